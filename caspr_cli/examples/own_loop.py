"""A training loop of one's own: CASPR or AdamW on a small network, with a schedule, clipping and a checkpoint.

python -m caspr_cli.examples.own_loop caspr 0      optimizer and seed
"""

import io
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caspr_cli import CASPR, param_groups

STEPS, BATCH = 200, 128


def points(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Return 8 numbers a sample, and the one of 8 classes that they are of."""
    weights = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(99))
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))
    return x, (torch.tanh(2 * x @ weights[0]) @ weights[1]).argmax(1)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))


def optimizer_of(name: str, model: nn.Sequential) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    # AdamW takes the output layer and all biases; the matrices before it are preconditioned.
    return CASPR(param_groups(model, heads=[model[-1]]), lr=1e-2, betas=(0.9, 0.95))


def main(name: str = "caspr", seed: int | str = 0) -> list[tuple[int, float]]:
    """Train, and return the validation losses with their steps."""
    torch.manual_seed(int(seed))
    model = network()
    optimizer = optimizer_of(name, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    (x, y), (held_x, held_y) = points(1, 8192), points(2, 2048)
    losses: list[tuple[int, float]] = []
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            with torch.no_grad():
                losses.append((step, F.cross_entropy(model(held_x), held_y).item()))
            print(f"step {step}  val/loss {losses[-1][1]:.4f}")

    file = io.BytesIO()  # a checkpoint, as anything of torch: it loads with weights_only=True
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True)["optimizer"])
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
