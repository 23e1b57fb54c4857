"""The graft methods on their own are torch's optimizers."""

import pytest
import torch
from pairs import pairs
from references.drive import relative_error, run
from references.optimizer import reference_weights
from references.stream import random_stream

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

STEPS = 8
RATES = [0.1, 0.1, 0.05, 0.2, 0.0, 0.1, 0.01, 0.3]  # the schedule changes lr between steps


def grouped(optimizer_class, **options):
    """Build it with the parameter in a group that is not preconditioned."""
    return lambda params, **rest: optimizer_class([{"params": params, "precondition": False}], **options, **rest)


def before_the_start(optimizer_class, **options):
    return lambda params, **rest: optimizer_class(params, start_step=STEPS + 1, **options, **rest)


def decayed(optimizer_class, weight_decay, **options):
    """Build torch's optimizer with decoupled weight decay before each step: W <- (1 - lr wd) W."""

    def build(params, **rest):
        def decay(optimizer, *_):
            params[0].data.mul_(1 - optimizer.param_groups[0]["lr"] * weight_decay)

        optimizer = optimizer_class(params, **options, **rest)
        optimizer.register_step_pre_hook(decay)
        return optimizer

    return build


TORCHS = {  # options of the graft, and the optimizer of torch that it is
    "adam": ({"betas": (0.8, 0.95), "graft_eps": 1e-3}, torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-3}),
    "rmsprop": ({"betas": (0.0, 0.95), "graft_eps": 1e-3}, torch.optim.RMSprop, {"alpha": 0.95, "eps": 1e-3}),
    "sgd": ({"betas": (0.0, 0.95)}, torch.optim.SGD, {}),
    "none": ({"betas": (0.0, 0.95)}, torch.optim.SGD, {}),
}
GRID = {
    "graft": [*TORCHS],
    "optimizer": [CASPR, Shampoo, FullAdagrad],
    "way": [grouped, before_the_start],
    "maximize": [False, True],
    "weight_decay": [0.0, 0.3],
    "shape": [(3, 4), (), (5,), (2, 3, 4), (5, 1)],
    "dtype": [torch.float64, torch.float32],
}


@pytest.mark.parametrize(
    "row", pairs(GRID), ids=lambda row: "-".join(getattr(v, "__name__", str(v)) for v in row.values())
)
def test_a_graft_alone_is_torchs_optimizer(row):
    own, torchs, theirs = TORCHS[row["graft"]]
    weight, *gradients = random_stream(*row["shape"], steps=STEPS + 1, seed=1, dtype=row["dtype"])
    shared = {"maximize": row["maximize"]}
    build = row["way"](row["optimizer"], graft=row["graft"], weight_decay=row["weight_decay"], **own, **shared)
    if torchs is torch.optim.AdamW:
        theirs = theirs | {"weight_decay": row["weight_decay"]}
        reference = lambda params, **rest: torchs(params, **theirs, **shared, **rest)  # noqa: E731
    else:
        reference = decayed(torchs, row["weight_decay"], **theirs, **shared)
    expected = run(reference, weight, gradients, lr=RATES)
    weights = run(build, weight, gradients, lr=RATES)
    assert weights[-1].dtype == row["dtype"]
    for w, w_expected in zip(weights, expected, strict=True):
        assert relative_error(w, w_expected) < (1e-12 if row["dtype"] == torch.float64 else 2e-6)


@pytest.mark.parametrize(
    ("graft", "way"), [("sgd", grouped), ("none", before_the_start), ("rmsprop", before_the_start)]
)
def test_momentum_of_the_other_grafts_is_a_corrected_average(graft, way):
    weight, *gradients = random_stream(3, 4, steps=STEPS + 1, seed=6)
    options = {"betas": (0.8, 0.95), "graft": graft, "graft_eps": 1e-3, "weight_decay": 0.2}
    expected = reference_weights(weight, gradients, use_preconditioner=False, lr=0.1, **options)
    for w, w_expected in zip(run(way(CASPR, **options), weight, gradients, lr=0.1), expected, strict=True):
        assert relative_error(w, w_expected) < 1e-12
    if graft != "rmsprop":  # the first step by hand: M^ is the gradient itself
        assert relative_error(expected[0], weight - 0.02 * weight - 0.1 * gradients[0]) < 1e-12
