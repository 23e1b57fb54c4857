"""Tables from the logs of other programs: each format as its own writer leaves it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from logged import (
    BEST,
    DAMAGED,
    METRIC,
    RUNS,
    WRITERS,
    by_add_hparams,
    by_folder,
    by_keras,
    by_wandb_runs,
    curve,
    events,
    last,
    mlflow,
    table,
)
from torch.utils.tensorboard import SummaryWriter

from caspr_cli.common.errors import UserError
from caspr_cli.report import logs
from caspr_cli.report.compare import tables
from caspr_cli.report.trackers import Asked, Found


def rows(found: Found, **how: Any) -> dict[str, list[tuple[int, float | None]]]:
    made = tables(found.runs, tuned=[], **how)
    return {row.label: [(run.seed, run.final) for run in row.runs] for table in made for row in table.rows}


@pytest.mark.parametrize("written", WRITERS, ids=lambda written: written.__name__)
def test_the_same_study_in_each_format(tmp_path: Path, written: Callable[[Path], Asked]) -> None:
    root = tmp_path / "runs"
    asked = written(root)
    found = logs.find([root], asked)
    assert not found.warnings
    (made,) = tables(found.runs, tuned=[])
    assert rows(found) == {name: [(seed, pytest.approx(last(name, seed))) for seed in range(3)] for name in BEST}
    assert made.task == ("cifar" if asked.kind == "mlflow" else "runs")
    caspr = made.rows[0]
    assert (made.baseline, caspr.label, caspr.mean) == ("adamw", "caspr", pytest.approx(3.25))
    assert (caspr.kind, caspr.difference.paired, caspr.difference.n) == ("better", True, 3)
    if written is not by_wandb_runs:
        assert [(p.step, p.value) for p in caspr.runs[1].curve] == [(s, pytest.approx(v)) for s, v in curve("caspr", 1)]


def test_logs_of_caspr_train_give_what_its_records_give(tmp_path: Path) -> None:
    """TensorBoard's file and hyperparameters as ``caspr-train`` writes them; the values as its records have them."""
    from caspr_cli.recipe.schema import OPTIMIZERS, Recipe
    from caspr_cli.tasks.registry import C4LMConf
    from caspr_cli.training import hparams

    for optimizer, seed in RUNS:
        recipe = Recipe(C4LMConf(), OPTIMIZERS[optimizer](), seed=seed)
        with SummaryWriter(str(tmp_path / "c4_lm" / optimizer / "4e9d1440" / f"seed{seed}")) as writer:
            for summary in hparams.summaries(recipe, "4e9d1440"):
                writer.file_writer.add_summary(summary)
            for step, value in curve(optimizer, seed):
                writer.add_scalar(METRIC, value, step)
    found = logs.find([tmp_path], Asked("tensorboard", METRIC, group=["optim.name"]))
    assert rows(found) == {name: [(seed, pytest.approx(last(name, seed))) for seed in range(3)] for name in BEST}


# ---- rows and seeds --------------------------------------------------------------------------------------------------


def study(root: Path, names: Mapping[str, float]) -> Path:
    for name, value in names.items():
        table(root / f"{name}.csv", ["step", METRIC], [(1, value + 1), (2, value)])
    return root


@pytest.mark.parametrize(
    ("names", "how", "expected"),
    [
        (["adam_seed0", "adam_seed1", "sgd_seed0"], {}, {"adam": [0, 1], "sgd": [0]}),
        (["adam/seed=3", "sgd/seed=3"], {}, {"adam": [3], "sgd": [3]}),
        (["a/adam/b/s4", "a/sgd/b/s4"], {}, {"adam/b": [4], "sgd/b": [4]}),
        (["seed1/adam", "seed2/adam"], {}, {"adam": [1, 2]}),
        (["seed1/version_0", "seed2/version_0"], {}, {"runs": [1, 2]}),
        (["optim=adam,lr=0.1,seed=1", "optim=adam,lr=0.2,seed=1"], {}, {"adam lr=0.1": [1], "adam lr=0.2": [1]}),
        (["optim=adam_lr=1e-3_seed=1", "optim=sgd_lr=1e-3_seed=1"], {"group": ["optim"]}, {"adam": [1], "sgd": [1]}),
        (["lr=0.1,seed=1", "lr=0.2,seed=1"], {}, {"run lr=0.1": [1], "run lr=0.2": [1]}),
        (["x-adam-0", "x-adam-1"], {"names": "x-{optimizer}-{seed}"}, {"adam": [0, 1]}),
        (["adam/5", "sgd/5"], {"names": "{optimizer}/{n}", "seed": "n"}, {"adam": [5], "sgd": [5]}),
        (["adam_a", "adam_b", "other"], {"names": "{optimizer}_{_}", "group": ["optimizer"]}, {"adam": [0, 1]}),
        (["resnet18 seed0", "resnet 34=x seed0"], {}, {"resnet18": [0], "resnet_34_x": [0]}),
    ],
)
def test_rows_and_seeds_from_names(
    tmp_path: Path, names: list[str], how: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    found = logs.find([study(tmp_path / "runs", dict.fromkeys(names, 1.0))], Asked("csv", METRIC, **how))
    assert {label: [seed for seed, _ in runs] for label, runs in rows(found).items()} == expected


def test_without_seeds_nothing_is_paired(tmp_path: Path) -> None:
    values = {f"{name}_{'abc'[k]}": base + k * k / 10 for name, base in (("adamw", 1), ("sgd", 2)) for k in range(3)}
    found = logs.find([study(tmp_path, values)], Asked("csv", METRIC, names="{optimizer}_{_}", group=["optimizer"]))
    assert any("no seed known" in note and "no test is paired" in note for note in found.notes)
    (made,) = tables(found.runs, tuned=[])
    assert not made.rows[1].difference.paired
    assert made.rows[1].kind == "worse"


def test_settings_that_are_no_row_are_refused_or_tuned(tmp_path: Path) -> None:
    lines = [
        (o, lr, seed, 1, 1 + abs(lr - 0.2) + seed / 10) for o in BEST for lr in (0.1, 0.2, 0.3) for seed in range(3)
    ]
    table(tmp_path / "all.csv", ["optimizer", "lr", "seed", "step", METRIC], lines)
    with pytest.raises(UserError, match="is more than one run: --group, --seed and --tuned name the columns"):
        logs.find([tmp_path], Asked("csv", METRIC, group=["optimizer"]))
    found = logs.find([tmp_path], Asked("csv", METRIC, group=["optimizer"], tuned=["lr"]))
    (made,) = tables(found.runs, tuned=["optim.lr"])
    assert [(row.label, len(row.trials), row.n) for row in made.rows] == [("adamw", 3, 3), ("caspr", 3, 3)]
    assert made.rows[0].selected.values == {"optim.lr": 0.2}
    by_add_hparams(tmp_path / "runs")
    with SummaryWriter(str(tmp_path / "runs" / "more")) as writer:
        writer.add_scalar(METRIC, 1.0, 30)
        writer.add_hparams({"optimizer": "caspr", "seed": 0, "lr": 0.2}, {"hparam/x": 1.0})
    found = logs.find([tmp_path / "runs"], Asked("tensorboard", METRIC, group=["optimizer", "lr"]))
    assert set(rows(found)) == {"adamw", "caspr lr=0.1", "caspr lr=0.2"}
    with pytest.raises(UserError, match=r"2 runs of caspr with seed 0 differ in lr: --group KEY,\.\.\. makes a row"):
        logs.find([tmp_path / "runs"], Asked("tensorboard", METRIC, group=["optimizer"]))


def test_a_metric_that_only_add_hparams_has(tmp_path: Path) -> None:
    """Its folder is called by the time: the run is the folder above."""
    for optimizer, seed in RUNS:
        with SummaryWriter(str(tmp_path / f"{optimizer}_seed{seed}")) as writer:
            writer.add_hparams({"lr": 0.1}, {"hparam/best": float(seed)})
    assert set(rows(logs.find([tmp_path], Asked("tensorboard", "hparam/best")))) == {"adamw", "caspr"}


def test_a_csv_that_may_be_cut_in_its_last_value_is_noted(tmp_path: Path) -> None:
    (tmp_path / "adamw_seed0.csv").write_text("step,loss\n1,1.0\n2,0.5")
    (tmp_path / "adamw_seed1.csv").write_text("step,loss\n1,1.0\n2,0.55\n")
    found = logs.find([tmp_path], Asked("csv", "loss"))
    assert [note.partition(": ")[2] for note in found.notes if "line break" in note] == [
        "does not end with a line break, so that its last value may be cut"
    ]


def test_what_differs_within_a_row_is_said(tmp_path: Path) -> None:
    lines = [(f"r{k}", o, lr, k, k, 3.0 + k) for k, (o, lr) in enumerate([("a", 1), ("a", 2), ("b", 1), ("b", 1)])]
    table(tmp_path / "all.csv", ["Name", "optimizer", "width", "seed", "Runtime", METRIC], lines)
    found = logs.find([tmp_path], Asked("wandb", METRIC, group=["optimizer"]))
    assert [note for note in found.notes if "within" in note] == [
        "width differs within a (--group KEY,... makes a row of each value)"
    ]
    assert len({run.path for run in found.runs}) == 4


def test_a_path_that_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_keras(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for again in (tmp_path, Path("runs"), Path("runs/../runs")):
        assert len(logs.find([tmp_path / "runs", again], Asked("csv", METRIC)).runs) == len(RUNS)


def test_lines_of_one_name_without_steps_are_runs(tmp_path: Path) -> None:
    """None is left out, though nothing but its place in the file tells one from another."""
    table(tmp_path / "all.csv", ["optimizer", METRIC], [(o, 1 + k + (o == "sgd")) for o in BEST for k in range(3)])
    found = logs.find([tmp_path], Asked("csv", METRIC, group=["optimizer"]))
    assert rows(found) == {"caspr": [(0, 1.0), (1, 2.0), (2, 3.0)], "adamw": [(3, 1.0), (4, 2.0), (5, 3.0)]}
    assert f"{tmp_path / 'all.csv'}: no column of steps: each line counts as a run (--step COLUMN)" in found.notes
    assert any("no test is paired" in note for note in found.notes)


def test_lines_of_one_seed_without_steps_are_refused(tmp_path: Path) -> None:
    """They may be a curve, or a run and its repetition."""
    lines = [("adamw", seed, "", value) for seed in (0, 1) for value in (3.0, 2.0)]
    table(tmp_path / "all.csv", ["optimizer", "seed", "note", METRIC], [*lines, ("adamw", 2, "", 1.0)])
    with pytest.raises(UserError, match=r"all has several lines of adamw, 0, and no column of steps: --step names one"):
        logs.find([tmp_path], Asked("csv", METRIC, group=["optimizer"]))
    lines = [("adamw", 0, 1.0), ("adamw", 0, ""), ("adamw", 1, 2.0)]  # a line without the metric is no second one
    table(tmp_path / "all.csv", ["optimizer", "seed", METRIC], lines)
    assert rows(logs.find([tmp_path], Asked("csv", METRIC, group=["optimizer"]))) == {"adamw": [(0, 1.0), (1, 2.0)]}


def test_runs_of_one_name_in_a_chart_are_all_read(tmp_path: Path) -> None:
    """W&B lets several runs have one name; other columns that have one name are no runs."""
    heads = ["Step", *(f"{name} - {METRIC}{band}" for name in ("adamw", "adamw", "sgd") for band in ("", "__MIN"))]
    table(tmp_path / "chart.csv", heads, [(1, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0), (2, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0)])
    found = logs.find([tmp_path], Asked("wandb", METRIC))
    assert rows(found) == {"adamw": [(0, 1.0), (1, 2.0)], "sgd": [(2, 3.0)]}
    assert not any("columns" in note for note in found.notes)
    table(tmp_path / "adamw_seed0.csv", ["step", METRIC, METRIC], [(1, 3.0, 4.0)])
    found = logs.find([tmp_path / "adamw_seed0.csv"], Asked("csv", METRIC))
    assert rows(found) == {"adamw": [(0, 4.0)]}
    assert f"{tmp_path / 'adamw_seed0.csv'}: several columns are called {METRIC}: the last counts" in found.notes


# ---- values ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_its_last_values(tmp_path: Path) -> None:
    """The later of two event files counts, and the steps that it purges are gone."""
    events(tmp_path / "adamw_seed0", [(10, 5.0), (20, 4.0), (30, 9.0), (40, 9.0)], filename_suffix=".a")
    for k, file in enumerate((tmp_path / "adamw_seed0").iterdir()):
        file.rename(file.with_name(f"events.out.tfevents.000000000{k}.x"))
    events(tmp_path / "adamw_seed0", [(30, 3.0)], purge_step=25)
    events(tmp_path / "adamw_seed1", [(10, 5.0), (20, 4.0), (20, 4.5), (30, 2.0), (30, 2.5)])
    found = logs.find([tmp_path], Asked("tensorboard", METRIC))
    first, second = found.runs
    assert [(p.step, p.value) for p in first.curve] == [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert [(p.step, p.value) for p in second.curve] == [(10, 5.0), (20, 4.5), (30, 2.5)]
    assert [note for note in found.notes if "the last counts" in note and "adamw_seed1" in note and "seed0" not in note]


def lengths(root: Path) -> Path:
    for name, points in {
        "adamw_seed0": [(10, 4.0), (20, 3.0), (30, 3.5)],
        "adamw_seed1": [(10, 4.0), (20, 3.2)],  # crashed
        "adamw_seed2": [(10, 4.0), (20, 3.4), (30, math.nan)],
    }.items():
        table(root / f"{name}.csv", ["step", METRIC], points)
    return root


@pytest.mark.parametrize(
    ("at", "finals", "states", "said"),
    [
        ("end", [3.5, None, None], ["done", "failed", "done"], "adamw_seed1.csv: ends too early and counts as failed"),
        ("best", [3.0, 3.2, 3.4], ["done"] * 3, "runs end at different steps, from 20 to 30 (--at 20 compares all"),
        (20, [3.0, 3.2, 3.4], ["done"] * 3, ""),
        (25, [3.0, None, 3.4], ["done", "failed", "done"], "adamw_seed1.csv: ends too early"),
        (5, [None] * 3, ["failed"] * 3, ""),
    ],
)
def test_runs_of_different_lengths(
    tmp_path: Path, at: str | int, finals: list[float | None], states: list[str], said: str
) -> None:
    found = logs.find([lengths(tmp_path)], Asked("csv", METRIC, at=at))
    assert [run.final for run in found.runs] == finals
    assert [run.state for run in found.runs] == states
    assert said in "\n".join(found.notes)
    from caspr_cli.report import format

    words = {"end": "at the end", "best": "at its best step"}.get(str(at), f"at step {at}")
    assert f": val/loss {words}, lower is better" in format.title(tables(found.runs, tuned=[])[0])


def test_what_a_tracker_says_of_a_run_counts(tmp_path: Path) -> None:
    store = tmp_path / "mlruns" / "0"
    mlflow(store / "a", "adamw-s0", [(10, 3.0), (20, 2.0)])
    mlflow(store / "b", "adamw-s1", [(10, 3.0)])  # finished: it stopped early
    mlflow(store / "c", "adamw-s2", [(10, 3.0)], status=4)
    mlflow(store / "d", "adamw-s3", [], status=5)  # killed before the first value
    mlflow(store / "e", "adamw-s4", [(10, 3.0)], status=1)
    mlflow(store / "f", "adamw-s5", [(10, math.inf)])
    mlflow(store / "g", "adamw-s6", [])
    mlflow(store / "h", "adamw-s7", [(10, 1.0)])
    meta = store / "h" / "meta.yaml"
    meta.write_text(meta.read_text().replace("active", "deleted"))
    (store / "d" / "metrics" / "val" / "loss").unlink()
    found = logs.find([tmp_path], Asked("mlflow", METRIC))
    assert [(run.seed, run.state, run.final) for run in found.runs] == [
        (0, "done", 2.0), (1, "done", 3.0), (2, "failed", None), (3, "failed", None), (4, "running", None),
        (5, "done", None),
    ]  # fmt: skip
    assert any(note.startswith("left out, as they have no val/loss:") and note.endswith("/g") for note in found.notes)


@pytest.mark.parametrize(
    ("metric", "given", "higher", "said"),
    [
        ("val/loss", None, False, False), ("val_acc", None, True, True), ("eval/accuracy", None, True, True),
        ("test/top1", None, True, True), ("mAP@50", None, True, True), ("roc_auc", None, True, True),
        ("map_loss", None, False, False), ("whatever", None, False, True), ("val/loss", True, True, False),
        ("val_acc", False, False, False),
    ],
)  # fmt: skip
def test_the_direction_is_guessed_and_said(
    metric: str, given: bool | None, higher: bool, said: bool, tmp_path: Path
) -> None:
    table(tmp_path / "adamw_seed0.csv", ["step", metric], [(1, 0.5)])
    found = logs.find([tmp_path], Asked("csv", metric, higher=given))
    (made,) = tables(found.runs, tuned=[])
    assert made.higher_is_better == higher
    assert any("by its name" in note for note in found.notes) == said


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_damaged_file_among_others_is_named(tmp_path: Path) -> None:
    by_folder(tmp_path)
    (tmp_path / "adamw_seed9").mkdir()
    (tmp_path / "adamw_seed9" / "events.out.tfevents.1.x").write_bytes(b"nonsense")
    found = logs.find([tmp_path], Asked("tensorboard", METRIC))
    assert len(found.runs) == 6
    assert [line.partition(": ")[2] for line in found.warnings] == [DAMAGED]
    whole = next((tmp_path / "caspr_seed0").iterdir())
    whole.write_bytes(whole.read_bytes()[:-5])  # cut off while it was written
    flipped = next((tmp_path / "caspr_seed1").iterdir())
    content = bytearray(flipped.read_bytes())
    content[-6] ^= 1  # in the last value
    flipped.write_bytes(content)
    found = logs.find([tmp_path], Asked("tensorboard", METRIC))
    assert [line.partition(": ")[0] for line in found.warnings if DAMAGED in line][-1] == str(flipped)
    states = {run.path: run.state for run in found.runs}
    assert states.pop(str(tmp_path / "caspr_seed1")) == "failed"
    assert states.pop(str(tmp_path / "caspr_seed0")) == "failed"
    assert set(states.values()) == {"done"}


def test_without_hyperparameters_the_message_says_where_a_key_can_come_from(tmp_path: Path) -> None:
    (tmp_path / "adam_seed0").mkdir()
    (tmp_path / "adam_seed0" / "log.csv").write_text("step,loss\n1,2.0\n2,1.0\n")
    with pytest.raises(UserError) as caught:
        logs.find([tmp_path], Asked("csv", "loss", group=["optimizer"]))
    said = str(caught.value)
    assert said.startswith("--group optimizer: these runs have no hyperparameters; leave it out, or ")
    assert said.endswith(": --names '{optimizer}_seed{seed}'")
    assert "adam_seed0" in said
