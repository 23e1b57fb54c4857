"""OGB's tables, ``*.csv.gz`` of whole numbers without a header: parsed by the block, with the line of what is wrong."""

import gzip
from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
import pandas

from caspr_cli.tasks.archives import Files
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import LONGEST_LINE, reading
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING, Array

BLOCK = 1 << 23  # bytes of text parsed at once
EMPTY = ["", "nan", "NaN"]  # cells that hold no value
NEWLINE, COMMA = b"\n,"


def read_table(
    files: Files, name: str, dtype: type[np.generic], sizes: Sequence[int] | int, *, missing: bool = False
) -> Array:
    """Return all cells of the file ``name``, ``[rows, columns]``.

    Args:
        sizes: for each column, how many values it can take, 0 the first; or one number for as many columns as the
            first line has.
        missing: cells may be empty, and are MISSING then.

    Raises:
        DataError: the file cannot be read to its end, or a line has other columns or a cell another value than
            this; the message names file and line.
    """
    short = name.rpartition("/")[2]
    parts: list[Array] = []
    for line, block in _blocks(files, name):
        if isinstance(sizes, int):
            sizes = (sizes,) * (block[: block.index(b"\n")].count(b",") + 1)
        with reading(f"{short}:{line}:", "cannot be read from here on"):
            parts.append(_parse(block, sizes, missing, short, line).astype(dtype))
    if not parts:
        raise DataError(f"{short}: empty")
    return np.concatenate(parts)


def _blocks(files: Files, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines, some BLOCK bytes at a time, each closed by a newline, with the number of the first."""
    short = name.rpartition("/")[2]
    line, size = 1, 0
    rest: list[bytes] = []
    with (
        reading(lambda: f"{short}:{line + b''.join(rest).count(NEWLINE)}:", "cannot be read from here on"),
        files.open(name) as raw,
        gzip.open(raw) as file,
    ):
        while piece := file.read1(1 << 20):
            rest.append(piece)
            size += len(piece)
            if size >= BLOCK and b"\n" in piece:
                whole, _, tail = b"".join(rest).rpartition(b"\n")
                yield line, whole + b"\n"
                line, rest, size = line + whole.count(b"\n") + 1, [tail], len(tail)
            if size > LONGEST_LINE:
                raise DataError(f"{short}:{line}: a line of more than {LONGEST_LINE >> 20} MB")
    if last := b"".join(rest):
        yield line, last if last.endswith(b"\n") else last + b"\n"


def _parse(block: bytes, sizes: Sequence[int], missing: bool, name: str, first: int) -> Array:
    text = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(text == NEWLINE)
    starts = np.concatenate(([0], ends[:-1] + 1))
    columns = np.add.reduceat(text == COMMA, starts, dtype=np.int64) + 1  # of each line
    wrong = np.flatnonzero(columns != len(sizes))
    if len(wrong):
        row = wrong[0]
        raise DataError(f"{name}:{first + row}: {columns[row]} columns, not {len(sizes)}")
    values = _numbers(block)
    if len(values) != len(ends):
        raise DataError(f"{name}:{first}: a carriage return within a line, somewhere from here on")
    if bad := out_of_range(values, sizes, "empty" if missing else ""):
        row, column, must = bad
        cell = block[starts[row] : ends[row]].decode(errors="replace").rstrip("\r").split(",")[column]
        raise DataError(f"{name}:{first + row}: column {column + 1} is '{cell}', it must be {must}")
    return np.where(np.isnan(values), MISSING, values)


def out_of_range(values: Array, sizes: Sequence[int], missing: str) -> tuple[int, int, str] | None:
    """Return row and column of the first of ``values`` ``[rows, len(sizes)]`` that is wrong, and what it must be.

    Args:
        sizes: as of :func:`read_table`.
        missing: the word for NaN where it may be; empty where it may not.
    """
    wrong = ~((values >= 0) & (values < np.array(sizes)) & (values == np.floor(values)))
    if missing:
        wrong &= ~np.isnan(values)
    if not wrong.any():
        return None
    row, column = map(int, np.argwhere(wrong)[0])
    return row, column, f"a whole number from 0 to {sizes[column] - 1}{missing and f', or {missing}'}"


def _numbers(block: bytes) -> Array:
    """Return the cells as numbers: NaN where they are empty, infinite where they are no numbers."""
    if not block.strip(b"\r\n"):  # pandas finds no columns in empty lines alone
        return np.full((block.count(b"\n"), 1), np.nan)
    how = {"header": None, "keep_default_na": False, "skip_blank_lines": False, "quoting": 3}  # 3: quotes are text
    try:
        numbers: Array = pandas.read_csv(BytesIO(block), dtype=np.float64, na_values=EMPTY, **how).to_numpy()
    except ValueError:  # one that is no number, or no UTF-8: slower, cell by cell
        cells = pandas.read_csv(BytesIO(block), dtype=str, encoding_errors="replace", **how)
        numbers = cells.apply(pandas.to_numeric, errors="coerce").to_numpy(np.float64, copy=True)
        numbers[np.isnan(numbers) & ~cells.isin(EMPTY).to_numpy()] = np.inf
    return numbers
