"""Errors, files, text, and the rule for the best trial, which all commands share."""

import io
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.common.files import write_output
from caspr_cli.common.format import Progress, count, duration, finite, listed, size, table, wrapped
from caspr_cli.common.selection import AGAIN, choose, reaches


def test_a_suggestion_is_the_nearest_choice() -> None:
    assert nearest("xyz", ["abc"]) == ""
    assert nearest("lrr", ["lr"], "optim.") == " Did you mean optim.lr?"
    assert nearest("c4", ["c4_lm", "vit"], "task=") == " Did you mean task=c4_lm?"
    assert nearest("ca", ["caspr_sum", "caspr_paper"]) == ""


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output(tmp_path / "new/a.txt", "ä")
    write_output(tmp_path / "new/a.txt", b"b")
    assert (tmp_path / "new/a.txt").read_bytes() == b"b"
    assert (tmp_path / "new/a.txt").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"a\.txt: cannot write there: No space left on device"):
        write_output(tmp_path / "new/a.txt", "c")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new/a.txt").read_bytes() == b"b"


def test_text() -> None:
    assert [count(n, "run") for n in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]
    assert [listed(list("abcd")[:n], 3) for n in range(5)] == ["none", "a", "a and b", "a, b and c", "a, b and 2 more"]
    assert [duration(s) for s in (None, 9.54, 59.6, 125, 3 * 3600 + 1199.8)] == [
        "-", "9.5 s", "1 min 00 s", "2 min 05 s", "3 h 20 min",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 1000, 999_999, 12_345_678)] == ["0 B", "999 B", "1 kB", "1 MB", "12.3 MB"]
    assert size(2.5e15, "FLOPs") == "2.5 PFLOPs"
    assert size(4e18) == "4000 PB"
    assert finite({1: [float("nan"), (float("-inf"), 2)], "x": "y"}) == {"1": [None, ["-inf", 2]], "x": "y"}
    assert wrapped("note     aa bb-cc dd", 18) == ["note     aa bb-cc", "         dd"]


def test_a_table_is_aligned_and_its_cells_are_text() -> None:
    rows = [["name", "n"], ["[red]x[/red] :smile:", "12,345"], ["ψ", ""]]
    assert table(rows, [False, True]) == ["name                       n", "[red]x[/red] :smile:  12,345", "ψ"]
    assert table(rows, [True, False])[0] == "                name  n"
    assert table([["a" * 300, "b"]], [False, True]) == [f"{'a' * 300}  b"]


def test_progress_is_one_line_for_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), "\r\x1b[Kone\r\x1b[K"), (io.StringIO(), "")):
        progress = Progress(stream)
        progress.say("one")
        progress.clear()
        assert stream.getvalue() == shown


def test_progress_is_plain_lines_in_a_pipe_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr("caspr_cli.common.format.time.monotonic", lambda: now[0])
    progress = Progress(stream, 10)
    for seconds, text in ((0, "one"), (9, "two"), (1, "three"), (20, "four")):
        now[0] += seconds
        progress.say(text)
    progress.clear()
    assert stream.getvalue() == "one\nthree\nfour\n"


# ---- the best trial ----------------------------------------------------------------------------------------------


def test_the_mean_over_shared_seeds_decides() -> None:
    trials = [{0: 1.0, 1: 3.0}, {0: 2.0, 1: 1.0, 5: 9.0}, {}]
    low, high = (choose(trials, higher_is_better=higher) for higher in (False, True))
    assert (low.best, low.seeds, low.scores) == (1, {0, 1}, {0: 2.0, 1: 1.5})
    assert high.best == 0


def test_where_no_seed_is_shared_the_commonest_decides() -> None:
    found = choose([{3: 5.0}, {1: 4.0, 2: 0.0}, {1: 3.0}, {2: 1.0}], higher_is_better=False)
    assert (found.best, found.seeds, found.scores) == (2, {1}, {1: 4.0, 2: 3.0})


def test_failed_trials_and_equal_ones() -> None:
    assert choose([], higher_is_better=True).best is choose([{}, {}], higher_is_better=True).best is None
    assert choose([{0: None}, {0: None}], higher_is_better=True).best is None
    assert choose([{0: None, 1: 1.0}, {0: 9.0}], higher_is_better=False).best == 1
    assert choose([{0: None}, {0: None, 1: 5.0}], higher_is_better=False).best == 1  # nothing chose it
    assert choose([{0: 1.0}, {0: 1.0}], higher_is_better=False).best == 0
    assert choose([{0: 1.0}, {0: 1.0, 1: 2.0}], higher_is_better=False).best == 1  # it has been run at other seeds


def test_the_best_three_are_compared_by_the_mean_of_their_seeds() -> None:
    """Only these three, and only by seeds that all of them have and that are for it."""
    trials = [{0: 1.0}, {0: 2.0}, {0: 3.0}, {0: 4.0}]
    assert choose(trials, higher_is_better=False, rerank=3).finalists == (0, 1, 2)
    for k, value in ((0, 9.0), (1, 0.5), (2, 3.0), (3, 0.0)):
        trials[k] |= dict.fromkeys(AGAIN, value)
    trials[0] |= {1: 0.0, 2: 0.0}  # held-out seeds choose nothing
    found = choose(trials, higher_is_better=False, rerank=3)
    assert (found.best, found.seeds) == (1, {0, *AGAIN})
    assert found.scores == {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}  # of all trials, by the seed that all have
    assert choose(trials, higher_is_better=False, rerank=4).best == 1
    del trials[2][AGAIN[1]]
    assert choose(trials, higher_is_better=False, rerank=3).seeds == {0, AGAIN[0]}
    trials[1][AGAIN[0]] = None
    assert choose(trials, higher_is_better=False, rerank=3).best == 2
    for rerank in (0, 1):  # off: as before there was such a thing
        assert choose(trials, higher_is_better=False, rerank=rerank) == choose(trials, higher_is_better=False)
    assert choose([{0: 1.0, AGAIN[0]: 2.0}], higher_is_better=True, rerank=3).finalists == ()  # nothing to choose


def test_a_target_is_reached_where_it_is_equalled() -> None:
    assert [reaches(v, 2.0, higher_is_better=True) for v in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [reaches(v, 2.0, higher_is_better=False) for v in (1.9, 2.0, 2.1)] == [True, True, False]
    assert not reaches(float("nan"), 2.0, higher_is_better=True)
