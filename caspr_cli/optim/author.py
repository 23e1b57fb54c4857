"""CASPR in the order of operations of its authors' public code, as a row of a comparison.

It is a transcription for PyTorch, a tensor at a time, of ``efficient_caspr`` (JAX) in
github.com/dvsaisurya/algorithmic-efficiency, branch main, commit 3b068d7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.caspr import takes
from caspr_cli.optim.closure import WithClosure
from caspr_cli.optim.family import AuthorOptions, wrong
from caspr_cli.optim.options import Group
from caspr_cli.optim.state import counter, params_of

MATRICES = ("L", "R", "L_root", "R_root")  # of the state: at least float32, for which there are eigendecompositions
SMALLEST_DAMPING = 1e-16
LARGEST_ERROR = 1e-2  # of an entry of a statistic that is rebuilt from its eigenvalues


class AuthorCASPR(WithClosure):
    r"""CASPR of order 2 as its authors' public code computes it.

    Momentum comes first, with Nesterov's look-ahead and bias correction,
    :math:`\hat M = (\beta_1 M + (1 - \beta_1) G) / (1 - \beta_1^t)`. Statistics are moving averages that begin at
    ``matrix_eps`` times the identity, without bias correction. Every ``interval`` steps each has new roots
    :math:`(S + \epsilon I)^{-1/4}`, where :math:`\epsilon` is ``matrix_eps`` times its mean eigenvalue (a side that is
    smaller than a block counts as padded with zeros), and no eigenvalue is below :math:`\epsilon`. The old roots stay
    where the eigenvalues rebuild S with an error above 0.01. U = A(A M + M B) + (A M + M B) B has the 4-norm of NAdam's
    step, a tensor at a time. Up to ``start_step``, and for vectors, NAdam's step itself is taken.

    A tensor of more than two axes is seen as (d_0, product of the rest). (The code has (product, d_last), which are the
    output channels of a convolution in JAX, as d_0 is in PyTorch.) Each rank of data
    parallelism does everything. ``AuthorOptions`` in ``family.py`` describes the options.

    Raises:
        ValueError: an option is out of its range.
    """

    @takes(AuthorOptions)
    def __init__(self, options: Group) -> None:
        if found := wrong(AuthorOptions, options):
            raise ValueError(f"{found.key} {found.should} but is: {found.value}")
        super().__init__(options.pop("params"), options)

    def _step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = _update(p.grad, self.state[p], group)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but statistics and roots keep the type they were saved with: torch takes the parameter's."""
        super().load_state_dict(state_dict)
        saved = params_of(state_dict["param_groups"])
        for (i, _theirs), (p, _ours) in zip(saved, params_of(self.param_groups), strict=True):
            own = state_dict["state"].get(i, {})
            self.state[p] |= {name: own[name].to(p.device, copy=True) for name in MATRICES if name in own}


def _update(G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return the step of a tensor over its learning rate, and move its state on."""
    (beta1, beta2), matrix = group["betas"], group["precondition"] and G.ndim >= 2 and G.numel() > 0
    if "step" not in state:
        state["step"] = counter()
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G), torch.zeros_like(G)
    dtype = torch.promote_types(G.dtype, torch.float32)
    if matrix and "L" not in state:
        state |= _first_statistics(blocks_of(G, group["block_size"]).to(dtype), group["matrix_eps"])
    elif matrix and state["L"].dtype != dtype:  # the model was cast, or an older version saved it
        state |= {name: state[name].to(dtype) for name in MATRICES}
    state["step"] += 1
    t = int(state["step"].item())
    state["exp_avg"].lerp_(G, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
    G = G.to(dtype)
    M = (beta1 * state["exp_avg"].to(dtype) + (1 - beta1) * G) / (1 - beta1**t)
    V = state["exp_avg_sq"].to(dtype) / (1 - beta2**t)
    nadam: Tensor = M / (V.sqrt() + group["eps"])
    if not matrix:
        return nadam
    B = blocks_of(G, group["block_size"])
    state["L"].mul_(beta2).add_(B @ B.mT, alpha=1 - beta2)
    state["R"].mul_(beta2).add_(B.mT @ B, alpha=1 - beta2)
    if t % group["interval"] == 0:
        for side in "LR":
            padding = (group["block_size"] - state[side].shape[-1]) * group["matrix_eps"] * beta2**t
            roots = state[f"{side}_root"]
            roots.copy_(_roots(state[side], roots, group["matrix_eps"], group["block_size"], padding))
    if t <= group["start_step"]:
        return nadam
    X = blocks_of(M, group["block_size"])
    for _ in range(2):
        X = state["L_root"] @ X + X @ state["R_root"]
    U = whole(X, G.shape)
    length = torch.linalg.vector_norm(U, 4)
    return U.mul_(torch.where(length > 0, torch.linalg.vector_norm(nadam, 4) / length, 0))


def blocks_of(tensor: Tensor, size: int) -> Tensor:
    """Return the blocks ``[i, j, m, n]`` of a tensor seen as a matrix; only a side longer than ``size`` is padded."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    sides = [min(size, d) for d in matrix.shape]
    (i, m), (j, n) = ((math.ceil(d / side), side) for d, side in zip(matrix.shape, sides, strict=True))
    matrix = torch.nn.functional.pad(matrix, (0, j * n - matrix.shape[1], 0, i * m - matrix.shape[0]))
    return matrix.reshape(i, m, j, n).transpose(1, 2)


def whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor of this shape whose blocks these are."""
    i, j, m, n = blocks.shape
    matrix = blocks.transpose(1, 2).reshape(i * m, j * n)
    return matrix[: shape[0], : math.prod(shape[1:])].reshape(shape)


def _first_statistics(blocks: Tensor, eps: float) -> dict[str, Tensor]:
    i, j, m, n = blocks.shape
    eyes = {"L": torch.eye(m).to(blocks), "R": torch.eye(n).to(blocks)}
    sides = {side: (eps * eye).expand(i, j, *eye.shape).clone() for side, eye in eyes.items()}
    return sides | {f"{side}_root": eye.expand(i, j, *eye.shape).clone() for side, eye in eyes.items()}


def _roots(S: Tensor, old: Tensor, eps: float, size: int, padding: float) -> Tensor:
    """Return (S + eps I)^(-1/4) of blocks ``[i, j, n, n]``, or the old one where it cannot be had.

    Args:
        padding: trace of what would pad a smaller block to ``size``.
    """
    traces = S.diagonal(dim1=-2, dim2=-1).sum(-1) + padding
    damping = (eps * traces / size).clamp(min=SMALLEST_DAMPING)[..., None]
    damped = S + torch.diag_embed(damping.expand(*S.shape[:-1]))
    if not damped.isfinite().all():  # an eigendecomposition would raise
        return old
    values, vectors = torch.linalg.eigh(damped)
    values = torch.maximum(values, damping)
    error = ((vectors * values[..., None, :]) @ vectors.mT - S).abs().amax((-2, -1), keepdim=True)
    return torch.where(error <= LARGEST_ERROR, (vectors * values[..., None, :] ** -0.25) @ vectors.mT, old)
