import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from calling import Call

from caspr_cli.bench import measure
from caspr_cli.commands import bench

TINY = ("--shapes", "2*12x8,6", "--rounds", "1", "--interval", "2")
PROMISED = [
    "optimizer", "median_ms", "p99_ms", "mean_ms", "step_ms", "floor_ms", "floor_ratio", "adamw_ratio",
    "statistics_ms", "roots_ms", "apply_ms", "rest_ms", "state_bytes_per_parameter", "share", "parameters", "threads",
    "device", "versions", "refresh_ms", "lapack_ms", "refresh_ratio",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(measure.RATE_SIZE, "cpu", 32)
    monkeypatch.setattr(measure, "SETTLING", 2)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return Call("caspr-bench", bench.main, monkeypatch, capsys)


def test_importing_the_command_imports_no_torch_and_help_is_quick() -> None:
    code = "import sys; from caspr_cli.commands import bench; sys.argv[1:] = ['--help']; bench.main()"
    code += "; assert 'torch' not in sys.modules"
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert os.times().children_user - before.children_user < 5  # not by the clock: other work may share the machine


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim", "caspr,adamv"], "--optim adamv: no such choice. Did you mean adamw?"),
        (["--shapes", "4*15y6x512"], "cannot read '4*15y6x512'"),
        (["--params", "14Q"], "--params: cannot read '14Q'"),
        (["--task", "c4lm"], "--task c4lm: no such choice. Did you mean c4_lm?"),
        (["--task", "c4_lm", "--scale", "papr"], "--scale papr: no such choice. Did you mean paper?"),
        (["--task", "c4_lm", "--batch", "3"], "a task has a batch of its own"),
        (["--task", "c4_lm", "--shapes", "3x3"], "--shapes: not allowed with argument --task"),
        (["--optim", "caspr,adamw:eps=1"], "--optim adamw: takes no options here; caspr"),
        (["--optm", "caspr"], "--optm is no flag of caspr-bench. Did you mean --optim?"),
        (["caspr"], "caspr is no flag of caspr-bench."),
        (["--rounds", "0"], "--rounds: should be a positive integer but is 0"),
        (["--interval", "x"], "--interval: should be a positive integer but is x"),
        (["--dtype", "float3"], "Did you mean float32?"),
        (["--device", "tpu"], "--device tpu: no such choice."),
        (["--json", "."], "it is a directory"),
        (["--png", "/proc/none/x.png"], "/proc/none/x.png: cannot write there"),
        (["--shapes", "3x3", "--set", "ordr=3"], "ordr is no option. Did you mean order?"),
        (["--shapes", "3x3", "--set", "eps=-1"], "caspr: eps should be > 0 but is: -1"),
        (["--ranks", "0"], "--ranks: should be a positive integer but is 0"),
        (["--ranks", "2", "--model", "gpt2-small"], "--ranks: measures a step, and --model does not"),
        (["--model", "gpt-2"], "--model gpt-2: no such choice"),
        (["--model", "gpt2-small", "--gpu", "h1"], "--gpu h1: no such choice. Did you mean h100?"),
        (["--model", "gpt2-small", "--scale", "paper"], "of --model: should be a positive integer but is paper"),
        (["--model", "gpt2-small", "--optim", "adamw"], "--optim adamw: does not share its work among ranks; caspr"),
        (["--scale", "8"], "--scale: needs --task NAME, or --model NAME"),
        (["--ranks", "2", "--optim", "adamw"], "--optim adamw: does not share its work among ranks; caspr"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(call: Call, argv: list[str], message: str) -> None:
    assert message in call.refused(*argv)
    assert call.out == ""


def test_table_json_and_chart(call: Call) -> None:
    assert call(*TINY, "--optim", "caspr,adamw", "--json", "rows.json") == 0
    rows = json.loads(Path("rows.json").read_text(encoding="utf8"))
    assert [row["optimizer"] for row in rows] == ["caspr", "adamw"]
    assert all(key in row for row in rows for key in PROMISED)
    assert (rows[1]["floor_ms"], rows[1]["floor_ratio"]) == (None, None)
    assert rows[0]["parameters"] == 2 * 12 * 8 + 6
    assert Path("outputs/bench/own.png").read_bytes().startswith(b"\x89PNG")
    lines = call.out.splitlines()
    table = [line for line in lines if line.startswith(("optimizer ", "caspr ", "adamw "))]
    assert len(table) == 3
    assert len({len(line) for line in table}) == 1  # aligned
    for start in ("median ", "share ", "roots ", "machine ", "json ", "png ", "next "):
        assert any(line.startswith(start) for line in lines), start
    assert call.err.startswith("importing torch\n")  # no terminal shows progress: plain lines at once, now and then
    assert "\r" not in call.err


def test_tables_and_legends_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cells = [["optimizer", *(f"column {k}" for k in range(13))], ["caspr", *["1.00"] * 13]]
    lines = list(bench.fitting(cells, [0, 0, 5, 2, 4, 6, 7, 0, 3, 3, 3, 3, 1, 1]))
    assert lines[0].startswith("optimizer  column 0")
    assert "column 6" in lines[0]  # x adamw
    assert any(line.startswith("(no room for: ") for line in lines)
    lines += [line for text in (bench.LEGEND, bench.RANKS_LEGEND) for line in bench.hanging(text, 12)]
    assert max(map(len, lines)) <= 80
    monkeypatch.delenv("COLUMNS")
    assert len(list(bench.fitting(cells, [0] + [1] * 13))) == 2  # a pipe has room for all


def test_json_has_standard_output_for_itself(call: Call) -> None:
    assert call(*TINY, "--optim", "adamw", "--json", "-", "--no-png") == 0
    (row,) = json.loads(call.out)
    assert row["optimizer"] == "adamw"
    assert "optimizer " in call.err
    assert not Path("outputs").exists()


def test_a_task_brings_its_own_rule(call: Call) -> None:
    assert call("--task", "vit", "--optim", "caspr", "--rounds", "1", "--interval", "1", "--json", "-",
                "--png", "here/chart.png") == 0  # fmt: skip
    (row,) = json.loads(call.out)
    assert row["set"] == "vit-sample"
    assert "for its own batch" in call.err
    assert Path("here/chart.png").exists()


def test_an_interruption_is_one_line_and_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "take_turns", Mock(side_effect=KeyboardInterrupt))
    assert call(*TINY, "--optim", "adamw", "--json", "rows.json", "--no-png") == 130
    assert (call.out, call.err) == ("", "importing torch\ninterrupted: nothing was written\n")
    assert not Path("rows.json").exists()


def test_a_step_on_many_gpus_is_predicted(call: Call) -> None:
    flags = ("--model", "gpt2-small", "--scale", "1024,8", "--gpu", "a100", "--json", "rows.json")
    assert call(*flags) == 0
    assert call.out.splitlines()[0].endswith("gpt2-small, caspr, predicted for A100 SXM 80GB, not measured")
    assert "19.5 TFLOP/s in float32" in " ".join(call.out.split())
    rows = json.loads(Path("rows.json").read_text())
    assert [(row["gpus"], row["mode"]) for row in rows] == [
        (8, "DDP"), (8, "fully_shard"), (1024, "DDP"), (1024, "fully_shard")
    ]  # fmt: skip
    assert rows[2]["received_ratio"] <= 1.1


@pytest.mark.release
def test_ranks_share_a_step(call: Call) -> None:
    flags = ("--ranks", "2,1", "--shapes", "4*16x16,6", "--rounds", "2", "--interval", "2", "--json", "rows.json")
    assert call(*flags) == 0
    heads = call.out.splitlines()[1].split()
    assert heads[:2] == ["optimizer", "ranks"]
    assert "mean" in heads  # a narrow terminal leaves the median out
    one, two = json.loads(Path("rows.json").read_text())
    assert (one["ranks"], two["ranks"], one["speedup"]) == (1, 2, 1.0)
    assert two["speedup"] == pytest.approx(one["mean_ms"] / two["mean_ms"])
    weights = 4 * (4 * 16 * 16 + 6)
    assert one["weight_bytes"] == two["weight_bytes"] == weights
    assert (one["bytes_received"], two["bytes_received"]) == (0, 4 * 4 * 16 * 16)
    assert two["factor_bytes"] == one["factor_bytes"] / 2
    moments = one["state_bytes"] - one["factor_bytes"]
    # a moment of each tensor, another of the vector, a counter each, and another of each matrix
    assert moments == two["state_bytes"] - two["factor_bytes"] == weights + 4 * 6 + 9 * 4
    assert one["communication_ms"] == 0 < two["communication_ms"]
    assert (one["steps"], one["threads"]) == (4, 1)
