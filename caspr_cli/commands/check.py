"""``caspr-report check`` and ``leaderboard``: what of them needs more than to read files."""

import hashlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caspr_cli.common.errors import UserError
from caspr_cli.common.format import count, listed
from caspr_cli.common.streams import TerminatedError
from caspr_cli.report import entry, leaderboard, records
from caspr_cli.report.compare import tables
from caspr_cli.report.model import Row, Run
from caspr_cli.report.pack import endings
from caspr_cli.report.settings import frozen

AGAIN = 2  # reported seeds of a row that are run again
INTO = "again"  # the folder of these runs, in which nobody's own records lie


def packs(paths: Sequence[Path]) -> dict[str, list[Run]]:
    """Return the records of packs by their names, with folders where two have one name.

    A directory stands for its packs. Raises UserError without any.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl.gz")) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"no packs in {paths[0]}; caspr-report pack makes them")
    return {name: records.find([file]).runs for file, name in endings(files).items()}


def draw(space: Mapping[str, Mapping[str, Any]], trial: int) -> dict[str, Any]:
    """Return the values of a trial of a search space; empty if it is none."""
    from caspr_cli.recipe import search  # scipy's Sobol sequence takes long to import
    from caspr_cli.recipe.errors import ConfigError

    try:
        return search.draw({key: dict(kinds) for key, kinds in space.items()}, trial)
    except ConfigError:
        return {}


def check(paths: Sequence[Path], board: Path | None, rerun: Path | None) -> bool:
    """Print for each row whether it may stand on the leaderboard (of these packs), or what is wrong. Return if all may.

    In the directory ``rerun`` two reported seeds of each row are run again; None: they are not. What an earlier check
    has run there is not run once more.
    """
    if board and not board.is_dir():
        raise UserError(f"--board {board}: no such directory")
    own = {path.resolve() for path in paths}
    others = [file for file in sorted(board.glob("*.jsonl.gz")) if file.resolve() not in own] if board else []
    standing = leaderboard.board(packs(others) if others else {})
    found = records.find(paths)
    if not found.runs and not found.warnings:
        raise UserError(f"no records in {listed(paths)}; {records.how(paths)}")
    for line in found.warnings:
        print(f"wrong    {line}")
    right, rows = not found.warnings, 0
    for table in tables(found.runs):
        for row in table.rows:
            if row.untuned:
                continue
            rows += 1
            wrong = [*entry.problems(row, draw), *standing.against(row, table)]
            wrong += [] if wrong or rerun is None else _again(row, rerun)
            name = f"{row.label} on {table.task}"
            for line in wrong:
                print(f"wrong    {name}: {line}")
            if not wrong:
                more = "" if rerun is None else f", {AGAIN} run again in {rerun / INTO}"
                print(f"right    {name}: {count(len(row.trials), 'trial')}, {count(row.n, 'fresh seed')}{more}")
            right = right and not wrong
    if not rows:
        print("wrong    no row was tuned: there is nothing to check")
    return right and rows > 0


def _again(row: Row, folder: Path) -> Iterator[str]:
    """Run reported seeds of a row again, and yield where they end elsewhere."""
    from caspr_cli.recipe import compose
    from caspr_cli.report.pack import unpack
    from caspr_cli.runs.launch import run as launched

    compose.register_schemas()
    for run in row.runs[:AGAIN]:
        name = hashlib.sha256(frozen(run.config).encode()).hexdigest()[:8]
        inner = f"{run.config['task.name']}/{row.optim}/{name}/seed{run.seed}"  # wherever the record itself lies
        unpack([replace(run, path=inner)], folder / "entry")
        recipe = replace(compose.load(folder / "entry" / inner / "config.yaml"), output_dir=str(folder / INTO))
        outcome = launched(recipe, ["caspr-train", *sys.argv[1:]])
        if outcome.signal:
            raise KeyboardInterrupt if outcome.signal == signal.SIGINT else TerminatedError
        found = records.find([outcome.record.path]).runs
        if line := entry.reproduced(row, run, found[0].final if found else None):
            yield line
