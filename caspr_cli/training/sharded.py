"""Models that no device holds whole: ``trainer.strategy=fsdp``, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Checkpoints are whole, and those of any other strategy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import nn
from torch.optim import Optimizer

from caspr_cli.optim.fsdp import is_sharded
from caspr_cli.optim.state import with_own_rows


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints that are loaded and saved as under DDP.

    Its own read and write what torch's ``set_optimizer_state_dict`` knows, which an optimizer's state of other shapes
    than its parameters' is not.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(with_own_rows(content, optimizer.param_groups))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state on the first rank, in the memory of its CPU, and nothing on others."""
        if gather := getattr(optimizer, "consolidate_state_dict", None):
            gather(0)
        whole = {
            (p, name): value.full_tensor().cpu() if self.global_rank == 0 else value.full_tensor().new_empty(0)
            for group in optimizer.param_groups
            for p in group["params"]
            for name, value in optimizer.state.get(p, {}).items()
            if is_sharded(value)
        }
        if self.global_rank:
            return {}
        content = optimizer.state_dict()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            i: {name: whole.get((params[i], name), value) for name, value in entries.items()}
            for i, entries in content["state"].items()
        }
        return content | {"state": state}


def divide(model: nn.Module, mesh: Any) -> None:
    """Divide the parameters of a model among the ranks of a mesh: of each repeated layer together, and of the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that stand in lists, but for those that stand in one of these."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _layers(child)
