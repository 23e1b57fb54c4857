"""The live line of a run."""

import io

import pytest
from rich.console import Console

from caspr_cli.runs.launch import BRIEF
from caspr_cli.training import progress
from caspr_cli.training.progress import Progress, fitting

PARTS = ["━━━━━━━>         step 120/350", "loss 4.0453", "lr 6.00e-03", "412 ms", "9,941 tokens/s", "1 min 35 s left"]


@pytest.mark.parametrize(
    ("width", "shown"),
    [(120, PARTS), (96, [*PARTS[:4], PARTS[5]]), (80, [*PARTS[:3], PARTS[5]]), (55, [PARTS[0], PARTS[5]])],
)
def test_the_time_left_is_always_seen(width: int, shown: list[str]) -> None:
    assert fitting(PARTS, width) == "  ".join(shown)
    assert fitting(["", *PARTS], width) == "  ".join(shown)
    assert fitting(PARTS, 10) == f"{PARTS[0]}  {PARTS[-1]}"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_line_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()

    class Terminal(progress._Console):
        def __init__(self, **options: bool) -> None:
            Console.__init__(self, file=written, force_terminal=True, width=columns, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(progress, "_Console", Terminal)
    with Progress(350, "tokens") as shown:
        shown.train(120, 4.0453, 6e-3, 0.412, 9941.0)
        (line,) = [line for line in written.getvalue().splitlines() if "step 120/350" in line]
    assert "95 s left" in line or "1 min 35 s left" in line
    assert ("tokens/s" in line) == (columns == 120)


def test_one_of_many_jobs_shows_no_line_that_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(BRIEF, "job 3 of 8")
    with Progress(350, "tokens") as shown:
        shown.validation(100, {"val/loss": 4.5}, "")
    out, log = capsys.readouterr()
    assert out == ""
    assert "val/loss 4.5000" in log
