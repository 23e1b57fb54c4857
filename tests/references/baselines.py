"""Optimizers to compare with, step by step from the formulas of their papers: float64, numpy, one tensor."""

from functools import reduce

import numpy as np

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def _polar(matrix: np.ndarray, steps: int) -> np.ndarray:
    """Return the matrix after quintic Newton-Schulz steps: its singular values end near 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def normuon_weights(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    *,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    nesterov: bool = True,
    ns_steps: int = 5,
    eps: float = 1e-10,
) -> list[np.ndarray]:
    """The weights of a matrix after every step: Algorithm 1 of arXiv:2510.05491 (there without Nesterov)."""
    rows, columns = weight.shape
    m, v, weights = np.zeros_like(weight), np.zeros(rows), []
    for gradient in gradients:
        m = momentum * m + (1 - momentum) * gradient
        o = _polar(momentum * m + (1 - momentum) * gradient if nesterov else m, ns_steps)
        v = beta2 * v + (1 - beta2) * np.array([np.mean(row**2) for row in o])
        scaled = np.stack([row / (np.sqrt(second) + eps) for row, second in zip(o, v, strict=True)])
        rate = 0.2 * lr * np.sqrt(rows * columns) / np.linalg.norm(scaled)
        weight = weight - lr * weight_decay * weight - rate * scaled
        weights.append(weight)
    return weights


def ademamix_weights(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    *,
    lr: float,
    betas: tuple[float, float],
    beta3: float,
    alpha: float,
    ramp_steps: int,
    weight_decay: float,
    eps: float,
) -> list[np.ndarray]:
    """The weights after every step: Algorithm 1 and the two schedulers of arXiv:2409.03137.

    The half-life of the slow momentum, t with beta**(t + 1) = 1/2, grows linearly from that of beta1 to that of beta3.
    """
    b1, b2 = betas
    fast, slow, second, weights = (*(np.zeros_like(weight) for _ in range(3)), [])
    for t, gradient in enumerate(gradients, start=1):
        share = min(1.0, t / ramp_steps) if ramp_steps else 1.0
        half_lives = [np.log(0.5) / np.log(b) for b in (b1, beta3)]
        b3 = 0.5 ** (1 / ((1 - share) * half_lives[0] + share * half_lives[1]))
        fast = b1 * fast + (1 - b1) * gradient
        slow = b3 * slow + (1 - b3) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        update = fast / (1 - b1**t) + share * alpha * slow
        update = update / (np.sqrt(second / (1 - b2**t)) + eps)
        weight = weight - lr * (update + weight_decay * weight)
        weights.append(weight)
    return weights


def schedule_free_weights(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    *,
    rates: list[float],
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The weights after every step to take gradients at (y) and to evaluate (x): Schedule-Free AdamW, arXiv:2405.15682.

    The paper's Algorithm 1 has sqrt(1 - beta2**t) in the rate, and with it in the weight decay and in the weights of
    the average. Here, as in its authors' code since version 1.3, it corrects the second moment alone.

    Args:
        rates: the learning rate of each step, with its warmup; it must not fall.
    """
    b1, b2 = betas
    x = z = y = weight
    second, trained, averaged = np.zeros_like(weight), [], []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        second = b2 * second + (1 - b2) * gradient**2
        z = z - rate * (gradient / (np.sqrt(second / (1 - b2**t)) + eps) + weight_decay * y)
        share = rate**2 / sum(each**2 for each in rates[:t])
        x = (1 - share) * x + share * z
        y = (1 - b1) * z + b1 * x
        trained.append(y)
        averaged.append(x)
    return trained, averaged


def _size_bound(matrix: np.ndarray) -> float:
    """Return a lower bound of the spectral norm: one power step from the longest column or row."""
    columns, rows = (matrix**2).sum(0), (matrix**2).sum(1)
    if columns.max() > rows.max():
        x = matrix.T @ matrix[:, columns.argmax()]
        return float(np.linalg.norm(matrix @ x) / np.linalg.norm(x))
    x = matrix @ matrix[rows.argmax()]
    return float(np.linalg.norm(matrix.T @ x) / np.linalg.norm(x))


def psgd_kron_weights(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    *,
    noise: list[np.ndarray],
    lr: float,
    momentum: float,
    weight_decay: float,
    factor_rate: float = 0.1,
) -> list[np.ndarray]:
    """The weights after every step: PSGD with Q = Q_1 x Q_2 x ..., upper triangular matrices.

    P = Q^T Q is fitted to the momentum m: a step on E[m^T P m + v^T P^-1 v] (arXiv:1512.04202) in the group of Q
    multiplies each factor from the left by 1 - rate * triu(A - B) / |A + B|, with A = (Q m) (Q m)^T and
    B = (Q^-T v) (Q^-T v)^T summed over the other axes (arXiv:2402.04553); of the norm there is a bound. As in Kron for
    torch the root mean square of an update is at most 1.1, and the decay is decoupled.

    Args:
        noise: v of each step.
    """
    shape, m, weights = weight.shape, np.zeros_like(weight), []
    factors = [np.eye(n) for n in shape]
    for t, (gradient, v) in enumerate(zip(gradients, noise, strict=True), start=1):
        m = momentum * m + (1 - momentum) * gradient
        h = m / (1 - momentum**t)
        whole = reduce(np.kron, factors)
        a = (whole @ h.ravel()).reshape(shape)
        b = np.linalg.solve(whole.T, v.ravel()).reshape(shape)
        for axis, Q in enumerate(factors):
            first, second = (np.moveaxis(x, axis, 0).reshape(shape[axis], -1) for x in (a, b))
            one, two = first @ first.T, second @ second.T
            factors[axis] = Q - factor_rate * np.triu(one - two) @ Q / _size_bound(one + two)
        whole = reduce(np.kron, factors)
        update = (whole.T @ whole @ h.ravel()).reshape(shape)
        update = update * min(1.0, 1.1 / np.sqrt(np.mean(update**2)))
        weight = weight - lr * (update + weight_decay * weight)
        weights.append(weight)
    return weights
