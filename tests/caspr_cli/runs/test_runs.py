"""Whole runs, as a user starts them: results, resuming, signals, ranks, sweeps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from running import Process, Runner, losses, near, wait_for

from caspr_cli.optim.precision import is_fast_in_bfloat16
from caspr_cli.recipe import compose

pytestmark = pytest.mark.release


def test_a_run_leaves_a_whole_record(runner: Runner, whole: Path) -> None:
    status = json.loads((whole / "status.json").read_text())
    assert (status["state"], status["attempts"], status["error"]) == ("done", 1, None)
    result = json.loads((whole / "result.json").read_text())
    assert (result["task"], result["optim"], result["seed"], result["steps"]) == ("c4_lm", "caspr", 0, 20)
    assert set(result["optimizer_seconds"]) == {"statistics", "roots", "apply", "communication", "other"}
    assert all((seconds > 0) == (part != "communication") for part, seconds in result["optimizer_seconds"].items())
    assert sum(result["optimizer_seconds"].values()) < result["seconds"]
    seen = losses(whole)
    assert result["final"]["val/loss"] == seen[20, "val/loss"]
    assert result["best"]["val/loss"] == min(v for (_, name), v in seen.items() if name == "val/loss")
    assert result["test"]["test/loss"] == seen[20, "test/loss"]
    # 20 steps, validations at 8, 16 and the end, one test
    assert sorted(step for step, name in seen if name == "train/loss") == list(range(1, 21))
    assert sorted(step for step, name in seen if name == "val/loss") == [8, 16, 20]
    assert seen[20, "val/loss"] < seen[8, "val/loss"]
    # embedding 300 x 16; attention 4 x 16 x 16 and MLP 2 x 16 x 64 in one layer; three norms of 16
    assert result["preconditioned_parameters"] == 4 * 16 * 16 + 2 * 16 * 64
    assert result["parameters"] == result["preconditioned_parameters"] + 300 * 16 + 3 * 16
    # a moment everywhere, another beside the blocks; in these statistics and roots of both axes, and two scales
    squares = 4 * 2 * (16**2 + 16**2) + 2 * 2 * (16**2 + 64**2)
    moments = 2 * result["parameters"] - result["preconditioned_parameters"]
    of_root = 2 if is_fast_in_bfloat16(torch.device("cpu")) else 4  # bytes of a number; half of the squares are roots
    assert result["optimizer_state_bytes"] == pytest.approx(4 * moments + (4 + of_root) * squares / 2, rel=0.02)
    provenance = json.loads((whole / "provenance.json").read_text())
    assert provenance["data"]["source"] == "files"
    assert provenance["packages"]["torch"]
    assert compose.load(whole / "config.yaml").task.name == "c4_lm"
    assert "val/loss" in (whole / "log.txt").read_text()
    assert list(whole.glob("events.out.tfevents.*"))
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}


def only_evaluates(runner: Runner, done: Path, name: str, *words: str) -> None:
    """A run that was killed before it had written its result comes to the same one."""
    record = runner.cut_off(done, name)
    runner(f"output_dir={name}", *words)
    result, again = (json.loads((each / "result.json").read_text()) for each in (done, record))
    for key in ("steps", "final", "best", "test", "optimizer_state_bytes"):
        assert again[key] == result[key], key
    assert losses(record) == losses(done)


def test_cut_off_after_its_last_step_it_only_evaluates(runner: Runner, whole: Path) -> None:
    only_evaluates(runner, whole, "evaluated")


def workers_of(record: Path) -> list[int]:
    """The processes with the record as their last word: those that train, and torch's launcher before them."""
    wanted = {"caspr_cli.training.worker", str(record)}
    return sorted(p.pid for p in psutil.process_iter(["cmdline"]) if wanted <= set(p.info["cmdline"] or ()))


def worker_of(record: Path) -> int:
    (worker,) = workers_of(record)
    return worker


@pytest.mark.parametrize(("number", "code", "lines"), [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 10)])
def test_signals_save_and_say_so(runner: Runner, whole: Path, number: signal.Signals, code: int, lines: int) -> None:
    name = f"signal{code}"
    process = runner.start(f"output_dir={name}")
    record = wait_for(runner, name, lines)
    worker = worker_of(record)
    os.kill(worker, signal.SIGSTOP)  # so small a run would be done before the signal is passed on
    process.send_signal(number)
    time.sleep(1)
    os.kill(worker, signal.SIGCONT)
    out = process.ended(code)
    status = json.loads((record / "status.json").read_text())
    assert status["state"] == "preempted"
    assert f"saved at step {status['step']}; the same command continues" in out
    assert out.count("stop     saves and ends") == 1
    assert status["step"] >= lines - 1
    runner(f"output_dir={name}")
    assert losses(record) == losses(whole)


@pytest.fixture(scope="module")
def ranks(runner: Runner) -> Path:
    """The same run on two ranks, never cut."""
    out = runner("output_dir=ranks", "trainer.devices=2")
    assert "2 cpu processes" in out
    return runner.record("ranks")


def test_two_ranks_that_only_evaluate_report_the_same(runner: Runner, ranks: Path) -> None:
    """They load a whole optimizer, of which each would keep its part in the next step."""
    only_evaluates(runner, ranks, "report", "trainer.devices=2")


def cut_and_resumed(runner: Runner, name: str, lines: int, *words: str) -> Path:
    """A run that a signal ended after so many lines of metrics, and that the same command continued."""
    process = runner.start(f"output_dir={name}", *words)
    record = wait_for(runner, name, lines)
    process.stopped_by(signal.SIGTERM, expect=143)
    runner(f"output_dir={name}", *words)
    return record


SHARDED = ("trainer.devices=2", "trainer.strategy=fsdp")


def test_ranks_that_have_a_part_of_the_model_each(runner: Runner, ranks: Path) -> None:
    """The losses of DDP, of which another strategy may go on; and cut off and continued, bit for bit the same."""
    runner("output_dir=rows", *SHARDED)
    record = runner.record("rows")
    assert losses(record) == near(losses(ranks))
    assert losses(cut_and_resumed(runner, "rows_cut", 3, *SHARDED)) == losses(record)
    checkpoints = [torch.load(each / "checkpoints" / "last.ckpt", weights_only=True) for each in (record, ranks)]
    rows, plain = (content["optimizer_states"][0]["state"] for content in checkpoints)
    assert {i: {k: x.shape for k, x in s.items()} for i, s in rows.items()} == {
        i: {k: x.shape for k, x in s.items()} for i, s in plain.items()
    }


def test_a_reader_that_goes_away_does_not_end_a_run(runner: Runner) -> None:
    process = runner.start("output_dir=unread")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert json.loads((runner.record("unread") / "status.json").read_text())["state"] == "done"


def test_low_precision_counts_right(runner: Runner, whole: Path) -> None:
    """Log-perplexity of the same model and steps, to what bfloat16 weights can do; counted in float64 all the same."""
    runner("output_dir=bf16", "trainer.precision=bf16-true")
    seen = losses(runner.record("bf16"))
    assert seen[8, "val/loss"] == pytest.approx(losses(whole)[8, "val/loss"], rel=0.05)
    assert seen[8, "val/loss"] != round(seen[8, "val/loss"], 2)  # 8 bits of mantissa would show


def test_accumulation_is_the_same_step(runner: Runner, whole: Path) -> None:
    runner("output_dir=parts", "trainer.accumulate=4")
    assert losses(runner.record("parts")) == near(losses(whole))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.exponent=2", "task.root=/nowhere"], "error: optim.exponent should be one of 0, 0.25, 0.5, 1"),
        (["trainer.precision=16-mixed"], "refused  trainer.precision=16-mixed is not for this device; bf16-mixed is"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(runner: Runner, words: list[str], message: str) -> None:
    """Options before data are read; a precision rather than another in its place."""
    assert message in runner("output_dir=cannot_be", *words, expect=2)


def test_a_diverging_run_fails_in_one_line(runner: Runner) -> None:
    diverging = ["output_dir=diverged", "optim=sgd", "optim.lr=1e30"]
    diverging += ["trainer.clip_norm=null", "trainer.log_every=1000"]
    out = runner(*diverging, expect=1)
    assert "failed   FloatingPointError: the validation loss is" in out
    assert "Traceback" not in out
    assert not list(runner.record("diverged").glob("checkpoints/*"))
    assert "resume=retry" in runner(*diverging, expect=1)


@pytest.mark.parametrize("devices", [1, 2])
def test_schedule_free_is_evaluated_and_saved_as_averaged_and_continues_bit_for_bit(
    runner: Runner, devices: int
) -> None:
    # On two ranks 20 steps take less time than a signal.
    words = ["optim=schedule_free", f"trainer.devices={devices}", "trainer.max_steps=120"]
    runner(f"output_dir=free{devices}", *words)
    whole = runner.record(f"free{devices}")
    saved = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    optimizer = saved["optimizer_states"][0]
    weights = [w for name, w in saved["state_dict"].items() if name.startswith("model.")]
    for group in optimizer["param_groups"]:
        for i, y in zip(group["params"], group["y"], strict=True):
            average = y.lerp(optimizer["state"][i]["z"], 1 - 1 / group["betas"][0])
            assert not torch.equal(average, y)
            assert any(torch.equal(average, w) for w in weights)
    # Validation and test see what the checkpoint has: from it alone they come out the same.
    only_evaluates(runner, whole, f"free_evaluated{devices}", *words)
    record = cut_and_resumed(runner, f"free_cut{devices}", 11, *words)  # it saves in the middle between two validations
    assert losses(record) == losses(whole)
    assert devices == 1 or losses(whole) == near(losses(runner.record("free1")))


def test_psgd_kron_draws_alike_on_all_ranks_and_where_a_run_goes_on(runner: Runner) -> None:
    found = []
    for devices in (1, 2):
        runner(f"output_dir=kron{devices}", "optim=psgd_kron", f"trainer.devices={devices}")
        found.append(losses(runner.record(f"kron{devices}")))
    record = cut_and_resumed(runner, "kron_cut", 11, "optim=psgd_kron", "trainer.devices=2")
    assert losses(record) == found[1]
    assert found[1] == near(found[0])


@pytest.mark.parametrize("devices", [1, 2])
def test_schedule_free_has_statistics_of_batch_norms_of_its_averaged_weights(runner: Runner, devices: int) -> None:
    """They are in the checkpoint, beside those of training, and validations change nothing of the training."""
    words = [sys.executable, "-m", "caspr_cli.commands.train", "task=resnet", "optim=schedule_free", "task.size=16"]
    words += ["task.width=8", "task.stem=1", "task.batch_size=16", "trainer.max_steps=12", "trainer.log_every=1"]
    words += [f"trainer.devices={devices}", "trainer.accelerator=cpu"]

    def start(name: str, *more: str) -> Process:
        command, streams = [*words, f"output_dir={name}", *more], {"stdout": subprocess.PIPE, "text": True}
        return Process(command, cwd=runner.home, env=runner.environment, stderr=subprocess.STDOUT, **streams)

    def run(name: str, *more: str) -> dict[tuple[int, str], float]:
        start(name, *more).ended(0)
        return losses(runner.record(name))

    whole = run(f"norm{devices}", "trainer.val_every=4")
    saved = torch.load(runner.record(f"norm{devices}") / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in saved["training_statistics"].items():
        evaluated = saved["state_dict"][f"model.{name}"]
        assert evaluated == 20 if "num_batches" in name else not torch.equal(evaluated, value), name
    once = run(f"norm_once{devices}", "trainer.val_every=12")
    assert {key: value for key, value in whole.items() if key in once} == once
    cut = start(f"norm_cut{devices}", "trainer.val_every=4")
    wait_for(runner, f"norm_cut{devices}", 6)
    cut.stopped_by(signal.SIGTERM, expect=143)
    assert run(f"norm_cut{devices}", "trainer.val_every=4") == whole
