"""Options that are out of range, and options that differ between groups."""

import inspect
import math
import re

import pytest
import torch
from references.drive import relative_error, run, turns_of
from references.optimizer import reference_weights
from references.stream import random_stream

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo
from caspr_cli.optim.family import OF_OPTIMIZER


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


REFUSED = [
    ({"lr": -0.1}, "lr should be >= 0 but is: -0.1"),
    ({"lr": math.nan}, "lr should be >= 0 but is: nan"),
    ({"eps": 0.0}, "eps should be > 0 but is: 0.0"),
    ({"eps": -1.0}, "eps should be > 0 but is: -1.0"),
    ({"eps": (None, 1e-3)}, r"eps should be > 0 but is: \(None, 0.001\)"),
    ({"lr": "big"}, "lr should be >= 0 but is: big"),
    ({"weight_decay": -0.1}, "weight_decay should be >= 0 but is: -0.1"),
    ({"graft_eps": 0}, "graft_eps should be > 0 but is: 0"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] should be in \[0, 1\) but is: 1.0"),
    ({"betas": (-0.1, 0.9)}, r"betas\[0\] should be in \[0, 1\) but is: -0.1"),
    ({"betas": (0.9, 1.5)}, r"betas\[1\] should be in \[0, 1\) but is: 1.5"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] should be in \[0, 1\) but is: -0.1"),
    ({"betas": (0.9, 1.0)}, 'statistics="accumulate"'),
    ({"statistics": "x"}, "statistics should be one of ema, accumulate but is: 'x'"),
    ({"damping": "x"}, "damping should be one of relative, absolute but is: 'x'"),
    ({"graft": "x"}, "graft should be one of adam, rmsprop, rms, sgd, none but is: 'x'"),
    ({"precondition": "x"}, "precondition should be one of momentum, gradient.* but is: 'x'"),
    ({"interval": 0}, "interval should be a positive integer but is: 0"),
    ({"interval": 1.5}, "interval should be a positive integer but is: 1.5"),
    ({"interval": math.inf}, "interval should be a positive integer but is: inf"),
    ({"start_step": 0}, "start_step should be a positive integer but is: 0"),
    ({"block_size": 0}, "block_size should be a positive integer but is: 0"),
    ({"solver": "qr"}, "solver should be one of auto, eigh, newton but is: 'qr'"),
    ({"root_dtype": torch.float16}, "root_dtype should be one of None, torch.bfloat16 but is: torch.float16"),
    (
        {"apply_dtype": torch.float16},
        "apply_dtype should be one of None, auto, torch.bfloat16, torch.float32 but is: torch.float16",
    ),
    ({"pack_roots": "yes"}, "pack_roots should be one of True, False but is: 'yes'"),
]
SCHEDULED = {"lr", "betas", "weight_decay"}


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_values_out_of_range_are_named(options, message):
    """Of defaults and of groups, at construction and later; a refused group leaves the optimizer as it was."""
    for optimizer in (CASPR, Shampoo, FullAdagrad):
        with pytest.raises(ValueError, match=message):
            optimizer([parameter(2, 3)], **options)
    with pytest.raises(ValueError, match=message):
        CASPR([{"params": [parameter(2, 3)], **options}])
    optimizer = CASPR([parameter(2, 3)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(2, 3)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("options", "message"), [x for x in REFUSED if not x[0].keys() & SCHEDULED])
def test_values_out_of_range_are_named_where_they_are_set_by_hand(options, message):
    """By the next step, which changes nothing; not so lr and betas alone, which schedules write in each step."""
    weight = parameter(2, 3)
    optimizer = CASPR([weight])
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    before, good = weight.detach().clone(), dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(weight, before)
    optimizer.param_groups[0].update(good)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2


def test_what_makes_a_class_is_not_set_by_hand():
    weight = parameter(2, 3)
    optimizer = Shampoo([weight])
    optimizer.param_groups[0]["order"] = 2
    with pytest.raises(ValueError, match="order of Shampoo is inf but is: 2"):
        optimizer.step()


OF_SOME = [  # that not all three classes have
    *((CASPR, "order", x, f"a positive integer or inf but is: {x}") for x in (0, -1, 1.5, math.nan, True)),
    *((kind, "exponent", x, r"one of 0, 0\.25, 0\.5, 1 but is")
      for kind in (CASPR, Shampoo) for x in (0.3, 2, -1, math.nan)),
    *((kind, "merge", "x", r"one of matrix, square, none.* but is: 'x'") for kind in (CASPR, Shampoo)),
    *((kind, "axes", x, f"one of all, first, last, row but is: {x!r}")
      for kind in (CASPR, Shampoo) for x in ("x", "rows", 0, None)),
    (CASPR, "batch_axes", -1, "a positive integer or 0 but is: -1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value", "words"), OF_SOME)
def test_values_of_other_options_out_of_range(kind, name, value, words):
    with pytest.raises(ValueError, match=f"{name} should be {words}"):
        kind([parameter(2, 3)], **{name: value})


@pytest.mark.parametrize("optimizer", [CASPR, Shampoo, FullAdagrad])
def test_the_signature_and_the_docstring_have_every_option(optimizer):
    given = inspect.signature(optimizer).parameters
    options = optimizer([parameter(2, 3)]).defaults
    assert {name: p.default for name, p in given.items() if name not in ("params", *OF_OPTIMIZER)} == {
        name: value for name, value in options.items() if name not in optimizer.fixed
    }
    assert [name for name, p in given.items() if p.kind is not p.KEYWORD_ONLY] == [
        "params", "lr", "betas", "eps", "weight_decay",
    ]  # fmt: skip
    assert all(f"\n        {name}: " in optimizer.__doc__ for name in given)
    with pytest.raises(TypeError, match=rf"{optimizer.__name__}.__init__\(\) .* 'ordr'"):
        optimizer([parameter(2, 3)], ordr=3)


@pytest.mark.release
def test_a_type_checker_sees_names_and_words(tmp_path):
    api = pytest.importorskip("mypy.api")
    lines = ['graft="adma"', "ordr=3", 'lr="x"', 'graft="adam", order=3, factor_dtype=torch.float64']
    head = "import torch\nfrom caspr_cli.optim import CASPR\np = [torch.nn.Parameter(torch.ones(2, 2))]\n"
    (tmp_path / "user.py").write_text(head + "\n".join(f"CASPR(p, {line})" for line in lines))
    out, _, _ = api.run([str(tmp_path / "user.py"), "--cache-dir", str(tmp_path)])
    assert re.findall(r"user.py:(\d+): error", out) == ["4", "5", "6"], out


def test_no_parameters_is_an_error_as_everywhere_in_torch():
    with pytest.raises(ValueError, match="empty parameter list"):
        CASPR([])


def test_sparse_gradients_are_refused():
    weight = parameter(4, 3)
    optimizer = CASPR([weight])
    weight.grad = torch.sparse_coo_tensor([[1], [2]], [1.0], (4, 3), check_invariants=True)
    with pytest.raises((RuntimeError, ValueError), match="sparse"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 3))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_are_no_real_numbers_are_refused(dtype):
    other = torch.nn.Parameter(torch.ones(2, 3, dtype=dtype), requires_grad=False)
    optimizer = CASPR([parameter(2, 3)])
    for add in (lambda: CASPR([other]), lambda: optimizer.add_param_group({"params": [other]})):
        with pytest.raises(ValueError, match="takes real floating-point parameters but got"):
            add()
    assert len(optimizer.param_groups) == 1


def test_the_smallest_allowed_values_run():
    """betas of zero, an lr and a weight decay of zero: nothing moves, nothing fails."""
    gradients = random_stream(2, 3, steps=3, seed=1)
    weight = torch.ones(2, 3, dtype=torch.float64)
    for w in run(CASPR, weight, gradients, lr=0.0, betas=(0.0, 0.0), interval=1, start_step=1):
        assert torch.equal(w, weight)


GROUPS = [
    {"precondition": False},
    {"order": 1, "graft": "sgd", "weight_decay": 0.2},
    {"order": 3, "statistics": "accumulate", "interval": 1, "start_step": 1},
    {"order": math.inf, "lr": 0.02, "betas": (0.5, 0.8)},
    {"precondition": "gradient", "damping": "absolute", "eps": 1e-2},
    {"block_size": 2, "maximize": True, "graft": "rmsprop", "graft_eps": 1e-3},
    {"graft": "none", "start_step": 4},
    {"merge": "none", "precondition_1d": True, "betas": (0.0, 0.9)},
    {"axes": "first", "order": 1},
    {"axes": "last", "order": math.inf, "merge": "none"},
    {"axes": "row", "block_size": 3},
]
DEFAULTS = {"lr": 0.1, "betas": (0.9, 0.95), "start_step": 2, "interval": 2, "eps": 1e-4}


def reference_of(group, weight, gradients, turns):
    """The slow run of one parameter under the defaults and its group's options."""
    options = {**DEFAULTS, **group}
    if options.get("precondition") is False:
        options |= {"precondition": "momentum", "use_preconditioner": False}
    if options.get("order") == math.inf:
        return reference_weights(weight, gradients, "shampoo", turns=turns, **options)
    return reference_weights(weight, gradients, turns=turns, **options)


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3), (5,)])
@pytest.mark.parametrize("late", [False, True])
def test_groups_of_different_options_in_one_optimizer(shape, late):
    """Every group moves like an optimizer of its own; ``late``: all but the first are added after two steps."""
    steps = 8
    weights = random_stream(*shape, steps=len(GROUPS), seed=2)
    streams = [random_stream(*shape, steps=steps, seed=10 + i) for i in range(len(GROUPS))]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    groups = [{"params": [p], **group} for p, group in zip(parameters, GROUPS, strict=True)]
    optimizer = CASPR(groups[:1] if late else groups, **DEFAULTS)
    for step in range(steps):
        if late and step == 2:
            for group in groups[1:]:
                optimizer.add_param_group(group)
        for p, stream in zip(parameters, streams, strict=True):
            p.grad = stream[step].clone()
        optimizer.step()
    for i, group in enumerate(GROUPS):
        seen = streams[i][2:] if late and i > 0 else streams[i]
        expected = reference_of(group, weights[i], seen, turns_of(optimizer, parameters[i], i))[-1]
        assert relative_error(parameters[i].detach(), expected) < 1e-9, group


def test_counts_may_be_written_as_numbers_with_a_point():
    """As a file of settings may have them."""
    params, others = ([torch.nn.Parameter(torch.ones(2, 4, 3))] for _ in range(2))
    whole = CASPR(params, start_step=1, interval=2, polar=True, polar_steps=3, batch_axes=1, order=2)
    point = CASPR(others, start_step=1.0, interval=2.0, polar=True, polar_steps=3.0, batch_axes=1.0, order=2.0)
    for group in (params, others):
        group[0].grad = torch.arange(24.0).view(2, 4, 3).sin()
    whole.step()
    point.step()
    assert torch.equal(params[0], others[0])


def test_named_parameters_are_accepted():
    layer = torch.nn.Linear(3, 2)
    optimizer = CASPR(layer.named_parameters())
    layer(torch.ones(4, 3)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert (layer.weight.detach() - before).abs().max() == pytest.approx(1e-3, rel=1e-3)
