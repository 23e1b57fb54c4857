"""Standard streams that are closed, full, or gone: nothing of what a command does or says is wrong for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from caspr_cli.training.progress import Progress

FULL = Path("/dev/full")
SAID = "error: standard output: No space left on device\n"


def run(line: str, home: Path) -> subprocess.CompletedProcess[str]:
    words = line.replace("caspr-", f"{sys.executable} -m caspr_cli.commands.")
    return subprocess.run(["sh", "-c", words], cwd=home, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["train --help", "report --help", "bench --help", "verify --help"])
def test_commands_start_without_streams_and_name_a_full_one(command: str, tmp_path: Path) -> None:
    done = run(f"caspr-{command} >&- 2>&- <&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    if FULL.exists():
        done = run(f"caspr-{command} > /dev/full", tmp_path)
        assert (done.returncode, done.stderr) == (2, SAID)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_no_file_gets_the_number_of_a_stream(closed: str, tmp_path: Path) -> None:
    code = (
        "import sys; from caspr_cli.common.streams import open_closed; open_closed(); file = open('file', 'w'); "
        "assert file.fileno() > 2; print('out', flush=True); print('err', file=sys.stderr); "
        "import subprocess; subprocess.run(['sh', '-c', 'echo more; echo more >&2'], check=True)"
    )
    done = run(f'{sys.executable} -c "{code}" {closed}', tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if closed == ">&-" else "out\nmore\n")
    assert done.stderr == ("" if closed == "2>&-" else "err\nmore\n")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("given", ["", "/nowhere:"])  # the last has an empty part
def test_what_a_command_starts_imports_nothing_from_the_working_directory(given: str, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("print('taken')")
    code = (
        "import os, subprocess, sys; from caspr_cli.common.streams import console_script as script; "
        f"os.environ['PYTHONPATH'] = '{given}'; child = [sys.executable, '-m', 'utils']; "
        "sys.exit(script(lambda: subprocess.run(child, capture_output=True).returncode)())"
    )
    assert run(f'{sys.executable} -c "{code}"', tmp_path).returncode == 1


@pytest.mark.parametrize("command", ["train task=c4_lm", "report list", "bench --help", "verify --help"])
def test_a_working_directory_that_was_deleted_is_named(command: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = run(f"cd gone && rmdir ../gone && caspr-{command}", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the working directory cannot be used, and may have been deleted")


@pytest.mark.skipif(not FULL.exists(), reason="of Linux")
def test_a_rank_goes_on_where_what_it_says_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = os.fdopen(os.dup(os.open(FULL, os.O_WRONLY)), "w")
    monkeypatch.setattr(sys, "stdout", full)
    progress = Progress(10, "tokens")
    with progress:
        progress.say("one")
        progress.validation(10, {"val/loss": 1.0}, "")
    assert sys.stdout is not full
    assert capsys.readouterr().err.splitlines()[:3] == [SAID.strip(), "one", "step 10/10  val/loss 1.0000"]
