"""``caspr-report``: what the records say, with error bars. Reads files alone: no torch, no Hydra.

What takes long to import is imported where it is used: there main() is ready for Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from caspr_cli import __version__
from caspr_cli.report.errors import ReportError, nearest
from caspr_cli.streams import console_script

if TYPE_CHECKING:
    from caspr_cli.report.model import Run, Table

OK, BAD_USAGE, INTERRUPTED = 0, 2, 130  # as those of caspr-train
WIDTH = 120  # where no terminal says its own
SHOWN = 8  # warnings about files

HELP = """\
caspr-report {version}: what the records say, with error bars. Reads files alone, also while runs go on

  caspr-report compare                                   a table for each task of outputs/
  caspr-report compare outputs/c4_lm --baseline shampoo  every row against this one
  caspr-report compare --to report.html --to table.tex   a page with figures, a table for a paper
  caspr-report compare --json                            all numbers, on standard output
  caspr-report profile                                   over all tasks: how often is a row near the fastest?
  caspr-report curves outputs/c4_lm --to curves.svg      validation by step, mean and 95 % band over seeds
  caspr-report list                                      one line a record, the newest last
  caspr-report show outputs/c4_lm/caspr/4e9d1440/seed0   one record in words
  caspr-report pack outputs --to study.jsonl.gz          one small file, to be read like a directory

  caspr-report unpack study.jsonl.gz --to outputs         directories again: caspr-train goes on from them

PATHS are directories with records below them, or packed files (default: outputs)

compare
  --baseline LABEL      a row, as the table names it (default: adamw, where there is one); without an
                        optimizer, as statistics=ema: each optimizer's own row with these settings
  --tuned KEYS          keys that rows are tuned over (default: optim.lr, and those of searches)
  --target TASK=VALUE   another target, as often as there are tasks; times are then read from the curves
  --json                the rows as a list, with nothing else on standard output
  --to FILE             {suffixes}; as often as you like
profile   --unit steps|seconds (default: steps)   --to FILE.svg; and --baseline, --tuned, --target
curves    --over steps|seconds (default: steps)   --to FILE.svg; the same
pack      --to FILE.jsonl.gz      unpack   --to DIRECTORY
exits     0 done   2 bad usage   130 interrupted
"""

SUFFIXES = (".html", ".md", ".tex", ".csv", ".json", ".svg")
COMMANDS = ("compare", "profile", "curves", "list", "show", "pack", "unpack")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like the other commands."""

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (--\S+): (.*)", message.replace("'", ""))
        if match and match[2].startswith("ignored explicit argument"):
            raise ReportError(f"{match[1]} takes no value")
        raise ReportError(f"{match[1]}: {match[2]}" if match else message)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ReportError: one line for the user.
    """
    what = argv[0] if argv else ""
    if what not in COMMANDS:
        given = f"{what}: no such command.{nearest(what, COMMANDS)} (" if what else "say what to do ("
        raise ReportError(f"{given}commands: {', '.join(COMMANDS)}; caspr-report --help)")
    parser = Parser(f"caspr-report {what}", add_help=False, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=Path)
    if what in ("compare", "profile", "curves"):
        parser.add_argument("--baseline")
        parser.add_argument("--tuned", type=lambda text: [key.strip() for key in text.split(",") if key.strip()])
        parser.add_argument("--target", type=target, action="append", default=[])
    if what in ("compare", "profile", "curves", "pack", "unpack"):
        parser.add_argument("--to", type=Path, action="append", default=[])
    if what == "compare":
        parser.add_argument("--json", action="store_true")
    if what in ("profile", "curves"):
        parser.add_argument("--unit" if what == "profile" else "--over", choices=("steps", "seconds"), default="steps")
    flags = [flag for action in parser._actions for flag in action.option_strings]
    args, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        raise ReportError(f"{unknown[0]} is no flag of {what}.{nearest(unknown[0].split('=')[0], flags)}")
    _check_files(what, getattr(args, "to", []))
    args.what, args.paths = what, args.paths or [Path("outputs")]
    return args


def target(text: str) -> tuple[str, float]:
    task, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not task or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"should be TASK=VALUE, as c4_lm=4.2, but is {text}")
    return task, number


def _check_files(what: str, files: Sequence[Path]) -> None:
    if what == "unpack":
        if len(files) != 1 or files[0].is_file():
            raise ReportError("unpack: say with --to into which directory")
        return
    allowed = {"compare": SUFFIXES, "pack": (".jsonl.gz",)}.get(what, (".svg",))
    for file in files:
        if not file.name.endswith(allowed):
            raise ReportError(f"--to {file}: the name should end in {', '.join(allowed)}")
        if file.is_dir():
            raise ReportError(f"--to {file}: it is a directory")
    if what in ("curves", "pack") and len(files) != 1:
        raise ReportError(f"{what}: say with --to which file to write, as {what}{allowed[0]}")


def run(args: argparse.Namespace) -> None:
    """Read, and do what was asked for.

    Raises:
        ReportError: one line for the user.
    """
    from caspr_cli.report import records
    from caspr_cli.report.words import listed

    found = records.find(args.paths)
    for line in found.warnings[:SHOWN]:
        print(f"warning  {line}", file=sys.stderr)
    if len(found.warnings) > SHOWN:
        print(f"warning  {len(found.warnings) - SHOWN} more files like these", file=sys.stderr)
    if not found.runs:
        raise ReportError(f"no records in {listed([str(path) for path in args.paths])}; {records.HOW}")
    {"list": listing, "show": show, "pack": pack, "unpack": unpack}.get(args.what, report)(args, found.runs)


def listing(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report import terminal

    print("\n".join(terminal.listing(runs)))


def show(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report import terminal
    from caspr_cli.report.words import count

    if len(runs) > 1:
        raise ReportError(f"show: {count(len(runs), 'record')} there; name one, as {runs[0].path}")
    print("\n".join(terminal.record_lines(runs[0])))


def pack(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report import packed
    from caspr_cli.report.files import write_whole
    from caspr_cli.report.words import count

    content = packed.pack(runs, args.paths)
    write_whole(args.to[0], content)
    print(f"wrote    {args.to[0]}: {count(len(runs), 'record')}, {len(content) / 1000:,.0f} kB")


def unpack(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report import packed
    from caspr_cli.report.words import count

    if outside := [path for path in args.paths if not path.is_file()]:
        raise ReportError(f"unpack {outside[0]}: is no packed file")
    written, there = packed.unpack(runs, args.to[0])
    print(f"wrote    {args.to[0]}: {count(written, 'record')}" + (f"; {there} were there already" if there else ""))


def report(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """What is made of tables: compare, profile, curves."""
    from caspr_cli.report import formats
    from caspr_cli.report.files import write_whole
    from caspr_cli.report.tables import tables

    made = tables(runs, baseline=args.baseline, tuned=args.tuned, wanted=dict(args.target))
    quiet = args.what == "compare" and args.json
    out = sys.stderr if quiet else sys.stdout
    lines = {"compare": _compared, "profile": _profiled, "curves": lambda args, runs, made: iter(())}[args.what]
    for line in lines(args, runs, made) if not quiet else ():
        print(line, file=out)
    for file in args.to:
        for path, content in _contents(args, file, made):
            if content:
                write_whole(path, content)
            print(f"wrote    {path}" if content else f"skipped  {path}: nothing to draw", file=out)
    if quiet:
        print(formats.as_json(made), end="")


def _compared(args: argparse.Namespace, runs: Sequence[Run], made: Sequence[Table]) -> Iterator[str]:
    from caspr_cli.report import terminal

    return terminal.compared(made, runs, args.paths, shutil.get_terminal_size((WIDTH, 24)).columns)


def _profiled(args: argparse.Namespace, runs: Sequence[Run], made: Sequence[Table]) -> Iterator[str]:
    from caspr_cli.report.profile import profile

    yield from profile(made, args.unit).lines


def _contents(args: argparse.Namespace, file: Path, made: Sequence[Table]) -> Iterator[tuple[Path, str]]:
    """The files to write for one name: several for figures of which there is one for each table."""
    from caspr_cli.report import formats
    from caspr_cli.runs.shape import printable

    command = printable(shlex.join(["caspr-report", *sys.argv[1:]]))
    if file.suffix == ".html":
        from caspr_cli.report.page import compared

        yield file, compared(made, command)
    elif args.what == "profile":
        from caspr_cli.report import figures
        from caspr_cli.report.profile import profile

        yield file, figures.profile(profile(made, args.unit))
    elif file.suffix == ".svg":
        from caspr_cli.report import figures, look

        styles = look.styles(row.label for table in made for row in table.rows)
        parts = [(table.task, table.scale, table.data) for table in made]
        for table, own in zip(made, parts, strict=True):
            more = (table.metric, (table.data_hash or "")[:8]) if parts.count(own) > 1 else ()
            what = re.sub(r"[^\w.-]", "_", "-".join([*own, *more]))
            name = file if len(made) == 1 else file.with_stem(f"{file.stem}-{what}")
            yield name, figures.curves(table, over=getattr(args, "over", "steps"), styles=styles)
    else:
        writers: dict[str, Callable[[], str]] = {
            ".md": lambda: formats.as_markdown(made, command),
            ".tex": lambda: formats.as_latex(made, command),
            ".csv": lambda: formats.as_csv(made),
            ".json": lambda: formats.as_json(made),
        }
        yield file, writers[file.suffix]()


@console_script
def main() -> int:
    """Console script. Returns the exit code."""
    argv = sys.argv[1:]
    try:
        if "--help" in argv or "-h" in argv:
            print(HELP.format(version=__version__, suffixes=", ".join(SUFFIXES)), end="")
        elif "--version" in argv:
            print(f"caspr-report {__version__}")
        else:
            run(parse(argv))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


if __name__ == "__main__":
    sys.exit(main())
