"""Saving, loading, copying: a run that was cut off goes on bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.drive import run
from references.stream import random_stream

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

SHAPES = [(3, 4), (3, 4), (4,), (2, 3, 2), ()]
STEPS = 12
# start_step 4, refreshes at 4, 7, 10: a cut at 2 is before the start, 6 between refreshes, 7 at one.
OPTIONS = {
    "lr": 0.1,
    "betas": (0.9, 0.95),
    "start_step": 4,
    "interval": 3,
    "weight_decay": 0.1,
    "block_size": 3,
}


def streams(dtype=torch.float32):
    return [random_stream(*shape, steps=STEPS, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]


def fresh(optimizer_class=CASPR, dtype=torch.float32, **options):
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    return parameters, optimizer_class(parameters, **{**OPTIONS, **options})


def advance(parameters, optimizer, gradients, first, last):
    """Steps first .. last - 1 (counted from 0)."""
    for step in range(first, last):
        for parameter, stream in zip(parameters, gradients, strict=True):
            parameter.grad = stream[step].clone()
        optimizer.step()


def through_disk(state_dict):
    """What ``torch.save`` wrote and the safe loader reads back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value, path=""):
    """(path, tensor or number) of everything in a state_dict."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}/{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for key, item in enumerate(value) for leaf in leaves(item, f"{path}/{key}")]
    return [(path, value)]


def assert_equal_states(one, other):
    """Same places, same values, same types of tensors."""
    assert [path for path, _ in leaves(one)] == [path for path, _ in leaves(other)]
    for (path, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        if torch.is_tensor(a):
            assert a.dtype == b.dtype, path
            assert torch.equal(a, b), path
        else:
            assert a == b, path


def assert_equal_weights(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.detach(), b.detach())


KINDS = [(CASPR, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(
    ("optimizer_class", "dtype"), [*KINDS, (Shampoo, torch.float32), (FullAdagrad, torch.bfloat16)]
)
@pytest.mark.parametrize("precondition", ["momentum", "gradient"])
@pytest.mark.parametrize("cut", [0, 2, 3, 4, 6, 7, 11])
def test_goes_on_bit_for_bit_after_a_cut(cut, dtype, precondition, optimizer_class):
    gradients = streams(dtype)
    whole, optimizer = fresh(optimizer_class, dtype, precondition=precondition)
    advance(whole, optimizer, gradients, 0, STEPS)
    first, before = fresh(optimizer_class, dtype, precondition=precondition)
    advance(first, before, gradients, 0, cut)
    second, after = fresh(optimizer_class, dtype, precondition=precondition)
    with torch.no_grad():
        for parameter, saved in zip(second, first, strict=True):
            parameter.copy_(saved)
    saved = before.state_dict()
    after.load_state_dict(through_disk(saved))
    assert_equal_states(after.state_dict(), saved)
    advance(second, after, gradients, cut, STEPS)
    assert_equal_weights(second, whole)
    assert_equal_states(after.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("factor_dtype", [None, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_tensor_keeps_its_own_type(dtype, factor_dtype):
    """torch would cast the factors to the type of the parameter, and round them."""
    parameters, optimizer = fresh(dtype=dtype, factor_dtype=factor_dtype)
    advance(parameters, optimizer, streams(dtype), 0, 8)
    saved = optimizer.state_dict()
    types = {value.dtype for _, value in leaves(saved["state"]) if torch.is_tensor(value)}
    assert (factor_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)) in types
    _, other = fresh(dtype=dtype, factor_dtype=factor_dtype)
    other.load_state_dict(through_disk(saved))
    assert_equal_states(other.state_dict(), saved)


def test_loading_replaces_what_was_there():
    """A load into an optimizer that has already run, with other gradients, leaves no trace of them."""
    gradients = streams()
    first, before = fresh()
    advance(first, before, gradients, 0, 6)
    second, after = fresh()
    advance(second, after, [[-3 * g for g in stream] for stream in gradients], 0, 9)
    after.load_state_dict(through_disk(before.state_dict()))
    with torch.no_grad():
        for parameter, saved in zip(second, first, strict=True):
            parameter.copy_(saved)
    advance(first, before, gradients, 6, STEPS)
    advance(second, after, gradients, 6, STEPS)
    assert_equal_weights(first, second)


def test_a_saved_copy_can_be_loaded_back_into_its_own_optimizer():
    """Rewinding: the copy is a snapshot, though the live state_dict is not."""
    gradients = streams()
    parameters, optimizer = fresh()
    advance(parameters, optimizer, gradients, 0, 6)
    snapshot = copy.deepcopy(optimizer.state_dict())
    weights = [parameter.detach().clone() for parameter in parameters]
    advance(parameters, optimizer, gradients, 6, STEPS)
    once = [parameter.detach().clone() for parameter in parameters]
    optimizer.load_state_dict(snapshot)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    advance(parameters, optimizer, gradients, 6, STEPS)
    assert_equal_weights(parameters, once)


@pytest.mark.parametrize("cut", [2, 6])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_like_the_original_and_apart_from_it(copied, cut):
    gradients = streams()
    parameters, optimizer = fresh()
    advance(parameters, optimizer, gradients, 0, cut)
    others, other = copied((parameters, optimizer))
    assert_equal_states(other.state_dict(), optimizer.state_dict())
    held = copy.deepcopy(other.state_dict())
    advance(parameters, optimizer, gradients, cut, STEPS)
    assert_equal_states(other.state_dict(), held)
    advance(others, other, gradients, cut, STEPS)
    assert_equal_weights(parameters, others)


def test_the_live_state_is_the_current_one():
    """optimizer.state shows what the steps use: a statistic set to zero there is gone."""
    gradients = random_stream(3, 4, steps=3, seed=1)
    parameter = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    bare = {"interval": 1, "start_step": 1, "graft": "none", "betas": (0.0, 0.9), "statistics": "accumulate"}
    optimizer = CASPR([parameter], lr=1.0, **bare)
    for gradient in gradients[:2]:
        parameter.grad = gradient
        optimizer.step()
    for tensor in optimizer.state[parameter].values():
        tensor.zero_()
    with torch.no_grad():
        parameter.zero_()
    parameter.grad = gradients[2]
    optimizer.step()
    alone = run(CASPR, torch.zeros(3, 4, dtype=torch.float64), gradients[2:], lr=1.0, **bare)[0]
    assert torch.allclose(parameter.detach(), alone, rtol=1e-12, atol=0)


def test_the_standard_state_dict():
    parameters, optimizer = fresh()
    assert optimizer.state_dict()["state"] == {}
    advance(parameters, optimizer, streams(), 0, 5)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) == set(range(len(SHAPES)))
    for state in saved["state"].values():
        assert float(state["step"]) == 5
        assert all(torch.is_tensor(value) or isinstance(value, (int, float)) for value in state.values())
    for group in saved["param_groups"]:
        assert group["params"] == list(range(len(SHAPES)))
        assert group["block_size"] == 3


def test_a_checkpoint_is_no_larger_than_its_tensors():
    """Views into shared memory are saved with the memory behind them: once, not once each."""
    parameters = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(8)]
    optimizer = CASPR(parameters, start_step=1)
    for parameter in parameters:
        parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    saved = optimizer.state_dict()
    tensors = [value for _, value in leaves(saved) if torch.is_tensor(value)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    file = io.BytesIO()
    torch.save(saved, file)
    assert size >= 8 * 6 * 64 * 64 * 4  # two moments, two statistics, two roots each
    assert len(file.getvalue()) < 1.1 * size + 200_000


def test_the_saved_options_win():
    """The options are part of the state: what was saved decides, not what the new optimizer was told."""
    gradients = streams()
    first, before = fresh()
    advance(first, before, gradients, 0, 6)
    second, after = fresh(block_size=1024, order=1, interval=1)
    with torch.no_grad():
        for parameter, saved in zip(second, first, strict=True):
            parameter.copy_(saved)
    after.load_state_dict(through_disk(before.state_dict()))
    assert after.param_groups[0]["block_size"] == 3
    advance(first, before, gradients, 6, STEPS)
    advance(second, after, gradients, 6, STEPS)
    assert_equal_weights(first, second)


def test_a_state_of_other_parameters_is_refused():
    _, optimizer = fresh()
    other = CASPR([torch.nn.Parameter(torch.ones(3, 4))])
    with pytest.raises(ValueError, match="parameter group"):
        other.load_state_dict(optimizer.state_dict())


@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_any_pattern_of_gradients_and_cuts(data):
    """Five parameters of one shape with gradients in steps of their own, and a save and load at any step:
    each moves as alone."""
    count, steps, shape = 5, 7, (3, 4)  # in blocks of 2 x 2 and 1 x 2, two of each
    marks = st.lists(st.booleans(), min_size=steps, max_size=steps)
    present = data.draw(st.lists(marks, min_size=count, max_size=count))
    cut = data.draw(st.integers(0, steps))
    options = {"lr": 0.1, "start_step": 2, "interval": 2, "betas": (0.9, 0.95), "block_size": 2}
    gradients = [
        [g if here else None for g, here in zip(stream, marks, strict=True)]
        for stream, marks in zip(
            (random_stream(*shape, steps=steps, seed=i) for i in range(count)), present, strict=True
        )
    ]
    start = torch.ones(shape, dtype=torch.float64)
    parameters = [torch.nn.Parameter(start.clone()) for _ in present]
    optimizer = CASPR(parameters, **options)
    for step in range(steps):
        if step == cut:
            saved = through_disk(optimizer.state_dict())
            optimizer = CASPR(parameters, **options)
            optimizer.load_state_dict(saved)
        for parameter, stream in zip(parameters, gradients, strict=True):
            parameter.grad = None if stream[step] is None else stream[step].clone()
        optimizer.step()
    for parameter, stream in zip(parameters, gradients, strict=True):
        alone = run(CASPR, start, stream, **options)[-1]
        assert torch.allclose(parameter.detach(), alone, rtol=1e-10, atol=1e-12)
