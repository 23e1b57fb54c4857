"""A Lightning module of one's own, trained by two processes that share the optimizer's work.

python -m caspr_cli.examples.lightning_ddp         two processes on the CPU; a number to have another number
"""

import sys

import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from caspr_cli import CASPR, param_groups
from caspr_cli.examples.own_loop import network, points


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val/loss", F.cross_entropy(self.model(batch[0]), batch[1]), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> CASPR:
        # Nothing is said of ranks: the optimizer finds the process group, and each rank works on its share.
        return CASPR(param_groups(self.model, heads=[self.model[-1]]), lr=1e-2, betas=(0.9, 0.95))


def main(devices: int = 2) -> float:
    """Train one epoch, and return the validation loss."""
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, gradient_clip_val=1.0,
    )  # fmt: skip
    train, validation = (TensorDataset(*points(seed, 8192)) for seed in (1, 2))
    trainer.fit(Classifier(), DataLoader(train, 64 // devices, shuffle=True), DataLoader(validation, 512))
    loss = float(trainer.callback_metrics["val/loss"])
    if trainer.is_global_zero:
        print(f"{trainer.world_size} processes, {trainer.global_step} steps  val/loss {loss:.4f}")
    return loss


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 2)
