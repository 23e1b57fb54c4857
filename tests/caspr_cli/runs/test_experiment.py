"""Tables by one command: what is run, and which trial is chosen. (Their files: ``test_experiment_files.py``.)"""

import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from running import Runner, ended, wait_for

from caspr_cli.commands import train
from caspr_cli.common.exits import BAD_USAGE, SOME_FAILED
from caspr_cli.common.selection import AGAIN
from caspr_cli.recipe import compose, search, words
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.report import records
from caspr_cli.report.compare import tables
from caspr_cli.report.format import budget
from caspr_cli.runs import experiment, horizon, trials
from caspr_cli.runs.experiment import Experiment, Row
from caspr_cli.runs.launch import Allocation, Outcome
from caspr_cli.runs.record import Record

compose.register_schemas()


@pytest.fixture(scope="module", autouse=True)
def hydra() -> None:
    """Hydra runs, whichever of these tests are chosen: it splits the words of a sweep into jobs."""
    Composer()


def planned(folder: Path, *given: str) -> tuple[Experiment, Sequence[Row]]:
    """The table of molpcba, and its rows as far as they have records in the folder."""
    asked = Experiment.read("molpcba", ["search.refine=0", *given, f"output_dir={folder}"])
    return asked, experiment.rows(asked)


def test_a_plan_counts_what_is_left(tmp_path: Path) -> None:
    """A row has 2 trials, both again at 2 seeds, the best at 3 seeds, 3 untuned."""
    asked, table = planned(tmp_path, "optim=adamw,sgd", "search=lr", "search.trials=2", "seed=1,2,3")
    assert [row.left for row in table] == [12, 12]
    for recipe in table[0].tuning:
        ended(recipe, recipe.optim.lr, started="2026-01-01T00:00:00Z", updated="2026-01-01T00:00:40Z")
    table = experiment.rows(asked)
    assert [row.left for row in table] == [10, 12]
    assert table[0].reported == ()
    assert {(recipe.trial, recipe.seed) for recipe in table[0].again} == {(k, s) for k in (0, 1) for s in AGAIN}
    for recipe in table[0].again:
        ended(recipe, 0.5 if recipe.trial == 1 else 0.4)
    table = experiment.rows(asked)
    assert [row.left for row in table] == [6, 12]
    assert {recipe.trial for recipe in table[0].reported} == {1}  # the better mean of three seeds
    assert experiment.seconds(table[0], []) == 40.0  # nothing is run to know it
    lines = experiment.plan(asked, table, [40.0, "the training loss is nan"])
    each = "each 2 trials at seed 0, then the best 2 again at seeds 1001 and 1002, then 3 seeds of the best and untuned"
    assert f"2 rows, {each}: 24 runs, 6 done" in lines[0]
    (adamw,) = (line for line in lines if "optim=adamw" in line)
    assert adamw.endswith("6 runs to do, about 40.0 s a run, 4 min 00 s in all")
    assert lines[-2].endswith("12 runs to do, time: the training loss is nan")
    assert lines[-1] == "total    about 4 min 00 s, one run after the other; without 1 row not timed"
    assert experiment.plan(asked, table, ["?", "?"])[-1] == "total    not known"


def as_run(
    asked: Experiment, monkeypatch: pytest.MonkeyPatch, quality: Callable[[Recipe, str], float]
) -> list[tuple[str, list[str]]]:
    """Return the line and the words of each sweep, which is written as if it had run: the next one follows from it."""
    seen = []
    composer = Composer(asked.shared(), sweeps=True)
    monkeypatch.setattr(experiment, "Composer", lambda *_, **__: composer)  # composing takes most of the time
    searches: dict[tuple[str, ...], trials.Tuning] = {}
    for line, sweep in experiment.sweeps(asked, experiment.rows(asked)):
        seen.append((line, list(sweep)))
        for job in words.split(sweep):
            recipe = compose.freeze(trials.resolve(composer.config(job), job, searches), job)
            ended(recipe, quality(recipe, line))
    return seen


def test_every_row_has_as_many_trials_and_its_best_is_reported(tmp_path: Path, monkeypatch) -> None:
    """adamw likes large steps, sgd those in the middle of its range."""
    asked, _ = planned(tmp_path, "optim=adamw,sgd", "search=lr", "search.trials=4", "search.refine=2", "seed=1,2")

    def quality(recipe: Recipe, _: str) -> float:
        return recipe.optim.lr if recipe.optim.name == "adamw" else -abs(math.log(recipe.optim.lr / 0.2))

    seen = as_run(asked, monkeypatch, quality)
    assert [[word for word in sweep if word.startswith(("trial=", "seed="))] for _, sweep in seen] == [
        ["trial=range(0,4)", "seed=0"],
        ["trial=range(4,6)", "seed=0"],
        ["trial=range(6,8)", "seed=0"],
        ["trial=top1,top2,top3", "seed=1001,1002"],
        ["trial=best,default", "seed=1,2"],
    ]
    adamw, sgd = experiment.rows(asked)
    kinds = [[next(iter(recipe.search.space["optim.lr"])) for recipe in row.tuning] for row in (adamw, sgd)]
    assert kinds == [["log"] * 4 + ["choice"] * 4] * 2
    assert [row.left for row in (adamw, sgd)] == [0, 0]
    assert {row.whole for row in (adamw, sgd)} == {8 + 3 * 2 + 2 + 2}
    assert adamw.reported[0].optim.lr == max(recipe.optim.lr for recipe in adamw.tuning) > 0.1  # beyond its range
    assert {recipe.optim.lr for recipe in adamw.untuned} == {1e-3}
    assert "refine" not in "".join(experiment.plan(asked, [adamw, sgd], [1.0, 1.0]))
    (table,) = tables(records.find([tmp_path]).runs)
    rows = {row.label: row for row in table.rows}
    assert set(rows) == {"adamw", "adamw untuned", "sgd", "sgd untuned"}
    assert rows["adamw"].selected
    assert rows["adamw"].selected.values == {"optim.lr": adamw.reported[0].optim.lr}
    assert [budget(rows[label]) for label in ("adamw", "adamw untuned")] == ["8 (+6 again)", "0"]
    assert {run.seed for run in rows["sgd"].runs} == {run.seed for run in rows["sgd untuned"].runs} == {1, 2}
    assert [row.difference is None for row in rows.values() if row.untuned] == [True, True]
    assert not [line for line in table.warnings if "unequal" in line or "grew" in line]


def test_the_best_trial_is_run_with_other_values_of_one_key_at_a_time(tmp_path: Path, monkeypatch) -> None:
    given = ["optim=adamw,sgd", "search=joint", "search.trials=4", "search.refine=2", "seed=1,2"]
    asked, table = planned(tmp_path, *given)
    says = "refine   4 trials a row: the best one so far, with other values of one key"
    assert says in experiment.plan(asked, table, [1.0, 1.0])
    likes = {"adamw": 1e-4, "sgd": 0.07}

    def quality(recipe: Recipe, _: str = "") -> float:
        return -abs(math.log(recipe.optim.lr / likes[recipe.optim.name])) - 0.1 * recipe.optim.adamw_lr_scale

    seen = as_run(asked, monkeypatch, quality)
    assert list(experiment.sweeps(asked, experiment.rows(asked))) == seen  # the same command later
    said = [word for line, sweep in seen if line.startswith("refine") for word in sweep if word.startswith("trial=")]
    assert said == ["trial=range(4,6)", "trial=range(6,8)"]
    for row in experiment.rows(asked):
        *first, half, twice, less, more = row.tuning
        rounds = {"optim.lr": ((half, twice), first), "optim.adamw_lr_scale": ((less, more), [*first, half, twice])}
        for key, (tried, before) in rounds.items():
            best = search.drawn(compose.to_plain(max(before, key=quality)))
            for recipe, factor in zip(tried, (0.5, 2), strict=True):
                values = search.drawn(compose.to_plain(recipe))
                assert values == best | {key: pytest.approx(factor * best[key], rel=1e-3)}
                assert recipe.search.space == {name: {"choice": [value]} for name, value in values.items()}
        assert (row.whole, row.left) == (len(row.tuning) + 3 * 2 + 2 + 2, 0)
        assert row.reported[0].optim == max(row.tuning, key=quality).optim


def test_keys_take_turns_and_keep_to_what_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A doubled warm-up would leave no room for the decay. A learning rate that the user sets is not changed."""
    given = ["optim=sgd", "search=joint", "search.trials=2", "optim.lr=0.1", "search.refine=4"]
    asked, (row,) = planned(tmp_path, *given)
    keys = ["optim.adamw_lr_scale", "optim.momentum", "optim.weight_decay", "schedule.warmup"]
    assert search.turns(row.tuning[0].search.space) == keys
    as_run(asked, monkeypatch, lambda recipe, _: recipe.schedule.warmup)
    (row,) = experiment.rows(asked)
    best = max(recipe.schedule.warmup for recipe in row.tuning)
    assert 2 * best + row.tuning[0].schedule.decay > 1
    assert [recipe.schedule.warmup / best for recipe in row.tuning[-2:]] == pytest.approx([0.5, 0.5**0.5], rel=1e-3)


def test_the_selected_trial_is_run_shorter_until_the_length_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["search=lr", "search.trials=2", "search.rerank=0", "trainer.max_steps=400"]
    given += ["optim=adamw", "seed=1,2", "task.target.value=0.84", "horizon=true"]
    asked, _ = planned(tmp_path, *given)

    def quality(recipe: Recipe, line: str) -> float:
        steps = recipe.trainer.max_steps
        assert recipe.horizon == (steps if line.startswith("horizon") else None)
        assert recipe.trainer.val_every <= steps
        return 0.5 + 0.34 * steps / 130 + 1e-6 * recipe.optim.lr  # the target is that of 130 steps

    seen = [line for line, _ in as_run(asked, monkeypatch, quality)]
    assert [line.partition(": ")[2] for line in seen[2:]] == [f"{steps} steps in all" for steps in (200, 100, 150, 125)]
    later = experiment.rows(asked)  # the same command later, which knows the records alone
    assert [line for line, _ in experiment.sweeps(asked, later)] == seen[:2]
    assert any("horizon  up to 4 x 2 seeds a row" in line for line in experiment.plan(asked, later, [1.0]))
    runs = records.find([tmp_path]).runs
    (table,) = tables(runs)
    rows = {row.label: row for row in table.rows}
    assert set(rows) == {"adamw", "adamw untuned"}  # shorter runs are no rows
    found = rows["adamw"].own_schedule
    assert (found.steps, found.tried) == (150, (100, 125, 150, 200, 400))
    assert {run.config["trainer.max_steps"] for run in rows["adamw"].runs} == {400}
    for seed in (1, 2):  # as if it had been stopped while this length was run
        (cut_off,) = [run for run in runs if (run.config["horizon"], run.seed) == (150, seed)]
        (Path(cut_off.path) / "status.json").unlink()
    assert horizon.next_length(later[0].reported) == 150


def test_a_length_of_which_a_run_was_cut_off_is_not_tried_again_at_once(tmp_path: Path) -> None:
    asked, (row,) = planned(tmp_path, "optim=adamw", "search=none", "seed=1", "horizon=true")
    ended(row.reported[0], 1.0)
    lengths = [line for line, _ in experiment.sweeps(asked, [row]) if line.startswith("horizon")]
    assert len(lengths) == 1  # nothing was run, as where it is killed


@pytest.mark.parametrize("state", ["failed", "done"])
def test_a_whole_run_that_fails_or_misses_the_target_is_not_shortened(tmp_path: Path, state: str) -> None:
    _, (row,) = planned(tmp_path, "optim=adamw", "search=none", "seed=1,2")
    one, other = row.reported
    ended(one, 1.0)
    assert horizon.next_length(row.reported) is None  # one seed has not ended
    ended(other, 0.1, state)
    assert horizon.next_length(row.reported) is None
    ended(other, 1.0)
    assert horizon.next_length(row.reported) == one.trainer.max_steps // 2
    assert horizon.next_length([replace(one, trainer=replace(one.trainer, max_steps=1))]) is None
    no_target = replace(one.task, target=replace(one.task.target, value=None))
    assert horizon.next_length([replace(recipe, task=no_target) for recipe in row.reported]) is None


def test_what_horizon_may_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="horizon should be true or false for a table but is '7'"):
        Experiment.read("molpcba", ["horizon=7"])
    assert not Experiment.read("molpcba").horizon
    given = ["task=c4_lm", f"output_dir={tmp_path}", "trainer.max_steps=40", "horizon=20"]
    composer = Composer(given)
    short = compose.freeze(trials.resolve(composer.config(given), given, {}))
    assert (short.trainer.max_steps, short.trainer.val_every, short.horizon) == (20, 20, 20)
    assert Record.of(replace(short, horizon=None)).path == Record.of(short).path  # it is the same run
    config = composer.config(given)
    for steps in (0, 41):
        config.horizon = steps
        with pytest.raises(ConfigError, match=f"horizon={steps}: should be from 1 to trainer.max_steps, which is 40"):
            trials.resolve(config, given, {})


@pytest.mark.parametrize(("resume", "left"), [("auto", 6), ("retry", 7), ("never", 8)])
def test_what_is_run_again_is_not_counted_as_done(tmp_path: Path, resume: str, left: int) -> None:
    given = ["optim=adamw", "search=lr", "search.trials=2", "search.rerank=0", "seed=1,2,3", f"resume={resume}"]
    asked, (row,) = planned(tmp_path, *given)
    for recipe, state in zip(row.tuning, ("done", "failed"), strict=True):
        ended(recipe, 0.5, state)
    assert experiment.rows(asked)[0].left == left


def test_a_quoted_output_dir_is_where_the_records_are(tmp_path: Path) -> None:
    asked = Experiment.read("molpcba", ["optim=adamw", "search.trials=1", f"output_dir='{tmp_path}/a, b=c'"])
    assert asked.output_dir == f"{tmp_path}/a, b=c"
    assert experiment.rows(asked)[0].tuning[0].output_dir == asked.output_dir


@pytest.mark.parametrize("planned", ["true", "True", "false"])
def test_a_table_without_its_data_is_refused_before_any_job(planned: str, tmp_path: Path, monkeypatch, capsys) -> None:
    words = ["experiment=ud_pos", "optim=adamw,sgd", "task.data=files", "task.root=/nowhere", f"output_dir={tmp_path}"]
    monkeypatch.setattr(train, "compose_and_run", lambda argv, **_: pytest.fail("a sweep was started"))
    monkeypatch.setattr(sys, "argv", ["caspr-train", *words, f"plan={planned}"])
    assert train.main() == (BAD_USAGE if planned == "false" else 0)
    shown = capsys.readouterr()
    text = " ".join((shown.err if planned == "false" else shown.out).split())  # lines are wrapped
    assert "task.root: no such directory: /nowhere" in text
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_refused_by_the_reader_refuse_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (row,) = planned(tmp_path, "optim=sgd")

    def refused(recipe: Recipe, *_: object) -> Outcome:
        record = Record.of(recipe)
        record.path.mkdir(parents=True)
        record.write("status.json", {"state": "failed", "error": "x.csv:3: not a number", "user_error": True})
        return Outcome(record, BAD_USAGE, ran=True)

    monkeypatch.setattr(experiment, "run", refused)
    with pytest.raises(ConfigError, match=r"^x\.csv:3: not a number$"):
        experiment.seconds(row, [])


@pytest.mark.parametrize("late", [signal.SIGINT, signal.SIGTERM, None])
def test_a_signal_of_the_user_stops_the_table_however_late_a_timing_ends(
    late: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (row,) = planned(tmp_path, "optim=sgd")

    def stopped(recipe: Recipe, _: object, allocation: Allocation) -> Outcome:
        return Outcome(Record.of(recipe), 143, ran=True, signal=late or allocation.stop_requests()[0])

    monkeypatch.setattr(experiment, "run", stopped)
    monkeypatch.setattr(experiment, "PATIENCE", 0.0)
    if late is None:
        assert experiment.seconds(row, []) == "a run of 30 steps takes more than 0.0 s"
        return
    with pytest.raises(experiment.StoppedError) as raised:
        experiment.seconds(row, [])
    assert raised.value.number == late


def test_one_damaged_record_is_named_and_refuses_no_table(tmp_path: Path, monkeypatch, capsys) -> None:
    given = ["optim=adamw,sgd", "search.trials=2", "search.refine=0"]
    _, table = planned(tmp_path, *given)
    file = Record.of(table[0].tuning[0]).path / "status.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    _, table = planned(tmp_path, *given)
    assert experiment.damaged(table) == [
        f"damaged  {file} is missing or damaged; resume=never starts this run anew (is not valid JSON)"
    ]
    assert [row.left for row in table] == [row.whole for row in table]
    monkeypatch.setattr(train, "seconds", lambda *_: 1.0)
    started = []
    monkeypatch.setattr(train, "compose_and_run", lambda argv, **_: started.append(argv) or SOME_FAILED)
    monkeypatch.setattr(train, "report", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["caspr-train", "experiment=molpcba", *given, f"output_dir={tmp_path}"])
    assert train.main() == SOME_FAILED
    assert len(started) == 3
    assert f"damaged {file}" in " ".join(capsys.readouterr().out.split())  # lines are wrapped


# ---- as a user runs it -------------------------------------------------------------------------------------------


@pytest.mark.release
def test_a_table_from_nothing_and_again(runner: Runner) -> None:
    """All sweeps of an experiment, stopped once on the way."""
    given = ["experiment=c4_14m", "optim=adamw", "search.trials=2", "seed=1,2", "output_dir=a_table"]
    process = runner.start(*given)
    wait_for(runner, "a_table", 8)
    stopped = process.stopped_by(signal.SIGTERM, expect=143)
    assert f"next     caspr-train {' '.join(runner.command(*given)[3:])}" in stopped.splitlines()
    each = "each 2 trials at seed 0, then the best 2 again at seeds 1001 and 1002, then 2 seeds of the best and untuned"
    assert f"1 row, {each}: 10 runs, 0 done" in stopped
    runner(*given)
    found = sorted((runner.home / "a_table").glob("c4_lm/*/*/seed*"))
    assert {json.loads((record / "status.json").read_text())["state"] for record in found} == {"done"}
    numbers = Counter(record.name for record in found)
    trials = numbers.pop("seed0")
    assert 2 <= trials <= 4  # where the best lies is not ours to say
    assert numbers == dict.fromkeys(("seed1001", "seed1002"), min(3, trials)) | {"seed1": 2, "seed2": 2}
    assert not list((runner.home / "a_table").glob("**/*.ckpt"))  # a table of hundreds of runs fits the disk
    page = runner.home / "a_table" / "report.html"
    assert "adamw untuned" in page.read_text(encoding="utf8")
    page.unlink()
    planned = runner(*given, "plan=true")
    assert f"{len(found)} runs, {len(found)} done" in planned
    assert not page.exists()
