"""What is published can be made again from the records beside it, and gone on with."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from caspr_cli.recipe import compose
from caspr_cli.runs.record import Record

compose.register_schemas()

PUBLISHED = Path(__file__).parents[1] / "outputs" / "published"
PACKS = sorted((PUBLISHED / "records").glob("*.jsonl.gz"))
TABLES = sorted(PUBLISHED.glob("tables/*.md"))


def report(*words: str, where: Path = PUBLISHED) -> str:
    command = [sys.executable, "-m", "caspr_cli.commands.report", *words]
    return subprocess.run(command, cwd=where, check=True, capture_output=True, text=True).stdout


@pytest.mark.release
@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)
def test_caspr_train_finds_the_records_again(pack: Path, tmp_path: Path) -> None:
    """By their recipes: what is done is not run twice, whatever defaults have changed since."""
    report("unpack", str(pack), "--to", str(tmp_path / "records"))
    configs = sorted((tmp_path / "records").rglob("config.yaml"))
    assert configs
    for config in configs:
        recipe, rows = compose.load(config), config.parents[2]
        place = tmp_path / "placed" / "-".join(rows.parts[1:]) / recipe.task.name / recipe.optim.name
        if not place.exists():  # a pack has not the folders above that all of its records share
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(rows)
        recipe.output_dir = str(place.parents[1])
        assert Record.of(recipe).path.resolve() == config.parent.resolve()


@pytest.mark.release
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_tables_are_those_of_the_records(table: Path, tmp_path: Path) -> None:
    """The command in the table's last line gives the table, but for the file it writes."""
    text = table.read_text(encoding="utf8")
    command = shlex.split(text.strip().splitlines()[-1])
    assert command[:2] == ["caspr-report", "compare"]
    assert command[-2:] == ["--to", f"tables/{table.name}"]
    made = tmp_path / "made.md"
    report(*command[1:-1], str(made))
    assert made.read_text(encoding="utf8").replace(str(made), f"tables/{table.name}") == text


@pytest.mark.release
def test_the_figure_of_the_readme_is_that_of_the_records(tmp_path: Path) -> None:
    """The command in family.md gives both files."""
    text = (PUBLISHED / "family.md").read_text(encoding="utf8")
    (command,) = (line.split() for line in text.splitlines() if "--together" in line)
    assert command[0] == "caspr-report"
    assert command[-2:] == ["--to", "curves.svg"]
    report(*command[1:-1], str(tmp_path / "curves.svg"))
    for name in ("curves.svg", "curves-dark.svg"):
        assert (tmp_path / name).read_bytes() == (PUBLISHED / name).read_bytes()
        assert f"outputs/published/{name}" in (PUBLISHED.parents[1] / "README.md").read_text(encoding="utf8")


@pytest.mark.release
def test_the_leaderboard_is_that_of_the_records(tmp_path: Path) -> None:
    text = (PUBLISHED / "README.md").read_text(encoding="utf8")
    made = tmp_path / "made.md"
    report("leaderboard", "records", "--to", str(made))
    assert text.endswith("    caspr-report leaderboard records --to README.md\n")
    assert made.read_text(encoding="utf8").replace(str(made), "README.md") == text


@pytest.mark.parametrize("pack", [pack for pack in PACKS if pack.name.startswith("fair_")], ids=lambda pack: pack.name)
def test_entries_of_the_leaderboard_are_whole(pack: Path) -> None:
    """Trials as drawn, fresh seeds, values not edited, one code: the check that everybody's entry has to pass."""
    assert "wrong" not in report("check", f"records/{pack.name}")


def test_there_is_something() -> None:
    assert PACKS
    assert TABLES
