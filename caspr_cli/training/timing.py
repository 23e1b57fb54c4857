"""Stopwatches: of a whole run, of a call, and of the phases of a step without stopping the device."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """A stopwatch that can be paused and carried over from an earlier process."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before, self._since = seconds, None  # type: float, float | None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        self._before, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class PhaseTimer:
    """Seconds by phase, to which those of ``seconds`` are added.

    On CUDA, events are recorded now and read later, when nobody waits for them; elsewhere ``now`` is the clock.
    """

    def __init__(
        self, device: torch.device, seconds: dict[str, float] | None = None, now: Callable[[], float] | None = None
    ) -> None:
        self._cuda, self._now = device.type == "cuda", now or time.perf_counter
        self._seconds = defaultdict(float, seconds or {})
        self._open: dict[str, Any] = {}  # times, or events
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self, phase: str) -> None:
        self._open[phase] = self._mark()

    def stop(self, phase: str) -> None:
        began, ended = self._open.pop(phase), self._mark()
        if self._cuda:
            self._pending.append((phase, began, ended))
            self._drain()
        else:
            self._seconds[phase] += ended - began

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.start(phase)
        try:
            yield
        finally:
            self.stop(phase)

    def _mark(self) -> Any:
        if not self._cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far. On CUDA this waits for the last event."""
        if self._pending:
            self._pending[-1][2].synchronize()  # and so those before it
        self._drain()
        return dict(self._seconds)

    def _drain(self) -> None:
        """Count the phases that the device is done with."""
        while self._pending and self._pending[0][2].query():
            phase, began, ended = self._pending.popleft()
            self._seconds[phase] += began.elapsed_time(ended) / 1000

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call of this method."""
        taken = self.seconds
        self._seconds.clear()
        return taken
