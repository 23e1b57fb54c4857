from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn

from caspr_cli.tasks.base import Task
from caspr_cli.training.timing import Clock, PhaseTimer


class Named:
    """A task that only says which parameters it wants preconditioned."""

    def plain(self, model: nn.Module) -> dict[str, str]:
        return dict.fromkeys(("0.bias", "1.bias", "2.weight", "2.bias"), "vector") | {"1.weight": "head"}


def test_every_parameter_is_in_one_group_and_vectors_never_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    matrices, others, vectors = Task.param_groups(cast(Task, Named()), model)
    assert [p.shape for p in matrices["params"]] == [(4, 3)]
    assert [p.shape for p in others["params"]] == [(2, 4)]
    assert [p.shape for p in vectors["params"]] == [(4,), (2,), (2,)]
    assert (matrices["precondition"], others["precondition"], vectors["precondition"]) == (True, False, False)
    assert vectors["weight_decay"] == 0.0
    assert "weight_decay" not in matrices


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    times = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: times[0])
    return cast(Any, times)


def test_a_clock_counts_what_is_not_paused(now: list[float]) -> None:
    clock = Clock(5.0)
    clock.start()
    now[0] = 2.0
    assert clock.seconds == 7.0
    clock.pause()
    now[0] = 100.0
    assert clock.seconds == 7.0
    clock.start()
    clock.start()  # twice is once
    now[0] = 101.0
    assert clock.seconds == 8.0


def test_phases_add_up_and_nest(now: list[float]) -> None:
    timer = PhaseTimer(torch.device("cpu"), {"roots": 1.0})
    timer.start("step")
    for _ in range(2):
        with timer("roots"):
            now[0] += 0.5
    timer.stop("step")
    assert timer.seconds == {"roots": 2.0, "step": 1.0}
