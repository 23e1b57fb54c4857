"""The runner with tensors on a GPU. The "meta" device stands for it, or a fake."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fake_gpu import fake_gpu
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, nn

from caspr_cli.training.callbacks import ASK_EVERY, Curves, StopOnSignal, Stopped
from caspr_cli.training.data import TaskData
from caspr_cli.training.module import clip
from caspr_cli.training.timing import PhaseTimer


def test_losses_of_a_checkpoint_are_on_the_cpu_and_those_of_now_are_not() -> None:
    """A run that was cut off between two points of the curve goes on."""
    seen: list[Tensor] = []

    def reduce(x: Tensor, reduce_op: str) -> Tensor:
        seen.append(x)
        return torch.tensor(1.0)

    curves = Curves(cast(Any, None), None, None)
    curves.losses = list(torch.ones(2, dtype=torch.float64))
    curves.losses.append(torch.ones((), dtype=torch.float64, device="meta"))
    curves.units, curves.mark = 3, (0, -1.0)
    last = {"grad_norm": torch.tensor(1.0)}
    module = SimpleNamespace(device=torch.device("meta"), last=last, task=SimpleNamespace(unit="samples"))
    trainer = SimpleNamespace(global_step=3, strategy=SimpleNamespace(reduce=reduce))
    curves._point(cast(Any, trainer), cast(Any, module))
    assert [x.device.type for x in seen] == ["meta"]
    assert curves.losses == []


def gradients(*values: float) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(3)) for _ in values]
    for p, value in zip(params, values, strict=True):
        p.grad = torch.tensor([value, 1.0, -2.0])
    return params


@pytest.mark.parametrize(("second", "limit"), [(3.0, 0.5), (3.0, 100.0), (float("nan"), 0.5), (float("inf"), 0.5)])
def test_clipping_is_torchs_of_what_is_finite(second: float, limit: float) -> None:
    """A broken gradient does not break the others, and the optimizer sees it."""
    ours, theirs = gradients(1.0, second, -0.1), gradients(1.0, second, -0.1)
    finite = [i for i, p in enumerate(theirs) if bool(torch.isfinite(cast(Tensor, p.grad)).all())]
    norm, expected = clip(ours, limit), nn.utils.clip_grad_norm_([theirs[i] for i in finite], limit)
    assert torch.equal(norm, expected)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if i in finite:
            assert torch.equal(cast(Tensor, p.grad), cast(Tensor, q.grad))
        else:
            assert not bool(torch.isfinite(cast(Tensor, p.grad)).all())


def test_nothing_is_clipped_without_a_limit() -> None:
    params = gradients(2.0, 2.0)
    before = [cast(Tensor, p.grad).clone() for p in params]
    version = [cast(Tensor, p.grad)._version for p in params]
    norm = clip(params, None)
    assert float(norm) == pytest.approx(2.0**0.5 * 3, rel=1e-6)
    for p, grad, was in zip(params, before, version, strict=True):
        assert torch.equal(cast(Tensor, p.grad), grad)
        assert cast(Tensor, p.grad)._version == was  # nobody wrote to it
    assert float(clip([nn.Parameter(torch.ones(2))], 1.0)) == 0.0


class Mark:
    """An event of a device that has come as far as ``now``."""

    now, count, waited = 0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Mark.count += 1
        self.number = Mark.count

    def query(self) -> bool:
        return self.number <= Mark.now

    def synchronize(self) -> None:
        Mark.waited += 1
        Mark.now = max(Mark.now, self.number)

    def elapsed_time(self, end: Mark) -> float:
        return 1000.0 * (end.number - self.number)


def test_timers_are_read_when_the_device_is_done_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Event", Mark)
    timer = PhaseTimer(torch.device("cuda"))
    for _ in range(5):
        with timer("roots"):
            pass
    assert len(timer._pending) == 5
    Mark.now = 9
    with timer("apply"):
        pass
    assert (len(timer._pending), Mark.waited) == (2, 0)  # the last of "roots" and "apply"
    assert timer.seconds == {"roots": 5.0, "apply": 1.0}
    assert (len(timer._pending), Mark.waited) == (0, 1)


@pytest.mark.parametrize(
    ("gpu", "accelerator", "pinned"), [(True, "auto", True), (True, "cpu", False), (False, "auto", False)]
)
def test_batches_for_a_gpu_are_in_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, accelerator: str, pinned: bool
) -> None:
    """From which they are sent while the host goes on."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    trainer = SimpleNamespace(workers=0, accelerator=SimpleNamespace(name=accelerator))
    data = SimpleNamespace(recipe=SimpleNamespace(trainer=trainer), task=SimpleNamespace(collate=None))
    assert TaskData._loading(cast(Any, data), "train")["pin_memory"] is pinned


@pytest.mark.parametrize(
    ("asked", "costs", "cores", "workers"),
    [
        (None, True, 12, 5),
        (None, True, 64, 8),
        (None, True, 1, 0),
        (None, False, 12, 0),
        (3, False, 1, 3),
        (0, True, 9, 0),
    ],
)
def test_processes_read_ahead_where_reading_costs(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, costs: bool, cores: int, workers: int
) -> None:
    """Two ranks share the cores, and each needs one for its steps."""
    monkeypatch.setattr("caspr_cli.training.data.cores", lambda: cores)
    trainer = SimpleNamespace(workers=asked, accelerator=SimpleNamespace(name="cpu"), devices=2)
    task, sets = SimpleNamespace(collate=None), {"train": SimpleNamespace(reading_costs=costs)}
    data = SimpleNamespace(recipe=SimpleNamespace(trainer=trainer), task=task, _datasets=sets)
    assert TaskData._loading(cast(Any, data), "train")["num_workers"] == workers


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> StopOnSignal:
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr("signal.pthread_sigmask", lambda *args: None)
    return StopOnSignal(cast(Any, SimpleNamespace(save=lambda trainer: None)))


def test_ranks_stop_together_and_no_gpu_is_waited_for(stop: StopOnSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x, op: asked.append((x.device.type, op)))
    trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=2, max_steps=100, val_check_batch=50)
    with fake_gpu() as gpu:
        module, ended = SimpleNamespace(device=torch.device("cuda", 0)), []
        for step in range(1, 2 * ASK_EVERY + 2):
            gpu.reset()
            gpu.answer = int(step == 2 * ASK_EVERY)  # another rank was asked to
            trainer.global_step = step
            try:
                stop.on_train_batch_end(cast(Any, trainer), cast(Any, module), None, None, step)
            except Stopped:
                ended.append(step)
            assert not gpu.waits
    assert ended == [2 * ASK_EVERY + 1]
    assert asked == [("cuda", torch.distributed.ReduceOp.MAX)] * 2


def test_lightning_does_not_ask_ranks_about_signals_in_each_step(stop: StopOnSignal) -> None:
    loop, waiting = _TrainingEpochLoop.__new__(_TrainingEpochLoop), _TrainingEpochLoop._broadcast_sigterm_tensor
    assert loop._broadcast_sigterm_tensor.__func__ is waiting
    stop.on_train_start(cast(Any, SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop))), cast(Any, None))
    assert loop._broadcast_sigterm_tensor() is None
