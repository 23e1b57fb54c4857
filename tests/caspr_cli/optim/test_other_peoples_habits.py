"""What real programs do to an optimizer, beyond calling step()."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stepping import advance, assert_finite, noise, weights

from caspr_cli.optim import CASPR


@pytest.fixture
def precision() -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [b.fp32_precision for b in backends]
    yield
    for backend, setting in zip(backends, before, strict=True):
        backend.fp32_precision = setting


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_precision_of_each_backend_is_put_back(setting: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = setting
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    params = weights([(4, 4)])
    advance(params, CASPR(params, start_step=1), range(2))
    assert torch.backends.cuda.matmul.fp32_precision == setting
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


@pytest.mark.parametrize("change", [("start_step", 100, 13), ("precondition", False, "momentum")])
def test_a_tensor_whose_turn_comes_between_refreshes_is_not_frozen(change: tuple[str, Any, Any]) -> None:
    name, before, after = change
    params = weights([(5, 4)])
    optimizer = CASPR(params, lr=0.1, **({"interval": 50, "start_step": 10} | {name: before}))
    advance(params, optimizer, range(20))
    optimizer.param_groups[0][name] = after
    assert min(advance(params, optimizer, range(20, 30))) > 0.05


def test_late_statistics_are_divided_by_their_own_weight() -> None:
    """Statistics that begin at step 201 are those of a fresh optimizer, not an average over 200 steps of nothing."""
    params, fresh = weights([(5, 4)]), weights([(5, 4)])
    options = {"lr": 1.0, "graft": "none", "betas": (0.0, 0.99), "start_step": 1, "interval": 1}
    late = CASPR([{"params": params, "precondition": False}], **options)
    advance(params, late, range(200))
    late.param_groups[0]["precondition"] = "momentum"
    torch.testing.assert_close(
        advance(params, late, range(200, 206)),
        advance(fresh, CASPR(fresh, **options), range(200, 206)),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize("options", [{"start_step": 1}, {"start_step": 3}, {"precondition": False}, {"graft": "rms"}])
def test_a_zero_in_a_float16_gradient_is_not_a_nan(options: dict[str, Any]) -> None:
    """Of matrices and vectors, before they are preconditioned and without. What is beside them is AdamW's."""
    halves, others, plain = (weights([(8, 8), (8,)], dtype=t) for t in (torch.float16, torch.float32, torch.float32))
    optimizer = CASPR([*halves, *others], **options)
    adamw = torch.optim.AdamW(plain, weight_decay=0)
    for step in range(3):
        for i, p in enumerate([*halves, *others]):
            p.grad = noise(step, i, p)
            p.grad[..., 3] = 0
        for p, q in zip(others, plain, strict=True):
            q.grad = p.grad
        optimizer.step()
        adamw.step()
        assert_finite(halves, optimizer)
    assert torch.equal(others[1], plain[1])


def test_a_removed_parameter_is_let_go() -> None:
    params = weights([(4, 4), (4, 4)])
    optimizer = CASPR(params, start_step=1)
    advance(params, optimizer, range(3))
    gone = weakref.ref(params[1])
    del optimizer.state[params[1]]
    optimizer.param_groups[0]["params"].pop()
    params.pop()
    advance(params, optimizer, range(3, 5))
    gc.collect()
    assert gone() is None


def test_hooks_around_loading_see_what_torch_shows_them() -> None:
    params = weights([(4, 4)], dtype=torch.bfloat16)
    optimizer = CASPR(params, start_step=1)
    advance(params, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())

    def halve(_: Any, content: dict[str, Any]) -> None:
        content["state"] = {i: s | {"statistics_0.0": s["statistics_0.0"] / 2} for i, s in content["state"].items()}

    def zero(loaded: torch.optim.Optimizer) -> None:
        for state in loaded.state.values():
            state["statistics_1.0"].zero_()

    other = CASPR(params)
    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(zero)
    other.load_state_dict(copy.deepcopy(saved))
    state = other.state[params[0]]
    torch.testing.assert_close(state["statistics_0.0"], saved["state"][0]["statistics_0.0"] / 2)
    assert state["statistics_0.0"].dtype == torch.float32
    assert not state["statistics_1.0"].any()
    assert not other._optimizer_load_state_dict_pre_hooks.keys() - {
        k for k, v in other._optimizer_load_state_dict_pre_hooks.items() if v is halve
    }


@pytest.mark.parametrize("way", ["load", "copy"])
def test_a_group_may_be_added_after_loading_or_copying(way: str) -> None:
    """In both torch gives the defaults an option of its own, ``differentiable``."""
    params = weights([(4, 4)])
    optimizer = CASPR(params, interval=3)
    advance(params, optimizer, range(2))
    if way == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        params, optimizer = copy.deepcopy((params, optimizer))
    params += weights([(2, 2)])
    optimizer.add_param_group({"params": params[1:], "lr": 0.1})
    advance(params, optimizer, range(2, 4))
    assert optimizer.state[params[1]]["step"] == 2
    assert optimizer.param_groups[1]["interval"] == 3


def test_options_that_a_state_does_not_have_are_those_of_its_group() -> None:
    params = weights([(4, 4), (4, 4)])
    groups = [{"params": [p]} for p in params]
    adamw = torch.optim.AdamW(groups, lr=0.1)
    advance(params, adamw, range(2))
    optimizer = CASPR([{"params": params[:1], "interval": 3}, {"params": params[1:], "precondition": False}])
    saved = adamw.state_dict()
    optimizer.load_state_dict(saved)
    assert [group["precondition"] for group in optimizer.param_groups] == ["momentum", False]
    assert [group["interval"] for group in optimizer.param_groups] == [3, 10]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert "precondition" not in saved["param_groups"][1]
