"""Full precision inside the optimizer, whatever the caller has chosen for the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def full_precision(device_type: str, *, tf32: bool = False) -> Iterator[None]:
    """No TF32 or bfloat16 in float32 products, and no autocast: statistics square their input's condition.

    With ``tf32`` those of a GPU are in TF32, whose numbers have ten bits after the first; sums stay in float32.

    The settings of each backend are put back as they were. (``torch.get_float32_matmul_precision`` raises where
    the user has set a backend's own.)
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if tf32 and backend is torch.backends.cuda.matmul else "ieee"
        # Some devices ("meta") have none to switch off.
        has_autocast = torch.amp.is_autocast_available(device_type)
        with torch.autocast(device_type, enabled=False) if has_autocast else nullcontext():
            yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting
