"""What an optimizer's step asks of a GPU, without one: launches, waits, FLOPs, bytes, for the shapes of GPT-2 small.

    python tests/benchmarks/launches.py [adamw caspr default shampoo eigenbasis nesterov eight]

Takes a minute an optimizer. Times are not known without a GPU.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from fake_gpu import fake_gpu  # noqa: E402
from fake_ranks import many  # noqa: E402

from caspr_cli.optim import CASPR, Shampoo  # noqa: E402

Shapes = list[tuple[int, ...]]
INTERVAL = 10
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "caspr": (CASPR, {}),
    "default": (CASPR, {"nesterov": True, "polar": True, "graft": "rms", "apply_dtype": "auto"}),  # optim=caspr
    "shampoo": (Shampoo, {}),
    "eigenbasis": (CASPR, {"measured": 1.0, "graft": "none"}),  # SOAP as a member of the family
    "nesterov": (CASPR, {"nesterov": True, "weight_decay": 0.1}),
    "eight": (CASPR, {}),  # the first of eight ranks
}


def gpt2(layers: int = 12, d: int = 768, words: int = 50257, context: int = 1024) -> tuple[Shapes, Shapes]:
    """Return the shapes of the matrices that are preconditioned, and of the rest."""
    matrices: Shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * layers
    vectors: Shapes = [(d,), (d,), (d,), (d,), (3 * d,), (d,), (4 * d,), (d,)] * layers
    return matrices, [(words, d), (context, d), *vectors, (d,), (d,)]


def on_the_gpu(shapes: Shapes) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def measured(name: str) -> dict[str, Any]:
    """Return the counts of an average step of an interval in which all blocks have roots.

    ``first interval``: of the one before it, in which blocks get their first roots at their turns.
    """
    cls, options = OPTIMIZERS[name]
    matrices, rest = gpt2()
    with many(8) if name == "eight" else nullcontext(), fake_gpu() as gpu:
        params, others = on_the_gpu(matrices), on_the_gpu(rest)
        before, size = gpu.live, sum(p.numel() for p in (*params, *others))
        if cls is torch.optim.AdamW:
            optimizer: Any = cls([*params, *others])
        else:
            groups = [{"params": params}, {"params": others, "precondition": False}]
            optimizer = cls(groups, interval=INTERVAL, start_step=2, **options)
        rows = []
        for _ in range(2 * INTERVAL + 3):
            gpu.reset()
            optimizer.step()
            over = (gpu.peak - gpu.live) / 2**20
            rows.append((gpu.launches, gpu.views, gpu.flops / 1e9, sum(gpu.waits.values()), over))
        first, last = (
            [sum(column) / INTERVAL for column in zip(*rows[i : i + INTERVAL], strict=True)] for i in (3, INTERVAL + 3)
        )
        return {
            "optimizer": name,
            "launches": round(last[0]),
            "first interval": round(first[0]),
            "most": max(row[0] for row in rows[3:]),
            "views": round(last[1]),
            "GFLOP": round(last[2]),
            "waits": first[3] + last[3],
            "B/param": round((gpu.live - before) / size, 1),
            "peak over state MiB": round(max(row[4] for row in rows)),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [measured(name) for name in sys.argv[1:] or OPTIMIZERS]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
