"""The options of CASPR and its kin: the one place where each is written. Imports no torch.

The signatures and docstrings of the classes, the checks of the library, and the keys of recipes come from here. To add
an option, add a field.
"""

# ruff: noqa: RUF009 (option() returns a field, not a value that instances would share)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

if TYPE_CHECKING:
    import torch
    from torch.optim.optimizer import Optimizer, ParamsT

    FactorDtype = torch.dtype
    LowDtype = torch.dtype
    ApplyDtype = torch.dtype | Literal["auto"]
    TravelDtype = torch.dtype
else:  # their names, as a recipe has them
    ParamsT = Any
    FactorDtype = Literal["float32", "float64"]
    LowDtype = Literal["bfloat16"]
    ApplyDtype = Literal["auto", "bfloat16", "float32"]
    TravelDtype = Literal["bfloat16", "float32"]

T = TypeVar("T")
OF_OPTIMIZER = ("process_group", "group_size")  # options that no param group has
EXPONENTS = (0, 0.25, 0.5, 1)
SMALLEST_EPS_FLOAT32 = 1e-6  # below it, the damping is lost in the rounding of float32 statistics


class Range(NamedTuple):
    """The numbers that an option may be: ``should`` goes with "should be > 0 but is -1"."""

    should: str
    holds: Callable[[Any], bool]
    most: int | None = None  # of a finite one in a recipe, where more is a slip


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 1 and value == int(value)


NOT_NEGATIVE = Range("should be >= 0", lambda value: value >= 0)
POSITIVE = Range("should be > 0", lambda value: value > 0)
BELOW_ONE = Range("should be in [0, 1)", lambda value: 0 <= value < 1)
SHARE = Range("should be from 0 to 1", lambda value: 0 <= value <= 1)
INSIDE = Range("should be above 0 and below 1", lambda value: 0 < value < 1)
COUNT = Range("should be a positive integer", _is_count, 10**9)
COUNT_OR_ZERO = Range("should be a positive integer or 0", lambda value: value == 0 or _is_count(value), 10**9)
COUNT_OR_NONE = Range("should be a positive integer or None", lambda value: value is None or _is_count(value))
ORDER = Range("should be a positive integer or inf", lambda value: value == math.inf or _is_count(value), 100)
EXPONENT = Range(f"should be one of {', '.join(map(str, EXPONENTS))}", lambda value: value in EXPONENTS)
PAIR = Range("should be two numbers", lambda value: isinstance(value, (tuple, list)) and len(value) == 2)


class Option(NamedTuple):
    """One option of an optimizer."""

    name: str
    kind: str  # its type, as it is written
    default: Any
    choices: tuple[Any, ...]  # empty: any value of the type
    allowed: Range | None
    about: str
    in_recipe: bool


Builder = Callable[..., "Optimizer"]


class Entry(NamedTuple):
    """One optimizer that a recipe can name."""

    about: str
    keys: type  # a dataclass of options
    build: Builder  # called as build(groups, lr=..., weight_decay=..., the other keys)
    defaults: Mapping[str, Any] = {}  # where they are not those of the keys


def option(default: T, about: str, allowed: Range | None = None, *, in_recipe: bool = True) -> T:
    """Return the field of an option.

    Args:
        about: what it does, and when to use it.
        in_recipe: False for what only a program can say.
    """
    return field(default=default, metadata={"about": " ".join(about.split()), "allowed": allowed, "key": in_recipe})


@cache
def options_of(keys: type) -> dict[str, Option]:
    """Return the options that a dataclass declares, by name."""
    hints = get_type_hints(keys)
    found = {}
    for f in fields(keys):
        if f.default is not MISSING:
            kind = f.type.__name__ if isinstance(f.type, type) and not get_args(f.type) else str(f.type)
            # option() may not have made the field.
            m: dict[str, Any] = {"allowed": None, "about": "", "key": True, **f.metadata}
            found[f.name] = Option(f.name, kind, f.default, _choices(hints[f.name]), m["allowed"], m["about"], m["key"])
    return found


def _choices(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (True, False)
    if type(None) in (inner := get_args(hint)):
        return (None, *get_args(inner[0]))
    return inner if all(isinstance(each, (str, bool)) for each in inner) else ()


@dataclass
class FullAdagradOptions:
    """The options of all three."""

    params: ParamsT
    lr: float = option(1e-3, "learning rate.", NOT_NEGATIVE)
    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay rates of the momentum, and of the statistics and the graft's second moment.", PAIR
    )
    eps: float = option(
        1e-6,
        """damping. It is not the eps of AdamW, which is ``graft_eps``. A relative eps below 1e-6 makes statistics and
        roots float64, with a warning unless ``factor_dtype`` is given.""",
        POSITIVE,
    )
    weight_decay: float = option(0.0, "decoupled weight decay, as in AdamW.", NOT_NEGATIVE)
    _: KW_ONLY
    statistics: Literal["ema", "accumulate"] = option(
        "ema",
        """``"ema"``, a bias-corrected moving average; or ``"accumulate"``, the sum, as in the theory: use it for convex
        problems.""",
    )
    damping: Literal["relative", "absolute"] = option(
        "relative",
        """``"relative"`` adds eps times the largest eigenvalue, ``"absolute"`` adds eps: use it where all gradients
        have a known scale.""",
    )
    interval: int = option(
        10,
        """steps between two computations of a block's roots; a larger one saves time and leaves roots stale. Blocks
        take turns, a share at each step, so that no single step is slow. A block in which a row or a column wakes up
        that was silent (its share in the statistics has grown 25 times), or that was silent as a whole, has new roots
        at once; a block that is a vector, as all of ``axes="row"`` are, waits for its turn.""",
        COUNT,
    )
    start_step: int = option(
        1,
        """the gradient of a tensor (counted from 1 since its statistics began) from which on it is preconditioned; the
        graft method alone comes before it; with ``polar``, the polar factor of the momentum. After loading AdamW's
        state, or where ``precondition`` is set later, the count begins then. 10 was behind on a small language model
        without ``polar``, and significantly better nowhere. Where all first roots together would take more than a
        second or two, they also take turns, at most ``interval - 1`` steps more, and a tensor waits until all its
        blocks have roots (with ``polar`` each block has its own at its turn).""",
        COUNT,
    )
    block_size: int = option(
        1024,
        """an axis longer than this is cut into equal parts with statistics of their own. A smaller one saves time and
        memory.""",
        COUNT,
    )
    batch_axes: int = option(
        0,
        """number of axes at the front of a tensor that count members, as in stacked weights: with 1, experts
        ``[E, m, n]`` are E matrices with statistics of their own. The step length is still that of the whole tensor;
        make each member a parameter if it should have a length of its own.""",
        COUNT_OR_ZERO,
        in_recipe=False,  # the model says it, of a param group
    )
    graft: Literal["adam", "rmsprop", "rms", "sgd", "none"] = option(
        "adam",
        """method that lends each tensor its step length. With ``"adam"`` the learning rates of AdamW fit. With
        ``"rms"`` all updates have a root mean square of 0.2, about that of AdamW's, as in torch's Muon: use it to save
        the second moment, 4 bytes a parameter. Without ``polar`` it is the sign of the momentum times 0.2 until
        ``start_step``. AdamW has what is left to the graft method for good. ``"sgd"`` and ``"none"`` need other
        learning rates. With float16 parameters use ``"rms"``: second moments would be zero, and steps far too long.""",
    )
    graft_eps: float = option(1e-8, "the eps of that method; with 0 a zero gradient would be 0 / 0.", POSITIVE)
    precondition: Literal["momentum", "gradient", False] = option(
        "momentum",
        """``"momentum"``, as in the authors' public code; or ``"gradient"``, with the momentum of the grafted updates
        (as in the Shampoo for Optax, from which the paper's code is said to be adapted); or ``False`` in a param group:
        the graft method alone, which with ``graft="adam"`` is exactly :class:`torch.optim.AdamW`. Use ``False`` for
        embeddings, output layers and norms.""",
    )
    nesterov: bool = option(
        False,
        """Nesterov's look-ahead: the momentum b1 M + (1 - b1) G in place of M, in the preconditioned tensors and in the
        graft's step that lends them its length. Muon and the authors' own code have it, so set it in a comparison with
        them. What is left to the graft method for good stays AdamW.""",
    )
    solver: Literal["auto", "eigh", "newton"] = option(
        "auto",
        """method of the inverse roots: ``"eigh"``, an eigendecomposition; ``"newton"``, the coupled Newton iteration.
        ``"auto"`` is eigh on a CPU and Newton on a GPU. Of eigenbases (``measured``) ``"newton"`` takes a step of
        orthogonal iteration from the last ones, as SOAP does: a product and a QR decomposition.""",
    )
    factor_dtype: FactorDtype | None = option(
        None,
        """type of statistics and roots, ``torch.float32`` or ``torch.float64``. None: float64 for float64 parameters
        and a small relative eps, else float32.""",
    )
    statistics_tf32: bool = option(
        False,
        """on a GPU, take the products of the statistics in TF32, for which it has faster units. Roots and what they
        are applied to stay in float32. It changes U by about 5e-5 of its length where both sides of the gradients have
        a condition of 10, and by 6e-4 where it is 1e4 (float32: 1e-6 and 2e-4; the rounding of inputs emulated on a
        CPU). Nothing changes on a CPU.""",
        in_recipe=False,
    )
    root_dtype: LowDtype | None = option(
        None,
        """type of the stored roots, ``torch.bfloat16``, or None for that of their products (``apply_dtype``), or of the
        statistics. bfloat16 saves memory. Where products are not in bfloat16, too, it changes U by about 3e-3 of its
        length where gradients are of full rank, and by much more where statistics are ill-conditioned.""",
    )
    pack_roots: bool = option(
        False,
        """store one triangle of the roots, which saves memory: with bfloat16 the state of a square block is 15.5 bytes
        a parameter instead of 21. Each step unpacks them.""",
    )
    apply_dtype: ApplyDtype | None = option(
        None,
        """type of the products with the roots and of the polar factor: ``torch.bfloat16``, ``torch.float32``, or None
        for that of the statistics (float32, or float64 for such parameters and a small eps). ``"auto"``, the choice of
        ``optim=caspr``, is bfloat16 where a polar factor follows and the device multiplies faster in it (GPUs, CPUs
        with AMX, AMD's with AVX-512 for bfloat16; others can take ten times as long), else None. Without a polar factor
        bfloat16 changes U by about 4e-3 of its length where gradients are of full rank and well conditioned, but by .27
        where both their sides have a condition of 1e4, by .25 at rank 8 of 64, and at rank 1 by more than its length
        (at eps=1e-3 by .02, .015 and .06).""",
    )
    shard: Literal["auto", "none"] = option(
        "auto",
        """``"auto"``: with a default process group of several ranks, each rank owns some blocks, keeps the statistics
        and roots of those alone, computes their updates and gets the others' while it computes. ``"none"``:
        every rank does everything; use it where parameters differ between ranks, where rank 0 alone saves, or under
        torch's ``Join``, where a rank that has run out of data no longer steps and the others would wait for it.
        Parameters of ``fully_shard`` are always divided, and with them the others of their group: their rows go to
        the owner of a block and back; of replicas each does so by itself.""",
    )
    gather_dtype: TravelDtype | None = option(
        None,
        """type in which updates travel between ranks: ``torch.float32`` or ``torch.bfloat16`` (half the bytes). None:
        bfloat16 for bfloat16 parameters, else that of the statistics.""",
    )
    maximize: bool = option(False, "maximize the objective.", in_recipe=False)
    process_group: Any = option(
        None,
        """ranks that have the same parameters, a process group or the last axis of a device mesh; None: all. Say it
        where ranks have different parts of a model (pipeline or expert parallelism). For parameters of ``fully_shard``
        their own mesh says it.""",
        in_recipe=False,
    )
    group_size: int | None = option(
        None,
        """how many neighbours among these ranks share the work on parameters that are not divided by rows. Other groups
        do the same work beside them. None: at most 64, and on more than 8 ranks so few that what a rank receives is at
        most 1.1 times the updates. More have less state each; ranks of one node exchange fastest.""",
        COUNT_OR_NONE,
        in_recipe=False,
    )


@dataclass
class ShampooOptions(FullAdagradOptions):
    """The options of Shampoo."""

    _: KW_ONLY
    merge: Literal["matrix", "square", "none"] = option(
        "matrix",
        """what a tensor of rank above two becomes. ``"matrix"``: (d_0, product of the rest), the paper's rule, without
        axes of size one; ``"square"``: the split into two groups of neighbouring axes that is nearest to a square;
        ``"none"``: all k axes are preconditioned.""",
    )
    axes: Literal["all", "first", "last", "row"] = option(
        "all",
        """which of these axes have statistics and roots. ``"all"``; but an axis of a block that is longer than 256 and
        than 8 times the product of the others has none, as they would have many times the block's numbers. One-sided
        (as SOAP may be, arXiv:2409.11321), which costs less: ``"first"``, U = L^(-1/2) G, or ``"last"``,
        U = G R^(-1/2). Or ``"row"``: each row g_i of the matrix, a neuron's incoming weights, has statistics of its
        own, R_i = sum g_i g_i^T, and u_i = R_i^(-1/2) g_i. That is block-diagonal full-matrix Adagrad (its blocks are
        *unit-wise* in arXiv:2305.04684), with 2 m n^2 numbers of state for m rows of n (``block_size`` cuts n); of more
        than two axes all but the first are flattened. Where one axis has statistics all orders are the same, and for a
        vector all four choices are.""",
    )
    exponent: float = option(
        0.5,
        """e, the power of the statistics in the preconditioner: 1/2, as published; 1, twice as much in every root; 1/4;
        or 0, no statistics: with ``polar`` this is Muon.
        With 1 Shampoo is U = tr(L)^(1/2) L^(-1/2) G R^(-1/2), which takes L x R / tr(L) for the statistic of Adagrad
        (Morwani et al., arXiv:2406.17748); for order q A_i = S_i^(-1/q), and U times tr(S)^(1/2), undamped.""",
        EXPONENT,
    )
    measured: float = option(
        0.0,
        """share of a measured second moment in the weights, from 0 to 1. With 0 all follow from the statistics of the
        axes. Else the momentum is seen in their eigenbases and divided there by the root of a mixture of what the axes
        say and of Adam's second moment in that basis. This takes half as many products again and 4 bytes a parameter.
        With 1 and ``graft="none"`` it is SOAP (arXiv:2409.11321), damped by ``eps``, and AdamW has what is left to the
        graft method for good. ``pack_roots`` does nothing then.""",
        SHARE,
    )
    polar: bool = option(
        False,
        """replace what the roots make of a block by its polar factor (Newton-Schulz steps, as in Muon), of which
        all singular values are about 1: no direction can then be overshot. Use it with ``nesterov=True``,
        ``graft="rms"`` and ``betas=(0.9, 0.99)``. A tensor that is cut into blocks has that of each block.""",
    )
    polar_steps: int = option(
        5,
        """how many Newton-Schulz steps a polar factor takes: 5, as in Muon. After the roots 3 came close to 5 on two
        small tasks; without them (``exponent=0``) 3 were far behind on the language model.""",
        COUNT,
    )
    precondition_1d: bool = option(
        False,
        """precondition vectors with full-matrix Adagrad, and (n, 1) or (1, n) like matrices; otherwise the graft method
        takes both.""",
    )


@dataclass
class CASPROptions(ShampooOptions):
    """The options of CASPR, which are all."""

    _: KW_ONLY
    order: float = option(2, "q, the power of the Kronecker sum: 1, 2 (CASPR), 3, ...; ``math.inf`` is Shampoo.", ORDER)


@dataclass
class AuthorOptions:
    """The options of AuthorCASPR, with the defaults of the authors' public code."""

    params: ParamsT
    lr: float = option(1e-3, "learning rate.", NOT_NEGATIVE)
    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay rates of the momentum, and of the statistics and NAdam's second moment.", PAIR
    )
    eps: float = option(1e-8, "that of NAdam.", NOT_NEGATIVE)
    matrix_eps: float = option(1e-6, "damping, times the mean eigenvalue of the statistics.", NOT_NEGATIVE)
    weight_decay: float = option(1e-4, "decoupled, times the learning rate.", NOT_NEGATIVE)
    _: KW_ONLY
    interval: int = option(20, "steps between two computations of the roots.", COUNT)
    start_step: int = option(101, "the last step that is NAdam's.", COUNT_OR_ZERO)
    block_size: int = option(
        1024, "longer sides are cut into blocks of this size, the last one padded with zeros.", COUNT
    )
    precondition: bool = option(True, "False in a param group: NAdam's step alone.", in_recipe=False)


# Options of older versions, with the value at which an optimizer did what it does without them.
REMOVED: dict[str, Any] = {"statistics_interval": 1, "refresh_above": 0.0}
REMOVED_SOLVER = "warm"


def without_removed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that an older version has saved, without those that were removed.

    Raises:
        ValueError: one of them has another value than its default; names it.
    """
    if options.get("solver") == REMOVED_SOLVER:
        raise ValueError(f"solver={REMOVED_SOLVER} was removed: use eigh, which computes each root anew")
    for key, default in REMOVED.items():
        if key in options and options[key] != default:
            raise ValueError(f"{key} was removed, and can only be read where it is {default}, but it is {options[key]}")
    return {key: value for key, value in options.items() if key not in REMOVED}


class Wrong(NamedTuple):
    """A number out of its range: ``should`` and ``value`` go with "should be > 0 but is -1"."""

    key: str
    should: str
    value: Any


def wrong(keys: type, values: Mapping[str, Any]) -> Wrong | None:
    """Return the first option that is out of its range, or None.

    Args:
        keys: the dataclass that declares the options.
        values: options by name; types by name or as such. An option that is absent is not checked.
    """
    for name, each in options_of(keys).items():
        if name not in values or each.allowed is None:
            continue
        value = values[name]
        try:
            is_allowed = each.allowed.holds(value)
        except TypeError:  # no number, such as Adafactor's pair of eps in its state
            is_allowed = False
        if not is_allowed:
            return Wrong(name, each.allowed.should, value)
        for i, beta in enumerate(value if each.allowed is PAIR else ()):
            if i == beta == 1 and values.get("statistics") == "ema":
                return Wrong(
                    f"{name}[1]", 'should be below 1 for a moving average (statistics="accumulate" is a sum)', beta
                )
            if not BELOW_ONE.holds(beta):
                return Wrong(f"{name}[{i}]", BELOW_ONE.should, beta)
    single = str(values.get("factor_dtype")).endswith("float32") and values["damping"] == "relative"
    if single and values["eps"] < SMALLEST_EPS_FLOAT32:
        should = f"should be >= {SMALLEST_EPS_FLOAT32} for float32 factors (without factor_dtype they are float64)"
        return Wrong("eps", should, values["eps"])
    return None
