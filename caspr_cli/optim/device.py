"""What passes between the host and a device, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(small: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, without waiting for the device."""
    return small.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else small.to(device)


def is_captured(device: torch.device) -> bool:
    """Whether what the device is asked is recorded into a CUDA graph, so that nothing can be read back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Question:
    """Numbers that a device computes and the host reads later: in the next step nobody waits, unless the device is a
    whole step behind."""

    def __init__(self, asked: Tensor) -> None:
        self._answer, self._event = asked, None  # type: Tensor, torch.cuda.Event | None
        if asked.device.type == "cuda":
            self._answer = torch.empty(asked.shape, dtype=asked.dtype, device="cpu", pin_memory=True)
            self._answer.copy_(asked, non_blocking=True)
            self._event = torch.cuda.current_stream(asked.device).record_event()

    def answer(self) -> list[bool]:
        """Return the numbers."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        answer: list[bool] = self._answer.tolist()
        return answer
