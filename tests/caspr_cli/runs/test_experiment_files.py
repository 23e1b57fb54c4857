"""The files of experiments: each composes to a table, at every scale."""

from pathlib import Path

import pytest

from caspr_cli.common.selection import AGAIN, TUNING_SEED
from caspr_cli.recipe import compose, words
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.configs import choices
from caspr_cli.runs import experiment
from caspr_cli.runs.experiment import Experiment

compose.register_schemas()


@pytest.fixture(scope="module", autouse=True)
def hydra() -> None:
    """Hydra runs, whichever of these tests are chosen: it splits the words of a sweep into jobs."""
    Composer()


PAPER = ("c4_234m", "merge", "one_sided")


TUNED = [name for name in choices("experiment") if name != "polar"]  # which compares what comes without tuning


@pytest.mark.parametrize(
    ("name", "scale"), [*((name, "sample") for name in TUNED), *((name, "paper") for name in PAPER)]
)
def test_every_experiment_composes_at_every_scale(name: str, scale: str, tmp_path: Path) -> None:
    # Every optimizer is composed for c4_14m; two of them do for the same table of another task.
    fewer = ["optim=caspr,sgd"] if name in ("molpcba", "ud_pos", "c4_234m", "vision") else []
    asked = Experiment.read(name, [f"scale={scale}", f"output_dir={tmp_path}", "search.trials=2", *fewer])
    table = experiment.rows(asked)
    assert asked.searches
    assert len({row.label for row in table}) == len(table) > 1
    assert {len(row.tuning) for row in table} == {table[0].tuning[0].search.trials}  # the same number for every row
    seeds = {recipe.seed for row in table for recipe in row.untuned}
    assert len(seeds) >= 3
    assert not seeds & {TUNING_SEED, *AGAIN}  # what chose is not reported
    assert len({compose.identity(row.tuning[0]) for row in table}) == len(table)
    assert choices("experiment")[name]


def test_without_a_search_only_the_reported_seeds_run() -> None:
    untuned = Experiment.read("polar", ["task=vit,resnet", "seed=1,2"])
    table = experiment.rows(untuned)
    assert not untuned.searches
    assert len({row.label for row in table}) == len(table) == 4
    assert {(len(row.tuning), len(row.untuned), len(row.reported)) for row in table} == {(0, 0, 2)}


def test_records_of_an_experiment_are_in_a_folder_of_its_name_and_scale() -> None:
    assert Experiment.read("damping").output_dir == "outputs/experiments/damping"
    assert Experiment.read("damping", ["scale=paper"]).output_dir == "outputs/experiments/damping_paper"


def test_a_list_in_a_list_is_one_value() -> None:
    asked = Experiment.read("momentum", ["search.trials=1"])
    table = experiment.rows(asked)
    assert [row.label for row in table] == [
        f"optim={optim} optim.betas={betas}"
        for optim in ("caspr_sum", "shampoo")
        for betas in ("[0.9,0.999]", "[0,0.999]")
    ]
    betas = [getattr(row.tuning[0].optim, "betas", None) for row in table]
    assert [tuple(both) for both in betas if both] == [(0.9, 0.999), (0.0, 0.999)] * 2


@pytest.mark.parametrize("name", choices("experiment"))
def test_an_ablation_of_several_optimizers_compares_each_with_its_own_row(name: str) -> None:
    asked = Experiment.read(name)
    assert asked.baseline
    first, *settings = asked.baseline.split()
    optimizers = asked.jobs["optim"].split(",")
    if "=" in first:
        assert len(optimizers) > 1
        settings = [first, *settings]
    else:
        assert first in optimizers
        assert len(optimizers) == 1 or not settings
    swept = {key.removeprefix("optim."): value for key, value in asked.jobs.items()}
    for key, value in map(halves, settings):
        values = [halves(job[0])[1] for job in words.split([f"{key}={swept[key]}"])]
        assert float_or_word(value) in map(float_or_word, values)


def halves(setting: str) -> tuple[str, str]:
    key, _, value = setting.partition("=")
    return key, value


def float_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def test_the_command_line_comes_last() -> None:
    asked = Experiment.read("molpcba", ["optim=adamw,sgd", "search.trials=2", "seed=7,8", "optim.lr=0.1"])
    assert asked.tuning(range(2))[-2:] == ["trial=range(0,2)", "seed=0"]
    assert asked.again(2)[-2:] == ["trial=top1,top2", "seed=1001,1002"]
    assert asked.seeds()[-2:] == ["trial=best,default", "seed=7,8"]
    assert {"optim=adamw,sgd", "optim.lr=0.1"} <= set(asked.seeds())
    plain = Experiment.read("molpcba", ["search=none", "seed=7"])
    assert plain.seeds()[-1] == "seed=7"
    assert not [word for word in plain.seeds() if word.startswith("trial")]
