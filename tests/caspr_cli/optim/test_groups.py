"""Which parameters go to which group, and what is refused in a group."""

import pytest
import torch
from torch import nn

from caspr_cli import CASPR, FullAdagrad, Shampoo, param_groups
from caspr_cli.optim.groups import left_to_adamw


class OwnRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def model() -> nn.Sequential:
    made = nn.Sequential()
    for name, module in {
        "tokens": nn.Embedding(5, 4),
        "body": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)),
        "own": OwnRMSNorm(),
        "filters": nn.Conv1d(4, 4, 1),
        "frozen": nn.Linear(4, 4),
        "head": nn.Linear(4, 5),
    }.items():
        made.add_module(name, module)
    made.get_submodule("frozen").requires_grad_(False)
    return made


def test_each_parameter_is_in_the_group_of_its_kind() -> None:
    made = model()
    names = {id(p): name for name, p in made.named_parameters()}
    matrices, others, vectors = ([names[id(p)] for p in group["params"]] for group in param_groups(made))
    assert matrices == ["body.0.weight", "body.2.weight", "filters.weight"]
    assert others == ["tokens.weight", "head.weight"]
    assert vectors == ["body.0.bias", "body.1.weight", "body.1.bias", "own.weight", "filters.bias", "head.bias"]
    assert [group.get("weight_decay") for group in param_groups(made)] == [None, None, 0.0]
    CASPR(param_groups(made), weight_decay=0.1)


@pytest.mark.parametrize("heads", ["body", ["body"], ["body.0", "body.2"], "module", ["module"]])
def test_heads_are_modules_or_names(heads: list[str] | str) -> None:
    """One alone needs no brackets."""
    made = model()
    body = made.get_submodule("body")
    found = left_to_adamw(made, {"module": body, "['module']": [body]}.get(str(heads), heads))
    assert [name for name, reason in found.items() if reason == "head"] == ["body.0.weight", "body.2.weight"]
    assert "head.weight" not in found
    assert "head.weight" not in left_to_adamw(made, ())


def test_a_tied_output_layer_is_an_embedding_in_either_order() -> None:
    for first, second in ((nn.Linear(4, 5), nn.Embedding(5, 4)), (nn.Embedding(5, 4), nn.Linear(4, 5))):
        first.weight = second.weight
        assert left_to_adamw(nn.Sequential(first, second))["0.weight"] == "embedding"


def test_what_a_parametrization_keeps_is_of_its_module() -> None:
    """``weight_norm`` and the like move a weight into a module of their own."""
    kinds = {"tokens": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)}
    made = nn.ModuleDict({name: nn.utils.parametrizations.weight_norm(module) for name, module in kinds.items()})
    found = left_to_adamw(made, made["head"])
    reasons = {name: found.get(f"{name}.parametrizations.weight.original1") for name in kinds}
    assert reasons == {"tokens": "embedding", "body": None, "head": "head"}


def test_a_head_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="heads: the model has no module 'haed', but 'head'"):
        param_groups(model(), heads=["haed"])


def test_the_table_says_what_goes_where_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    groups, table = param_groups(model(), explain=True)
    assert len(groups) == 3
    assert capsys.readouterr().out == ""
    rows = [line.split() for line in table.splitlines()]
    assert ["body.*.weight", "4", "x", "4", "preconditioned", "matrix", "2", "of", "them"] in rows
    assert ["head.weight", "5", "x", "4", "AdamW", "head"] in rows
    assert ["own.weight", "4", "AdamW,", "no", "weight", "decay", "norm"] in rows
    assert ["frozen.weight", "4", "x", "4", "-", "frozen"] in rows
    column = nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 5))
    assert "*.weight  6 x 1  AdamW                   vector" in param_groups(column, explain=True)[1]


@pytest.mark.parametrize("cls", [CASPR, Shampoo, FullAdagrad])
def test_an_unknown_key_of_a_group_is_refused(cls: type[CASPR]) -> None:
    p, q = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    message = f"precondtion is not an option of {cls.__name__}. Did you mean precondition?"
    with pytest.raises(ValueError, match=message):
        cls([{"params": [p], "precondtion": False}])
    optimizer = cls([{"params": [p], "name": "body", "lr_scale": 0.5}])
    with pytest.raises(ValueError, match="wheight_decay is not an option"):
        optimizer.add_param_group({"params": [q], "wheight_decay": 0.1})
    with pytest.raises(ValueError, match="group_size is an option of the optimizer, not of a param group"):
        optimizer.add_param_group({"params": [q], "group_size": 1})
    assert len(optimizer.param_groups) == 1
