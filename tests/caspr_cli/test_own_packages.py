"""Packages of others that bring a task, an optimizer and config files: as ``caspr-train new`` writes them."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from caspr_cli.commands import new
from caspr_cli.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"task": "own_rings", "optimizer": "own_signs"}


def install(project: Path, site: Path) -> None:
    """Do what ``pip install -e`` does: put the package on the path, and its entry points beside it."""
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    folder = site / f"{about['name']}-{about['version']}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    lines = [
        line
        for group, points in about["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    (site / about["name"]).symlink_to(project / about["name"])


class Home:
    """A folder of a user, with packages of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"

    def __call__(self, *words: str, module: str = "caspr_cli.commands.train", expect: int = 0) -> str:
        path = os.pathsep.join([str(ROOT), str(self.site)])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        start = f"import sys; from caspr_cli.commands import scripts; sys.argv[1:] = {list(words)!r}; "
        command = ["-c", start + "sys.exit(scripts.train())"] if module.startswith("caspr") else ["-m", module, *words]
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def record(self) -> dict[str, object]:
        (file,) = self.folder.glob("outputs/*/*/*/seed0/provenance.json")
        found: dict[str, object] = json.loads(file.read_text())
        return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    made = Home(tmp_path)
    monkeypatch.chdir(tmp_path)
    for kind, name in NAMES.items():
        new.main([kind, name])
        install(tmp_path / name, made.site)
    return made


def test_what_packages_bring_is_listed_under_them_and_composed_without_torch(home: Home) -> None:
    lines = [line.split() for line in home("--help").splitlines()]
    assert lines[-5:] == [
        ["of", "own_rings", "0.1.0"],
        ["task=own_rings", "points", "of", "two", "rings", "(accuracy)"],
        [
            "experiment=own_rings",
            *["CASPR", "and", "AdamW", "on", "own_rings,", "each", "tuned", "by", "six", "trials"],
        ],
        ["of", "own_signs", "0.1.0"],
        ["optim=own_signs", "the", "sign", "of", "the", "momentum"],
    ]
    words = ("task=own_rings", "optim=own_signs", "task.width=8", "optim.beta=0.5", "--cfg", "job")
    assert "  width: 8\n" in home(*words)
    assert "task.wdith is not a key of task=own_rings. Did you mean task.width?" in home(
        "task=own_rings", "task.wdith=8", expect=2
    )
    assert "search.trials should be at least 1" in home("experiment=own_rings", "search.trials=0", expect=2)
    module = "import own_rings, own_signs, caspr_cli.recipe.compose, sys; sys.exit('torch' in sys.modules)"
    (home.site / "light.py").write_text(module)
    home(module="light")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise OSError('no')", "cannot be imported (OSError: no)"),
        ("raise ValueError('no\\nand more')", "cannot be imported (ValueError: no and more)"),
        ("import sys\nsys.exit(3)", "cannot be imported (SystemExit: 3)"),
        ("ENTRY = 3", "should be a caspr_cli.tasks.Entry but is a int"),
        ("from own_signs import ENTRY", "should be a caspr_cli.tasks.Entry but is a caspr_cli.optim.family.Entry"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_in_one_line(text: str, message: str, home: Home) -> None:
    (home.folder / "own_rings" / "own_rings" / "__init__.py").write_text(text)
    said = home("task=c4_lm", expect=2)
    assert said == f"error: package own_rings 0.1.0: entry point own_rings of caspr.tasks: {message}\n"


SIGNS, RINGS = ("own_signs/own_signs/__init__.py", "own_signs/own_signs/optimizer.py"), "own_rings/own_rings/task.py"
FAULTS = [  # file, what stands in it, what is put there, and what is said of the package
    (SIGNS[0], "    from own_signs", "    {}['x']\n    from own_signs",
     r"own_signs 0.1.0: build \(__init__.py, line \d+\): KeyError: 'x'"),
    (RINGS, "def datasets(self):", "def datasets(self):\n        1 / 0",
     r"own_rings 0.1.0: Rings.datasets \(task.py, line \d+\): ZeroDivisionError: division by zero"),
    (SIGNS[1], "        super().", "        raise ValueError('no')\n        super().",
     r"own_signs 0.1.0: SignMomentum.__init__ \(optimizer.py, line \d+\): ValueError: no"),
    (SIGNS[0], "build(groups, **keys)", "build(groups, lr)",
     r"own_signs 0.1.0: own_signs:ENTRY: TypeError: build\(\) got an unexpected keyword argument .*"),
    (RINGS, "class Rings", "class Rungs",
     r"own_rings 0.1.0: own_rings:ENTRY: AttributeError: module 'own_rings.task' has no attribute 'Rings'"),
    (RINGS, "import torch", "import nowhere_at_all",
     r"own_rings 0.1.0: <module> \(task.py, line \d+\): ModuleNotFoundError: No module named 'nowhere_at_all'"),
    (RINGS, "def model(self):", "def model(self):\n        torch.zeros(2) @ torch.zeros(3)",
     r"own_rings 0.1.0: Rings.model \(task.py, line \d+\): RuntimeError: .*"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [pytest.param(*fault, marks=pytest.mark.release if i > 1 else ()) for i, fault in enumerate(FAULTS)],
)
def test_an_error_of_a_package_names_package_and_function(
    file: str, before: str, after: str, message: str, home: Home
) -> None:
    """In the process that will train, and in that of ``debug=plan``."""
    text = (home.folder / file).read_text()
    assert before in text
    (home.folder / file).write_text(text.replace(before, after, 1))
    debug = "plan" if any(name in message for name in ("build ", "model ")) else "fast"
    said = home("task=own_rings", "optim=own_signs", f"debug={debug}", expect=2)
    assert re.search(rf"(error: |refused  )package {message}\n", said), said


def test_a_record_names_the_package_that_is_not_installed_any_more(home: Home) -> None:
    record = home.folder / "outputs" / "own_rings" / "own_signs" / "0123abcd" / "seed0"
    record.mkdir(parents=True)
    packages = {"torch": "2.9", "own_rings": "0.1.0", "own_signs": "0.1.0"}
    (record / "provenance.json").write_text(json.dumps({"packages": packages}))
    for file in (home.site / "own_rings-0.1.0.dist-info").iterdir():
        file.unlink()
    where = "outputs/own_rings/own_signs/0123abcd/seed0"
    said = home("task=own_rings", "optim=own_signs", expect=2)
    assert said == f"error: task=own_rings: {where} ran it from the package own_rings 0.1.0, not installed now\n"
    assert "task=own_ringz: no such choice." in home("task=own_ringz", expect=2)


def test_a_name_that_is_taken_is_refused(home: Home) -> None:
    points = home.site / "own_rings-0.1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("own_rings = own_rings:", "vit = own_rings:"))
    said = home("task=vit", expect=2)
    assert "entry point vit of caspr.tasks: caspr-cli itself has this name; choose another" in said
    points.write_text(points.read_text().replace("vit = own_rings:", "own_signs = own_rings:"))
    other = home.site / "own_signs-0.1.0.dist-info" / "entry_points.txt"
    other.write_text(f"{other.read_text()}\n[caspr.tasks]\nown_signs = own_rings:ENTRY\n")
    assert re.search(
        r"own_signs of caspr.tasks: own_\w+ 0.1.0 has this name, too; uninstall one", home("task=vit", expect=2)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "write caspr-train new task NAME"),
        (["tsk", "x"], "new tsk: no such choice. Did you mean task?"),
        (["task", "token"], "token: there is a Python module of this name; choose another, as in my_token"),
        (["task", "vit"], "vit: there is a task or an optimizer of this name"),
        (["task", "Own-Task"], "Own-Task: a name has lower-case letters"),
        (["task", "there"], "there: is there already"),
    ],
)
def test_names_that_new_refuses(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        new.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.release
def test_own_task_and_optimizer_train_and_their_tests_pass(home: Home) -> None:
    home("task=own_rings", "optim=own_signs", "debug=fast", "trainer.devices=2")
    packages = home.record()["packages"]
    assert packages["own_rings"] == packages["own_signs"] == "0.1.0"
    for name in NAMES.values():
        home("-q", name, module="pytest")
    assert len((home.folder / "own_rings" / "own_rings" / "task.py").read_text().splitlines()) <= 40


def test_the_task_that_new_writes_learns(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(home.site))
    from own_rings import Conf  # type: ignore[import-not-found]
    from own_rings.task import Rings  # type: ignore[import-not-found]

    task, again = Rings(Conf(), 0), Rings(Conf(), 1)
    task.prepare()
    assert task.describe_data() == again.describe_data()
    assert task.describe_data()["splits"] == {
        "train": {"samples": 4096}, "validation": {"samples": 1024}, "test": {"samples": 1024}
    }  # fmt: skip
    torch.manual_seed(0)
    model = task.model()
    assert task.plain(model)["4.weight"] == "head"
    assert task.train_flops(model) == 3 * 2 * (2 * 64 + 64 * 64 + 64 * 2) * 128
    data = task.dataset("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        task.loss(model, task.collate([data[i] for i in range(32 * step, 32 * step + 32)])).backward()
        optimizer.step()
    metrics, whole = task.metrics(), task.dataset("test")
    for part in (range(100), range(100, 1024)):  # batches of unequal size
        task.evaluate(model, task.collate([whole[i] for i in part]), metrics)
    found = {name: float(value) for name, value in metrics.compute().items()}
    with torch.no_grad():
        at_once = task.measure(model, task.collate([whole[i] for i in range(1024)]))
    assert found == pytest.approx({name: float(value) for name, value in at_once.items()}, rel=1e-5)
    assert found["accuracy"] > 0.85
