"""Where the statements of :mod:`caspr_cli.theory.chain` are looked at, and how often each held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caspr_cli.theory.chain import Checked, check, ridge
from caspr_cli.theory.gradients import STEPS, Recording, Say, low_rank_stream

RANDOM = (((3, 4), 1), ((4, 3), 2), ((4, 4), 4), ((2, 5), 2))  # shapes and ranks of random streams
RANDOM_STEPS = 6
CLEAR = -1e-6  # a margin below this is a counterexample, and no rounding
REAL, DRAWN = "recorded", "random"


@dataclass(frozen=True)
class Case:
    """One layer, or random stream, at one step."""

    source: str  # REAL or DRAWN
    task: str
    parameter: str
    size: str  # m x n
    rank: int
    seed: int
    step: int
    checked: Checked


def of_recordings(found: Sequence[Recording], say: Say) -> Iterator[Case]:
    for one in found:
        say(f"{one.task}: {one.parameter}, seed {one.seed}: decompositions")
        m, n = one.shape
        eps, rank = ridge(one.gradients), one.rank
        for step in STEPS:
            seen = one.gradients[:step]
            if len(seen) == step and seen.any():  # below a head that starts at zero there is no gradient at first
                size = f"{m} x {n}"
                yield Case(REAL, one.task, one.parameter, size, rank, one.seed, step, check(seen, eps, rank))


def of_random(seed: int, trials: int, say: Say) -> Iterator[Case]:
    say("random gradients")
    for (m, n), rank in RANDOM:
        for trial in range(trials):
            G = low_rank_stream((m, n), rank, RANDOM_STEPS, 1_000_003 * seed + trial)
            checked = check(G, ridge(G), rank)
            yield Case(DRAWN, DRAWN, f"of rank {rank}", f"{m} x {n}", rank, trial, RANDOM_STEPS, checked)


def margins(cases: Sequence[Case], key: str, source: str | None = None) -> list[tuple[float, float]]:
    """The margins of a statement, each with what is rounding."""
    wanted = [case.checked for case in cases if source in (None, case.source)]
    return [(checked.margins[key], checked.tolerance) for checked in wanted if key in checked.margins]


def held(cases: Sequence[Case], key: str) -> bool:
    return all(margin >= -tolerance for margin, tolerance in margins(cases, key))


def looked(cases: Sequence[Case], key: str) -> str:
    found = [margin for margin, _ in margins(cases, key)]
    return f"{len(found):,} cases, least margin {min(found, default=0.0):.0e}"


def failures(cases: Sequence[Case], key: str, source: str) -> tuple[int, int]:
    """Counterexamples, and how often it was looked."""
    found = [margin for margin, _ in margins(cases, key, source)]
    return sum(margin < CLEAR for margin in found), len(found)


def seen(cases: Sequence[Case], key: str) -> str:
    parts = []
    for source in (REAL, DRAWN):
        bad, of = failures(cases, key, source)
        parts.append(f"false in {bad:,} of {of:,} {source} cases")
    return ", ".join(parts)
