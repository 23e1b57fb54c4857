"""The whole optimizer for one parameter, recomputed from the full history of gradients at every step."""

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from references.eigenbasis import in_eigenbasis
from references.kronecker import damped, newton_schulz, one_sided, row_by_row
from references.kronecker import precondition as preconditioned
from references.stream import average, statistics, uncorrected_average


def merged_shape(shape: tuple[int, ...], merge: str) -> tuple[int, ...]:
    """The axes a parameter is preconditioned on; a single one means a vector."""
    if len(shape) < 2:
        return (math.prod(shape),)
    if merge == "none" or len(shape) == 2:
        return tuple(shape)
    if merge == "square":
        splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
        return min(splits, key=sum)  # min keeps the first of equals
    kept = [size for size in shape if size != 1] or [1]
    return (kept[0],) if len(kept) == 1 else (kept[0], math.prod(kept[1:]))


def axis_parts(size: int, block_size: int) -> list[slice]:
    """ceil(size / block_size) parts whose sizes differ by at most one, larger ones first."""
    count = max(1, math.ceil(size / block_size))
    short, longer = divmod(size, count)
    ends = list(itertools.accumulate(short + (index < longer) for index in range(count)))
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def blockwise(gradient, history: list[Tensor], age: int, turns, interval: int, sizes: list[int], *, wait, **options):
    """U of every block from the statistics of that block alone; ``sizes`` of blocks, ``options`` of ``_block``.

    ``age`` steps ago all blocks had their first roots, or with ``wait`` each at its turn since then; each got new ones
    whenever it was its turn of the interval, or it had outgrown those that it had.
    """
    result = torch.zeros_like(gradient)
    for block in itertools.product(*map(axis_parts, gradient.shape, sizes)):
        turn = (turns or {}).get(tuple((s.start, s.stop) for s in block), 0)
        past = [gradient[block] for gradient in history]
        start = len(past) - age
        last = start + turn * bool(wait)  # when it had its first roots, or will have them
        refreshed = [last] if last <= len(past) else []
        for count in range(last + 1, len(past) + 1):
            due = (count - start - turn) % interval == 0
            if due or outgrown(past[: refreshed[-1]], past[:count], **options):
                refreshed.append(count)
        result[block] = _block(gradient[block], past, refreshed, **options)
    return result


def outgrown(then: list[Tensor], now: list[Tensor], *, kind, beta, eps, damping, exponent, axes, **_) -> bool:
    """Whether a row of an axis with statistics has over 25 times its share of then, damping included, in the trace.

    Never of a vector.
    """
    if sum(size > 1 for size in now[0].shape) < 2 or exponent == 0:
        return False
    pairs = list(zip(statistics(then, kind, beta), statistics(now, kind, beta), strict=True))
    chosen = {"all": slice(None), "first": slice(1), "last": slice(-1, None), "row": slice(-1, None)}[axes]
    return any(
        bool((new.diagonal() / new.trace() > 25 * damped(old, eps, damping).diagonal() / old.trace()).any())
        if old.any()
        else bool(new.any())  # the roots were of nothing
        for old, new in pairs[chosen]
    )


def _block(gradient, history, refreshed, *, polar, polar_steps, rms, measured, solver, **options):
    """U of a block, or its polar factor with a root mean square of 0.2 where all singular values are 1.

    The polar factor is that of the gradient itself where the block has not been ``refreshed``.
    """
    if not refreshed:
        update = gradient
    elif measured and options["exponent"]:
        all_axes = list(range(gradient.ndim))
        chosen = {"all": all_axes, "first": all_axes[:1]}.get(options.pop("axes"), all_axes[-1:])
        update = in_eigenbasis(gradient, history, refreshed, chosen, measured=measured, solver=solver, **options)
    else:
        update = _combined(gradient, history[: refreshed[-1]], **options)
    if not polar:
        return update
    sizes = [size for size in gradient.shape if size > 1] or [1]
    factor = newton_schulz(update.reshape(sizes[0], -1), polar_steps).reshape(gradient.shape)
    return factor * (0.2 * math.sqrt(max(sizes[0], math.prod(sizes[1:]))) if rms else 1)


def _combined(gradient, history, *, kind, beta, eps, damping, order, exponent, axes):
    if exponent == 0:
        return gradient
    if gradient.ndim == 1 or axes == "all":
        return preconditioned(gradient, statistics(history, kind, beta), eps, damping, order, exponent)
    if axes == "row":
        rows = zip(*history, strict=True)  # of each row all that was seen
        return row_by_row(gradient, [statistics(row, kind, beta)[0] for row in rows], eps, damping, exponent)
    axis = 0 if axes == "first" else gradient.ndim - 1
    return one_sided(gradient, statistics(history, kind, beta)[axis], axis, eps, damping, exponent)


def graft_direction(direction: Tensor, history: list[Tensor], graft: str, beta: float, eps: float) -> Tensor:
    """The diagonal method's own step: Adam, RMSprop (no bias correction of v), signs, or the direction itself."""
    squares = [gradient**2 for gradient in history]
    if graft == "adam":
        return direction / (average(squares, beta).sqrt() + eps)
    if graft == "rmsprop":
        return direction / (uncorrected_average(squares, beta).sqrt() + eps)
    if graft == "rms":
        return 0.2 * direction.sign()
    return direction


def rescaled(update: Tensor, length_from: Tensor, graft: str) -> Tensor:
    """The update at the Frobenius length of the graft direction."""
    length = torch.linalg.vector_norm(update)
    if graft == "none" or length == 0:
        return update
    if graft == "rms":
        return update * 0.2 * math.sqrt(update.numel()) / length
    return update * torch.linalg.vector_norm(length_from) / length


@dataclass
class Reference:
    """The updates of one parameter, each computed anew from all gradients so far."""

    sizes: tuple[int, ...]  # of the parameter
    method: str  # "caspr", "shampoo", "full" (the flattened parameter as one axis)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    order: float = 2
    exponent: float = 0.5
    measured: float = 0.0
    solver: str = "auto"
    statistics: str = "ema"
    damping: str = "relative"
    interval: int = 10
    start_step: int = 1
    block_size: int = 1024
    merge: str = "matrix"
    axes: str = "all"  # "first", "last", "row"
    precondition_1d: bool = False
    graft: str = "adam"
    polar: bool = False
    polar_steps: int = 5
    graft_eps: float = 1e-8
    precondition: str = "momentum"
    nesterov: bool = False
    use_preconditioner: bool = True
    turns: dict[tuple[tuple[int, int], ...], int] | None = None  # of blocks, see ``drive.turns_of``; 0 by default
    wait: int = 0  # steps from start_step until the last of them, where first roots come at their turns
    history: list[Tensor] = field(default_factory=list)  # every gradient so far, on the axes of ``shape``

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (math.prod(self.sizes),) if self.method == "full" else merged_shape(self.sizes, self.merge)
        by_row = self.axes == "row" and self.exponent and len(shape) > 2
        return (shape[0], math.prod(shape[1:])) if by_row else shape

    @property
    def active(self) -> bool:
        """Whether the parameter is ever preconditioned."""
        whole = self.method == "full" or self.precondition_1d
        return self.use_preconditioner and (whole or sum(size > 1 for size in self.shape) > 1)

    def update(self, gradient: Tensor) -> Tensor:
        """U of the next gradient: the weights lose lr times it."""
        self.history.append(gradient.reshape(self.shape))
        step = len(self.history)
        first = 1 if self.polar else self.start_step + self.wait
        if not self.active or step < first:
            return self._plain(self._momentum(self.history), step)
        if self.precondition == "momentum":
            return self._grafted(self._momentum(self.history), step)
        return self._momentum([self._grafted(self.history[s - 1], s) for s in range(first, step + 1)])

    def _grafted(self, direction: Tensor, step: int) -> Tensor:
        """U of a direction with the roots in force at a step, at the length of the graft method."""
        by_row = self.axes == "row" and self.exponent and len(self.shape) > 1
        options = {
            "sizes": [1, self.block_size] if by_row else [self.block_size] * len(self.shape),
            "kind": self.statistics,
            "beta": self.betas[1],
            "order": math.inf if self.method == "shampoo" else self.order,
            "rms": self.graft == "rms",
        }
        names = ("eps", "damping", "exponent", "measured", "solver", "axes", "polar", "polar_steps", "wait")
        options |= {name: getattr(self, name) for name in names}
        past, age = self.history[:step], step - self.start_step
        update = blockwise(direction, past, age, self.turns, self.interval, **options)
        has_length = self.graft == "rms" and self.polar
        return rescaled(update, self._plain(direction, step), "none" if has_length else self.graft)

    def _plain(self, direction: Tensor, step: int) -> Tensor:
        own_length = self.graft == "rms" or (self.graft == "none" and self.measured > 0)
        graft = "adam" if own_length and not self.active else self.graft
        return graft_direction(direction, self.history[:step], graft, self.betas[1], self.graft_eps)

    def _momentum(self, terms: list[Tensor]) -> Tensor:
        """The bias-corrected average M / (1 - b1^t), or (b1 M + (1 - b1) G) / (1 - b1^t) with Nesterov's look-ahead."""
        beta = self.betas[0]
        if not (self.nesterov and self.active):
            return average(terms, beta)
        return beta * average(terms, beta) + (1 - beta) / (1 - beta ** len(terms)) * terms[-1]


def reference_weights(
    weight: Tensor,
    gradients: list[Tensor | None],
    method: str = "caspr",
    *,
    lr: float | list[float] = 1e-3,
    weight_decay: float = 0.0,
    maximize: bool = False,
    **options,
) -> list[Tensor]:
    """The weights after every step, float64. A gradient of None is a step that skips the parameter."""
    reference = Reference(tuple(weight.shape), method, **options)
    weight = weight.double().clone()
    rates = lr if isinstance(lr, list) else [lr] * len(gradients)
    weights = []
    for rate, gradient in zip(rates, gradients, strict=True):
        if gradient is not None:
            update = reference.update(-gradient.double() if maximize else gradient.double())
            weight = weight - rate * weight_decay * weight - rate * update.reshape(weight.shape)
        weights.append(weight.clone())
    return weights
