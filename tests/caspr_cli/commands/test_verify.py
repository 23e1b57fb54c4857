"""``caspr-verify``: the command line, its mistakes, its exit codes, and what it writes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from calling import Call

from caspr_cli.commands import verify
from caspr_cli.common.errors import UserError
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.report.answer import Answer, table
from caspr_cli.theory.choices import Costs, Layers


def made_up(name, asked, held=True):
    """A module of theory that remembers what it was asked."""

    def answer(choice, log):
        log("half way")
        asked.append((name, choice))
        tables = {"gaps": table([{"a": 1}], "Gaps")}
        return Answer(name, f"Is {name} so?", finding="Yes.", tables=tables, claims=((f"{name} holds", held),))

    return SimpleNamespace(answer=answer)


@pytest.fixture
def call(monkeypatch, capsys):
    return Call("caspr-verify", verify.main, monkeypatch, capsys)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the modules of theory were asked; nothing is computed."""
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "import_module", lambda name: made_up(name.rpartition(".")[2], found))
    return found


def test_importing_it_imports_no_torch():
    code = "import sys, caspr_cli.commands.verify; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_of_a_question_names_its_flags(call):
    assert call("order", "--help") == 0
    for name in ("ogbg_molpcba", "--quick", "--parameter", "default: outputs/verify/order"):
        assert name in " ".join(call.out.split())
    assert "--tokens" not in call.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say what to verify (choices: order, approximation,"),
        (["ordr"], "ordr: no such question. Did you mean order?"),
        (["order", "--seeeds", "2"], "--seeeds is no flag of order. Did you mean --seeds?"),
        (["order", "--seeds", "0"], "--seeds: "),
        (["order", "--seed", "-1"], "--seed: "),
        (["regret", "--task", "vit"], "--task is no flag of regret."),
        (["order", "--optim", "adam"], "--optim adam: no such choice. Did you mean adamw?"),
        (["order", "extra"], "extra is no flag of order."),
        (["cost", "--tokens", "many"], "--tokens: "),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError) as error:
        verify.parse(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_in_the_way_is_said_before_anything_is_computed(asked, tmp_path, call):
    (tmp_path / "file").touch()
    assert call("order", "--to", "file/below") == 2
    assert "is no directory" in call.err
    assert asked == []


def test_one_question(asked, tmp_path, call):
    assert call("order", "--quick", "--seed", "4", "--task", "vit") == 0
    assert asked == [("order", Layers(quick=True, seed=4, task="vit"))]
    assert "Is order so?" in call.out
    assert "wrote    outputs/verify/order: order.md, order.json and gaps.csv" in call.out
    record = json.loads((tmp_path / "outputs/verify/order/order.json").read_text(encoding="utf8"))
    assert record["command"] == "caspr-verify order --quick --seed 4 --task vit"
    assert record["provenance"]["torch"]
    assert "host" not in record["provenance"]


def test_all_of_them_and_one_page(asked, tmp_path, call):
    assert call("all", "--seeds", "2", "--to", "there") == 0
    assert [name for name, *_ in asked] == list(verify.QUESTIONS)
    for name in verify.QUESTIONS:
        assert (tmp_path / "there" / name / f"{name}.md").is_file()
    page = (tmp_path / "there/index.html").read_text(encoding="utf8")
    assert all(f"Is {name} so?" in page for name in verify.QUESTIONS)
    assert "caspr-verify order --seeds 2" in page
    assert asked[0][1] == Layers(seeds=2)
    assert asked[-1][1] == Costs()  # which takes no seeds
    assert "wrote    there/index.html" in call.out


def test_json_alone_on_standard_output(asked, call):
    assert call("order", "--json") == 0
    assert json.loads(call.out)["name"] == "order"
    assert "wrote" in call.err
    assert call("all", "--json") == 0
    assert [one["name"] for one in json.loads(call.out)] == list(verify.QUESTIONS)


def test_a_statement_that_failed_is_said_and_the_code_is_one(asked, monkeypatch, call):
    monkeypatch.setattr(verify, "import_module", lambda name: made_up(name.rpartition(".")[2], asked, held=False))
    assert call("order") == 1
    assert "failed   order: order holds" in call.err


WRONG = "--task vot: no such task. Did you mean vit?"


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [(ConfigError(WRONG), 2, f"error: {WRONG}"), (KeyboardInterrupt(), 130, "importing torch")],
)
def test_errors_of_theory_and_interruptions(asked, monkeypatch, call, error, code, last):
    module = SimpleNamespace(answer=Mock(side_effect=error))
    monkeypatch.setattr(verify, "import_module", lambda name: module)
    assert call("order") == code
    assert call.err.splitlines()[-1] == last


def test_every_question_is_a_module():
    from importlib import import_module

    assert all(callable(import_module(f"caspr_cli.theory.{name}").answer) for name in verify.QUESTIONS)


def test_a_terminal_without_utf8_gets_what_it_can_show(tmp_path):
    code = """
import sys
from types import SimpleNamespace
from caspr_cli.commands import verify
from caspr_cli.report.answer import Answer
verify.import_module = lambda name: SimpleNamespace(
    answer=lambda choice, log: Answer("order", "X₁ ⪯ X₂?", finding="X₁ ⪯ X₂.")
)
sys.argv = ["caspr-verify", "order"]
sys.exit(verify.main())
"""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "X₁ ⪯ X₂" in (tmp_path / "outputs/verify/order/order.md").read_text(encoding="utf8")
