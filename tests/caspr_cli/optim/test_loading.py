"""What comes out of a loaded state, and what does not: a class's identity, roots of other options, other counts."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import advance, assert_alike, copies, loaded, resumed, through_disk, weights
from torch import Tensor, nn

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

SHAPES: list[tuple[int, ...]] = [(6, 5), (6, 5), (4, 3, 3, 3), (7,)]
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-4, "start_step": 3, "interval": 50}


def update(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> list[Tensor]:
    """What one step adds to each parameter."""
    before = [p.detach().clone() for p in params]
    advance(params, optimizer, [step])
    return [p.detach() - old for p, old in zip(params, before, strict=True)]


def trained(optimizer_class: type, steps: int, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = weights(SHAPES)
    optimizer = optimizer_class(params, **options)
    advance(params, optimizer, range(steps))
    return params, optimizer


# A class is what it is.


def test_shampoo_stays_shampoo() -> None:
    params, caspr = trained(CASPR, 6, **OPTIONS)
    others = copies(params)
    shampoo = loaded(Shampoo(others), caspr.state_dict())
    assert shampoo.param_groups[0]["order"] == math.inf
    assert shampoo.param_groups[0]["interval"] == 50  # what is no identity is as it was saved
    # Statistics and moments know the gradients alone, so a Shampoo with roots of this very step is what it should be.
    truth = trained(Shampoo, 6, **OPTIONS | {"interval": 1})
    torch.testing.assert_close(update(others, shampoo, 6), update(*truth, 6), rtol=1e-4, atol=1e-6)


def test_caspr_does_not_become_shampoo() -> None:
    """Powers of the sum are CASPR's to choose, so a saved one counts; sum or product is not a state's to say."""
    _, shampoo = trained(Shampoo, 4, **OPTIONS)
    _, cubic = trained(CASPR, 4, **OPTIONS, order=3)
    optimizer = loaded(CASPR(weights(SHAPES)), shampoo.state_dict())
    assert optimizer.param_groups[0]["order"] == 2
    optimizer.load_state_dict(through_disk(cubic.state_dict()))
    assert optimizer.param_groups[0]["order"] == 3
    product = loaded(CASPR(weights(SHAPES), order=math.inf), cubic.state_dict())
    assert product.param_groups[0]["order"] == math.inf


def test_full_adagrad_keeps_what_it_is_made_of() -> None:
    names = ("order", "exponent", "merge", "axes", "precondition_1d")
    _, other = trained(CASPR, 2, **OPTIONS, precondition=False, exponent=1, axes="last")
    optimizer = FullAdagrad(weights(SHAPES))
    before = {name: optimizer.param_groups[0][name] for name in names}
    optimizer.load_state_dict(through_disk(other.state_dict()))
    assert {name: optimizer.param_groups[0][name] for name in names} == before
    assert optimizer.param_groups[0]["eps"] == OPTIONS["eps"]


@pytest.mark.parametrize(("source", "target"), [(FullAdagrad, CASPR), (CASPR, FullAdagrad)])
def test_statistics_of_other_axes_are_refused_at_once(source: type, target: type) -> None:
    """Before anything has changed."""
    _, other = trained(source, 4, **OPTIONS)
    params, optimizer = trained(target, 2, lr=0.5)
    twins, twin = trained(target, 2, lr=0.5)
    with pytest.raises(ValueError, match=r"of a parameter of shape \(6, 5\): block_size, merge or axes were others"):
        optimizer.load_state_dict(through_disk(other.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_alike((params, optimizer), (twins, twin), range(2, 14))


@pytest.mark.parametrize("optimizer_class", [Shampoo, FullAdagrad])
def test_a_group_may_not_ask_for_another_class(optimizer_class: type) -> None:
    with pytest.raises(ValueError, match=f"order of {optimizer_class.__name__} is (inf|1) but is: 2"):
        optimizer_class([{"params": weights(SHAPES), "order": 2}])


def test_options_that_cannot_be_are_refused_before_anything_has_changed() -> None:
    _, other = trained(CASPR, 2, **OPTIONS)
    content = through_disk(other.state_dict())
    content["param_groups"][0]["interval"] = 0
    optimizer = CASPR(weights(SHAPES))
    with pytest.raises(ValueError, match="interval should be a positive integer but is: 0"):
        optimizer.load_state_dict(content)
    assert optimizer.param_groups[0]["interval"] == 10


def test_a_rate_that_a_schedule_has_left_a_rounding_below_zero_loads() -> None:
    params = weights(SHAPES)
    optimizer = CASPR(params, lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.3, end_factor=0, total_iters=3)
    for step in range(3):
        advance(params, optimizer, [step])
        schedule.step()
    assert -1e-15 < optimizer.param_groups[0]["lr"] < 0
    optimizer.param_groups[0]["interval"] = 5
    advance(params, optimizer, [3])
    others, other = resumed(params, optimizer)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_alike((params, optimizer), (others, other), range(4, 6))


# Roots that do not belong.

CHANGES: list[tuple[str, Any]] = [
    ("order", 1), ("order", math.inf), ("exponent", 1), ("eps", 0.1), ("damping", "absolute"),
    ("statistics", "accumulate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "way"), [*((*change, "on the way") for change in CHANGES), ("eps", 0.1, "in the file"),
                               ("order", 1, "after loading"), ("exponent", 1, "before saving")]
)  # fmt: skip
def test_roots_of_other_options_are_made_anew_at_the_next_step(name: str, value: Any, way: str) -> None:
    """Their turn would be 50 steps away. All of them, and what they are is what statistics and options say."""
    params, optimizer = trained(CASPR, 6, **OPTIONS)
    stale = {p: optimizer.state[p]["root_0.0"].clone() for p in params[:3]}
    if way in ("on the way", "before saving"):
        optimizer.param_groups[0][name] = value
    if way != "on the way":
        content = through_disk(optimizer.state_dict())
        if way == "in the file":
            content["param_groups"][0][name] = value
        optimizer = loaded(CASPR(params), content)
        optimizer.param_groups[0][name] = value
    truth, exact = trained(CASPR, 6, **OPTIONS)
    exact.param_groups[0].update({name: value, "interval": 1})
    torch.testing.assert_close(update(params, optimizer, 6), update(truth, exact, 6), rtol=1e-4, atol=1e-6)
    fresh = {p: optimizer.state[p]["root_0.0"].clone() for p in params[:3]}
    if name != "statistics":  # whose units alone are others
        assert not any(torch.allclose(fresh[p], stale[p], rtol=1e-3) for p in stale)
    advance(params, optimizer, [7])  # and once
    assert all(torch.equal(optimizer.state[p]["root_0.0"], fresh[p]) for p in fresh)


@pytest.mark.parametrize(
    ("change", "load"), [({"order": 1}, "after"), ({"order": 1}, "before"), ({"measured": 0.5}, "before")]
)
def test_a_tensor_without_a_gradient_has_them_made_at_its_next(change: dict[str, Any], load: str) -> None:
    """Whether the state is loaded before the step in which it has none, or after it."""
    params, optimizer = trained(CASPR, 6, **OPTIONS)
    stale = optimizer.state[params[1]]["root_0.0"].clone()
    if load == "before":
        optimizer = loaded(CASPR(params), optimizer.state_dict())
    optimizer.param_groups[0].update(change)
    params[1].grad = None
    optimizer.step()
    if load == "after":
        optimizer = loaded(CASPR(params), optimizer.state_dict())
    advance(params, optimizer, [7])
    fresh = optimizer.state[params[1]]["root_0.0"]
    assert bool(fresh.any())
    assert not torch.allclose(fresh, stale, rtol=1e-3)
    assert bool(params[1].isfinite().all())


def test_options_that_change_while_a_group_is_off_are_seen_when_it_is_on() -> None:
    params, optimizer = trained(CASPR, 6, **OPTIONS)
    stale = optimizer.state[params[0]]["root_0.0"].clone()
    optimizer.param_groups[0].update(precondition=False, order=1)
    advance(params, optimizer, [6])
    optimizer.param_groups[0]["precondition"] = "momentum"
    advance(params, optimizer, [7])
    assert not torch.allclose(optimizer.state[params[0]]["root_0.0"], stale, rtol=1e-3)


def test_other_options_leave_the_roots() -> None:
    params, optimizer = trained(CASPR, 6, **OPTIONS)
    before = optimizer.state[params[0]]["root_0.0"].clone()
    optimizer.param_groups[0].update(lr=0.1, betas=(0.8, 0.9), graft="sgd", interval=40, weight_decay=0.1)
    advance(params, optimizer, [6])
    assert torch.equal(optimizer.state[params[0]]["root_0.0"], before)


# States of AdamW.


def test_the_eps_of_adamw_is_that_of_the_graft() -> None:
    _, adamw = trained(torch.optim.AdamW, 3, eps=1e-5)
    optimizer = CASPR(weights(SHAPES), eps=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(through_disk(adamw.state_dict()))
    assert optimizer.param_groups[0]["eps"] == 1e-3
    assert optimizer.param_groups[0]["graft_eps"] == 1e-5
    own = loaded(CASPR(weights(SHAPES)), optimizer.state_dict())  # and its own eps are what they are
    assert (own.param_groups[0]["eps"], own.param_groups[0]["graft_eps"]) == (1e-3, 1e-5)


@pytest.mark.parametrize(("precondition", "way"), [("momentum", "loaded"), ("gradient", "switched on")])
def test_start_step_counts_the_gradients_in_the_statistics(precondition: str, way: str) -> None:
    """After twelve steps of AdamW: eight more of it, and the ninth is preconditioned."""
    options = {"lr": 0.05, "betas": (0.9, 0.95)}
    params, adamw = trained(torch.optim.AdamW, 12, weight_decay=0, **options)
    steady = copy.deepcopy((params, adamw))
    if way == "loaded":
        others = copies(params)
        optimizer = loaded(CASPR(others, precondition=precondition, start_step=9), adamw.state_dict())
    else:
        others, optimizer = trained(CASPR, 12, precondition=False, start_step=9, **options)
        optimizer.param_groups[0]["precondition"] = precondition
    for step in range(12, 20):
        advance(others, optimizer, [step])
        advance(*steady, [step])
        assert all(map(torch.equal, others, steady[0]))
        assert not optimizer.state[others[0]]["root_0.0"].any()
    usual = advance(*steady, range(20, 30))
    found = advance(others, optimizer, range(20, 30))
    assert bool(optimizer.state[others[0]]["root_0.0"].any())
    assert not torch.equal(others[0], steady[0][0])
    assert float(optimizer.state[others[0]]["step"]) == 30
    assert float(optimizer.state[others[0]]["gradients"]) == 18
    assert max(found) < 3 * max(usual)


@pytest.mark.parametrize(
    ("before", "after", "by_disk"),
    [("momentum", "gradient", False), ("gradient", "momentum", True), ("gradient", False, False)],
)
def test_a_momentum_of_something_else_begins_anew(before: Any, after: Any, by_disk: bool) -> None:
    """Gradients are small and updates are of the size of one: taken for each other they are 1000 times too long."""
    params = weights(SHAPES)
    optimizer = CASPR(params, lr=0.05, start_step=3, interval=2, precondition=before)
    usual = advance(params, optimizer, range(30), scale=1e-3)
    if by_disk:
        optimizer = loaded(CASPR(params), optimizer.state_dict())
    optimizer.param_groups[0]["precondition"] = after
    found = advance(params, optimizer, range(30, 60), scale=1e-3)
    # The first update of a new momentum is a whole one, as long as the tenth root of 30 ones: as at the very start.
    assert max(found) < 1.5 * max(usual)
    assert 0.3 * usual[-1] < found[-1] < 3 * usual[-1]
    optimizer.param_groups[0]["precondition"] = before  # and back
    assert max(advance(params, optimizer, range(60, 70), scale=1e-3)) < 1.5 * max(usual)


def test_the_momentum_of_updates_has_a_bias_correction_of_its_own() -> None:
    """After AdamW's state: a weight is moved by the mean of the updates so far, not by those and nine times nothing."""
    params, adamw = trained(torch.optim.AdamW, 12, weight_decay=0)
    optimizer = loaded(CASPR(params, precondition="gradient", start_step=1), adamw.state_dict())
    for count, share in enumerate([0.1, 0.19, 0.271], start=1):
        moved = update(params, optimizer, 12 + count)
        for p, change in zip(params[:3], moved, strict=False):
            state = optimizer.state[p]
            assert float(state["updates"]) == count
            torch.testing.assert_close(change, -1e-3 * state["exp_avg"] / share, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("other", [torch.optim.Adagrad, torch.optim.SGD])
def test_a_state_without_its_moments_begins_them_together(other: type) -> None:
    """The bias correction belongs to the moments: one of 400 steps would make a first one 30 times too long."""
    params = weights(SHAPES)
    source = other(params, lr=0.01)
    advance(params, source, range(20))
    for state in source.state.values():
        if "step" in state:
            state["step"].fill_(400)
    optimizer = loaded(CASPR(params, betas=(0.9, 0.999), start_step=3, interval=2), source.state_dict())
    lr = optimizer.param_groups[0]["lr"]
    assert max(advance(params, optimizer, range(20, 30))) < 2 * lr * params[0].numel() ** 0.5


def test_a_state_does_not_say_who_shares_the_work() -> None:
    """It may come from another number of ranks, or from ranks with models of their own."""
    _, optimizer = trained(CASPR, 2, **OPTIONS)
    assert loaded(CASPR(weights(SHAPES), shard="none"), optimizer.state_dict()).param_groups[0]["shard"] == "none"


def test_another_graft_begins_the_moments_together() -> None:
    params, optimizer = trained(CASPR, 40, lr=0.05, graft="sgd", start_step=5)
    optimizer.param_groups[0]["graft"] = "adam"
    assert max(advance(params, optimizer, range(40, 50))) < 1.1 * 0.05 * 30**0.5


# States of an older version.

OLD = Path(__file__).with_name("state_de29eed.pt")


@pytest.mark.parametrize("kind", ["momentum", "gradient"])
def test_a_state_of_an_older_version_goes_on(kind: str) -> None:
    """Seven steps by commit de29eed, whose states have no counters; its weights after five more are in the file.

    They are of another CPU, whose products round differently.
    """
    content = torch.load(OLD, weights_only=True)[kind]
    params = [nn.Parameter(w) for w in content["before"]]
    optimizer = CASPR(params)
    optimizer.load_state_dict(content["state"])
    advance(params, optimizer, range(7, 12))
    for p, expected in zip(params, content["after"], strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
    assert float(optimizer.state[params[0]]["gradients"]) == 12
    assert ("updates" in optimizer.state[params[0]]) == (kind == "gradient")


def test_a_step_that_is_a_number_loads() -> None:
    """As torch saved it before 1.12."""
    params, optimizer = trained(CASPR, 5, **OPTIONS)
    content = copy.deepcopy(optimizer.state_dict())
    for state in content["state"].values():
        state["step"] = int(state["step"])
    assert_alike((params, optimizer), resumed(params, optimizer, content), range(5, 9))


# What is said.


def small(where: str) -> None:
    groups = [{"params": weights([shape])} for shape in SHAPES[:2]]
    if where == "argument":
        optimizer = CASPR(groups, eps=1e-8)
    elif where == "group":
        optimizer = CASPR([group | {"eps": 1e-8} for group in groups])
    else:
        optimizer = CASPR(groups)
        content = optimizer.state_dict()
        for group in content["param_groups"]:
            group["eps"] = 1e-8
        optimizer.load_state_dict(content)
    advance([group["params"][0] for group in groups], optimizer, range(3))


@pytest.mark.parametrize("where", ["argument", "group", "loaded"])
def test_a_small_eps_is_said_once(where: str) -> None:
    """That it is damping, and costs memory. Once, for two groups."""
    with pytest.warns(UserWarning, match=r"eps=1e-08 is damping .* not the eps of AdamW, which is graft_eps") as said:
        small(where)
    assert len(said) == 1


MEANT: list[dict[str, Any]] = [
    {"factor_dtype": torch.float64}, {"damping": "absolute"}, {"precondition": False}, {"eps": 1e-6},
]  # fmt: skip


@pytest.mark.parametrize("options", MEANT, ids=str)
def test_an_eps_that_is_meant_is_not_spoken_of(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(CASPR, 3, **{"eps": 1e-8} | options)
        CASPR(weights([(7,)]), eps=1e-8)  # of which no statistics are kept
        CASPR([nn.Parameter(p.detach().double()) for p in weights(SHAPES)], eps=1e-8)


def test_gradients_that_are_not_finite_are_spoken_of_once() -> None:
    """With the numbers that state_dict() has."""
    params = weights(SHAPES)
    optimizer = CASPR([{"params": params[:2]}, {"params": params[2:], "precondition": False}], **OPTIONS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step, broken in enumerate([{1}, {1}, set(), {0, 1, 3}, {0}]):
            for i, p in enumerate(params):
                p.grad = torch.full(p.shape, torch.nan) if i in broken else torch.randn(p.shape)
            optimizer.step()
            if step == 1:  # what was said is said, also after loading
                content = through_disk(optimizer.state_dict())
                optimizer.load_state_dict(content)
    assert {warning.filename for warning in said} == {__file__}  # the caller of step() is blamed
    found = [str(warning.message) for warning in said]
    assert len(found) == 2
    assert "parameter 1 of shape (6, 5)" in found[0]
    assert "parameter 0 of shape (6, 5), parameter 3 of shape (7,)" in found[1]
    assert "parameter 1 " not in found[1]
    assert [float(optimizer.state[p].get("skipped", 0)) for p in params] == [2, 3, 0, 1]


def test_many_at_once_are_a_short_message() -> None:
    params = weights([(2, 2)] * 50)
    optimizer = CASPR(params)
    for p in params:
        p.grad = torch.full((2, 2), torch.inf)
    with pytest.warns(UserWarning, match="and 42 more") as said:
        optimizer.step()
    assert len(said) == 1
    assert len(str(said[0].message)) < 700


# Parameters in another order; parts of a state.


@pytest.mark.parametrize("kind", [torch.optim.AdamW, CASPR])
def test_parameters_in_another_order_are_refused_at_loading(kind: type) -> None:
    _, other = trained(kind, 4)
    params = weights([SHAPES[i] for i in (0, 2, 1, 3)])
    optimizer = CASPR(params)
    with pytest.raises(
        ValueError, match=r"parameter 1 has shape \(4, 3, 3, 3\) here and \(6, 5\) in the state: .* another order"
    ):
        optimizer.load_state_dict(through_disk(other.state_dict()))
    assert not optimizer.state
