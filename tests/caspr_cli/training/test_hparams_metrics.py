from caspr_cli.recipe.schema import AdamWConf, Recipe, SearchConf
from caspr_cli.tasks.registry import CONFS, C4LMConf
from caspr_cli.training.hparams import METRICS, hyperparameters, summaries

TRIED = Recipe(C4LMConf(), AdamWConf(lr=4e-3), search=SearchConf("lr", 6, {"optim.lr": {"log": [1e-3, 1e-1]}}), trial=3)


def test_the_page_has_a_column_for_what_each_task_is_judged_by() -> None:
    for conf in CONFS.values():
        metric = conf().target.metric
        assert {metric, metric.replace("val/", "test/")} <= set(METRICS)


def test_a_trial_is_a_column_and_the_space_it_is_from_is_not() -> None:
    values = hyperparameters(TRIED)
    found = {name: value for name, value in values.items() if "search" in name or name in ("trial", "optim.lr")}
    assert found == {"search.name": "lr", "trial": 3, "optim.lr": 4e-3}


def test_runs_with_and_without_a_search_agree_on_the_columns() -> None:
    plain = Recipe(C4LMConf(), AdamWConf())
    assert not {"search.name", "trial"} & hyperparameters(plain).keys()
    columns = [summaries(recipe, "0123abcd")[0] for recipe in (plain, TRIED)]
    assert columns[0] == columns[1]
