"""A rank's part of a factor in a state_dict, as torch.distributed.checkpoint saves it from where it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Shape


class Part(Tensor):
    """The blocks ``[k, ...]`` that a rank owns of a factor, which torch takes for shards of the whole ``[K, ...]``.

    This is torch's protocol CheckpointableTensor: a tensor with four attributes. They stay with what torch copies
    before it writes; a copy without them would be taken for the whole.
    """

    global_shape: Shape
    global_offsets: tuple[Shape, ...]
    local_offsets: tuple[Shape, ...]
    local_sizes: tuple[Shape, ...]

    @classmethod
    def of(cls, blocks: Tensor, numbers: list[int], K: int) -> Part:
        """Return a view of these blocks, given their numbers among all K."""
        part, zeros = blocks.as_subclass(cls), (0,) * (blocks.ndim - 1)
        part.global_shape = (K, *blocks.shape[1:])
        part.global_offsets = tuple((number, *zeros) for number in numbers)
        part.local_offsets = tuple((i, *zeros) for i in range(len(numbers)))
        part.local_sizes = ((1, *blocks.shape[1:]),) * len(numbers)
        return part

    @property
    def numbers(self) -> list[int]:
        """The numbers of these blocks among all."""
        return [offset[0] for offset in self.global_offsets]

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return cls.of(result, args[0].numbers, args[0].global_shape[0]) if func in COPIES else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "with sharded_state a state_dict() has this rank's part alone: save it with torch.distributed.checkpoint"
        )


COPIES = (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.clone, Tensor.detach)


def check_torch() -> None:
    """Refuse a torch that would take a part for the whole.

    Raises:
        RuntimeError: it is older than 2.14.
    """
    from torch.distributed import checkpoint  # here, because it takes a second

    if not hasattr(checkpoint, "CheckpointableTensor"):
        raise RuntimeError(f"sharded_state needs torch 2.14 or newer, and this is {torch.__version__}")


def length(factor: Tensor) -> int:
    """Return of how many blocks a factor is, of which a part has some."""
    return factor.global_shape[0] if isinstance(factor, Part) else len(factor)
