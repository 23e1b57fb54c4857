"""The files of experiments, which other packages write, too."""

from pathlib import Path

import pytest

from caspr_cli.recipe import tables
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.tables import in_words, written


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "files", lambda _: {file.stem: file for file in tmp_path.iterdir()})
    return tmp_path


def test_what_a_file_leaves_out_is_that_of_the_one_it_is_like_but_for_the_baseline(files: Path) -> None:
    (files / "first.yaml").write_text(
        "jobs: {task: vit, optim: caspr}\nscale: {sample: {search: lr}, paper: {}}\nbaseline: adamw\nhorizon: true\n"
    )
    (files / "second.yaml").write_text("like: first\njobs: {optim: sgd}\nscale: {sample: {search.trials: 2}}\n")
    (files / "alone.yaml").write_text("jobs: {task: vit}\nbaseline: null\n")
    assert written("second") == {
        "jobs": {"task": "vit", "optim": "sgd"},
        "scale": {"sample": {"search": "lr", "search.trials": 2}, "paper": {}},
        "baseline": None,
        "horizon": True,
    }
    assert written("alone") == {"jobs": {"task": "vit"}, "scale": {"sample": {}}, "baseline": None, "horizon": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: [", "x.yaml: is not YAML: while parsing"),
        ("- jobs", "x.yaml: should have keys and values: like, jobs, scale, baseline, horizon"),
        ("job: {task: vit}", "x.yaml: job is not a key of an experiment. Did you mean jobs?"),
        ("jobs: vit", "x.yaml: jobs should be a mapping but is 'vit'"),
        ("jobs: {}\nhorizon: 3", "x.yaml: horizon should be true or false but is 3"),
        ("jobs: {}\nscale: {sample: lr}", "x.yaml: scale.sample should be a mapping, as in {sample: {}}, but is 'lr'"),
        ("scale: {sample: {}}", "x.yaml: should have jobs, as in jobs: {task: c4_lm, optim: [caspr, adamw]}"),
        ("like: x", "x.yaml: like: x leads back to x"),
        ("like: vitt", "experiment=vitt: no such choice. (choices: x)"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(files: Path, text: str, message: str) -> None:
    (files / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        written("x")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_is_written_as_hydra_reads_it() -> None:
    assert in_words([0.5, [0.9, 0.99], None, True]) == "0.5,[0.9,0.99],null,true"
