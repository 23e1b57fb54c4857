import io
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from calling import REPORT, Call, without
from recorded import run, write

from caspr_cli import __version__
from caspr_cli.commands import report
from caspr_cli.report import records

OPTIMIZERS = {"caspr": 4.0, "adamw": 4.5}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return Call("caspr-report", report.main, monkeypatch, capsys)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two optimizers on two tasks, three seeds each, in ./outputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for task in ("c4_lm", "vit"):
        for optim, value in OPTIMIZERS.items():
            for seed in range(3):
                write(run(optim, seed, value + seed / 50, task__name=task), Path("outputs", task, optim, f"seed{seed}"))
    return Path("outputs")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say what to do (caspr-report --help)"),
        (["cmpare"], "cmpare: no such command. Did you mean compare?"),
        (["compare", "--js"], "--js is no flag of compare. Did you mean --json?"),
        (["compare", "--targt=vit=1"], "--targt=vit=1 is no flag of compare. Did you mean --target?"),
        (["list", "--json"], "--json is no flag of list."),
        (["compare", "--target"], "--target: expected one argument"),
        (["compare", "--json=1"], "--json takes no value"),
        (["compare", "outputs/vti"], "outputs/vti: no such file or directory; caspr-train makes records, as: "),
        (["compare", "empty"], "no records in empty; caspr-train makes records, as: caspr-train -m optim=caspr,adamw"),
        (["check", "empty"], "no records in empty; caspr-train makes records, as: caspr-train -m optim=caspr,adamw"),
        (["compare", "packs"], "no records in packs; it has packs: name them, as packs/x.jsonl.gz"),
        (["leaderboard", "empty", "--to", "x.md"], "no packs in empty"),
        (["check", "packs"], "no records in packs; it has packs: name them, as packs/x.jsonl.gz"),
        (["compare", "events"], "no records in events; it has logs of TensorBoard: add --from tensorboard --metric "),
        (["compare", "--baseline", "adamv"], "--baseline adamv: no row has this name. Did you mean adamw? (rows: "),
        (["compare", "--target", "vit"], "--target: should be TASK=VALUE, as c4_lm=4.2, but is vit"),
        (["compare", "--target", "vit=nan"], "--target: should be TASK=VALUE, as c4_lm=4.2, but is vit=nan"),
        (["compare", "--target", "vt=1"], "--target vt: no record is of this task. Did you mean vit?"),
        (["compare", "--tuned", "optim.lrr"], "--tuned optim.lrr: no record has this key. Did you mean optim.lr?"),
        (["compare", "--to", "x.pdf"], "--to x.pdf: the name should end in .html, .md, .tex, .csv, .json, .svg"),
        (["compare", "--to", "d.md"], "--to d.md: it is a directory"),
        (["compare", "--to", "outputs/vit/adamw/seed0/config.yaml/x.md"], "cannot write there: "),
        (["profile", "--unit", "step"], "--unit step: no such choice. Did you mean steps? (choices: steps, seconds)"),
        (["curves"], "curves: name a file with --to, as curves.svg"),
        (["pack"], "pack: name a file with --to, as pack.jsonl.gz"),
        (["pack", "--to", "x.gz"], "--to x.gz: the name should end in .jsonl.gz"),
        (["show"], "show: 12 records there; name one, as outputs/c4_lm/adamw/seed0"),
        (["compare", "outputs/vit/adamw/seed0/config.yaml"], "config.yaml: cannot be read as what caspr-report pack"),
    ],
)
def test_mistakes_get_a_line_and_exit_code_2(study: Path, argv: list[str], message: str, call: Call) -> None:
    Path("d.md").mkdir()
    for name in ("empty", "events", "packs"):
        Path(name).mkdir()
    Path("packs", "x.jsonl.gz").touch()
    Path("events", "events.out.tfevents.1").touch()
    assert message in call.refused(*argv)


def test_compare_prints_a_table_for_each_task(study: Path, call: Call) -> None:
    assert call("compare") == 0
    assert call.out.startswith(f"caspr-report {__version__}  12 records in outputs\n")
    assert call.out.count("\ncaspr ") == 2
    assert call.out.count("against adamw: not tested: -11 %; the differences of 3 seeds are all equal") == 2
    assert max(map(len, call.out.splitlines())) <= 120


def test_json_is_all_there_is_on_standard_output(study: Path, call: Call) -> None:
    assert call("compare", study / "vit", "--json", "--to", "x.csv", "--baseline", "caspr") == 0
    assert [(row["task"], row["label"], row["baseline"]) for row in json.loads(call.out)] == [
        ("vit", "caspr", "caspr"), ("vit", "adamw", "caspr"),
    ]  # fmt: skip
    assert call.err == "wrote    x.csv\n"


def test_every_format_is_written_whole(study: Path, call: Call) -> None:
    words = {"x.md": "| caspr | 3 |", "new/x.tex": r"\toprule", "x.csv": "task,scale", "x.json": '"label": "caspr"'}
    argv = [word for name in words for word in ("--to", name)]
    assert call("compare", *argv) == 0
    assert all(word in Path(name).read_text(encoding="utf8") for name, word in words.items())
    assert [line for line in call.out.splitlines() if line.startswith("wrote")] == [
        f"wrote    {name}" for name in words
    ]
    assert not list(Path.cwd().glob(".*"))


def test_what_cannot_be_read_is_warned_of_and_the_rest_is_compared(study: Path, call: Call) -> None:
    for k in range(20):
        Path("outputs/bad", str(k)).mkdir(parents=True)
        Path("outputs/bad", str(k), "status.json").write_text("{", encoding="utf8")
    assert call("compare") == 0
    assert "12 records" in call.out
    lines = call.err.splitlines()
    assert lines[0] == "warning  outputs/bad/0/config.yaml: missing: left out"
    assert lines[-1] == "warning  12 more files like these"
    assert len(lines) == report.SHOWN + 1


def test_a_pack_of_any_name_is_unpacked(study: Path, call: Call) -> None:
    assert call("pack", study, "--to", "p.jsonl.gz") == 0
    assert call.out.startswith("wrote    p.jsonl.gz: 12 records, ")
    Path("p.jsonl.gz").rename("study.gz")
    assert call("unpack", "study.gz", "--to", "un") == 0
    assert Path("un/vit/caspr/seed1/status.json").exists()


def test_a_record_of_a_pack_is_shown_by_the_name_that_it_has_in_lists(study: Path, call: Call) -> None:
    assert call("pack", study, "--to", "p.jsonl.gz") == 0
    assert "name one, as p.jsonl.gz:c4_lm/adamw/seed0" in call.refused("show", "p.jsonl.gz")
    assert call("show", "p.jsonl.gz:c4_lm/adamw/seed0") == 0
    assert "task=c4_lm optim=adamw scale=sample seed=0" in call.out
    assert call("list", "p.jsonl.gz:vit/adamw", "p.jsonl.gz:vit", "p.jsonl.gz:vit/adamw/seed1") == 0
    assert len(call.out.splitlines()) == 7
    assert "p.jsonl.gz:vit/ad: no such file or directory" in call.refused("show", "p.jsonl.gz:vit/ad")


def test_curves_of_all_tasks_together_have_a_dark_twin(study: Path, call: Call) -> None:
    assert call("curves", "--together", "--to", "c.svg") == 0
    assert call.out == "wrote    c.svg\nwrote    c-dark.svg\n"
    light, dark = (Path(name).read_text(encoding="utf8") for name in ("c.svg", "c-dark.svg"))
    assert all(text.count(">vit<") == 1 for text in (light, dark))
    assert light != dark


def test_all_trials_and_their_figures(study: Path, call: Call) -> None:
    for k in range(3):
        write(run("caspr", 0, 4.0 + k, optim__lr=0.1 * 2**k), Path("outputs/c4_lm/caspr/trials", str(k)))
    argv = ["trials", study / "c4_lm", "--to", "t.svg", "--to", "t.md", "--tuned", "optim.lr,optim.eps"]
    assert call(*argv[:-1], "optim.lr,optim.weight_decay") == 0
    out = call.out
    assert "row    best lr  val/loss" in out
    assert out.count("\ncaspr ") == 1 + 4  # one range and four trials
    assert out.endswith("wrote    t.svg\nskipped  t-keys.svg: nothing to draw\nwrote    t.md\n")
    assert "by learning rate" in Path("t.svg").read_text(encoding="utf8")
    assert Path("t.md").read_text(encoding="utf8").count("| caspr |") == 4
    assert call(*argv) == 2


def test_output_that_is_not_utf_8_has_question_marks(study: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert call("compare", "--to", "x.md") == 0
    assert b" ? 0.020 " in out.getvalue()
    assert " ± 0.020 " in Path("x.md").read_text(encoding="utf8")


@pytest.mark.release
def test_a_task_that_is_no_name_of_a_file_gets_its_figure_here(study: Path, call: Call) -> None:
    write(run(task__name="../evil/x"), Path("outputs/odd"))
    assert call("curves", "outputs/odd", "outputs/vit", "--to", "c.svg") == 0
    assert sorted(path.name for path in Path().glob("*.svg")) == [
        "c-.._evil_x-sample-sample.svg", "c-vit-sample-sample.svg",
    ]  # fmt: skip


@pytest.mark.release
def test_figures_and_the_page(study: Path, call: Call) -> None:
    assert call("curves", "--over", "seconds", "--to", "c.svg") == 0
    assert call("profile", "--to", "p.svg") == 0
    assert call("compare", study / "vit", "--to", "x.html", "--to", "x.svg") == 0
    names = ["c-c4_lm-sample-sample.svg", "c-vit-sample-sample.svg", "p.svg", "x.html", "x.svg"]
    assert sorted(path.name for path in Path.cwd().iterdir() if path.is_file()) == names
    assert all("<svg" in Path(name).read_text(encoding="utf8") for name in names)
    assert "caspr-report compare outputs/vit --to x.html --to x.svg" in Path("x.html").read_text(encoding="utf8")


@pytest.mark.release
def test_a_figure_for_each_data_set(study: Path, call: Call) -> None:
    for seed in range(2):
        other = run("caspr", seed, 4.0 + seed, provenance={"data": {"hash": "ffff"}})
        write(other, Path("outputs/c4_lm/caspr/other", f"seed{seed}"))
    assert call("curves", study / "c4_lm", "--to", "c.svg") == 0
    names = ["c-c4_lm-sample-sample-val_loss-abcd-300.svg", "c-c4_lm-sample-sample-val_loss-ffff-300.svg"]
    assert sorted(path.name for path in Path.cwd().glob("*.svg")) == names


def test_ctrl_c_ends_it_quietly(study: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr(records, "find", Mock(side_effect=KeyboardInterrupt))
    assert call("compare") == 130
    assert (call.out, call.err) == ("", "")


@pytest.mark.release
def test_a_reader_that_leaves_ends_it_quietly(study: Path) -> None:
    command = f"{sys.executable} -m caspr_cli.commands.report compare | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_ctrl_c_is_heard_while_libraries_are_imported() -> None:
    """Nothing slow comes before main()."""
    program = (
        "import sys; from caspr_cli.commands import report; "
        "print({name.partition('.')[0] for name in sys.modules} & {'numpy', 'scipy', 'yaml', 'matplotlib'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.release
@pytest.mark.parametrize(
    "argv",
    [
        ["compare", "outputs", "--to", "x.md", "--to", "x.tex", "--to", "x.csv", "--to", "x.json", "--to", "x.html"],
        ["pack", "outputs", "--to", "x.jsonl.gz"],
    ],
)
def test_it_works_where_there_is_no_torch_and_no_hydra(study: Path, argv: list[str]) -> None:
    done = without(("torch", "lightning", "hydra", "omegaconf"), REPORT, *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("wrote") == argv.count("--to")
