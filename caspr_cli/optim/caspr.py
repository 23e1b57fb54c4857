r"""The optimizers that users construct: CASPR, Shampoo and full-matrix Adagrad."""

from __future__ import annotations

import math
import types
from typing import Literal

import torch
from torch.optim.optimizer import ParamsT

from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.options import OPTIONS

Statistics = Literal["ema", "accumulate"]
Damping = Literal["relative", "absolute"]
Merge = Literal["matrix", "square", "none"]
Axes = Literal["all", "first", "last", "row"]
Graft = Literal["adam", "rmsprop", "sgd", "none"]
Precondition = Literal["momentum", "gradient", False]
Solver = Literal["auto", "eigh", "newton"]
Shard = Literal["auto", "none"]


class CASPR(KroneckerOptimizer):
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        order: float = 2,
        exponent: float = 0.5,
        statistics: Statistics = "ema",
        damping: Damping = "relative",
        interval: int = 10,
        start_step: int = 10,
        block_size: int = 1024,
        batch_axes: int = 0,
        merge: Merge = "matrix",
        axes: Axes = "all",
        precondition_1d: bool = False,
        graft: Graft = "adam",
        graft_eps: float = 1e-8,
        precondition: Precondition = "momentum",
        solver: Solver = "auto",
        factor_dtype: torch.dtype | None = None,
        root_dtype: torch.dtype | None = None,
        pack_roots: bool = False,
        apply_dtype: torch.dtype | None = None,
        shard: Shard = "auto",
        gather_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        options = dict(locals())
        super().__init__(params, {name: options[name] for name in OPTIONS})


class Shampoo(KroneckerOptimizer):
    fixed = types.MappingProxyType({"order": math.inf})

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        exponent: float = 0.5,
        statistics: Statistics = "ema",
        damping: Damping = "relative",
        interval: int = 10,
        start_step: int = 10,
        block_size: int = 1024,
        batch_axes: int = 0,
        merge: Merge = "matrix",
        axes: Axes = "all",
        precondition_1d: bool = False,
        graft: Graft = "adam",
        graft_eps: float = 1e-8,
        precondition: Precondition = "momentum",
        solver: Solver = "auto",
        factor_dtype: torch.dtype | None = None,
        root_dtype: torch.dtype | None = None,
        pack_roots: bool = False,
        apply_dtype: torch.dtype | None = None,
        shard: Shard = "auto",
        gather_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        options = dict(locals()) | self.fixed
        super().__init__(params, {name: options[name] for name in OPTIONS})


class FullAdagrad(KroneckerOptimizer):
    # One axis: every order is the same, and there is nothing to merge.
    fixed = types.MappingProxyType(
        {"order": 1, "exponent": 0.5, "merge": "flatten", "axes": "all", "precondition_1d": True}
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        statistics: Statistics = "ema",
        damping: Damping = "relative",
        interval: int = 10,
        start_step: int = 10,
        block_size: int = 1024,
        batch_axes: int = 0,
        graft: Graft = "adam",
        graft_eps: float = 1e-8,
        precondition: Precondition = "momentum",
        solver: Solver = "auto",
        factor_dtype: torch.dtype | None = None,
        root_dtype: torch.dtype | None = None,
        pack_roots: bool = False,
        apply_dtype: torch.dtype | None = None,
        shard: Shard = "auto",
        gather_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        options = dict(locals()) | self.fixed
        super().__init__(params, {name: options[name] for name in OPTIONS})


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

_ARGS = """
    Args:
        params: parameters, or param groups; any option below can be set for a group.
        lr: learning rate.
        betas: decay of the momentum, and of the statistics and the graft's second moment.
        eps: damping, not the eps of AdamW (which is ``graft_eps``). Relative: at least about 1e-6 for float32 factors;
            below that they are float64, with a warning unless ``factor_dtype`` is given.
        weight_decay: decoupled, as in AdamW.
%(order)s        statistics: ``"ema"``, a bias-corrected moving average, or ``"accumulate"``, the sum of the theory.
        damping: ``"relative"`` adds eps times the largest eigenvalue, ``"absolute"`` adds eps.
        interval: steps between two computations of a block's roots; in between, they are stale. Blocks take turns, a
            share at each step, so that no step is a spike. A block in which a row or a column wakes up that was silent
            (its share in the statistics has grown 25 times) has new roots at once.
        start_step: the gradient of a tensor (counted from 1 since its statistics began) from which on it is
            preconditioned. Before it, the graft method alone. After loading AdamW's state, or where ``precondition`` is
            set later, the count begins then. Where all first roots together take more than a second or two, they, too,
            come at their turns, and a tensor waits with the graft method until all its blocks have theirs: at most
            ``interval - 1`` steps more.
        block_size: an axis longer than this is cut into equal parts with statistics of their own.
        batch_axes: how many axes at the front of a tensor count members, as in stacked weights: with 1, experts
            ``[E, m, n]`` are E matrices with statistics of their own, which do not mix. The step length is still that
            of the whole tensor; make each member a parameter if it should have a length of its own.
%(merge)s        graft: method that lends each tensor its step length: ``"adam"``, ``"rmsprop"``, ``"sgd"``, ``"none"``.
        graft_eps: the eps of that method.
        precondition: ``"momentum"``, as in the authors' public code; or ``"gradient"``, with the momentum taken of the
            grafted updates (as in the Shampoo for Optax, from which the paper's code is said to be adapted); or
            ``False`` in a param group: the graft method alone, with ``graft="adam"`` exactly
            :class:`torch.optim.AdamW`. Embeddings, output heads and norms are best left to it.
        solver: of the inverse roots. ``"eigh"``, an eigendecomposition; ``"newton"``, the coupled Newton iteration;
            ``"auto"`` is eigh on a CPU and Newton on a GPU.
        factor_dtype: type of statistics and roots. Default: float64 for float64 parameters, else float32.
        root_dtype: type of the stored roots, ``torch.bfloat16`` or that of the statistics. bfloat16 changes U by about
            3e-3 of its length where gradients are of full rank, by much more where statistics are ill-conditioned.
        pack_roots: store one triangle of the roots. With bfloat16 the state of a square block is 15.5 bytes a
            parameter instead of 21; each step unpacks them.
        apply_dtype: type of the products with the roots, ``torch.bfloat16`` or that of the statistics. bfloat16 changes
            U by about 4e-3 of its length where gradients are of full rank and well conditioned, but by .27 where both
            their sides have a condition of 1e4, by .25 at rank 8 of 64, and at rank 1 by more than its length (at
            eps=1e-3 by .02, .015 and .06).
        shard: ``"auto"``: with a default process group of several ranks, each owns some blocks, keeps statistics and
            roots of those alone, computes their updates and gets the others' by one collective a step. ``"none"``:
            every rank does everything; for parameters that are not the same on all ranks. Those of ``fully_shard`` are
            always divided: their rows go to the owner of a block and back.
        gather_dtype: type in which updates travel, ``torch.bfloat16`` (half the bytes) or that of the statistics.
        maximize: maximize the objective.

    Raises:
        ValueError: an option is out of its range, a parameter is complex, or a DTensor that is not divided by rows
            (``Shard(0)``) over all ranks; in the first step, parameters that are not the same on all ranks.

    ``interval=1, start_step=1, graft="none", betas=(0, b2)`` is the bare update W <- W - lr U. Statistics start
    with the first step, whatever ``start_step`` is. ``state_dict()`` is torch's, holds tensors alone, and loads
    under ``weights_only=True``. ``block_size``, ``merge``, ``axes`` and ``batch_axes`` of a group are fixed with its
    first step. Where ``order``, ``exponent``, ``statistics``, ``damping`` or ``eps`` change, by hand or by a state, all
    roots of the group are made anew at its next step. A loaded state brings its options, but does not make another
    class of this one; the ``eps`` of AdamW's becomes ``graft_eps``.

    Nothing that a gradient holds stops the training. A tensor whose gradient is not finite (or whose square is not,
    where a second moment is kept) is left out of the step as if it had none, with one warning, and ``state["skipped"]``
    counts it. A new root is used if it is finite and its residual, recomputed, is small; else the old one stays,
    ``state["rejected.0"]`` counts it, and eps is ten times as large at the block's next turn.
    :func:`caspr_cli.optim.probe.counters` adds both up.
"""

_MERGE = """\
        merge: what a tensor of rank above two becomes. ``"matrix"``: (d_0, product of the rest), the paper's rule,
            without axes of size one; ``"square"``: the split into two groups of neighbouring axes that is nearest to
            a square; ``"none"``: all k axes are preconditioned.
        axes: which of these axes have statistics and roots. ``"all"``; but an axis of a block that is longer than 256
            and than 8 times the product of the others has none, as they would have many times the block's numbers.
            One-sided (as SOAP may be, arXiv:2409.11321): ``"first"``, U = L^(-1/2) G, or ``"last"``, U = G R^(-1/2). Or
            ``"row"``: each row g_i of the matrix, a neuron's incoming weights, has statistics of its own,
            R_i = sum g_i g_i^T, and u_i = R_i^(-1/2) g_i. That is block-diagonal full-matrix Adagrad (its blocks are
            *unit-wise* in arXiv:2305.04684), with 2 m n^2 numbers of state for m rows of n (``block_size`` cuts n); of
            more than two axes all but the first are flattened. Where one axis has statistics all orders are the same,
            and for a vector all four choices are.
        precondition_1d: precondition vectors with full-matrix Adagrad, and (n, 1) or (1, n) like matrices; otherwise
            the graft method takes both.
"""

_ORDER = """        order: q, the power of the Kronecker sum: 1, 2 (CASPR), 3, ...; ``math.inf`` is Shampoo.
"""

_EXPONENT = """\
        exponent: e, of the statistics in the preconditioner: 1/2, as published, or 1, twice as much in every root: for
            Shampoo U = tr(L)^(1/2) L^(-1/2) G R^(-1/2), which takes L x R / tr(L) for the statistic of Adagrad (Morwani
            et al., arXiv:2406.17748); for order q A_i = S_i^(-1/q), and U times tr(S)^(1/2), undamped.
"""

CASPR.__doc__ = (
    r"""Combined Axis Preconditioner: the axes' preconditioners combined by a Kronecker *sum*.

    For a matrix with L = sum G G^T and R = sum G^T G, the default ``order=2`` is

    .. math:: U = \tfrac14 (L^{-1/2} G + 2 L^{-1/4} G R^{-1/4} + G R^{-1/2})
"""
    + _ALGORITHM % {"p": "2q", "combination": r"[\tfrac1k \textstyle\sum_i A_i \text{ on axis } i\,]^q\, \hat{M}"}
    + _ARGS % {"order": _ORDER + _EXPONENT, "merge": _MERGE}
    + """
    Cost for a block of m x n: 6 m n (m + n) FLOPs a step (statistics and application), less what is not computed of
    the statistics' upper triangles (up to an eighth of the whole), and two eigendecompositions every ``interval``
    steps. State: 1.6 to 2 times m^2 + n^2 numbers and the two moments of Adam. ``caspr-bench`` measures it.

    Source: Duvvuri, Devvrit, Anil, Hsieh, Dhillon, "Combining Axes Preconditioners through Kronecker Approximation
    for Deep Learning", ICLR 2024, Algorithm 1. That ``order`` 1, 2, ... leads from the sum of the axes'
    preconditioners to Shampoo is its Lemma 3.2.
    """
)

Shampoo.__doc__ = (
    r"""Shampoo: the axes' preconditioners combined by a Kronecker *product*.

    For a matrix, U = L^(-1/4) G R^(-1/4). The same engine and options as :class:`CASPR`, so that a comparison of
    the two compares the combination alone.
"""
    + _ALGORITHM % {"p": "2k", "combination": r"(A_1 \otimes \cdots \otimes A_k)\, \hat{M}"}
    + _ARGS % {"order": _EXPONENT, "merge": _MERGE}
    + """
    Source: Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018; grafting,
    relative damping and stale roots as in Anil et al., arXiv:2002.09018.
    """
)

FullAdagrad.__doc__ = (
    r"""Full-matrix Adagrad on the flattened parameter: U = S^(-1/2) vec(G), S = sum vec(G) vec(G)^T.

    What CASPR and Shampoo approximate. A tensor of N numbers needs 2 N^2 of state: an oracle for small models.
    A larger one is cut into blocks of ``block_size`` along its flattened axis.
"""
    + _ALGORITHM % {"p": "2", "combination": r"A\, \hat{M}"}
    + _ARGS % {"order": "", "merge": ""}
    + """
    Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    JMLR 2011.
    """
)
