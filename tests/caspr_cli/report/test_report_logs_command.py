"""``caspr-report`` on the logs of other programs: its examples, and a line for each mistake."""

import json
import shlex
from pathlib import Path

import pytest
from calling import REPORT, Call, without
from logged import DAMAGED, METRIC, RUNS, by_add_hparams, by_folder, by_keras, by_wandb_chart, curve, mlflow, table

from caspr_cli.commands import report

OWN = ("--from", "csv", "runs", "--metric", METRIC)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    return Call("caspr-report", report.main, monkeypatch, capsys)


def test_the_examples_of_the_help_run(call: Call) -> None:
    by_add_hparams(Path("runs"))
    for k, (optimizer, seed) in enumerate(RUNS):
        folder = Path("lightning_logs", f"version_{k}")
        table(folder / "metrics.csv", ["step", "val_acc"], [(s, 1 / v) for s, v in curve(optimizer, seed)])
        (folder / "hparams.yaml").write_text(f"optimizer: {optimizer}\nseed: {seed}\n")
        mlflow(Path("mlruns/0", f"{k:032x}"), "wise", curve(optimizer, seed), optimizer=optimizer, seed=seed, lr=0.1)
    by_wandb_chart(Path())
    Path("wandb_export.csv").rename("export.csv")
    assert call("compare", "--help") == 0
    text = call.out
    assert max(map(len, text.splitlines())) <= 80
    lines = text.replace(" \\\n", " ").splitlines()  # as a shell reads a line that goes on
    examples = [shlex.split(line) for line in lines if line.startswith("  caspr-report compare --from")]
    assert [example[3] for example in examples] == list(report.SOURCES)
    for example in examples:
        assert call(*example[1:]) == 0
        assert "\ncaspr " in call.out
        assert "against adamw: better" in call.out
    assert "Best mean: caspr" in Path("report.html").read_text()


def test_other_commands_read_logs_too(call: Call) -> None:
    by_keras(Path("runs"))
    assert call("curves", *OWN, "--to", "curves.svg") == 0
    assert "caspr" in Path("curves.svg").read_text()
    assert call("list", *OWN) == 0
    assert "runs/caspr-s2.csv" in call.out
    assert call("compare", *OWN, "--json") == 0
    assert [row["label"] for row in json.loads(call.out)] == ["caspr", "adamw"]
    assert call.err.startswith("note     a row for each value of the name without its seed (--group KEY,...")
    assert call("profile", *OWN, "--target", "runs=3.6", "--unit", "seconds") == 0
    assert "seconds" in call.out
    assert "caspr" in call.out
    assert call("trials", *OWN, "--to", "t.md") == 0
    assert call.out.endswith("trials   no row has more than one trial\nskipped  t.md: nothing to show\n")
    assert not Path("t.md").exists()


def test_where_knows_hyperparameters_that_make_no_row(call: Call) -> None:
    lines = [(f"{optim}{seed}{lr}", optim, seed, lr, seed + lr) for optim, seed in RUNS for lr in (0.1, 0.2)]
    table(Path("runs.csv"), ["Name", "optimizer", "seed", "model.lr", METRIC], lines)
    own = ("compare", "--from", "wandb", "runs.csv", "--metric", METRIC, "--group", "optimizer", "--json")
    assert "with seed 0 differ in model.lr" in call.refused(*own)
    for words, rows in (
        (["--where", "lr=0.1"], {"caspr": 1.1, "adamw": 1.1}),
        (["--where", "optimizer=adamw", "--where", "model.lr=2e-1"], {"adamw": 1.2}),
        (["--where", "lr=0.1", "--where", "optim=caspr"], {"caspr": 1.1}),
    ):
        assert call(*own, *words) == 0
        assert {row["label"]: row["mean"] for row in json.loads(call.out)} == pytest.approx(rows)
    assert "--where lr=3: no record has lr=3 (lr is 0.1 and 0.2)" in call.refused(*own, "--where", "lr=3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--from", "tensorboard"], "--from tensorboard: name the folder or the files of the logs"),
        (["--metric", "x"], "--metric: only with --from (tensorboard, csv, wandb, mlflow)"),
        (["--from", "tensorbord", "runs"], "--from tensorbord: no such choice. Did you mean tensorboard?"),
        (["--from", "mlflow", "runs", "--step", "x"], "--step: mlflow has steps of its own"),
        (["--from", "csv", "nowhere"], "nowhere: no such file or directory"),
        (["--from", "tensorboard", "runs"], "runs: no event files of TensorBoard (events.out.tfevents.*) there"),
        (["--from", "mlflow", "runs"], "runs: no runs of MLflow (mlflow.db or mlruns) there"),
        (["--from", "mlflow", "text.txt"], "text.txt: is no database of MLflow"),
        (["--from", "csv", "empty"], "empty: no CSV files there"),
        (["--from", "csv", "text.txt"], "text.txt: is no CSV with a line of heads and as many values in each line"),
        (["--from", "csv", "binary"], "binary: cannot be read as CSV"),
        (["--from", "tensorboard", "text.txt"], f"text.txt: {DAMAGED}"),
        (["--from", "csv", "runs"], "--from csv: name a metric with --metric (metrics: epoch, loss and val/loss)"),
        (["--from", "csv", "runs", "--metric", "val_loss"], "--metric val_loss: no run has it. Did you mean val/loss?"),
        ([*OWN, "--group", "optim"],
         "--group optim: no run has this key. (keys: loss)"),
        ([*OWN, "--names", "{a}+{b}"], "--names {a}+{b}: no run has such a name (runs: "),
        ([*OWN, "--names", "x"], "--names x: should have parts in braces, each once"),
        ([*OWN, "--step", "it"], "no column is called it (columns: epoch, loss and val/loss)"),
        ([*OWN, "--step", METRIC], "is no whole number; --step COLUMN names another"),
        ([*OWN, "--at", "last"], "--at: should be end, best, or a step, but is last"),
        (["--from", "csv", "words.csv", "--metric", METRIC],
         "words.csv: line 2: step '1' and val/loss 'high' should be numbers"),
        (["--from", "csv", "seeds.csv", "--metric", METRIC],
         "the seed should be a whole number but is 0.5; --seed KEY"),
    ],
)  # fmt: skip
def test_mistakes_get_a_line_and_exit_code_2(argv: list[str], message: str, call: Call) -> None:
    by_keras(Path("runs"))
    Path("empty").mkdir()
    Path("text.txt").write_text("some words, and more\nof them\nand, so, on\nto the end\n")
    Path("binary").write_bytes(b"\x80\xff\x00")
    table(Path("words.csv"), ["step", METRIC], [(1, "high")])
    table(Path("seeds.csv"), ["step", "seed", METRIC], [(1, 0.5, 1.0)])
    assert message in call.refused("compare", *argv)


def test_tensorboard_is_read_without_torch_and_tensorflow(tmp_path: Path) -> None:
    """Without TensorBoard itself, a line says what to install."""
    by_folder(tmp_path)
    argv = ["compare", "--from", "tensorboard", str(tmp_path), "--metric", METRIC]
    for blocked, code, said in (
        (("torch", "tensorflow", "lightning", "hydra"), 0, "against adamw: better"),
        (("tensorboard",), 2, "error: this needs tensorboard, which is not installed: pip install 'caspr-cli[run]'\n"),
    ):
        done = without(blocked, REPORT, *argv)
        assert done.returncode == code, done.stderr
        assert said in (done.stderr if code else done.stdout)
