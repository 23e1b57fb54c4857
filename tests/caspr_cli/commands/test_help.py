"""Help of every command: it fits a terminal of 80 columns, and texts stand in one column."""

import re

import pytest
from calling import Call

from caspr_cli import __version__
from caspr_cli.commands import bench, report, train, verify
from caspr_cli.recipe.schema import OPTIMIZERS
from caspr_cli.tasks.registry import CONFS

REPORT = ("compare", "profile", "trials", "curves", "list", "show", "pack", "unpack", "leaderboard", "check")
COMMANDS = {
    "caspr-train": (train, [[]]),
    "caspr-bench": (bench, [[]]),
    "caspr-report": (report, [[], *([name] for name in REPORT)]),
    "caspr-verify": (verify, [[], *([name] for name in (*verify.QUESTIONS, verify.ALL))]),
}
LISTED = {  # what the help of a command names, and on how many lines
    "caspr-train": ([*CONFS, *OPTIMIZERS], {80: 90, 200: 66}),
    "caspr-bench": ([*CONFS, *OPTIMIZERS, "transformer", "small"], {80: 58, 200: 44}),
    "caspr-report": (REPORT, {80: 60, 200: 40}),
    "caspr-verify": ([*verify.QUESTIONS, "all", "130 interrupted"], {80: 60, 200: 60}),
}
CASES = [(name, words) for name, (_, every) in COMMANDS.items() for words in every]


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize(("name", "words"), CASES, ids=[" ".join([name, *words]) for name, words in CASES])
def test_help_fits_and_is_aligned(
    name: str, words: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    call = Call(name, COMMANDS[name][0].main, monkeypatch, capsys)
    assert call(*words, "--help") == 0
    text, lines = call.out, call.out.splitlines()
    assert max(map(len, lines)) <= min(columns, 110)
    if not words:
        listed, most = LISTED[name]
        assert len(lines) <= most[columns]
        assert all(re.search(rf"\b{re.escape(each)}\b", text) for each in listed)
    flags = [line for line in lines if re.match(r"  (?:-|  \w+ )", line)]
    starts = {re.match(r" +\S.*?  +(?=\S)", line) for line in flags}
    assert None not in starts  # no text begins on the next line
    by_indent = {(len(line) - len(line.lstrip()), len(found[0])) for line in flags
                 if (found := re.match(r" +\S.*?  +(?=\S)", line))}  # fmt: skip
    assert len(by_indent) == len({indent for indent, _ in by_indent})


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call = Call(name, COMMANDS[name][0].main, monkeypatch, capsys)
    assert call("--version") == 0
    assert call.out == f"{name} {__version__}\n"
