"""What is summed over a stream of gradients G_1 .. G_t, as explicit weighted sums rather than recursions."""

import torch
from torch import Tensor

from references.kronecker import gram


def average(terms: list[Tensor], beta: float) -> Tensor:
    """The bias-corrected moving average: sum_s (1 - beta) beta^(t-s) terms_s / (1 - beta^t)."""
    last = len(terms) - 1
    weights = [(1 - beta) * beta ** (last - index) for index in range(len(terms))]
    return sum(w * term for w, term in zip(weights, terms, strict=True)) / (1 - beta ** len(terms))


def uncorrected_average(terms: list[Tensor], beta: float) -> Tensor:
    """The moving average that starts at zero: sum_s (1 - beta) beta^(t-s) terms_s."""
    return average(terms, beta) * (1 - beta ** len(terms))


def statistics(gradients: list[Tensor], kind: str, beta: float) -> list[Tensor]:
    """S_1 .. S_k after the last gradient: their sums ("accumulate") or bias-corrected averages ("ema")."""
    result = []
    for axis in range(gradients[0].ndim):
        terms = [gram(gradient, axis) for gradient in gradients]
        result.append(sum(terms) if kind == "accumulate" else average(terms, beta))
    return result


def full_matrix(gradients: list[Tensor], eps: float, rank: int = 1) -> Tensor:
    """F~ = eps I + (1/rank) sum_t vec(G_t) vec(G_t)^T, [n, n]."""
    rows = torch.stack([gradient.flatten() for gradient in gradients])  # [t, n]
    return eps * torch.eye(rows.shape[1], dtype=rows.dtype) + rows.mT @ rows / rank


def random_stream(*shape: int, steps: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Independent normal gradients; the seed alone decides them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


def low_rank_stream(rows: int, columns: int, rank: int, steps: int, seed: int) -> list[Tensor]:
    """Gradients [rows, columns] of the given rank, of sizes that differ from step to step."""
    left = random_stream(rows, rank, steps=steps, seed=seed)
    right = random_stream(rank, columns, steps=steps, seed=seed + 1)
    size = random_stream(steps=steps, seed=seed + 2)
    return [s.exp() * a @ b for a, b, s in zip(left, right, size, strict=True)]
