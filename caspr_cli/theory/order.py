"""``caspr-verify order``: is CASPR between full-matrix Adagrad and Shampoo? On gradients of real training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from caspr_cli.report.answer import Answer
from caspr_cli.theory import order_shown as shown
from caspr_cli.theory.chain import FAILS, HOLDS, NAMES
from caspr_cli.theory.gradients import Choice, Say, recordings
from caspr_cli.theory.order_cases import DRAWN, REAL, Case, failures, held, looked, of_random, of_recordings, seen

QUESTION = (
    "Does CASPR stand between full-matrix Adagrad and Shampoo, in the order of positive matrices, on real gradients?"
)
TRIALS = 50  # random streams of each kind


def answer(
    *,
    quick: bool = False,
    seed: int = 0,
    seeds: int = 3,
    task: str | None = None,
    parameter: str | None = None,
    optim: str = "caspr",
    say: Say = lambda text: None,
) -> Answer:
    """The chain and its relatives, checked on recorded gradients and on random ones.

    Args:
        quick: one seed, few steps, few random trials: seconds.
        seed: the first of ``seeds``.
        task, parameter: look at these layers alone.
        optim: the gradients are those along the path of this optimizer.

    Raises:
        ConfigError: there is no such task or parameter, or it is too large.
    """
    found = recordings(Choice(quick, seed, seeds, task, parameter, optim), say)
    cases = [*of_recordings(found, say), *of_random(seed, 5 if quick else TRIALS, say)]
    return Answer(
        name="order",
        question=QUESTION,
        words=tuple(words(cases)),
        sheets=shown.sheets(found, cases),
        figures=tuple(shown.figures(found, cases)),
        holds=tuple((f"{text} ({looked(cases, key)})", held(cases, key)) for key, text in HOLDS.items()),
        fails=tuple(f"{text}: {seen(cases, key)}" for key, text in FAILS.items()),
    )


def words(cases: Sequence[Case]) -> Iterator[str]:
    """The answer, from the margins."""
    real = [case for case in cases if case.source == REAL]
    broken = [text for key, text in HOLDS.items() if not held(cases, key)]
    layers, tasks, seeds = (
        len({value(case) for case in real})
        for value in (lambda c: (c.task, c.parameter), lambda c: c.task, lambda c: c.seed)
    )
    where = (
        f"at {len(real):,} points (layers {layers}, tasks {tasks}, seeds {seeds}, steps {min(c.step for c in real)} to "
        f"{max(c.step for c in real)}) and on {len(cases) - len(real):,} random streams"
    )
    if broken:
        yield f"Not everywhere. Checked {where}, these did not hold: {'; '.join(broken)}."
    else:
        yield (
            f"Yes: F~^½ ⪯ X₁ ⪯ X₂ (CASPR) ⪯ X₃ ⪯ X_Shampoo held {where}, with the inverses the other way around, "
            f"up to rounding in float64; so did all {len(HOLDS)} statements that should hold."
        )
    yield _sizes([case for case in real if case.step == max(c.step for c in real)])
    yield _false(cases)


def _sizes(last: Sequence[Case]) -> str:
    """By how much the members of the chain differ."""
    ratios = [fmean(case.checked.traces[k] for case in last) for k in range(len(NAMES))]
    saved = [100 * (1 - case.checked.traces[2] / case.checked.traces[4]) for case in last]
    return (
        f"How much it matters: at step {last[0].step} the trace of CASPR, which bounds the regret, is "
        f"{fmean(saved):.1f} % below Shampoo's on average (least {min(saved):.1f} %, most {max(saved):.1f} %). In "
        f"units of that of F~^½, traces are {ratios[1]:.1f} (order 1), {ratios[2]:.1f} (CASPR), {ratios[3]:.1f} (order "
        f"3) and {ratios[4]:.1f} (Shampoo)."
    )


def _false(cases: Sequence[Case]) -> str:
    """Which statements are no law, and where that is seen."""
    counts = {key: [failures(cases, key, source)[0] for source in (REAL, DRAWN)] for key in FAILS}
    groups = {
        "False on recorded gradients": [FAILS[key] for key, (real, _) in counts.items() if real],
        "False on random gradients, and not seen to be on recorded ones": [
            FAILS[key] for key, (real, drawn) in counts.items() if drawn and not real
        ],
        "Not seen to be false in this run": [FAILS[key] for key, found in counts.items() if not any(found)],
    }
    told = (f"{where}: {'; '.join(found)}" for where, found in groups.items() if found)
    return f"What looks like it and is no law. {'. '.join(told)}."
