"""Parameters that come late, and preconditioning that is switched off and on: the rest goes on."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from stepping import advance as drive
from stepping import copies, resumed
from torch import nn

from caspr_cli.optim import CASPR


def turns(optimizer: CASPR, index: int = 0) -> dict[tuple[int, tuple[int, ...]], list[int]]:
    """(number of the parameter, block shape) to the steps of the interval at which its roots are made anew."""
    members = optimizer.param_groups[index]["params"]
    return {
        (i, stack.shape): stack.refresh_offset[stack.rows[p]]
        for i, p in enumerate(members)
        for stack in optimizer.stacks(index)
        if p in stack.rows
    }


COMING_AND_GOING: list[tuple[int, ...]] = [(6, 5), (6, 5), (4, 3, 3), (7, 3), (6, 5)]
TURNING = {"lr": 0.05, "start_step": 2, "interval": 5, "block_size": 4, "betas": (0.9, 0.95)}


def tensors(shapes: Iterable[tuple[int, ...]] = COMING_AND_GOING) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def test_a_parameter_that_joins_a_group_later() -> None:
    """The list of a group's parameters may grow: the newcomer is rooted at its own start_step, all go on."""
    params, late = tensors(), tensors([(6, 5)])
    optimizer = CASPR(params, **TURNING)
    drive(params, optimizer, range(7))
    optimizer.param_groups[0]["params"] += late
    drive(params + late, optimizer, range(7, 16))
    state = optimizer.state[late[0]]
    assert float(state["step"]) == 9
    assert bool(state["root_0.0"].any())
    assert all(bool(torch.isfinite(p).all()) for p in params + late)
    assert float((late[0].detach() - 1).norm()) > 0.1


def nothing(optimizer: CASPR) -> None:
    pass


def another_interval(optimizer: CASPR) -> None:
    optimizer.param_groups[0]["interval"] = 3


def moved(optimizer: CASPR) -> None:
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items()})


def reloaded(optimizer: CASPR) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("meanwhile", "name", "on"),
    [
        (nothing, "precondition", "momentum"),
        (another_interval, "precondition_1d", True),
        (moved, "precondition", "momentum"),
        (reloaded, "precondition_1d", True),
    ],
)
def test_preconditioning_may_be_switched_off_and_on(name: str, on: Any, meanwhile: Callable[[CASPR], None]) -> None:
    """Off, it is the graft method; on again, it goes on from the old statistics, at everybody's own turn."""
    params = tensors([*COMING_AND_GOING, (9,)])
    optimizer = CASPR(params, **(TURNING | {"precondition_1d": True}))
    drive(params, optimizer, range(8))
    optimizer.param_groups[0][name] = False
    drive(params, optimizer, range(8, 10))
    meanwhile(optimizer)
    drive(params, optimizer, range(10, 13))
    changed = params if name == "precondition" else params[-1:]
    old = [optimizer.state[p]["statistics_0.0"].clone() for p in changed]
    optimizer.param_groups[0][name] = on
    drive(params, optimizer, range(13, 25))
    for p, S in zip(changed, old, strict=True):
        assert not torch.equal(optimizer.state[p]["statistics_0.0"], S)
    assert all(float(optimizer.state[p]["step"]) == 25 for p in params)
    assert all(float((p.detach() - 1).norm()) > 0.1 for p in params)
    assert all(bool(torch.isfinite(value).all()) for state in optimizer.state.values() for value in state.values())
    assert all(len(stack.refresh_offset) == len(stack.scale) for stack in optimizer.stacks(0))
    fresh = tensors([*COMING_AND_GOING, (9,)])
    never_off = CASPR(fresh, **(TURNING | {"precondition_1d": True}))
    never_off.param_groups[0]["interval"] = optimizer.param_groups[0]["interval"]
    drive(fresh, never_off, range(1))
    assert turns(optimizer) == turns(never_off)


@pytest.mark.parametrize("meanwhile", [nothing, moved, reloaded])
def test_while_preconditioning_is_off_it_is_adamw(meanwhile: Callable[[CASPR], None]) -> None:
    """Whatever is left of the stacks takes no part."""
    params, others = tensors(), tensors()
    optimizer = CASPR(params, **TURNING)
    adamw = torch.optim.AdamW(others, lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    drive(params, optimizer, range(8))
    drive(others, adamw, range(8))
    optimizer.param_groups[0]["precondition"] = False
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)
    meanwhile(optimizer)
    drive(params, optimizer, range(8, 14))
    drive(others, adamw, range(8, 14))
    torch.testing.assert_close(params, others)


@pytest.mark.parametrize(
    ("precondition", "graft", "small", "large"),
    [("momentum", "adam", 1e-20, 1e18), ("gradient", "none", 1e-20, 1e18), ("momentum", "sgd", 1e-36, 1e10)],
)
def test_a_gradient_that_outgrows_old_roots_beyond_float32(
    precondition: Any, graft: Any, small: float, large: float
) -> None:
    """Roots are of the small gradients until their next turn; momentum over their scale would be infinite."""
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = CASPR([p], lr=1e-3, start_step=2, precondition=precondition, graft=graft)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        p.grad = torch.randn(6, 4, generator=generator) * (small if step < 4 else large)
        optimizer.step()
    assert bool(p.isfinite().all())


@pytest.mark.parametrize(("key", "other", "own"), [("precondition", False, "momentum"), ("graft", "adam", "rms")])
def test_a_second_moment_that_has_rested_begins_anew(key: str, other: Any, own: Any) -> None:
    """It knows few gradients, and its bias correction would count all steps: updates would be far too long."""
    params = tensors([(20, 20)])
    optimizer = CASPR(params, lr=1e-3, graft="rms", start_step=2)
    for value, steps in ((other, 5), (own, 100)):
        optimizer.param_groups[0][key] = value
        drive(params, optimizer, range(steps))
        assert ("exp_avg_sq" in optimizer.state[params[0]]) == (value == other)
    optimizer.param_groups[0][key] = other
    lengths = drive(params, optimizer, range(5))
    assert max(lengths) < 1.01 * 1e-3 * 20  # each number moves by at most the rate


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("exponents", [(0.5, 0), (0, 0.5)])
def test_an_exponent_of_zero_is_for_good(exponents: tuple[float, float], is_loaded: bool) -> None:
    """There are no statistics with it, and none of the steps before can be made up for. A state brings its own."""
    params = tensors()
    optimizer = CASPR(params, **TURNING, exponent=exponents[0])
    drive(params, optimizer, range(4))
    others, other = resumed(params, optimizer, exponent=exponents[1])
    assert other.param_groups[0]["exponent"] == exponents[0]
    if is_loaded:
        params, optimizer, others, other = others, other, params, optimizer
    drive(others, other, [4])
    optimizer.param_groups[0]["exponent"] = exponents[1]
    before = copies(params)
    with pytest.raises(ValueError, match=r"axes, merge, block_size, batch_axes or exponent .* after its first step"):
        drive(params, optimizer, [4])
    assert all(map(torch.equal, params, before))
    optimizer.param_groups[0]["exponent"] = exponents[0]
    drive(params, optimizer, [4])
    assert all(map(torch.equal, params, others))
