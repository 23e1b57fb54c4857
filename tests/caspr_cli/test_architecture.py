"""Who may import whom: the arrows of the house, read from the code."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = {"pyproject.toml", "README.md", "conf", "caspr_cli", "tasks", "tests", "outputs"}
BESIDE = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}

TORCH_FREE = ["commands", "common", "recipe", "runs"]
THEORY_USES = ["optim", "recipe", "bench", "theory"]
OTHER_SIDE = {"worker.py", "preflight.py"}  # in runs, but run by the process that is launched


def imports(file: Path) -> set[str]:
    """Modules that a file imports at run time, wherever in the file it does; type-checking blocks left out."""
    tree = ast.parse(file.read_text(encoding="utf8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def files(*packages: str) -> list[Path]:
    return [f for p in packages for f in sorted((ROOT / p).rglob("*.py"))]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def uses(file: Path, *modules: str) -> list[str]:
    return sorted(i for i in imports(file) if any(i == m or i.startswith(f"{m}.") for m in modules))


def test_the_top_level_is_the_design() -> None:
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert seen >= TOP | BESIDE
    assert seen - TOP - BESIDE <= {"build", "dist", "venv"}  # untracked leftovers


@pytest.mark.parametrize("file", files("caspr_cli/optim"), ids=name)
def test_optim_imports_torch_and_itself(file: Path) -> None:
    ours = [i for i in uses(file, "caspr_cli", "tasks") if not i.startswith("caspr_cli.optim")]
    assert ours == []
    assert uses(file, "lightning", "hydra", "omegaconf", "torchvision", "rich") == []


@pytest.mark.parametrize("file", files("tasks"), ids=name)
def test_tasks_know_the_types_of_the_recipe_alone(file: Path) -> None:
    assert [i for i in uses(file, "caspr_cli") if not i.startswith("caspr_cli.recipe.schema")] == []
    assert uses(file, "lightning", "hydra") == []


@pytest.mark.parametrize("file", files(*(f"caspr_cli/{p}" for p in TORCH_FREE)), ids=name)
def test_composing_and_launching_need_no_torch(file: Path) -> None:
    if file.name in OTHER_SIDE:
        assert uses(file, "torch", "lightning") == []  # they go through training
        return
    assert uses(file, "torch", "torchvision", "lightning", "torchmetrics", "caspr_cli.training", "tasks") == []
    if file.parent.name != "commands":
        assert uses(file, "caspr_cli.optim") == []


@pytest.mark.parametrize("file", files("caspr_cli", "tasks"), ids=name)
def test_lightning_lives_in_training_and_nothing_imports_commands(file: Path) -> None:
    if file.parent.name != "training":
        assert uses(file, "lightning") == []
    if file.parent.name != "commands":
        assert uses(file, "caspr_cli.commands") == []
    assert file.name != "utils.py"


@pytest.mark.parametrize("file", files("caspr_cli/bench"), ids=name)
def test_bench_measures_what_others_build(file: Path) -> None:
    rooms = tuple(f"caspr_cli.{room}." for room in ("bench", "optim", "recipe", "training"))
    assert [i for i in uses(file, "caspr_cli") if not i.startswith(rooms)] == []
    assert uses(file, "hydra", "omegaconf") == []
    if file.name == "shapes.py":
        assert uses(file, "torch", "numpy", "caspr_cli.optim", "caspr_cli.training", "tasks") == []


@pytest.mark.parametrize("file", files("caspr_cli", "tasks"), ids=name)
def test_nothing_but_commands_and_theory_import_bench(file: Path) -> None:
    if file.parent.name not in ("bench", "commands", "theory"):
        assert uses(file, "caspr_cli.bench") == []


@pytest.mark.parametrize("file", files("caspr_cli/theory"), ids=name)
def test_theory_computes_and_others_show_it(file: Path) -> None:
    rooms = (*(f"caspr_cli.{room}" for room in THEORY_USES), "caspr_cli.report.answer")
    rooms += ("caspr_cli.common", "caspr_cli.report.look", "caspr_cli.report.style")
    allowed = {"caspr_cli.report", *uses(file, *rooms)}  # `from caspr_cli.report import look` names both
    assert [i for i in uses(file, "caspr_cli") if i not in allowed] == []
    assert uses(file, "hydra", "omegaconf", "lightning") == []


@pytest.mark.parametrize("file", files("caspr_cli", "tasks"), ids=name)
def test_nothing_but_commands_imports_theory(file: Path) -> None:
    if file.parent.name not in ("theory", "commands"):
        assert uses(file, "caspr_cli.theory") == []


@pytest.mark.parametrize("file", files("caspr_cli/common"), ids=name)
def test_common_imports_almost_nothing(file: Path) -> None:
    outside = [i for i in imports(file) if i.partition(".")[0] not in sys.stdlib_module_names]
    assert [i for i in outside if i not in uses(file, "rich", "caspr_cli.common")] == []


@pytest.mark.parametrize("file", files("caspr_cli/report"), ids=name)
def test_report_reads_files_with_small_libraries(file: Path) -> None:
    allowed = ("numpy", "scipy", "pandas", "matplotlib", "rich", "yaml", "jinja2", "markupsafe")
    allowed += ("caspr_cli.report", "caspr_cli.common")
    outside = [i for i in imports(file) if i.partition(".")[0] not in sys.stdlib_module_names]
    version = {"caspr_cli", "caspr_cli.__version__"}
    assert [i for i in outside if i not in version.union(uses(file, *allowed))] == []


@pytest.mark.parametrize("file", files("caspr_cli", "tasks"), ids=name)
def test_nothing_but_commands_and_theory_import_report(file: Path) -> None:
    if file.parent.name not in ("report", "commands", "theory"):
        assert uses(file, "caspr_cli.report") == []
    if file.name == "report.py" and file.parent.name == "commands":  # where there is no Hydra, too
        assert uses(file, "hydra", "omegaconf", *(f"caspr_cli.{room}" for room in ("recipe", "runs", "bench"))) == []
