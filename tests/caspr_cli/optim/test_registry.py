"""Every optimizer of the bench through the registry: it learns, it resumes, and the groups mean what they say."""

import pickle
from typing import Any

import pytest
import torch
from stepping import loaded, through_disk
from torch import nn

from caspr_cli.optim.mixed import MixedOptimizer
from caspr_cli.optim.registry import build
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.schema import OPTIMIZERS

RATES = {"sgd": 0.1}
NO_COPIES = {"ademamix", "normuon", "schedule_free", "soap"}  # a pickle of them loses what is neither state nor group


def settings(name: str, **changes: Any) -> dict[str, Any]:
    found = options(OPTIMIZERS[name]()) | {"lr": RATES.get(name, 0.02)} | changes
    return found | ({"betas": tuple(found["betas"])} if "betas" in found else {})


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 6), nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def groups(net: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": [net[2].weight, net[4].weight], "precondition": True},
        {"params": [net[0].weight], "precondition": False},
        {"params": [net[2].bias, net[4].bias], "precondition": False, "weight_decay": 0.0},
    ]


def train(net: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(8, (64, 2), generator=generator)
    y = x.sum(1) % 8
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_it_learns(name: str) -> None:
    net = model()
    losses = train(net, build(name, groups(net), settings(name)), 90)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_it_continues_from_its_own_state_and_so_does_a_copy(name: str) -> None:
    whole, cut = model(), model()
    expected = train(whole, build(name, groups(whole), settings(name)), 24)
    first = build(name, groups(cut), settings(name))
    train(cut, first, 13)
    second = loaded(build(name, groups(cut), settings(name)), first.state_dict())
    twin = None if name in NO_COPIES else pickle.loads(pickle.dumps((cut, second)))
    assert train(cut, second, 11) == expected[13:]
    if twin:
        assert train(*twin, 11) == expected[13:]


@pytest.mark.parametrize(
    "name", ["caspr", "caspr_sum", "caspr_paper", "shampoo", "full_adagrad", "muon", "normuon", "soap", "psgd_kron"]
)
def test_what_is_not_preconditioned_is_adamw(name: str) -> None:
    """One step on the same gradients: embedding and biases move as under AdamW, matrices do not."""
    ours, theirs = model(), model()
    conf = settings(name, weight_decay=0.1) | ({"start_step": 1} if "start_step" in settings(name) else {})
    eps = conf.get("graft_eps", conf["eps"])
    optimizer = build(name, groups(ours), conf)
    adamw = build("adamw", groups(theirs), settings("adamw", betas=conf["betas"], eps=eps, weight_decay=0.1))
    for _ in range(2):  # SOAP only collects statistics in its first step
        for net, opt in ((ours, optimizer), (theirs, adamw)):
            opt.zero_grad()
            torch.manual_seed(0)
            for p in net.parameters():
                p.grad = torch.randn(p.shape)
            opt.step()
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if n in ("2.weight", "4.weight"):
            assert (p - q).abs().max() > 1e-4, n
        else:
            torch.testing.assert_close(p, q)


def test_a_mixed_optimizer_is_one_optimizer() -> None:
    net = model()
    optimizer = build("muon", groups(net), settings("muon"))
    assert isinstance(optimizer, MixedOptimizer)
    assert len(optimizer.param_groups) == 3
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(net, optimizer, 1)
    scheduler.step()
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, 1)  # at a learning rate of zero nothing moves, in either part
    assert all(map(torch.equal, net.parameters(), before))
    calls = []
    optimizer.step(lambda: calls.append(1) or 0.0)
    assert calls == [1]
    with pytest.raises(ValueError, match="takes no further param groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def test_muon_sees_a_convolution_as_one_filter_a_row() -> None:
    """As torch's Muon would see it flattened, which itself refuses what is no matrix."""
    torch.manual_seed(0)
    flat, convolution, matrix = (
        nn.Parameter(torch.randn(8, 12)),
        nn.Parameter(torch.empty(8, 3, 2, 2)),
        torch.randn(4, 5),
    )
    convolution.data = flat.detach().clone().view_as(convolution)
    beside = nn.Parameter(matrix.clone())
    conf = settings("muon", lr=0.01, weight_decay=0.1)
    ours = build("muon", [{"params": [convolution, beside], "precondition": True}], conf)
    theirs = torch.optim.Muon([flat], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        if step == 2:
            state = through_disk(ours.state_dict())
            ours = loaded(build("muon", [{"params": [convolution, beside], "precondition": True}], conf), state)
        flat.grad, beside.grad = torch.randn(8, 12), torch.randn(4, 5)
        convolution.grad = flat.grad.clone().view_as(convolution)
        ours.step()
        theirs.step()
    torch.testing.assert_close(convolution.detach().flatten(1), flat.detach(), rtol=0, atol=0)
    assert (beside - matrix).abs().max() > 0.01


MIXING = sorted(name for name in OPTIMIZERS if "adamw_lr_scale" in options(OPTIMIZERS[name]()))


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("vectors", ["apart", "among the matrices"])
def test_what_adamw_takes_has_a_rate_of_its_own(name: str, vectors: str) -> None:
    """A quarter of it moves embedding and biases a quarter as far, and the matrices as far as before."""
    moved = []
    for scale in (1.0, 0.25):
        net = model()
        found = groups(net)
        if vectors == "among the matrices":
            found = [{"params": [*found[0]["params"], *found[2]["params"]], "precondition": True}, found[1]]
        optimizer = build(name, found, settings(name, weight_decay=0.0, adamw_lr_scale=scale))
        before = [p.detach().clone() for p in net.parameters()]
        train(net, optimizer, 1)
        moved.append([p.detach() - q for p, q in zip(net.parameters(), before, strict=True)])
    matrices = {1, 3} if name != "full_adagrad" or vectors == "apart" else {1, 2, 3, 4}
    for i, (whole, less) in enumerate(zip(*moved, strict=True)):
        torch.testing.assert_close(less, whole if i in matrices else whole / 4, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"sgd", "schedule_free"}))
def test_weight_decay_means_the_same_in_all(name: str) -> None:
    """Each step multiplies a matrix by 1 - lr times the decay, and moves it as without.

    SGD adds the decay to the gradient, and Schedule-Free multiplies one of its two sequences (see test_baselines.py).
    """
    paths = []
    for decay in (0.0, 0.3):
        net, gradients = model(), torch.Generator().manual_seed(0)
        optimizer = build(name, groups(net), settings(name, weight_decay=decay))
        path = [net[2].weight.detach().clone()]
        for _ in range(4):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=gradients)
            optimizer.step()
            path.append(net[2].weight.detach().clone())
        paths.append(path)
    plain, decayed = paths
    for step in range(1, 4):  # SOAP does nothing in its first
        ours = decayed[step + 1] - decayed[step] * (1 - 0.02 * 0.3)
        # SOAP multiplies after the move, and so the move as well, by 0.994.
        torch.testing.assert_close(ours, plain[step + 1] - plain[step], rtol=1e-2, atol=1e-5)
    assert not torch.allclose(plain[-1], decayed[-1], rtol=1e-3)
