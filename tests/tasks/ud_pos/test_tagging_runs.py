from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.release

SMALL = ["task=ud_pos", "task.data=files", "task.width=8", "task.layers=1", "task.heads=2", "task.batch_size=8"]


@pytest.mark.parametrize("optim", ["caspr", "shampoo", "adamw"])
def test_it_trains_validates_and_tests(optim: str, train: Callable[..., dict[str, Any]], root: Path) -> None:
    rows = train(*SMALL, f"task.root={root}", f"optim={optim}", name=optim)
    assert rows[6]["train/loss"] != rows[1]["train/loss"]
    for split in ("val", "test"):
        assert 0 <= rows[6][f"{split}/accuracy"] <= 1
    assert rows["result"]["target"]["metric"] == "val/accuracy"


def test_two_processes(train: Callable[..., dict[str, Any]], root: Path) -> None:
    """The loss is a mean over each process's own words, so it is near that of one process, and the metric is whole."""
    one, two = (
        train(*SMALL, f"task.root={root}", "task.dropout=0", "task.word_dropout=0", "optim.lr=0",
              f"trainer.devices={n}", name=f"processes-{n}")
        for n in (1, 2)
    )  # fmt: skip
    for split in ("val", "test"):
        for name in (f"{split}/accuracy", f"{split}/unknown_accuracy", f"{split}/loss"):
            assert two[6][name] == pytest.approx(one[6][name], rel=1e-5)
    assert two[1]["train/loss"] == pytest.approx(one[1]["train/loss"], rel=0.3)
