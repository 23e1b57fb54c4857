"""Which trial of a search is chosen: by the runner, and the same one by the report."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ended

from caspr_cli.common.selection import AGAIN
from caspr_cli.recipe import compose
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import CasprConf, Recipe, SearchConf, Target
from caspr_cli.report import records
from caspr_cli.report.compare import tables
from caspr_cli.runs import trials
from caspr_cli.runs.record import Record
from caspr_cli.tasks.registry import C4LMConf

compose.register_schemas()


def tuned(folder: Path | str, count: int = 3, *, higher: bool = False) -> Callable[[int], Recipe]:
    def trial(index: int) -> Recipe:
        task = C4LMConf(target=Target("val/x", None, higher))
        search = SearchConf("lr", count, space={"optim.lr": {"log": [1e-3, 1e-1]}})
        recipe = Recipe(task=task, optim=CasprConf(lr=0.1 * (index + 1)), search=search, trial=index)
        return replace(recipe, output_dir=str(folder))

    return trial


@pytest.mark.parametrize(
    ("finals", "higher", "best"),
    [
        ((0.5, 0.3, 0.4), False, 1),
        ((0.5, 0.3, 0.4), True, 0),
        ((None, "failed", 8.0), False, 2),  # what is not finite, or failed, is not chosen
    ],
)
def test_the_best_is_the_best_at_the_end(
    tmp_path: Path, finals: tuple[float | str | None, ...], higher: bool, best: int
) -> None:
    trial = tuned(tmp_path, higher=higher)
    for index, value in enumerate(finals):
        failed = isinstance(value, str)
        ended(trial(index), None if failed else value, "failed" if failed else "done")
    ended(replace(trial(2), seed=1), 9.0 if higher else 0.0)  # a held-out seed chooses nothing
    assert trials.best(trial) == best


def test_a_trial_without_its_result_is_named(tmp_path: Path) -> None:
    trial = tuned(tmp_path)
    for index in range(3):
        ended(trial(index), 0.5)
    record = Record.of(trial(1))
    (record.path / "result.json").unlink()
    anew = "is missing or damaged, and decides: run it anew with trial=1 seed=0 resume=never"
    with pytest.raises(ConfigError, match=rf"result\.json {anew}"):
        trials.best(trial)
    record.write("result.json", {"final": {"val/x": 0.1}})
    whole = record.config.read_text(encoding="utf8")
    record.config.unlink()  # so that a report leaves the record out
    with pytest.raises(ConfigError, match=rf"config\.yaml {anew}"):
        trials.best(trial)
    record.config.write_text(whole[: len(whole) // 2], encoding="utf8")  # it does so here, too
    with pytest.raises(ConfigError, match=rf"config\.yaml {anew}"):
        trials.best(trial)


def test_trials_that_have_not_ended_are_named(tmp_path: Path) -> None:
    trial = tuned(tmp_path)
    ended(trial(0), 0.5)
    ended(trial(1), 0.5, "running")
    with pytest.raises(ConfigError, match=r"2 of 3 trials of optim=caspr have not ended .* run -m trial=1,2 seed=0"):
        trials.best(trial)
    for index in range(3):
        shutil.rmtree(Record.of(trial(index)).path, ignore_errors=True)
        ended(trial(index), None, "failed")
    with pytest.raises(ConfigError, match="all 3 trials of caspr failed"):
        trials.best(trial)


def test_further_trials_wait_for_those_before(tmp_path: Path) -> None:
    row = ["optim=adamw", "search=lr", "search.trials=2", f"output_dir={tmp_path}"]
    composer = Composer(row)
    for more, message in (
        (["search.refine=1", "trial=2"], r"2 of 2 trials of optim=adamw have not ended"),
        (["search.refine=1", "trial=4"], r"from 0, and 2 more with search.refine$"),
        (["trial=2"], r"^trial=2: search=lr has 2 trials \(search.trials\), from 0$"),
    ):
        words = [*row, *more]
        with pytest.raises(ConfigError, match=message):
            trials.resolve(composer.config(words), words, {})
    words = [*row, "trial=1"]
    assert trials.resolve(config := composer.config(words), words, {}) is config  # a function of its index


def test_the_best_waits_until_the_best_three_were_run_again(tmp_path: Path) -> None:
    trial = tuned(tmp_path, 4)

    def again(index: int) -> Recipe:
        return replace(trial(index), search=replace(trial(index).search, rerank=3))

    for index, value in enumerate((0.4, 0.3, 0.2, 0.1)):
        ended(again(index), value)
    assert trials.best(trial) == 3
    with pytest.raises(ConfigError, match=r"3 of the best 3 trials .* trial=top1,top2,top3 seed=1001,1002"):
        trials.best(again)
    assert [trials.top(again, place) for place in (1, 2, 3)] == [3, 2, 1]
    for index, value in ((3, 0.9), (2, 0.2), (1, 0.0)):
        for seed in AGAIN:
            ended(replace(again(index), seed=seed), value)
    assert trials.best(again) == 1
    assert [trials.top(again, place) for place in (1, 2, 3)] == [3, 2, 1]  # as before they were run again


FINALS = st.dictionaries(st.integers(1, 3), st.sampled_from([None, 0.25, 0.5, 1e60]), max_size=2)
TRIALS = st.lists(st.tuples(st.sampled_from([None, 0.25, 0.5]), FINALS), min_size=2, max_size=3)


@settings(max_examples=12, deadline=None)
@given(TRIALS, st.booleans())
def test_what_is_run_at_other_seeds_is_what_a_report_selects(
    made: list[tuple[float | None, dict[int, float | None]]], higher: bool
) -> None:
    """Whatever seeds there are beside seed 0, with ties and failures."""
    with TemporaryDirectory() as folder:
        trial = tuned(folder, len(made), higher=higher)
        for index, (first, others) in enumerate(made):
            for seed, value in ({0: first} | others).items():
                ended(replace(trial(index), seed=seed), value)
        (table,) = tables(records.find([Path(folder)]).runs)
        (row,) = table.rows
        if any("nothing selected" in line for line in table.warnings) or row.selected is None:
            with pytest.raises(ConfigError, match=r"all \d trials of caspr failed"):
                trials.best(trial)
        else:
            assert trials.best(trial) == row.selected.index
