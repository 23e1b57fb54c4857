"""``caspr-verify approximation``: how near each preconditioner stands to the full-matrix one, over training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

from caspr_cli.report.answer import Answer
from caspr_cli.theory import approximation_shown as shown
from caspr_cli.theory.chain import ridge
from caspr_cli.theory.gradients import QUICK_STEPS, STEPS, Choice, Recording, Say, kronecker_stream, recordings
from caspr_cli.theory.nearness import FAMILY, ORACLES, PRODUCTS, Case, at, mean, nearness, tasks_of

QUESTION = "How near do CASPR and its relatives come to full-matrix Adagrad over training?"
NOISE, NOISE_SHAPE, NOISE_STEPS = "Kronecker noise", (8, 8), (*STEPS, 1000, 3000)


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
    """Every preconditioner against the full-matrix one, on recorded gradients and on Kronecker-structured noise.

    Args:
        quick: one seed, few steps: seconds.
        seed: the first of ``seeds``.
        task, parameter: look at these layers alone.
        optim: the gradients are those along the path of this optimizer.

    Raises:
        ConfigError: there is no such task or parameter, or it is too large.
    """
    choice = Choice(quick, seed, seeds, task, parameter, optim)
    cases = [*_recorded(recordings(choice, say), say), *_noise(choice, say)]
    return Answer(
        name="approximation",
        question=QUESTION,
        words=tuple(words(cases)),
        sheets=(*shown.summaries(cases), shown.over_steps(cases), shown.everything(cases)),
        figures=tuple(shown.figures(cases)),
        holds=(
            (
                "the distances to F^½ and to F^−½ grow from order 1 over CASPR and order 3 to Shampoo 1/4",
                _ordered(cases),
            ),
            (
                "no other Kronecker product has a larger cosine with F^½ than the nearest one (Van Loan and Pitsianis)",
                all(c.near[ORACLES[1]].root >= c.near[name].root - 1e-9 for c in cases for name in PRODUCTS),
            ),
        ),
        fails=(_cosines(cases),),
    )


def _ordered(cases: Sequence[Case]) -> bool:
    """Statement 9 of :mod:`caspr_cli.theory.chain`, which is about distances without scaling."""
    found = [(case.near[a], case.near[b]) for case in cases for a, b in pairwise(FAMILY)]
    return all(
        getattr(a, measure) <= getattr(b, measure) * (1 + 1e-7)
        for a, b in found
        for measure in ("root_distance", "inverse_distance")
    )


def _cosines(cases: Sequence[Case]) -> str:
    """The same of cosines is no law: gradients of single entries are a counterexample."""
    falls = sum(all(c.near[a].root >= c.near[b].root - 1e-12 for a, b in pairwise(FAMILY)) for c in cases)
    return (
        f"the cosine with F^½ falls from order 1 over CASPR and order 3 to Shampoo 1/4: it does in {falls:,} of "
        f"{len(cases):,} cases here; gradients of single entries are a counterexample"
    )


def _recorded(found: Sequence[Recording], say: Say) -> Iterator[Case]:
    for one in found:
        say(f"{one.task}: {one.parameter}, seed {one.seed}: decompositions")
        eps = ridge(one.gradients)
        for step in STEPS:
            seen = one.gradients[:step]
            if len(seen) == step and seen[-1].any():
                yield Case(one.task, one.parameter, one.seed, step, nearness(seen, eps))


def _noise(choice: Choice, say: Say) -> Iterator[Case]:
    say("Kronecker-structured noise")
    steps = (*QUICK_STEPS, 30, 100) if choice.quick else NOISE_STEPS
    for seed in choice.all_seeds:
        G = kronecker_stream(NOISE_SHAPE, steps[-1], seed)
        for step in steps:
            yield Case(NOISE, f"{NOISE_SHAPE[0]} x {NOISE_SHAPE[1]}", seed, step, nearness(G[:step], ridge(G[:100])))


def _ranked(cases: Sequence[Case], measure: str) -> list[tuple[str, float]]:
    """Those that need no full matrix, the nearest first."""
    values = [(name, mean(cases, name, measure)) for name in cases[0].near if name not in ORACLES]
    return sorted(values, key=lambda item: item[1], reverse=measure != "angle")


def _against(cases: Sequence[Case], other: str, measure: str) -> tuple[int, int]:
    """In how many cases CASPR is nearer than another."""
    sign = -1 if measure == "angle" else 1
    pairs = [(getattr(c.near["caspr"], measure), getattr(c.near[other], measure)) for c in cases]
    return sum(sign * (a - b) > 0 for a, b in pairs), len(pairs)


MEASURES = {
    "root": "F^½ (cosine)",
    "inverse": "F^−½ (cosine)",
    "angle": "the update of full-matrix Adagrad (angle)",
}


def words(cases: Sequence[Case]) -> Iterator[str]:
    """Who is nearest where, from the numbers."""
    real = [case for case in cases if case.task != NOISE]
    tasks, step = tasks_of(real), max(case.step for case in real)
    yield (
        f"At step {step}, of those that need no full matrix, the nearest to F^½ is "
        + "; ".join(_best(at(real, task), task, "root") for task in tasks)
        + ". The update nearest to full-matrix Adagrad's is "
        + "; ".join(_best(at(real, task), task, "angle") for task in tasks)
        + "."
    )
    later = [case for case in real if case.step > 1]
    for measure, text in MEASURES.items():
        parts = []
        for other in ("shampoo 1/4", "order 1", "shampoo 1/2", "row-wise", "diagonal"):
            nearer, of = _against(later, other, measure)
            parts.append(f"{other} in {nearer} of {of}")
        means = {name: fmean(mean(at(real, task), name, measure) for task in tasks) for name in FAMILY}
        values = ", ".join(f"{name} {_said(value, measure)}" for name, value in means.items())
        yield (
            f"After the first step, CASPR is nearer to {text} than {', than '.join(parts)} (layers, seeds and steps). "
            f"By how much: at the last step, over all tasks, {values}."
        )
    noise = at(cases, NOISE)
    ordered = _ranked(noise, "root")
    above = [name for name, value in ordered if value > mean(noise, "caspr", "root")]
    yield (
        f"Where gradients have a covariance that is exactly a Kronecker product, after {noise[0].step:,} steps: "
        + ", ".join(f"{name} {value:.3f}" for name, value in ordered)
        + ". "
        + (
            f"CASPR is not the best approximation there; nearer: {', '.join(above)}."
            if above
            else "None is nearer than CASPR in this run."
        )
    )


def _best(cases: Sequence[Case], task: str, measure: str) -> str:
    (first, value), *others = _ranked(cases, measure)
    own = next(((k, v) for k, (name, v) in enumerate(others, start=2) if name == "caspr"), None)
    place = f", CASPR {_said(own[1], measure)} in place {own[0]}" if own else ""
    return f"{first} on {task} ({_said(value, measure)}{place})"


def _said(value: float, measure: str) -> str:
    return f"{value:.1f}°" if measure == "angle" else f"{value:.3f}"
