"""Parameters of `fully_shard`: a part of the state for each rank, torch's checkpoints, and changes on the way."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, alone
from rows import OPTIONS, SHAPES, Net, divided, fit, full_state, sharded, train, weights, whole
from torch import Tensor, nn

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.optim.stacks import is_factor
from caspr_cli.optim.state import COUNTERS


def state_bytes(rank: int, how: str, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Of factors and of moments, on this rank."""
    optimizer = train(weights(how, torch.float32, shapes), range(2), how)
    sizes = {True: 0, False: 0}
    for state in optimizer.state.values():
        for name, x in state.items():
            if name not in COUNTERS:
                here = x.to_local() if hasattr(x, "to_local") else x
                sizes[is_factor(name)] += here.numel() * here.element_size()
    return sizes[True], sizes[False]


def test_each_rank_keeps_its_part_of_the_state(ranks: Ranks) -> None:
    shapes = [(64, 64)] * 4
    factors, moments = alone(state_bytes, "plain", shapes)
    assert ranks(state_bytes, "rows", shapes) == [(factors // ranks.world, moments // ranks.world)] * ranks.world


def through_torch(rank: int, path: str, load: bool, kind: str, how: str) -> list[Tensor]:
    """torch.distributed.checkpoint, of whole factors or, with ``parts``, of those of each rank; ``full``: one file with
    everything in it, as `torch.save` writes it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    model: nn.Module = sharded(Net()) if how == "fsdp" else Net()
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = CASPR(model.parameters(), **OPTIONS)
    optimizer.sharded_state, full = kind == "parts", kind == "full"
    options = StateDictOptions(full_state_dict=full, cpu_offload=kind != "whole")

    def save_or_load(model_state: Any, optimizer_state: Any) -> Any:
        content = {"model": model_state, "optimizer": optimizer_state}
        if full and load:
            return torch.load(f"{path}/full.pt", weights_only=True)
        if full and rank == 0:
            torch.save(content, f"{path}/full.pt")
        elif load:
            dcp.load(content, checkpoint_id=path)
        elif not full:
            dcp.save(content, checkpoint_id=path)
        return content

    if load:
        content = save_or_load(*get_state_dict(model, optimizer, options=options))
        set_state_dict(
            model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"], options=options
        )
    else:
        fit(model, optimizer, range(4))
        save_or_load(*get_state_dict(model, optimizer, options=options))
    return fit(model, optimizer, range(4, 7))


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("fsdp", "parts"),
        ("ddp", "full"),
        pytest.param("fsdp", "full", marks=pytest.mark.release),
        pytest.param("fsdp", "whole", marks=pytest.mark.release),
        pytest.param("ddp", "whole", marks=pytest.mark.release),
        pytest.param("ddp", "parts", marks=pytest.mark.release),
    ],
)
def test_torchs_checkpoints_load_at_another_number_of_ranks(
    two: Ranks, ranks: Ranks, how: str, kind: str, tmp_path: Path
) -> None:
    expected = ranks(through_torch, str(tmp_path), False, kind, how)[0]
    for again in {two, ranks}:
        for other in ("fsdp", "ddp"):
            for found in again(through_torch, str(tmp_path), True, kind, other):
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        alone(through_torch, str(tmp_path), True, kind, "plain"), expected, rtol=1e-8, atol=1e-10
    )


def bare(rank: int, how: str, path: str, load: bool) -> tuple[list[Tensor], bool]:
    """The state_dict itself, with moments made whole by the user; what was loaded is saved again."""
    params = weights(how, torch.float64, SHAPES)
    optimizer = CASPR(params, **OPTIONS)
    same = True
    if load:
        saved = torch.load(path, weights_only=True)
        with torch.no_grad():
            for i, (p, w) in enumerate(zip(params, saved["weights"], strict=True)):
                p.copy_(divided(w, how, i))
        optimizer.load_state_dict(saved["optimizer"])
        again = full_state(optimizer)["state"]
        same = all(torch.equal(x, again[i][k]) for i, s in saved["optimizer"]["state"].items() for k, x in s.items())
    else:
        train(params, range(4), how, optimizer)
        content = {"optimizer": full_state(optimizer), "weights": [whole(p) for p in params]}
        if rank == 0:
            torch.save(content, path)
    train(params, range(4, 7), how, optimizer)
    return [whole(p) for p in params], same


@pytest.mark.parametrize("source", ["ranks", "one"])
def test_a_bare_state_dict_loads_anywhere(two: Ranks, ranks: Ranks, source: str, tmp_path: Path) -> None:
    path = str(tmp_path / "state.pt")
    if source == "ranks":
        expected = ranks(bare, "rows", path, False)[0][0]
    else:
        expected, _ = alone(bare, "plain", path, False)
    for found, same in [
        *two(bare, "rows", path, True),
        *(ranks(bare, "replicas", path, True) if ranks.world == 4 else ()),
        *two(bare, "plain", path, True),
        alone(bare, "plain", path, True),
    ]:
        assert same
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def changed(rank: int, how: str) -> list[Tensor]:
    """AdamW, then preconditioned, with other roots, with another momentum, and its state in another class."""
    params = weights(how, torch.float64, SHAPES)
    optimizer = train(params, range(4), how, precondition=False)
    group = optimizer.param_groups[0]
    changes: list[dict[str, Any]] = [
        {"precondition": "gradient", "start_step": 3},
        {"order": 1},
        {"precondition": "momentum"},
    ]
    for number, change in enumerate(changes):
        group.update(change)
        train(params, range(5 * number + 4, 5 * number + 9), how, optimizer, broken={5: {0}})
    shampoo = Shampoo(params)
    shampoo.load_state_dict(optimizer.state_dict())
    train(params, range(19, 22), how, shampoo)
    warm = CASPR(params)  # without what it has learned of gradients
    warm.load_state_dict(without_factors(shampoo.state_dict()))
    warm.param_groups[0].update(start_step=2)
    params, warm = copy.deepcopy([params, warm])
    train(params, range(22, 26), how, warm)
    return [whole(p) for p in params]


def without_factors(content: dict[str, Any]) -> dict[str, Any]:
    """A state like that of AdamW."""
    moments = ("step", "exp_avg", "exp_avg_sq")
    return content | {"state": {i: {k: s[k] for k in moments} for i, s in content["state"].items()}}


@pytest.mark.parametrize("how", ["plain", "rows"])
def test_changes_on_the_way_are_the_same_on_all_ranks(ranks: Ranks, how: str) -> None:
    expected = alone(changed, "plain")
    for found in ranks(changed, how):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
