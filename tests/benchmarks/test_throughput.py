"""The benchmark of the runner works: what it prints is of this machine, and no test."""

import pytest
from benchmarks import throughput


@pytest.mark.release
def test_both_loops_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(throughput, "TURNS", 1)
    monkeypatch.setattr(throughput, "STEPS", 2)
    monkeypatch.setattr("sys.argv", ["throughput.py", "optim=adamw"])
    throughput.main()
    warm_up, turn, ratio = capsys.readouterr().out.splitlines()
    assert warm_up.startswith("warm-up  bare ")
    assert turn.startswith("turn 1  bare ")
    assert float(ratio.partition(": ")[2].partition(" ")[0]) > 0
