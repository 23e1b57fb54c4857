"""Which package may import which: the arrows of the architecture, read from the source."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = {"pyproject.toml", "README.md", "conf", "caspr_cli", "tasks", "tests", "outputs"}
BESIDE = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}

TASKS = ("c4_lm", "images", "ogbg_molpcba", "resnet", "ud_pos", "vit")

# What each package may import, beside itself and the standard library. A name with a dot allows that module alone.
MAY_IMPORT = {
    "common": {"psutil", "rich", "yaml"},
    "commands": {"hydra", "omegaconf", "rich", "common", "optim.family", "optim.registry", "recipe", "runs",
                 "report", "bench", "theory", "tasks.registry"},
    "recipe": {"hydra", "omegaconf", "scipy", "yaml", "common", "optim.family", "optim.registry",
               "tasks.registry"},
    "runs": {"hydra", "omegaconf", "psutil", "yaml", "common", "recipe", "tasks.errors", "tasks.own"},
    "examples": {"lightning", "torch", "transformers", "CASPR", "param_groups"},
    "training": {"google", "lightning", "mlflow", "numpy", "rich", "tensorboard", "torch", "wandb", "common", "optim",
                 "recipe", "runs", "tasks"},
    "optim": {"torch", "pytorch_optimizer", "common.plugins"},
    "bench": {"matplotlib", "numpy", "pytorch_optimizer", "torch", "common", "optim", "recipe", "tasks",
              "training"},
    "report": {"google", "jinja2", "markupsafe", "matplotlib", "numpy", "pandas", "rich", "scipy", "tensorboard",
               "yaml", "common"},
    "theory": {"matplotlib", "numpy", "pandas", "torch", "bench", "common", "optim", "recipe", "tasks",
               "training.timing",
               "report.answer", "report.style"},
    "tasks": {"PIL", "datasets", "numpy", "pandas", "pyarrow", "rdkit", "tokenizers", "torch", "torch_geometric",
              "torchmetrics", "torchvision", "common.errors", "common.files", "common.plugins",
              "optim.groups", "recipe.schema", "recipe.task"},
}  # fmt: skip
READERS = (  # of the tasks, which look at data before torch is imported
    "archives", "errors", "files", "names", "own", "registry", "c4_lm/own", "c4_lm/sources", "images/albums",
    "images/sources", "ud_pos/conllu", "ud_pos/sources", "ogbg_molpcba/features", "ogbg_molpcba/smiles",
    "ogbg_molpcba/sources",
)  # fmt: skip
# What single files may not import, against the rule of their package.
NEVER = {
    "caspr_cli/commands/report.py": {"hydra", "omegaconf", "recipe", "runs", "bench", "theory"},  # also works alone
    "caspr_cli/commands/train.py": {"bench", "theory"},
    "caspr_cli/bench/shapes.py": {"torch", "numpy", "optim", "training", "tasks"},
    "caspr_cli/optim/combine.py": {"pytorch_optimizer"},
    # Both take seconds to import, and data are checked before.
    **{f"caspr_cli/training/{name}.py": {"lightning"} for name in ("begin", "describe", "progress")},
    **{f"tasks/{name}.py": {"torchmetrics"} for name in ("base", "simple", *(f"{each}/task" for each in TASKS))},
    **{f"tasks/{name}.py": {"torch", "torchvision", "tasks.base", "tasks.cache"} for name in READERS},
    "caspr_cli/optim/family.py": {"torch", "pytorch_optimizer"},
}


@cache
def imports(file: Path) -> frozenset[str]:
    """Return the modules that a file imports at run time, wherever in the file it does."""
    tree = ast.parse(file.read_text(encoding="utf8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def short(module: str) -> str:
    """Return a module's name without ``caspr_cli.``: ours are called by package."""
    return module.removeprefix("caspr_cli.")


def package(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return parts[0] if parts[0] == "tasks" else parts[1]


def is_in(module: str, allowed: set[str]) -> bool:
    return any(short(module) == name or short(module).startswith(f"{name}.") for name in allowed)


def files(name: str) -> list[Path]:
    folder = ROOT / name if name == "tasks" else ROOT / "caspr_cli" / name
    return sorted(folder.rglob("*.py"))


def test_the_top_level_is_the_design() -> None:
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert seen >= TOP | BESIDE
    assert seen - TOP - BESIDE <= {"build", "dist", "venv"}  # untracked leftovers


def test_every_package_has_a_rule() -> None:
    ours = {p.name for p in (ROOT / "caspr_cli").iterdir() if (p / "__init__.py").exists()}
    assert ours == set(MAY_IMPORT)
    assert all((ROOT / file).exists() for file in NEVER)
    assert not list((ROOT / "caspr_cli").rglob("utils.py")) + list((ROOT / "tasks").rglob("utils.py"))


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_package_imports_what_its_rule_allows(name: str) -> None:
    for file in files(name):
        path = str(file.relative_to(ROOT))
        never = NEVER.get(path, set())
        allowed = {name, *MAY_IMPORT[name], "__version__"} - {"caspr_cli"} - never
        others = [i for i in sorted(imports(file)) if i.partition(".")[0] not in sys.stdlib_module_names]
        assert [i for i in others if not is_in(i, allowed)] == [], path


def test_the_rule_finds_what_it_forbids(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom caspr_cli.optim import CASPR\nif TYPE_CHECKING:\n    import hydra\n"
        "def late():\n    import torch.nn\n"
    )
    assert imports(file) == {"typing.TYPE_CHECKING", "caspr_cli.optim.CASPR", "torch.nn"}
    assert is_in("caspr_cli.optim.CASPR", {"optim"})
    assert not is_in("caspr_cli.optim.CASPR", {"opt", "recipe"})
    assert is_in("torch.nn", {"torch"})
    assert not is_in("caspr_cli.report.page", {"report.answer"})


def test_files_of_tests_have_names_of_their_own() -> None:
    """Two of one name cannot be collected together, and ranks of a test import it by its name."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
