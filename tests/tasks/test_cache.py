"""The cache of what tasks build: full disks, builders that died, damage."""

import errno
import fcntl
import io
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.cache import META, array_file, build_once, building, read_array, read_meta, write_array


def test_what_dead_builders_left_is_deleted_and_what_live_ones_build_is_not(tmp_path: Path) -> None:
    for name in (".building-dead", ".building-older", ".building-alive"):
        (tmp_path / name / "whole").mkdir(parents=True)
    (tmp_path / ".building-dead" / ".lock").touch()  # its holder is gone; the older one is of a time without locks
    with (tmp_path / ".building-alive" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with building(tmp_path) as mine, building(tmp_path) as another:
            assert {p for p in tmp_path.iterdir() if p.is_dir()} == {mine, another, tmp_path / ".building-alive"}
    with building(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_locks_nothing_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".building-left").mkdir()
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    build_once(tmp_path / "built", lambda whole: {"bytes": (whole / "file").write_bytes(b"content")})
    assert read_meta(tmp_path / "built") == {"bytes": 7}
    assert (tmp_path / ".building-left").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("No space left on device (os error 28)"),  # of `tokenizers`
    ],
)
def test_a_full_disk_is_no_error_of_the_data(tmp_path: Path, error: Exception) -> None:
    """So a run is cut off by it, and the same command continues."""
    with pytest.raises(OSError, match=r"space left|quota") as caught:
        build_once(tmp_path / "kind" / "built", Mock(side_effect=error))
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
    assert caught.value.filename == str(tmp_path / "kind")
    assert build_once(tmp_path / "kind" / "built", lambda _: {"a": 1}).is_dir()


def test_a_cache_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    build = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(DataError, match=r"^CASPR_CACHE: cannot build in .*Permission denied"):
        build_once(tmp_path / "built", build)


@pytest.mark.parametrize("content", ["{", "[]", "3", "{}", "[" * 100_000, "\ufeff{}", "\udcff"])
def test_damaged_meta_says_what_to_delete(tmp_path: Path, content: str) -> None:
    (tmp_path / META).write_bytes(content.encode("utf8", "surrogateescape"))
    with pytest.raises(DataError, match=rf"/{META}: damaged; delete {tmp_path} and start again$"):
        read_meta(tmp_path)


@pytest.mark.parametrize("shape", [(3, 4), (0,), (2, 0, 3), ()])
@pytest.mark.parametrize("dtype", ["<i8", "u1", "<f4"])
def test_arrays_are_written_as_numpy_writes_them(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    theirs = io.BytesIO()
    np.save(theirs, array)
    write_array(tmp_path / "a.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == theirs.getvalue()
    with array_file(tmp_path / "b.npy", array.dtype, array.shape) as file:
        file.write(array.tobytes())
    assert (tmp_path / "b.npy").read_bytes() == theirs.getvalue()


def test_an_array_in_another_order_is_written_in_this_one(tmp_path: Path) -> None:
    array = np.arange(12).reshape(3, 4).T
    write_array(tmp_path / "a.npy", array)
    assert np.array_equal(read_array(tmp_path / "a.npy"), array)
