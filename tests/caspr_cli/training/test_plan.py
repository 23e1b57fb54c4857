from typing import Any, cast

import pytest
import torch
from torch import nn

from caspr_cli import tasks
from caspr_cli.optim.cost import state_bytes
from caspr_cli.optim.registry import build
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import OPTIMIZERS, Recipe, TaskConf
from caspr_cli.tasks.base import Task
from caspr_cli.training.plan import plan, table


class Small(Task):
    """Two convolutions, an embedding, a norm and a head."""

    heads = ("head",)

    def __init__(self) -> None: ...
    def prepare(self) -> None: ...

    def model(self) -> nn.Module:
        parts = {
            "words": nn.Embedding(50, 8),
            "convs": nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)),
            "norm": nn.LayerNorm(8),
            "wide": nn.Linear(8, 30),
            "head": nn.Linear(8, 5),
        }
        return nn.ModuleDict(parts)

    def train_flops(self, model: nn.Module) -> float:
        return 1e6

    dataset = loss = metrics = evaluate = units = describe_data = cast(Any, None)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "load", lambda conf, seed: Small())
    monkeypatch.setattr(Small, "__abstractmethods__", frozenset())


def recipe(name: str, **changes: Any) -> Recipe:
    return Recipe(task=TaskConf(name="small"), optim=OPTIMIZERS[name](**changes))


def test_each_tensor_has_its_treatment_and_reason() -> None:
    found = plan(recipe("caspr", block_size=10))
    rows = {row.tensor: (row.count, row.shape, row.blocks, row.treatment, row.reason) for row in found.rows}
    assert rows == {
        "words.weight": (1, (50, 8), "-", "AdamW", "embedding"),
        "convs.*.weight": (2, (6, 4, 3, 3), "4 of 6 x 9", "caspr", "tensor, seen as 6 x 36"),
        "convs.*.bias": (2, (6,), "-", "AdamW", "bias"),
        "norm.weight": (1, (8,), "-", "AdamW", "norm"),
        "norm.bias": (1, (8,), "-", "AdamW", "norm"),
        "wide.weight": (1, (30, 8), "3 of 10 x 8", "caspr", "matrix"),
        "wide.bias": (1, (30,), "-", "AdamW", "bias"),
        "head.weight": (1, (5, 8), "-", "AdamW", "head"),
        "head.bias": (1, (5,), "-", "AdamW", "bias"),
    }
    assert found.preconditioned == 2 * 6 * 36 + 30 * 8
    lines = list(table(found))
    assert " ".join(lines[0].split()) == "tensor count shape blocks treatment reason state FLOPs/step share"
    assert "4 of 6 x 9" in lines[2]


def test_what_is_thin_or_a_vector_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"down": nn.Linear(8, 600, bias=False), "one": nn.Linear(600, 1, bias=False)}
    monkeypatch.setattr(Small, "model", lambda self: nn.ModuleDict(parts))
    monkeypatch.setattr(Small, "heads", ())
    rows = {row.tensor: (row.blocks, row.treatment, row.reason) for row in plan(recipe("caspr")).rows}
    reason = "matrix; statistics of the axis of 8 alone: the other is more than 8 times as long"
    assert rows == {
        "down.weight": ("1 of 600 x 8", "caspr", reason),
        "one.weight": ("-", "AdamW", "matrix of one axis"),
    }


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_state_is_what_a_real_optimizer_holds_after_two_steps(name: str) -> None:
    changes = {"start_step": 1} if hasattr(OPTIMIZERS[name](), "start_step") else {}
    found = plan(recipe(name, **changes))
    model = Small().model()
    optimizer = build(name, Small().param_groups(model), options(OPTIMIZERS[name](**changes)))
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert sum(row.count * row.state for row in found.rows) == state_bytes(optimizer.state)


@pytest.mark.parametrize("name", ["muon", "soap", "sgd", "shampoo"])
def test_what_takes_a_convolution(name: str) -> None:
    treatments = {row.tensor: row.treatment for row in plan(recipe(name)).rows}
    assert treatments["convs.*.weight"] == treatments["wide.weight"] == name


def test_adamw_has_another_rate_for_what_matrix_methods_leave_to_it() -> None:
    treatments = {row.tensor: row.treatment for row in plan(recipe("adamw", adamw_lr_scale=0.5)).rows}
    left = {tensor for tensor, treatment in treatments.items() if treatment == "adamw, lr x 0.5"}
    assert left == {row.tensor for row in plan(recipe("caspr")).rows if row.treatment == "AdamW"}
    assert {treatments[tensor] for tensor in treatments.keys() - left} == {"adamw"}


def test_products_are_counted() -> None:
    (wide,) = (row for row in plan(recipe("muon", ns_steps=3)).rows if row.tensor == "wide.weight")
    m, n = 8, 30  # Newton-Schulz works on the wide side: A = X X', B = b A + c A A, X = a X + B X
    assert wide.flops == 3 * 2 * (m * m * n + m * m * m + m * m * n)


def test_a_bad_option_is_the_users_to_mend() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.eps should be > 0"):
        plan(recipe("caspr", eps=-1.0))
