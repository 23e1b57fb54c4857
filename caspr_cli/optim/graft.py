"""Diagonal methods: they lend their step length to a preconditioned direction, and stand in where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from caspr_cli.optim.fsdp import local

RMS = 0.2  # of the entries of an update with graft="rms": about that of AdamW's (Liu et al., arXiv:2502.16982)

# Between these, a Frobenius norm has neither lost squares at the lower end of float32 nor overflowed at the upper one.
SAFE_NORMS = (1e-15, 1e18)


def frobenius(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Frobenius norms of n > 0 tensors of one device: ``[n]`` in float64. (A float32 has no square of 1e20.)

    On a CPU a norm in float64 takes three times as long as one in float32, so only those are taken that need it.
    """
    if tensors[0].device.type != "cpu" or any(t.dtype == torch.float64 for t in tensors):
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64))
    norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).double()
    least, most = SAFE_NORMS
    for i in (~((norms > least) & (norms < most))).nonzero().flatten().tolist():
        norms[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
    return norms


def needs_second_moment(graft: str) -> bool:
    return graft in ("adam", "rmsprop")


def rate(group: dict[str, Any]) -> float | Tensor:
    """Return the learning rate. A tensor on a GPU stays there: nobody waits, and a CUDA graph sees it change."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def graft_of(group: dict[str, Any], *, preconditioned: bool) -> str:
    """Return the graft method of a tensor: AdamW has those that are left to it for good, where "rms" is of the others,
    or "none" of those that have a length of their own, as in SOAP.

    Args:
        preconditioned: whether the tensor is, from ``start_step`` on.
    """
    own_length = group["graft"] == "rms" or (group["graft"] == "none" and group["measured"] > 0)
    return "adam" if own_length and not preconditioned else str(group["graft"])


def update_second_moment(exp_avg_sq: list[Tensor], grads: list[Tensor], beta2: float) -> None:
    """v <- beta2 v + (1 - beta2) g^2."""
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - beta2)


def look_ahead(exp_avg: list[Tensor], grads: list[Tensor], beta1: float) -> list[Tensor]:
    """Return Nesterov's momentum b1 M + (1 - b1) G, where M has G already."""
    return list(torch._foreach_lerp(exp_avg, [G.to(M.dtype) for M, G in zip(exp_avg, grads, strict=True)], 1 - beta1))


def direction(
    graft: str, momenta: list[Tensor], exp_avg_sq: list[Tensor], steps: list[int], beta2: float, eps: float
) -> list[Tensor]:
    """Return the step that the diagonal method would take, divided by the learning rate.

    Args:
        momenta: bias-corrected momentum, or the gradient where momentum comes later.
        exp_avg_sq: moving average of the squared gradient, for ``adam`` (which corrects its bias) and
            ``rmsprop`` (which does not); unused otherwise.
        steps: number of updates in ``exp_avg_sq``, for each tensor.

    ``sgd`` and ``none`` are the momentum itself, ``rms`` is its sign times ``RMS``: no norm of a tensor is needed that
    several ranks hold.
    """
    if graft == "rms":
        return list(torch._foreach_mul(torch._foreach_sign(momenta), RMS))
    if not needs_second_moment(graft):
        return momenta
    # In float16 eps is 0, and a zero gradient would be 0/0.
    momenta, exp_avg_sq = (
        [t.float() if t.dtype == torch.float16 else t for t in tensors] for tensors in (momenta, exp_avg_sq)
    )
    denominators = torch._foreach_sqrt(exp_avg_sq)
    if graft == "adam":
        torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, eps)
    return list(torch._foreach_div(momenta, denominators))


def are_alike(*lists: list[Tensor]) -> bool:
    """Whether torch's fused kernels may be given these: they go through memory by address."""
    dtype = lists[0][0].dtype
    return all(t.is_contiguous() and t.dtype == dtype for tensors in lists for t in tensors)


def fusible(*lists: list[Tensor]) -> bool:
    """Whether torch's fused kernel for the CPU may be given these."""
    first = lists[0][0]
    known = first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return known and are_alike(*lists)


def torch_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    counters: list[Tensor],
    group: dict[str, Any],
    *,
    lr: float,
    weight_decay: float,
    fused: bool | None = None,
) -> None:
    """Take torch's own step of AdamW, in place.

    Args:
        fused: whether by torch's kernel, see :func:`fusible`: one pass over memory instead of fifteen.
    """
    (beta1, beta2), eps = group["betas"], group["graft_eps"]
    adamw(
        params, grads, exp_avg, exp_avg_sq, [], counters, fused=fused, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr,
        weight_decay=weight_decay, eps=eps, maximize=False,
    )  # fmt: skip


def transfer_length(updates: list[list[Tensor]], lengths: list[Tensor], known: list[Tensor] | None = None) -> None:
    """In place: the pieces of each update together get this Frobenius norm. A zero update stays zero.

    Args:
        lengths: 0-d, float64.
        known: the norms that the updates have, where some of their pieces are elsewhere; otherwise they are computed.
    """
    for device in {length.device for length in lengths}:
        here = [i for i, length in enumerate(lengths) if length.device == device]
        have = _norms([updates[i] for i in here]) if known is None else torch.stack([known[i] for i in here])
        factors = torch.where(have > 0, torch.stack([lengths[i] for i in here]) / have, 0).unbind()
        pieces, repeated = [], []
        for i, factor in zip(here, factors, strict=True):
            pieces += updates[i]
            repeated += [factor] * len(updates[i])
        torch._foreach_mul_(pieces, repeated)


def _norms(updates: list[list[Tensor]]) -> Tensor:
    """Return the norm ``[n]`` of each update, which is in pieces: those of as many pieces in one call."""
    counts = [len(pieces) for pieces in updates]
    found: dict[int, Tensor] = {}
    for count in set(counts):
        members = [i for i, n in enumerate(counts) if n == count]
        norms = frobenius([u for i in members for u in updates[i]])
        norms = norms if count == 1 else torch.linalg.vector_norm(norms.view(-1, count), dim=1)
        found |= dict(zip(members, norms.unbind(), strict=True))
    return torch.stack([found[i] for i in range(len(updates))])


def diagonal_step(
    params: list[Tensor], grads: list[Tensor], state: Any, group: dict[str, Any], graft: str, *, nesterov: bool = False
) -> None:
    """Take a step of a graft method alone. With ``"adam"`` and no ``nesterov`` this is torch's own AdamW.

    Parameters in float16 do not take torch's: its eps is 0 there on a CPU, and a zero gradient would give 0/0.

    Args:
        grads: what is here of them.
    """
    low = [p.dtype == torch.float16 for p in params]
    if any(low) and not all(low):
        for is_low in (True, False):
            some = [(p, G) for p, G, yes in zip(params, grads, low, strict=True) if yes is is_low]
            diagonal_step([p for p, _ in some], [G for _, G in some], state, group, graft, nesterov=nesterov)
        return
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    exp_avg = [local(state[p]["exp_avg"]) for p in params]
    exp_avg_sq = [local(state[p]["exp_avg_sq"]) for p in params] if needs_second_moment(graft) else []
    counters = [state[p]["step"] for p in params]
    params = [local(p) for p in params]
    if graft == "adam" and not nesterov and not any(low):
        decay = group["weight_decay"]
        torch_adamw(params, grads, exp_avg, exp_avg_sq, counters, group, lr=lr, weight_decay=decay)
        return
    torch._foreach_add_(counters, 1)
    T = [int(t.item()) for t in counters]
    torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    if needs_second_moment(graft):
        update_second_moment(exp_avg_sq, grads, beta2)
    ahead = look_ahead(exp_avg, grads, beta1) if nesterov else exp_avg
    momenta = list(torch._foreach_div(ahead, [1 - beta1**t for t in T]))
    D = direction(graft, momenta, exp_avg_sq, T, beta2, group["graft_eps"])
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_add_(params, D, alpha=-lr)
