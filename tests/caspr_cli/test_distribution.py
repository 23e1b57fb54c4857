"""What a user gets: the README's lines, and a wheel that works where there is no checkout."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from calling import without
from torch import nn

from caspr_cli.common.errors import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_lines_work_alone() -> None:
    train, test = blocks("bash")
    for line in (train, test):
        assert len(line.splitlines()) == 1
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install --quiet -e ")
    assert "caspr-train task=c4_lm optim=caspr" in train
    assert "-m pytest" in test


def test_the_loop_of_the_readme_runs_as_it_stands() -> None:
    (code,) = blocks("python")
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("tokens", nn.Embedding(5, 8))
    model.add_module("body", nn.Linear(8, 8))
    model.add_module("head", nn.Linear(8, 5))
    losses: list[float] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = nn.functional.cross_entropy(model(batch), (batch + 1) % 5)
        losses.append(float(value.detach()))
        return value

    exec(code, {"model": model, "loss": loss, "batches": [torch.arange(5)] * 200})
    assert losses[-1] < losses[0] / 2


def test_every_module_of_an_extra_is_known_by_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    modules = {"hydra-core": "hydra", "pytorch-optimizer": "pytorch_optimizer", "pyyaml": "yaml",
               "torch-geometric": "torch_geometric", "turkish-treebanks": "turkish_treebanks"}  # fmt: skip
    for extra, known in EXTRAS.items():
        names = [re.match(r"[\w-]+", each)[0] for each in extras[extra] if not each.startswith("caspr")]  # type: ignore[index]
        assert {modules.get(name, name) for name in names} <= set(known)


def test_the_optimizer_needs_torch_alone() -> None:
    code = (
        "import torch; from caspr_cli import CASPR, Shampoo\n"
        "p = torch.nn.Parameter(torch.ones(3, 3)); o = CASPR([p], lr=0.1, interval=1); p.grad = torch.ones(3, 3)\n"
        "o.step(); o.load_state_dict(o.state_dict()); print(float(p.sum()) < 9, Shampoo.__name__)"
    )
    done = without([*EXTRAS["run"], *EXTRAS["graphs"]], code)
    assert done.stdout == "True Shampoo\n", done.stderr


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        *((name, ("hydra", "numpy", "rich"), "run") for name in ("train", "bench", "report compare", "verify roots")),
        ("bench --task ogbg_molpcba", ("torch_geometric",), "graphs"),
    ],
)
def test_a_command_says_which_extra_it_needs(command: str, missing: tuple[str, ...], extra: str) -> None:
    name, *words = command.split()
    code = f"sys.argv[1:] = {words!r}\nfrom caspr_cli.commands import scripts\nsys.exit(scripts.{name}())"
    done = without(missing, code)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]  # caspr-verify says first that it imports torch
    assert "Traceback" not in done.stderr
    assert re.search(rf"error: this needs \w+, which is not installed: pip install 'caspr-cli\[{extra}\]'$", line)


FOREIGN = ("tasks", "datasets", "utils", "token", "conf", "caspr_cli", "experiments")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that is built from the sdist, which is built from here."""
    wheels, sdists = (pytest.importorskip(f"hatchling.builders.{kind}") for kind in ("wheel", "sdist"))
    home = tmp_path_factory.mktemp("built")
    (sdist,) = sdists.SdistBuilder(str(ROOT)).build(directory=str(home))
    with tarfile.open(sdist) as archive:
        archive.extractall(home, filter="data")
    (built,) = wheels.WheelBuilder(sdist.removesuffix(".tar.gz")).build(directory=str(home), versions=["standard"])
    return zipfile.ZipFile(built)


def test_an_editable_install_makes_one_name_importable(tmp_path: Path) -> None:
    editables = pytest.importorskip("editables")
    builders = pytest.importorskip("hatchling.builders.wheel")
    (built,) = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"])
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    code = (
        f"import site, sys; sys.path.append({str(Path(editables.__file__).parents[1])!r})\n"
        f"site.addsitedir({str(tmp_path / 'site')!r})\n"
        "import caspr_cli.recipe.words as words, importlib.util as util\n"
        "print(words.__file__, [name for name in ('tasks', 'tests', 'conf') if util.find_spec(name)])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"{ROOT}/caspr_cli/recipe/words.py []\n"


def test_the_wheel_has_all_files_under_one_name(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    here = {ROOT / "conf": "*.yaml", ROOT / "tasks": "*.*", ROOT / "caspr_cli": "*.*"}
    files = {file.relative_to(ROOT) for folder, kind in here.items() for file in folder.rglob(kind)}
    own = {str(file).removeprefix("caspr_cli/") for file in files if "__pycache__" not in file.parts}
    assert names == {f"caspr_cli/{name}" for name in own}


@pytest.mark.release
@pytest.mark.parametrize(
    "words", ["trainer.devices=2", "-m hydra/launcher=joblib hydra.launcher.n_jobs=2 seed=0,1", "debug=plan"]
)
def test_the_wheel_works_among_modules_of_the_same_names(words: str, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    if "joblib" in words:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    wheel.extractall(tmp_path / "site")
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    command = [sys.executable, "-P", "-m", "caspr_cli.commands.train", "task=vit", "optim=adamw", "debug=fast"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command += words.split()
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("outputs/vit/adamw/*/seed0/result.json")) or "plan" in words
