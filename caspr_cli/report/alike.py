"""What should be the same in all runs of a table, and is not: one line for each."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from caspr_cli.report.model import Row, Run
from caspr_cli.report.rows import ABSENT, SPACE, Twice, ended, frozen, plain
from caspr_cli.report.words import count, listed

NO_DIFF = hashlib.sha256(b"").hexdigest()[:16]
NO_MATTER = ("output_dir", "resume")  # of records that are there twice
Whole = Sequence[tuple[Row, Sequence[Run]]]  # rows with all their records


def differences(rows: Whole) -> Iterator[str]:
    """Settings, ranges of a search, code, versions and hardware of which rows or runs have several."""
    asked: list[tuple[str, Callable[[Row, Run], str | None]]] = [
        *((key, partial(_setting, key)) for key in _unequal([row for row, _ in rows])),
        ("trainer.val_every", lambda _, run: _value(run, "trainer.val_every")),  # when a target is noticed
        *((f"{SPACE}{key}", partial(_range, key)) for key in _searched(run for _, runs in rows for run in runs)),
        ("code", lambda _, run: _code(run)),
        ("torch", lambda _, run: (run.provenance.get("packages") or {}).get("torch")),
        ("hardware", lambda _, run: _hardware(run)),
    ]
    for what, of in asked:
        counts: dict[str, Counter[str]] = {}
        for row, runs in rows:
            for run in runs:
                if ended(run) and (value := of(row, run)) is not None:
                    counts.setdefault(value, Counter())[row.label] += 1
        if len(counts) > 1:
            yield f"different {what}: {'; '.join(_groups(counts, len(rows)))}"


def _unequal(rows: Sequence[Row]) -> list[str]:
    """Keys, but the optimizers' own, of which one optimizer has other values than another.

    Where all have the same several values they are variants, and labels show them.
    """
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for key, value in row.settings.items():
            if not key.startswith("optim.") and value != ABSENT:
                values[key][row.optim].add(frozen(value))
    return sorted(key for key, own in values.items() if len(set(map(frozenset, own.values()))) > 1)


def _setting(key: str, row: Row, run: Run) -> str | None:
    return plain(row.settings[key]) if row.settings.get(key, ABSENT) != ABSENT else None


def _value(run: Run, key: str) -> str | None:
    return plain(run.config[key]) if key in run.config else None


def _searched(runs: Iterable[Run]) -> list[str]:
    found = {key.removeprefix(SPACE).rpartition(".")[0] for run in runs for key in run.config if key.startswith(SPACE)}
    return sorted(found)


def _range(key: str, row: Row, run: Run) -> str | None:
    """As ``log 0.001,0.1``; None if this run was not of a search over the key."""
    kinds = (name for name in run.config if name.rpartition(".")[0] == f"{SPACE}{key}")
    return " ".join(f"{name.rpartition('.')[2]} {plain(run.config[name])}" for name in sorted(kinds)) or None


def _groups(counts: dict[str, Counter[str]], rows: int, most: int = 4) -> Iterator[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    for value, labels in ranked[:most]:
        where = "all rows" if len(labels) == rows > 1 else listed(list(labels), 3)
        yield f"{value} ({where}, {count(labels.total(), 'run')})"
    if len(ranked) > most:
        yield f"{len(ranked) - most} more"


def _code(run: Run) -> str | None:
    code: dict[str, Any] | None = run.provenance.get("code")
    if not code:
        version = run.provenance.get("caspr_cli")
        return f"version {version}" if version else None
    commit, diff = str(code.get("commit"))[:8], code.get("diff_sha256")
    return commit if diff in (None, NO_DIFF) else f"{commit} with changes {str(diff)[:8]}"


def _hardware(run: Run) -> str | None:
    device = run.provenance.get("device") or {}
    if not device:
        return None
    machine = run.provenance.get("machine") or {}
    name = device.get("name") if device.get("type") != "cpu" else machine.get("processor") or "cpu"
    processes, threads = (int(device.get(key) or 1) for key in ("processes", "threads"))
    return f"{name}, {count(processes, 'process', 'es')}, {count(threads, 'thread')}"


def telling_apart(twice: Iterable[Twice]) -> list[str]:
    """Keys in which records of one trial and seed differ, and ``code`` where it is another."""
    found = set()
    for one in twice:
        ours, theirs = one.left_out.config, one.kept.config
        keys = (ours.keys() | theirs.keys()) - set(NO_MATTER)
        found |= {key for key in keys if frozen(ours.get(key)) != frozen(theirs.get(key))}
        found |= {"code"} if _code(one.left_out) != _code(one.kept) else set()
    return sorted(found)
