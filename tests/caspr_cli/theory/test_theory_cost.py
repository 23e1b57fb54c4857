"""The cost of a step by its shapes: formulas against the engine, and assumptions on ranks and large models."""

import math
from pathlib import Path

import pytest
from pandas import to_numeric

from caspr_cli.bench.shapes import layer
from caspr_cli.optim import CASPR
from caspr_cli.optim.cost import called_flops, step_flops
from caspr_cli.optim.symmetric import packed_length
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.report.answer import sheet
from caspr_cli.theory import cost
from caspr_cli.theory.choices import Costs
from caspr_cli.theory.cost_runs import called_products, divided, model_of
from caspr_cli.theory.work import PASSES, seconds, stand_ins, work_of


def meta(*shapes):
    return stand_ins(shapes)


@pytest.mark.parametrize("options", [{}, {"order": 3}, {"block_size": 64}, {"interval": 3}])
@pytest.mark.parametrize("shape", [(40, 24), (128, 192), (8, 6, 3, 3)])
def test_one_matrix_costs_what_the_docstring_says(shape, options):
    optimizer = CASPR(meta(shape), **options)
    work = work_of(optimizer)
    q, b = options.get("order", 2), options.get("block_size", 1024)
    m, n = shape[0], math.prod(shape[1:])
    blocks = -(-m // b) * -(-n // b)
    m, n = min(m, b), min(n, b)
    packed = packed_length(m) + packed_length(n)
    assert work.statistics == pytest.approx(blocks * 2 * m * n * (packed_length(m) / m + packed_length(n) / n))
    assert work.apply == blocks * q * 2 * m * n * (m + n)
    assert work.roots == pytest.approx(blocks * 25 * (m**3 + n**3) / options.get("interval", 10))
    assert work.traffic == blocks * 4 * (2 * packed + q * (m * m + n * n))
    assert work.entries == blocks * 4 * PASSES * m * n
    assert work.factors == blocks * 4 * (packed + m * m + n * n + m + n)
    assert work.moments == blocks * 8 * m * n
    assert step_flops(optimizer) == {key: getattr(work, key) for key in ("statistics", "roots", "apply")}


def test_products_that_are_called_have_these_flops():
    optimizer = CASPR(meta(*layer(96), (300, 500)), start_step=1, interval=1000)
    optimizer.step()  # roots are made in the first
    assert called_flops(optimizer) == work_of(optimizer).products
    assert called_products() == 1


def test_seconds_are_work_at_the_rates_of_the_machine():
    work = work_of(CASPR(meta((64, 64))))
    assert seconds(work, 2.0, 8.0) == {
        "statistics": work.statistics / 2,
        "roots": work.roots / 2,
        "apply": work.apply / 2,
        "rest": (work.traffic + work.entries) / 8,
    }


def test_a_large_model_by_hand(monkeypatch):
    """7B on 64 GPUs: what training takes, and the part of a step that has the same length on any machine."""
    monkeypatch.setattr(cost, "LARGE", {"llama-7b": (64, 256)})
    table = cost._large(Costs(), lambda text: None)
    assert [(row.gpus, row.mode) for row in table.itertuples()] == [
        (64, "DDP"), (64, "fully_shard"), (256, "DDP"), (256, "fully_shard"),
    ]  # fmt: skip
    ddp, sharded = table.iloc[0], table.iloc[1]
    assert ddp["parameters"] == pytest.approx(6.74e9, rel=1e-3)
    assert ddp["training"] == pytest.approx(6 * ddp["parameters"] * 4e6 / (64 * 989e12 * 0.4))
    assert ddp["share"] == ddp["total"] / (ddp["total"] + ddp["training"])
    assert ddp["total"] == ddp["compute"] + ddp["exchange"]
    assert (ddp["fits"], sharded["fits"]) == ("no", "yes")
    assert 16 * ddp["parameters"] / 1e9 < ddp["gigabytes"] < 64 * sharded["gigabytes"]  # weights, gradients, moments
    assert len(cost._large(Costs(quick=True), lambda text: None)) == 2
    assert cost._large(Costs(quick=True, network=25.0), print).iloc[1]["exchange"] > sharded["exchange"]


@pytest.mark.parametrize("ranks", [1, 2, 8, 50])
def test_ranks_have_their_part_and_a_block_at_most(ranks):
    optimizer = CASPR(meta(*layer(128) * 3, (700, 90)), block_size=64)
    found = divided(optimizer, ranks)
    assert found["balance"] <= 1 + 1e-12
    assert found["most"] <= found["bound"] * (1 + 1e-12)
    assert found["speedup"] <= ranks * (1 + 1e-12)
    assert found["most"] * found["speedup"] == pytest.approx(divided(optimizer, 1)["most"])
    assert found["received"] == (4 * work_of(optimizer).parameters if ranks > 1 else 0)
    assert found["factors"] == work_of(optimizer).factors / ranks


def test_a_model_is_costed_as_the_plan_does():
    """The numbers of ``caspr-train task=vit optim=caspr_sum debug=plan``."""
    from caspr_cli.recipe.schema import OPTIMIZERS, Recipe
    from caspr_cli.tasks.registry import ViTConf
    from caspr_cli.training.plan import plan

    planned = plan(Recipe(task=ViTConf(), optim=OPTIMIZERS["caspr_sum"]()))
    found = model_of("vit", None)
    rows = [row for row in planned.rows if row.treatment == "caspr_sum"]
    assert found.parameters == planned.parameters
    assert found.work.parameters == sum(row.count * math.prod(row.shape) for row in rows)
    assert found.work.products + found.work.roots == pytest.approx(sum(row.count * row.flops for row in rows))
    assert found.state == sum(row.count * row.state for row in rows)
    assert found.training == planned.model_flops
    assert model_of("vit", 256).training == 2 * found.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "c4-lm"}, "--model c4-lm: no such task.*c4_lm"),
        ({"mfu": 1.5}, "--mfu 1.5: should be above 0 and at most 1"),
        ({"tokens": -1.0}, "--tokens -1: should be above 0"),
        ({"network": math.nan}, "--network nan"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        cost.answer(Costs(quick=True, **options))


def test_the_answer_holds_and_its_tables_are_what_was_measured(monkeypatch):
    monkeypatch.setattr("caspr_cli.theory.solvers.TIMED", 0.0)
    monkeypatch.setattr("caspr_cli.theory.cost_runs.COPIED", 2**16)
    monkeypatch.setattr(cost, "LARGE", {"llama-7b": (64,), "llama-1.1b": (8,)})
    found = cost.answer(Costs(quick=True, model="vit"))
    assert all(held for _, held in found.claims)
    assert list(found.tables) == [
        "width", "block_size", "interval", "order", "model", "ranks", "scale",
    ]  # fmt: skip
    assert [figure.name for figure in found.figures] == ["width", "options", "scale"]
    assert found.finding.startswith("A step of CASPR has ")
    assert len(found.finding.split()) <= 30
    assert found.tables["order"]["order"].tolist() == [1, 2, 3, "Shampoo"]
    assert "(FLOPs 2.00)" in found.tables["order"].attrs["note"]  # two passes for one
    width, model = found.tables["width"], found.tables["model"]
    assert width[["statistics", "roots", "apply", "rest"]].sum(axis=1).tolist() == pytest.approx(
        width["total"].tolist()
    )
    assert (width["total_predicted"] / width["total"]).tolist() == pytest.approx(width["ratio"].tolist())
    assert model["share"].sum() == pytest.approx(1)
    assert f"{100 * (1 - model.set_index('part')['share']['training']):.1f} %" in found.finding
    assert found.tables["ranks"].loc[0, "speedup"] == 1
    sums = {name: to_numeric(found.tables[name].stack(), errors="coerce").sum() for name in ("model", "ranks")}
    assert sums == pytest.approx({"model": 48005003300.0, "ranks": 11037265900000.0})
    published = Path("outputs/published/verify/cost/cost.md").read_text(encoding="utf8").splitlines()
    made = sheet(found.tables["scale"])  # numbers that follow from shapes alone
    assert len(made) == 4
    assert [row for row in [made.heads, *made.rows] if f"| {' | '.join(row)} |" not in published] == []
