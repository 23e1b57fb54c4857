"""A GPU that is not there: tensors on "cuda" have shapes and no numbers, and what a GPU would be asked is counted.

Real are tensors on the CPU alone. Counted are launches of kernels (aten operations that are no views; those over lists
by torch's limits for a launch), FLOPs of matrix products, bytes, and each place at which the host would wait for the
device. It cannot tell what a kernel computes, nor how long it takes.
"""

import math
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from caspr_cli.optim import stacks
from caspr_cli.optim.roots import probe_vectors, start_vector

optimizers: Any = import_module("torch.optim.optimizer")  # torch.optim hides it

VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "permute",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze",
    "view",
}  # fmt: skip
# Of linear algebra, what does not ask whether it has succeeded: the others copy that to the host.
UNASKED = {"linalg_vector_norm", "linalg_qr"}
NOTHING = {"device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {"nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}  # for the size of the result
# Of a list of tensors one launch takes so many at once, by how many lists there are, and so many pieces of 65,536.
TENSORS, PIECES, PIECE = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536
ALLOCATED = 512  # bytes that the allocator rounds to


class FakeGPU(TorchDispatchMode):
    """The calls a GPU would have seen since the last :meth:`reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.turn = 0
        self.answer = 0  # what the host reads of the device
        self.capturing = False  # whether calls are recorded, as into a CUDA graph
        self._storages: dict[int, int] = {}
        self._total, self._born = 0, dict[int, int]()  # storages so far, and the number of each that is alive
        self.reset()

    def reset(self) -> None:
        self.turn += 1
        self.kernels: Counter[str] = Counter()  # launches by operation
        self.waits: Counter[str] = Counter()  # by reason and place
        self.calls: list[Any] = []  # of a capture: operations, with tensors that were there before, shapes and numbers
        self._before = self._total
        self.views, self.flops, self.peak = 0, 0.0, self.live

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    def wait(self, why: str) -> None:
        """Note that the host waits for the device."""
        frames = [f for f in traceback.extract_stack() if "caspr_cli" in f.filename or "torch/optim" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        self.waits[f"{why} @ {place}"] += 1

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = op._schema.name.partition("::")[2]
        there = any(map(_is_there, tree_leaves((args, kwargs))))
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if name == "is_pinned":
            return True
        if self.capturing and (kwargs.get("pin_memory") or name == "_pin_memory"):
            self.wait("pinned memory in a graph")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if name == "_pin_memory":
            with unset_fake_temporarily():
                return args[0].clone()
        if not there and target != "cuda":
            with unset_fake_temporarily():
                return op(*args, **kwargs)
        if there and name in ("_local_scalar_dense", "item", "is_nonzero", "equal"):
            self.wait(name)
            return 1.0 if args[0].is_floating_point() and name not in ("is_nonzero", "equal") else True
        if name in WAITS:
            self.wait(name)
        if name in ("index", "index_put_", "index_put") and any(_is_mask(i) for i in args[1]):
            self.wait(f"{name} by a mask")
        if name.startswith(("_linalg_", "linalg_")) and name not in UNASKED:
            self.wait(f"{name}, which reads whether it has succeeded")
        if name == "copy_" and not _is_there(args[0]):
            return self._to_host(args[0], asynchronous=bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
        if name == "_to_copy" and target == "cpu":
            with unset_fake_temporarily():
                result = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
            return self._to_host(result, asynchronous=False)
        if name == "_to_copy" and not there and not kwargs.get("non_blocking"):
            self.wait("copy from memory that is not pinned")
        self.note(name, *args, **kwargs)
        result = None if name == "_fused_adamw_" else op(*args, **kwargs)  # with a tensor's rate it has no fake
        self._count(name, args, result)
        return result

    def note(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Note an operation that is captured."""
        if self.capturing:
            self.calls.append((name, tree_map(self._recorded, (args, kwargs))))

    def _recorded(self, x: Any) -> Any:
        """Return what a graph would keep of an argument: of memory that was there before, which it is."""
        if not _is_there(x):
            with unset_fake_temporarily():
                return x.tolist() if isinstance(x, Tensor) else x
        born = self._born.get(x.untyped_storage()._cdata, -1)
        which = born if 0 <= born <= self._before else "new"
        return which, tuple(x.shape), x.stride(), x.storage_offset(), x.dtype

    def _to_host(self, into: Tensor, *, asynchronous: bool) -> Tensor:
        if self.capturing or not asynchronous:
            self.wait("copy to the host")
        self.kernels["copy to the host"] += 1
        with unset_fake_temporarily():
            return into.fill_(self.answer)

    def _count(self, name: str, args: Any, result: Any) -> None:
        if name in VIEWS:
            self.views += 1
        elif name.startswith(("_foreach_", "_fused_")):
            self.kernels[name] += _launches(name, args)
        elif name == "linalg_qr":
            self.kernels[name] += 2 * math.prod(args[0].shape[:-2])  # one matrix at a time: the reflectors, then Q
        elif name not in NOTHING:
            self.kernels[name] += 1
        if name in ("mm", "bmm", "baddbmm", "baddbmm_", "addmm"):
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.flops += 2 * math.prod(left.shape) * right.shape[-1]
        for x in tree_leaves(result):
            if _is_there(x):
                self._hold(x.untyped_storage())

    def _hold(self, storage: Any) -> None:
        """Count the bytes of a storage for as long as it lives."""
        key = storage._cdata
        if key in self._storages:
            return
        size = self._storages[key] = -(-storage.nbytes() // ALLOCATED) * ALLOCATED
        self._total = self._born[key] = self._total + 1
        self.live += size
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self.live -= self._storages.pop(key)
            del self._born[key]

        weakref.finalize(storage, free)


def _is_there(x: object) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def _is_mask(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _launches(name: str, args: Any) -> int:
    """Return the launches of an operation over lists: few, or one for each tensor where lists do not match."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    first = lists[0]
    for others in lists:
        for x, y in zip(first, others, strict=True):
            same_type = x.dtype == y.dtype or name == "_foreach_copy_" or name.startswith("_fused_")
            if x.device != y.device and y.ndim == 0:
                continue
            if not (x.shape == y.shape and x.stride() == y.stride() and same_type and _is_dense(x)):
                if name.startswith("_fused_") and others is lists[-1]:
                    continue  # the counters
                return len(first)
    lists_at_once = len(lists) + (not name.endswith("_"))
    pieces = sum(-(-x.numel() // PIECE) for x in first)
    launches: int = max(-(-len(first) // TENSORS.get(lists_at_once, 30)), -(-pieces // PIECES))
    return launches


def _is_dense(x: Tensor) -> bool:
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class Event:
    """An event of a stream."""

    gpu: FakeGPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._turn = self.gpu.turn
        if self.gpu.capturing:
            self.gpu.wait("an event in a graph")

    def record(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return self.gpu.turn > self._turn  # the device has come to what was recorded before the last reset

    def synchronize(self) -> None:
        self.gpu.wait("event.synchronize")


class Stream:
    def record_event(self, event: Any = None) -> Event:
        return Event()


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Put tensors on "cuda" that are not there, and count what is asked of them."""
    gpu = FakeGPU()
    probe_vectors.cache_clear()
    start_vector.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Event, "gpu", gpu, raising=False)
        patch.setattr(torch.cuda, "current_stream", lambda *args: Stream())
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
        patch.setattr(stacks, "View", FakeTensor)  # a fake cannot be of another class
        # Else torch's own optimizers take a loop.
        kinds = [*optimizers._foreach_supported_types, FakeTensor]
        patch.setattr(optimizers, "_foreach_supported_types", kinds)
        with FakeTensorMode(allow_non_fake_inputs=True), gpu:
            yield gpu
    probe_vectors.cache_clear()
    start_vector.cache_clear()
