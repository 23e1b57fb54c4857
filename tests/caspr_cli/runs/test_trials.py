"""The runner and the report choose the same trial."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import CasprConf, Recipe, SearchConf, Target
from caspr_cli.report import records
from caspr_cli.report.compare import tables
from caspr_cli.runs import trials
from caspr_cli.runs.record import Record
from caspr_cli.tasks.registry import C4LMConf

compose.register_schemas()

FINALS = st.dictionaries(st.integers(1, 3), st.sampled_from([None, 0.25, 0.5, 1e60]), max_size=2)
TRIALS = st.lists(st.tuples(st.sampled_from([None, 0.25, 0.5]), FINALS), min_size=2, max_size=3)


@settings(max_examples=12, deadline=None)
@given(TRIALS, st.booleans())
def test_what_is_run_at_other_seeds_is_what_a_report_selects(
    made: list[tuple[float | None, dict[int, float | None]]], higher: bool
) -> None:
    """Whatever seeds there are beside seed 0, with ties and failures."""

    def trial(index: int) -> Recipe:
        task = C4LMConf(target=Target("val/x", None, higher))
        search = SearchConf("lr", len(made), space={"optim.lr": {"log": [1e-3, 1e-1]}})
        recipe = Recipe(task=task, optim=CasprConf(lr=0.1 / (index + 1)), search=search, trial=index)
        return replace(recipe, output_dir=folder)

    with TemporaryDirectory() as folder:
        for index, (first, others) in enumerate(made):
            for seed, value in ({0: first} | others).items():
                record = Record.of(replace(trial(index), seed=seed))
                record.path.mkdir(parents=True)
                record.config.write_text(compose.save(replace(trial(index), seed=seed)), encoding="utf8")
                record.write("status.json", {"state": "done"})
                record.write("result.json", {"final": {"val/x": value}})
        (table,) = tables(records.find([Path(folder)]).runs)
        (row,) = table.rows
        if any("nothing selected" in line for line in table.warnings) or row.selected is None:
            with pytest.raises(ConfigError, match=r"all \d trials of caspr failed"):
                trials.best(trial)
        else:
            assert trials.best(trial) == row.selected.index
