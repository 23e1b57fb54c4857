"""Every optimizer that a recipe can name: its line in ``--help``, its keys, its builder. To add one, enter it here.

Other packages enter theirs as entry points (:mod:`caspr_cli.common.plugins`).

Imports torch only when something is built, so that recipes are checked without it.

A group is ``{"params": [...], "precondition": bool, "weight_decay": float}``. Where ``precondition`` is False the
matrix methods leave the group to AdamW; for the diagonal methods it makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from caspr_cli.common import plugins
from caspr_cli.optim.family import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_ZERO,
    INSIDE,
    NOT_NEGATIVE,
    PAIR,
    POSITIVE,
    AuthorOptions,
    Builder,
    CASPROptions,
    Entry,
    FullAdagradOptions,
    ShampooOptions,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import Optimizer

    from caspr_cli.optim.options import Group

    Takes = Callable[[Tensor], bool]


@dataclass
class AdamWRate:
    """The key of every optimizer: what matrix methods leave to AdamW has a rate of its own in all of them.

    Without it a comparison of AdamW with a matrix method also compares one learning rate with two.
    """

    _: KW_ONLY
    adamw_lr_scale: float = option(
        1.0,
        "learning rate of what matrix methods leave to AdamW (embeddings, output layers, norms, biases), over lr",
        POSITIVE,
    )


@dataclass
class FullAdagradKeys(FullAdagradOptions, AdamWRate):
    pass


@dataclass
class ShampooKeys(ShampooOptions, AdamWRate):
    pass


@dataclass
class CASPRKeys(CASPROptions, AdamWRate):
    pass


@dataclass
class AuthorKeys(AuthorOptions, AdamWRate):
    pass


@dataclass
class SGDKeys(AdamWRate):
    lr: float = option(0.1, "learning rate", NOT_NEGATIVE)
    weight_decay: float = option(0.0, "weight decay, added to the gradient", NOT_NEGATIVE)
    momentum: float = option(0.9, "Nesterov's momentum", INSIDE)


@dataclass
class AdamWKeys(AdamWRate):
    lr: float = option(1e-3, "learning rate", NOT_NEGATIVE)
    weight_decay: float = option(0.0, "decoupled weight decay", NOT_NEGATIVE)
    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of the two moments", PAIR)
    eps: float = option(1e-8, "added to the root of the second moment", NOT_NEGATIVE)


@dataclass
class MuonKeys(AdamWKeys):
    """betas and eps are those of AdamW, which takes the tensors that are no matrices."""

    momentum: float = option(0.95, "momentum of the matrices", BELOW_ONE)
    ns_steps: int = option(5, "Newton-Schulz steps", COUNT._replace(most=99))


@dataclass
class NorMuonKeys(MuonKeys):
    beta2: float = option(0.95, "decay rate of the second moment of each row", BELOW_ONE)


@dataclass
class SOAPKeys(AdamWKeys):
    betas: tuple[float, float] = option((0.95, 0.95), "decay rates of the two moments", PAIR)
    interval: int = option(10, "steps between two updates of the eigenbases", COUNT)


@dataclass
class PSGDKronKeys(AdamWKeys):
    """betas and eps are those of AdamW, which takes the tensors that are no matrices."""

    momentum: float = option(0.9, "momentum of the matrices", BELOW_ONE)


@dataclass
class ScheduleFreeKeys(AdamWKeys):
    lr: float = option(2.5e-3, "learning rate", NOT_NEGATIVE)
    betas: tuple[float, float] = option(
        (0.9, 0.999), "share of the average where gradients are taken; decay rate", PAIR
    )


@dataclass
class AdEMAMixKeys(AdamWKeys):
    beta3: float = option(0.9999, "decay rate of the slow momentum, when it has grown", INSIDE)
    alpha: float = option(5.0, "weight of the slow momentum, when it has grown", NOT_NEGATIVE)
    ramp_steps: int = option(
        0, "steps over which beta3 and alpha grow; 0: all steps of the run, as in the paper", COUNT_OR_ZERO
    )


def build(name: str, groups: list[Group], options: dict[str, Any]) -> Optimizer:
    """Return the optimizer ``name`` over ``groups``, with the keyword options of its config."""
    return OPTIMIZERS[name].build([dict(g) for g in groups if g["params"]], **options)


def _family(name: str) -> Builder:
    """Return the builder of a class of ours. It knows ``precondition=False`` itself; elsewhere the option decides."""

    def make(groups: list[Group], *, adamw_lr_scale: float = 1.0, **options: Any) -> Optimizer:
        from caspr_cli.optim import caspr
        from caspr_cli.optim.options import as_dtype
        from caspr_cli.optim.plan import is_preconditioned

        if adamw_lr_scale != 1:
            settings = vars(CASPROptions([])) | getattr(caspr, name).fixed | options
            groups = _with_rate(groups, settings["lr"] * adamw_lr_scale, lambda p: is_preconditioned(p, settings))
        for group in groups:
            if group["precondition"]:
                del group["precondition"]
        dtypes = {key: as_dtype(value) for key, value in options.items() if key.endswith("_dtype")}
        made: Optimizer = getattr(caspr, name)(groups, **options | dtypes)
        return made

    return make


def _one_method(make: Builder, takes: Takes = lambda p: p.ndim >= 2) -> Builder:
    """Return the builder of an optimizer that treats all tensors alike, but for the rate of those it does not take."""

    def with_rates(groups: list[Group], *, adamw_lr_scale: float = 1.0, **options: Any) -> Optimizer:
        if adamw_lr_scale != 1:
            groups = _with_rate(groups, options["lr"] * adamw_lr_scale, takes)
        return make(groups, **options)

    return with_rates


def _torch(name: str, **fixed: Any) -> Builder:
    """Return the builder of a class of ``torch.optim``."""

    def make(groups: list[Group], **options: Any) -> Optimizer:
        import torch

        made: Optimizer = getattr(torch.optim, name)(groups, **fixed, **options)
        return made

    return _one_method(make)


def _beside_adamw(make: Callable[..., list[Optimizer]], shared: tuple[str, ...] = ("lr", "weight_decay")) -> Builder:
    """Return the builder of a method for matrices, with AdamW for the rest.

    Args:
        make: returns the optimizers of the matrices.
        shared: options of AdamW that ``make`` takes, too, beside its own.
    """

    def both(groups: list[Group], *, adamw_lr_scale: float = 1.0, **options: Any) -> Optimizer:
        import torch

        from caspr_cli.optim.mixed import MixedOptimizer

        adamw = {key: options.pop(key) for key in ("lr", "weight_decay", "betas", "eps")}
        matrices, rest = _apart(groups, _is_matrix)
        parts = make(matrices, **options, **{key: adamw[key] for key in shared}) if matrices else []
        if rest:
            parts.append(torch.optim.AdamW(rest, **adamw | {"lr": adamw["lr"] * adamw_lr_scale}))
        return MixedOptimizer(parts)

    return both


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and p.numel() > 0


# Which tensors of a preconditioned group each of these takes; AdamW gets the others (of caspr_author NAdam).
TAKES: dict[str, Takes] = dict.fromkeys(("muon", "normuon", "soap", "psgd_kron", "caspr_author"), _is_matrix)


def _apart(groups: list[Group], takes: Takes) -> tuple[list[Group], list[Group]]:
    """Return the groups with the parameters that are to be preconditioned and are taken, and with the others; none that
    is empty then."""

    def only(wanted: bool) -> list[Group]:
        kept = [[p for p in group["params"] if (group["precondition"] and takes(p)) == wanted] for group in groups]
        return [group | {"params": params} for group, params in zip(groups, kept, strict=True) if params]

    return only(True), only(False)


def _with_rate(groups: list[Group], rate: float, takes: Takes) -> list[Group]:
    """Return the groups, with this learning rate for the parameters that are not taken."""
    taken, rest = _apart(groups, takes)
    return [*taken, *(group | {"lr": rate} for group in rest)]


def _author(groups: list[Group], **options: Any) -> Optimizer:
    from caspr_cli.optim.author import AuthorCASPR

    return AuthorCASPR(groups, **options)


def _muon(groups: list[Group], *, momentum: float, ns_steps: int, **shared: Any) -> list[Optimizer]:
    import torch

    # An orthogonalised update of the size of AdamW's ("match_rms_adamw"), so that one lr serves all parts.
    shared |= {"momentum": momentum, "ns_steps": ns_steps}
    flat, filters = _apart(groups, lambda p: p.ndim == 2)
    parts: list[Optimizer] = []
    if flat:
        parts.append(torch.optim.Muon(flat, nesterov=True, adjust_lr_fn="match_rms_adamw", **shared))
    if filters:
        from pytorch_optimizer import Muon  # torch's refuses them; this one sees one filter a row, [out, rest]

        parts.append(Muon([group | {"use_muon": True} for group in filters], use_adjusted_lr=True, **shared))
    return parts


def _normuon(groups: list[Group], **options: Any) -> list[Optimizer]:
    """Build NorMuon, Algorithm 1 of arXiv:2510.05491, with the Nesterov momentum of its authors' code and of Muon here.

    An update has a root mean square of 0.2, as Muon's with ``match_rms_adamw``.
    """
    from pytorch_optimizer import NorMuon  # it sees a convolution as one filter a row

    return [NorMuon([group | {"use_muon": True} for group in groups], update_scale="match_rms", **options)]


def _ademamix(
    groups: list[Group], *, betas: tuple[float, float], beta3: float, ramp_steps: int, **options: Any
) -> Optimizer:
    """Build AdEMAMix, Algorithm 1 of arXiv:2409.03137; with ``ramp_steps=0`` beta3 and alpha are constant."""
    from pytorch_optimizer import AdEMAMix

    if not 0 < betas[0] <= beta3:
        raise ValueError(f"betas: the first should be above 0 and at most beta3, {beta3:g}, but is {betas[0]:g}")
    return AdEMAMix(groups, betas=(*betas, beta3), t_alpha_beta3=ramp_steps or None, weight_decouple=True, **options)


def _schedule_free(groups: list[Group], **options: Any) -> Optimizer:
    from caspr_cli.optim.schedule_free import ScheduleFree  # here, because importing it takes a second

    return ScheduleFree(groups, **options)


def _soap(groups: list[Group], *, interval: int, **options: Any) -> list[Optimizer]:
    from pytorch_optimizer import SOAP  # here, because importing it takes a second

    return [SOAP(groups, precondition_frequency=interval, **options)]


def _psgd_kron(groups: list[Group], **options: Any) -> list[Optimizer]:
    """Build PSGD Kron with the settings of its authors: factors are updated at each of 500 steps, and then less often.

    An update has a root mean square of up to 1.1, five times that of AdamW's.
    """
    from caspr_cli.optim.kron import PSGDKron

    return [PSGDKron(groups, **options)]


SOAP: dict[str, Any] = {"measured": 1.0, "graft": "none", "betas": (0.95, 0.95)}
POLAR: dict[str, Any] = {"polar": True, "nesterov": True, "betas": (0.95, 0.95)}
# Single runs, not tuned: behind the published sum at its best rate on none of five tasks (outputs/published/family.md).
CHOSEN = POLAR | {"graft": "rms", "betas": (0.9, 0.99), "lr": 2e-2, "apply_dtype": "auto"}

OPTIMIZERS: dict[str, Entry] = plugins.joined(
    plugins.OPTIMIZERS,
    {
        "caspr": Entry(
            "CASPR: the axes' preconditioners combined by a Kronecker sum; then the polar factor, as in Muon",
            CASPRKeys,
            _family("CASPR"),
            CHOSEN,
        ),
        "caspr_sum": Entry("CASPR as published: the Kronecker sum alone", CASPRKeys, _family("CASPR")),
        "caspr_paper": Entry(
            "CASPR with momentum after preconditioning, as in Shampoo for Optax: as the paper has it",
            CASPRKeys,
            _family("CASPR"),
            {"precondition": "gradient"},
        ),
        "caspr_author": Entry(
            "CASPR as its authors' public code has it: Nesterov first, NAdam's length by the 4-norm",
            AuthorKeys,
            _one_method(_author, _is_matrix),
        ),
        "shampoo": Entry("Shampoo: the same with a Kronecker product", ShampooKeys, _family("Shampoo")),
        "caspr_polar": Entry(
            "caspr with the length of Adam, betas (.95, .95) and a rate of .001: a name in older records",
            CASPRKeys,
            _family("CASPR"),
            POLAR,
        ),
        "shampoo_polar": Entry(
            "Shampoo, each update replaced by its polar factor; Nesterov momentum as in Muon",
            ShampooKeys,
            _family("Shampoo"),
            CHOSEN,
        ),
        "shampoo_soap": Entry(
            "SOAP as a member of this family, shared by ranks and damped like it; between it and Shampoo: measured=0.5",
            ShampooKeys,
            _family("Shampoo"),
            SOAP,
        ),
        "full_adagrad": Entry(
            "full-matrix Adagrad in blocks: what the others approximate (for small models)",
            FullAdagradKeys,
            _family("FullAdagrad"),
        ),
        "adamw": Entry("AdamW of torch.optim", AdamWKeys, _torch("AdamW")),
        "nadamw": Entry(
            "NAdam of torch.optim with decoupled weight decay", AdamWKeys, _torch("NAdam", decoupled_weight_decay=True)
        ),
        "sgd": Entry("SGD with Nesterov momentum, of torch.optim", SGDKeys, _torch("SGD", nesterov=True)),
        "muon": Entry(
            "Muon of torch.optim (convolutions: of pytorch-optimizer), AdamW for the rest",
            MuonKeys,
            _beside_adamw(_muon),
        ),
        "normuon": Entry(
            "NorMuon of pytorch-optimizer: Muon that scales each row; AdamW for the rest",
            NorMuonKeys,
            _beside_adamw(_normuon),
        ),
        "ademamix": Entry(
            "AdEMAMix of pytorch-optimizer: Adam with a second, slow momentum", AdEMAMixKeys, _one_method(_ademamix)
        ),
        "schedule_free": Entry(
            "Schedule-Free AdamW of pytorch-optimizer: weights are averaged in place of a decay",
            ScheduleFreeKeys,
            _one_method(_schedule_free),
        ),
        "soap": Entry(
            "SOAP of pytorch-optimizer for matrices, AdamW for the rest",
            SOAPKeys,
            _beside_adamw(_soap, ("lr", "weight_decay", "betas", "eps")),
        ),
        "psgd_kron": Entry(
            "PSGD Kron for matrices, AdamW for the rest; its steps are up to five times as long as AdamW's",
            PSGDKronKeys,
            _beside_adamw(_psgd_kron),
        ),
    },
)
