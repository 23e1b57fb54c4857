"""The optimizers that users construct: CASPR, Shampoo and full-matrix Adagrad."""

from __future__ import annotations

import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.family import CASPROptions, FullAdagradOptions, ShampooOptions, options_of
from caspr_cli.optim.options import Group

P = ParamSpec("P")
C = TypeVar("C", bound=type[KroneckerOptimizer])

_ALGORITHM = r"""
    .. math::
       \begin{aligned}
        &\rule{110mm}{0.4pt} \\
        &\textbf{input}: \gamma \text{ (lr)}, \beta_1, \beta_2 \text{ (betas)}, \epsilon \text{ (eps)},
          \lambda \text{ (weight decay)}, f(W) \text{ (objective)}                        \\
        &\textbf{for}\ t = 1, 2, \ldots\ \textbf{do}                                      \\
        &\quad G \leftarrow \nabla f(W) \text{, one block, with axes } i = 1, \ldots, k   \\
        &\quad M \leftarrow \beta_1 M + (1 - \beta_1)\, G, \quad
          \hat{M} \leftarrow M / (1 - \beta_1^t)                                          \\
        &\quad S_i \leftarrow \beta_2 S_i + (1 - \beta_2)\,
          \mathrm{unfold}_i(G)\, \mathrm{unfold}_i(G)^\top, \quad
          \hat{S}_i \leftarrow S_i / (1 - \beta_2^t)                                      \\
        &\quad \textbf{if}\ t \text{ is due}:\ A_i \leftarrow
          (\hat{S}_i + \epsilon\, \lambda_{\max}(\hat{S}_i)\, I)^{-1/%(p)s}              \\
        &\quad U \leftarrow %(combination)s                                               \\
        &\quad U \leftarrow U\, \lVert D \rVert_F / \lVert U \rVert_F
          \text{ over the whole tensor, } D \text{ the step of Adam (graft)}              \\
        &\quad W \leftarrow W - \gamma \lambda W - \gamma U                               \\
        &\rule{110mm}{0.4pt} \\
       \end{aligned}
"""


_NOTES = """
    Raises:
        ValueError: an option is out of its range, a parameter is complex, or a DTensor that is not divided by rows
            (``Shard(0)``); in the first step, parameters that are not the same on all ranks that should have them.

    Any option but ``params``, ``process_group`` and ``group_size`` can be set for a param group, also by hand later:
    the next step refuses what cannot be (but trusts schedules with ``lr``, ``betas`` and ``weight_decay``).
    ``interval=1, start_step=1, graft="none", betas=(0, b2)`` is the bare update W <- W - lr U. Statistics start with
    the first step, whatever ``start_step`` is. ``state_dict()`` is torch's, holds tensors alone, and loads under
    ``weights_only=True``. ``block_size``, ``merge``, ``axes`` and ``batch_axes`` of a group are fixed with its first
    step, and so is whether ``exponent`` is 0. Where ``order``, ``exponent``, ``statistics``, ``damping`` or ``eps``
    change, or ``measured`` from or to 0, by hand or by a state, all roots of the group are made again at its next
    step. A loaded state brings its options, but neither the class nor ``shard``; the ``eps`` of an AdamW state becomes
    ``graft_eps``.

    On a GPU ``lr`` may be a tensor there. A step then waits for nothing once there are roots, and can be captured in
    CUDA graphs, one for each step of an ``interval``, which are replayed in their order.

    No gradient stops the training. A tensor whose gradient is not finite (or whose square is not, but with the grafts
    "sgd" and "none") is left out of the step as if it had none, with one warning, and ``state["skipped"]`` counts it. A
    new root is used if it is finite and its residual, recomputed, is small; otherwise the old one stays,
    ``state["rejected.0"]`` counts it, and eps is ten times as large at the block's next turn.
    :func:`caspr_cli.optim.probe.counters` adds both up.
    """


def takes(options: Callable[P, Any]) -> Callable[[Callable[[Any, Group], None]], Callable[Concatenate[Any, P], None]]:
    """Return a decorator that gives ``__init__`` the signature of a dataclass, and passes the values by name."""

    def decorate(init: Callable[[Any, Group], None]) -> Callable[Concatenate[Any, P], None]:
        @functools.wraps(init)
        def __init__(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, vars(options(*args, **kwargs)))

        signature, constructor = inspect.signature(options), vars(__init__)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        constructor["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
        vars(options)["__init__"].__qualname__ = init.__qualname__  # which the error about an unknown option names
        return __init__

    return decorate


def documented(options: type, root: str, combination: str) -> Callable[[C], C]:
    """Return a class decorator that adds the algorithm, the options and the notes to the docstring."""
    lines = ["params: parameters, or param groups."]
    lines += [f"{each.name}: {each.about} Default: {each.default!r}." for each in options_of(options).values()]
    wrap = textwrap.TextWrapper(120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)
    wrapped = (wrap.fill(line) for line in lines)

    def decorate(cls: C) -> C:
        algorithm = _ALGORITHM % {"p": root, "combination": combination}
        cls.__doc__ = f"{cls.__doc__ or ''}{algorithm}\n    Args:\n" + "\n".join(wrapped) + f"\n{_NOTES}"
        return cls

    return decorate


@documented(CASPROptions, "2q", r"[\tfrac1k \textstyle\sum_i A_i \text{ on axis } i\,]^q\, \hat{M}")
class CASPR(KroneckerOptimizer):
    r"""Combined Axis Preconditioner: the axes' preconditioners combined by a Kronecker *sum*.

    For a matrix with L = sum G G^T and R = sum G^T G, the default ``order=2`` is

    .. math:: U = \tfrac14 (L^{-1/2} G + 2 L^{-1/4} G R^{-1/4} + G R^{-1/2})

    Cost for a block of m x n: 6 m n (m + n) FLOPs a step (statistics and application), less what is not computed of
    the statistics' upper triangles (up to an eighth of the whole), and two eigendecompositions every ``interval``
    steps. State: 1.6 to 2 times m^2 + n^2 numbers and the two moments of Adam. ``caspr-bench`` measures it.

    Source: Duvvuri, Devvrit, Anil, Hsieh, Dhillon, "Combining Axes Preconditioners through Kronecker Approximation
    for Deep Learning", ICLR 2024, Algorithm 1. That ``order`` 1, 2, ... leads from the sum of the axes'
    preconditioners to Shampoo is its Lemma 3.2.
    """

    @takes(CASPROptions)
    def __init__(self, options: Group) -> None:
        super().__init__(options.pop("params"), options)


@documented(ShampooOptions, "2k", r"(A_1 \otimes \cdots \otimes A_k)\, \hat{M}")
class Shampoo(KroneckerOptimizer):
    r"""Shampoo: the axes' preconditioners combined by a Kronecker *product*.

    For a matrix, U = L^(-1/4) G R^(-1/4). The same engine and options as :class:`CASPR`, so that a comparison of
    the two compares the combination alone.

    Source: Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018; grafting,
    relative damping and stale roots as in Anil et al., arXiv:2002.09018.
    """

    fixed = types.MappingProxyType({"order": math.inf})

    @takes(ShampooOptions)
    def __init__(self, options: Group) -> None:
        super().__init__(options.pop("params"), options | self.fixed)


@documented(FullAdagradOptions, "2", r"A\, \hat{M}")
class FullAdagrad(KroneckerOptimizer):
    r"""Full-matrix Adagrad on the flattened parameter: U = S^(-1/2) vec(G), S = sum vec(G) vec(G)^T.

    What CASPR and Shampoo approximate. A tensor of N numbers needs 2 N^2 of state: an oracle for small models.
    A larger one is cut into blocks of ``block_size`` along its flattened axis.

    Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    JMLR 2011.
    """

    # One axis: every order is the same, and there is nothing to merge.
    fixed = types.MappingProxyType(
        {
            "order": 1,
            "exponent": 0.5,
            "merge": "flatten",
            "axes": "all",
            "precondition_1d": True,
            "polar": False,
            "polar_steps": 5,
            "measured": 0.0,
        }
    )

    @takes(FullAdagradOptions)
    def __init__(self, options: Group) -> None:
        super().__init__(options.pop("params"), options | self.fixed)
