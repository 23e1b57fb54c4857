"""The precision of products: full inside the optimizer, whatever the caller has chosen for the model, or bfloat16."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch


class _Backends:
    """The precision of float32 products in each backend, which all threads share.

    The first thread that wants them in full finds the user's settings, and the last one puts them back: one that came
    later would find those of the first.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[tuple[Any, str]] = []

    @contextmanager
    def full(self, *, tf32: bool) -> Iterator[None]:
        """Set them to full precision, or with ``tf32`` those of a GPU to TF32 where no other thread is inside; after
        that put them back as they were, unless another thread is inside."""
        cuda: Any = torch.backends.cuda.matmul
        mkldnn: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            if not self._inside:
                self._before = [(backend, backend.fp32_precision) for backend in (cuda, mkldnn)]
            cuda.fp32_precision = "tf32" if tf32 and not self._inside else "ieee"
            mkldnn.fp32_precision = "ieee"
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for backend, setting in self._before:
                        backend.fp32_precision = setting


_backends = _Backends()


@contextmanager
def full_precision(device_type: str, *, tf32: bool = False) -> Iterator[None]:
    """No TF32 or bfloat16 in float32 products, and no autocast: statistics square their input's condition.

    With ``tf32`` those of a GPU are in TF32, whose numbers have ten bits after the first; sums stay in float32.

    The settings of each backend are put back as they were. (``torch.get_float32_matmul_precision`` raises where
    the user has set a backend's own.)
    """
    has_autocast = torch.amp.is_autocast_available(device_type)  # some devices ("meta") have none to switch off
    with _backends.full(tf32=tf32), torch.autocast(device_type, enabled=False) if has_autocast else nullcontext():
        yield


@cache
def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies faster in bfloat16 than in float32.

    GPUs do; CPUs with AMX (measured: 1/8 of the time) and AMD's with AVX-512 for bfloat16 (1/2). On an Intel CPU with
    AVX-512 for it and no AMX products took 1.4 times as long, on CPUs without either 6 to 60 times. Of tensors that
    have shapes alone: a GPU that is not there is one of today's, and "meta" stands for the device of a run here.
    """
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in torch 2.9
    amd = "AMD" in str(found.get("cpu_name"))
    return bool(found.get("amx_bf16") or (amd and found.get("avx512_bf16")))
