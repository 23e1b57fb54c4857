"""The authors' public code, ``efficient_caspr`` at its defaults, step by step as it stands there: float64, numpy.

Written from the JAX source (github.com/dvsaisurya/algorithmic-efficiency, commit 3b068d7): blocks are padded with zeros
up to the block size, always.
"""

import numpy as np


def _root(stat: np.ndarray, old: np.ndarray, eps: float) -> np.ndarray:
    eps = max(eps * np.trace(stat) / len(stat), 1e-16)
    values, vectors = np.linalg.eigh(stat + eps * np.eye(len(stat)))
    values = np.maximum(values, eps)
    if np.abs(vectors @ np.diag(values) @ vectors.T - stat).max() > 1e-2:
        return old
    return vectors @ np.diag(values ** (-1 / 4)) @ vectors.T


def _padded(matrix: np.ndarray, size: int) -> np.ndarray:
    return np.pad(matrix, [(0, -d % size) for d in matrix.shape])


def author_weights(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    matrix_eps: float = 1e-6,
    weight_decay: float = 1e-4,
    interval: int = 20,
    start_step: int = 101,
    block_size: int = 1024,
) -> list[np.ndarray]:
    """The weights after every step, of a vector or a matrix."""
    (b1, b2), size = betas, block_size
    weight = weight.astype(np.float64)
    mu, nu = np.zeros_like(weight), np.zeros_like(weight)
    grid = [(i, j) for i in range(-(-weight.shape[0] // size)) for j in range(-(-weight.shape[-1] // size))]
    stats = {at: [matrix_eps * np.eye(size), matrix_eps * np.eye(size)] for at in grid}
    preconds = {at: [np.eye(size), np.eye(size)] for at in grid}
    weights = []
    for count, gradient in enumerate(gradients, start=1):
        mu = (1 - b1) * gradient + b1 * mu
        nu = (1 - b2) * gradient**2 + b2 * nu
        mu_hat = (b1 * mu + (1 - b1) * gradient) / (1 - b1**count)
        adam = mu_hat / (np.sqrt(nu / (1 - b2**count)) + eps)
        update = adam
        if weight.ndim == 2:
            g, m = _padded(gradient, size), _padded(mu_hat, size)
            for i, j in grid:
                block = g[i * size : (i + 1) * size, j * size : (j + 1) * size]
                L, R = stats[i, j]
                stats[i, j] = [b2 * L + (1 - b2) * block @ block.T, b2 * R + (1 - b2) * block.T @ block]
                if count % interval == 0:
                    preconds[i, j] = [_root(s, p, matrix_eps) for s, p in zip(stats[i, j], preconds[i, j], strict=True)]
            caspr = np.zeros_like(m)
            for i, j in grid:
                at = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                (A, B), x = preconds[i, j], m[at]
                x = A @ x + x @ B
                caspr[at] = A @ x + x @ B
            caspr = caspr[: weight.shape[0], : weight.shape[1]]
            if count > start_step:
                update = caspr / np.linalg.norm(caspr.ravel(), 4) * np.linalg.norm(adam.ravel(), 4)
        weight = weight - lr * (update + weight_decay * weight)
        weights.append(weight.copy())
    return weights
