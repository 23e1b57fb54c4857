"""What every torch optimizer can do: closures, schedulers, scalers, averaged models, plain loops."""

import copy

import pytest
import torch
from references.drive import relative_error, run
from references.stream import random_stream

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

OPTIONS = {"start_step": 3, "interval": 2, "betas": (0.9, 0.95)}


def toy(seed=0):
    """A network of 4 matrices and vectors, and a regression that it can learn."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    inputs = torch.randn(64, 6)
    targets = torch.sin(inputs @ torch.randn(6, 2))
    return model, inputs, targets


def loss_of(model, inputs, targets):
    return torch.nn.functional.mse_loss(model(inputs), targets)


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(optimizer_class, steps=60, **options):
    """The losses before every step and after the last, and the model."""
    model, inputs, targets = toy()
    optimizer = optimizer_class(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [*losses, loss_of(model, inputs, targets).item()], model


def quadratic(optimizer_class, **options):
    """Last over first loss of 200 steps on ||L^T (W - W*) R||^2 / 2, both sides rotated and of condition 10."""
    rows, columns = 8, 12
    left, right = (
        torch.linalg.qr(random_stream(size, size, steps=1, seed=size)[0])[0] * torch.logspace(0, -1, size).double()
        for size in (rows, columns)
    )
    best = random_stream(rows, columns, steps=1, seed=1)[0]
    weight = torch.nn.Parameter(torch.zeros_like(best))
    optimizer = optimizer_class([weight], lr=0.1, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 200)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = ((left.mT @ (weight - best) @ right) ** 2).sum() / 2
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    return losses[-1] / losses[0]


@pytest.mark.parametrize("optimizer", [CASPR, Shampoo, FullAdagrad])
def test_a_bare_loop_learns_faster_than_the_graft_method_alone(optimizer):
    """Equal lr and equal lengths of the steps, so that only the direction differs; a factor of 10 when written."""
    alone = quadratic(optimizer, precondition=False)
    assert alone < 1e-2
    assert quadratic(optimizer, start_step=5, interval=1) < alone / 3
    assert quadratic(optimizer) < alone / 3


def test_a_closure_has_gradients_enabled_and_its_loss_is_returned():
    model, inputs, targets = toy()
    plain, plain_model = trained(CASPR, steps=5, lr=0.01, **OPTIONS)
    optimizer = CASPR(model.parameters(), lr=0.01, **OPTIONS)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():  # as some loops call it
        losses = [optimizer.step(closure) for _ in range(5)]
    assert [loss.item() for loss in losses] == calls == plain[:5]
    assert torch.equal(weights_of(model), weights_of(plain_model))
    assert optimizer.step() is None


@pytest.mark.parametrize("options", [{}, {"graft": "rms"}, {"precondition": "gradient"}])
def test_a_group_on_two_devices(options):
    """Each does its own work, also where tensors are cut into blocks of several shapes. ("meta" has no numbers.)"""
    shapes = [(4, 5), (3, 3), (7,)]
    alone, beside = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    away = [torch.nn.Parameter(torch.ones(shape, device="meta")) for shape in shapes]
    options = options | {"block_size": 3, "interval": 1}  # with another one turns depend on all blocks of a group
    optimizers = [CASPR(alone, **options), CASPR([*beside, *away], **options)]
    for step in range(4):
        for i, ps in enumerate((alone, beside, away)):
            for p, G in zip(ps, (random_stream(*shape, steps=4, seed=7)[step] for shape in shapes), strict=True):
                p.grad = G.float() if i < 2 else torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(alone, beside, strict=True))


def test_another_default_device_changes_nothing():
    weights = []
    for device in ("cpu", "meta"):
        p = torch.nn.Parameter(torch.zeros(3, 4))
        p.grad = random_stream(3, 4, steps=1, seed=1)[0].float()
        with torch.device(device):
            CASPR([p]).step()
        weights.append(p)
    assert torch.equal(*weights)


def test_steps_leave_no_graph_behind():
    model, inputs, targets = toy()
    optimizer = CASPR(model.parameters(), start_step=1)
    loss_of(model, inputs, targets).backward()
    optimizer.step()
    for parameter, state in optimizer.state.items():
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert not any(torch.is_tensor(value) and value.requires_grad for value in state.values())


def test_a_learning_rate_in_a_tensor():
    weight, *gradients = random_stream(3, 4, steps=6, seed=1)
    expected = run(CASPR, weight, gradients, lr=0.1, **OPTIONS)
    weights = run(CASPR, weight, gradients, lr=torch.tensor(0.1, dtype=torch.float64), **OPTIONS)
    for w, w_expected in zip(weights, expected, strict=True):
        assert relative_error(w, w_expected) < 1e-12


def one_cycle(optimizer_class, weight, gradients, **options):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = optimizer_class([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=len(gradients))
    momenta = set()
    for gradient in gradients:
        momenta.add(optimizer.param_groups[0]["betas"][0])
        parameter.grad = gradient.clone()
        optimizer.step()
        schedule.step()
    return parameter.detach(), momenta


def test_one_cycle_moves_lr_and_momentum():
    """OneCycleLR writes betas[0] too; without preconditioning the whole path is AdamW's."""
    weight, *gradients = random_stream(3, 4, steps=13, seed=3)
    expected, _ = one_cycle(torch.optim.AdamW, weight, gradients)
    actual, momenta = one_cycle(CASPR, weight, gradients, precondition=False)
    assert relative_error(actual, expected) < 1e-12
    assert len(momenta) > 5
    moved, _ = one_cycle(CASPR, weight, gradients, start_step=3)
    assert torch.isfinite(moved).all()
    assert relative_error(moved, expected) > 1e-3


def scaled_run(overflow_at, seed=4):
    """Steps under a CPU GradScaler whose scale is a power of two, one of them with an infinite gradient."""
    model, inputs, targets = toy(seed)
    optimizer = CASPR(model.parameters(), lr=0.01, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(9):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, inputs, targets)).backward()
        before = copy.deepcopy(optimizer.state_dict()), weights_of(model)
        if step == overflow_at:
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step == overflow_at:
            assert torch.equal(weights_of(model), before[1])
            after = optimizer.state_dict()["state"]
            for index, state in before[0]["state"].items():
                for name, value in state.items():
                    assert torch.equal(value, after[index][name])
    return weights_of(model), scaler.get_scale()


@pytest.mark.parametrize("overflow_at", [1, 5])
def test_grad_scaler_changes_nothing_and_skips_what_overflows(overflow_at):
    """Scaling by powers of two is exact, so the scaled run equals the plain one of one step less."""
    model, inputs, targets = toy(4)
    optimizer = CASPR(model.parameters(), lr=0.01, **OPTIONS)
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model, inputs, targets).backward()
        optimizer.step()
    weights, scale = scaled_run(overflow_at)
    assert torch.equal(weights, weights_of(model))
    assert scale != 2.0**10
    assert torch.isfinite(weights).all()
