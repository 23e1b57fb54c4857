"""``caspr-verify regret``: how much regret has CASPR on online convex problems, and how far is the bound from it?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from caspr_cli.report.answer import Answer
from caspr_cli.theory import regret_shown as shown
from caspr_cli.theory.learners import DEPARTURES, METHODS, Method
from caspr_cli.theory.online import RUNGS, Runs, of_theorem, play, traces
from caspr_cli.theory.played import HALVINGS, Played, Say, limits, play_all, rate
from caspr_cli.theory.problems import all_problems, forgetting

QUESTION = "Does the theory's regret tell which preconditioner is best, and how tight is its bound?"
ROUNDS, QUICK_ROUNDS = 200, 16
ORDERS = (1.0, 2.0, 3.0, math.inf)  # of the traces
ROUNDING = 1e-8  # relative: what no inequality is asked for below this
CASPR = METHODS[2]
EXAMPLE = (Method("sum", "sum", 2), Method("average", "moving average, beta 0.9", 2, beta=0.9))
EXAMPLE_ROUNDS = 2040

HOLDS = {
    "grid": "Regret ≤ (D²/2η + ηr) tr X_T, at every step size of the grid",
    "theorem": "Regret ≤ √(2r) D tr X_T, with η = D/√(2r) and W kept in a ball",
    "chain": "every inequality on the way to the bound",
    "grows": "sums: X_t ⪰ X_{t−1}, in every round",
    "sums": "Σ⟨G_t, X_t⁻¹G_t⟩ ≤ 2r tr F~_T^½",
    "traces": "tr F~^½ ≤ tr X₁ ≤ tr X₂ ≤ tr X₃ ≤ tr X_Shampoo, of the same gradients",
}


def answer(*, quick: bool = False, seed: int = 0, seeds: int = 3, say: Say = lambda text: None) -> Answer:
    """Regret and bounds of all methods on all problems.

    Args:
        quick: one seed, few rounds: seconds.
        seed: the first of ``seeds``.
    """
    chosen = list(range(seed, seed + (1 if quick else seeds)))
    say("problems: the best W of each")
    problems = all_problems(rounds=QUICK_ROUNDS if quick else ROUNDS, seeds=chosen)
    played = [play_all(problem, method, say) for problem in problems for method in METHODS]
    departed = [play_all(problem, method, say) for problem in problems for method in DEPARTURES]
    chains = {problem.name: traces(problem, list(ORDERS)) for problem in problems}
    say("a sequence on which moving averages fail")
    example = _example(EXAMPLE_ROUNDS // 8 if quick else EXAMPLE_ROUNDS)
    return Answer(
        name="regret",
        question=QUESTION,
        words=tuple(words(played, departed, chains, example)),
        sheets=shown.sheets(played, departed, chains, example),
        figures=shown.figures(played),
        holds=tuple((text, held) for text, held in zip(HOLDS.values(), _held(played, chains), strict=True)),
        fails=tuple(_fails(departed, example)),
    )


def _example(rounds: int) -> list[tuple[Method, Runs]]:
    problem = forgetting(rounds)
    return [(method, play(problem, method, *of_theorem(problem, method))) for method in EXAMPLE]


# ---- what holds --------------------------------------------------------------------------------------------------


def ordered(values: Sequence[Tensor]) -> bool:
    """Whether each is at most the next, up to rounding; what is not a number is left out."""
    known = [value for value in values if not bool(torch.isnan(value).any())]
    return all(bool((a <= b + ROUNDING * b.abs()).all()) for a, b in pairwise(known))


def _held(played: Sequence[Played], chains: dict[str, Tensor]) -> Iterator[bool]:
    """In the order of HOLDS."""
    yield all(ordered([p.grid.regret[..., -1], p.grid.bound()[..., -1]]) for p in played)
    yield all(ordered([p.theorem.regret[:, 0], limits(p.theorem)]) for p in played)
    yield all(ordered([p.ladder.rungs[name] for name in RUNGS]) for p in played)
    yield all(float(p.ladder.growth.min()) >= -ROUNDING for p in played)
    yield all(float(p.ladder.sums.max()) <= 1 + ROUNDING for p in played)
    yield all(ordered(list(found.unbind(1))) for found in chains.values())


def _fails(departed: Sequence[Played], example: Sequence[tuple[Method, Runs]]) -> Iterator[str]:
    average = [p for p in departed if p.method.beta is not None and p.method.interval == 1]
    stale = [p for p in departed if p.method.beta is None and p.method.interval > 1]
    fell = sum(int((p.ladder.growth < -ROUNDING).sum()) for p in average)
    of = sum(p.ladder.growth.numel() for p in average)
    yield f"X_t ⪰ X_(t−1) for moving averages: false in {fell:,} of {of:,} rounds"
    broken = sum(int((p.ladder.sums > 1).sum()) for p in stale)
    most = max(float(p.ladder.sums.max()) for p in stale)
    runs = sum(len(p.ladder.sums) for p in stale)
    yield (
        f"Σ⟨G, X⁻¹G⟩ ≤ 2r tr F~^½ with roots that are old: false in {broken} of {runs} runs (at most {most:.3g} times "
        "the right side)"
    )
    _, runs_of_average = example[1]
    ratio = float(runs_of_average.regret[0, 0, -1] / limits(runs_of_average)[0, -1])
    yield (
        "Regret ≤ √(2r) D tr X_T for moving averages, W in a ball: on a sequence made for it, the regret is "
        f"{ratio:.2g} times the right side"
    )


# ---- what is said ------------------------------------------------------------------------------------------------


def _by_problem(played: Sequence[Played]) -> dict[str, dict[str, Played]]:
    found: dict[str, dict[str, Played]] = {}
    for one in played:
        found.setdefault(one.problem.name, {})[one.method.name] = one
    return found


def words(
    played: Sequence[Played],
    departed: Sequence[Played],
    chains: dict[str, Tensor],
    example: Sequence[tuple[Method, Runs]],
) -> Iterator[str]:
    problems = _by_problem(played)
    yield _practice_in_words(problems)
    yield _bound_in_words(played, chains)
    yield _slack_in_words([p for p in played if p.method is CASPR], [p for p in played if p.method.name == "full"])
    yield _ball_in_words(played)
    yield _departures_in_words(_by_problem(departed), example)


def _practice_in_words(problems: dict[str, dict[str, Played]]) -> str:
    least = {name: min(of.values(), key=lambda p: fmean(p.regret)) for name, of in problems.items()}
    won = ", ".join(f"{p.method.label} on {name} ({fmean(p.regret):.4g})" for name, p in least.items())
    ratios = {name: _ratio(of["caspr"], of["shampoo"]) for name, of in problems.items()}
    pairs = [(a, b) for of in problems.values() for a, b in zip(of["caspr"].regret, of["shampoo"].regret, strict=True)]
    below = sum(a < b for a, b in pairs)
    worst = {name: max(of.values(), key=lambda p: fmean(p.regret)) for name, of in problems.items()}
    spread = max(fmean(worst[name].regret) / fmean(least[name].regret) for name in problems)
    edges = [f"{p.method.label} on {name}" for name, of in problems.items() for p in of.values() if p.at_edge]
    edge = f"At the edge of the grid: {', '.join(edges)}." if edges else "No best step is at the edge of the grid."
    return (
        f"In practice, each method at the best of {len(HALVINGS)} step sizes, the least regret is that of {won}; on "
        f"no problem has the worst method more than {spread:.2g} times the least. CASPR's regret is "
        f"{min(ratios.values()):.3f} to {max(ratios.values()):.3f} of Shampoo's, and the smaller one in {below} of "
        f"{len(pairs)} pairs (problem and seed). {edge}"
    )


def _ratio(one: Played, other: Played) -> float:
    return fmean(one.regret) / fmean(other.regret)


def _bound_in_words(played: Sequence[Played], chains: dict[str, Tensor]) -> str:
    shares = {m.label: [s for p in played if p.method is m for s in p.share] for m in METHODS}
    said = ", ".join(f"{label} {100 * min(s):.1f} to {100 * max(s):.1f} %" for label, s in shares.items())
    place = ORDERS.index(2.0) + 1
    kept = torch.cat([found[:, place] / found[:, -1] for found in chains.values()])
    full = torch.cat([found[:, place] / found[:, 0] for found in chains.values()])
    tuned = [fmean(p.regret) / fmean(p.theorem.at_end[:, 0].tolist()) for p in played if p.method is CASPR]
    return (
        f"With the theorem's step the regret, as a part of the bound √(2r) D tr X_T, is: {said}. On the same "
        f"gradients tr X₂, which CASPR's bound has, is {float(kept.min()):.3f} to {float(kept.max()):.3f} of "
        f"Shampoo's trace, and {float(full.min()):.1f} to {float(full.max()):.1f} times tr F~^½. At the best step of "
        f"the grid CASPR has {min(tuned):.2f} to {max(tuned):.2f} of the regret that it has with the theorem's."
    )


def _slack_in_words(caspr: Sequence[Played], full: Sequence[Played]) -> str:
    """Where on the way to the bound it is lost, as geometric means over problems and seeds."""

    def factors(of: Sequence[Played]) -> dict[str, float]:
        heights = torch.cat([torch.stack([p.ladder.rungs[name] for name in RUNGS], 1) for p in of])  # [runs, rungs]
        logs = heights[(heights > 0).all(1)].log().mean(0)  # a regret may be negative
        return dict(zip(RUNGS[1:], logs.diff().exp().tolist(), strict=True))

    text = {
        "linear": "convexity",
        "distances": "the distance at the end, and what projections gain",
        "largest": "D in place of distances",
        "trace": "tr in place of λ_max",
        "full": "tr F~^½ in place of the sum of ⟨G, X⁻¹G⟩",
        "bound": "tr X_T in place of tr F~^½",
    }
    of_caspr, of_full = factors(caspr), factors(full)
    said = ", ".join(f"{text[name]} {value:.2f}" for name, value in of_caspr.items())
    return (
        f"Where CASPR's bound is lost, factor by factor (geometric means): {said}; together "
        f"{math.prod(of_caspr.values()):.0f}. For full-matrix Adagrad they come to {math.prod(of_full.values()):.0f}, "
        f"with {of_full['bound']:.2f} for the last, as it is its own F~."
    )


def _ball_in_words(played: Sequence[Played]) -> str:
    strayed = {m.label: [s for p in played if p.method is m for s in p.strayed.tolist()] for m in METHODS}
    said = ", ".join(
        f"{label} {sum(s > 1 for s in found)} of {len(found)} (up to {max(found):.2g} D)"
        for label, found in strayed.items()
    )
    return (
        "The theorem's step is D/√(2r), and D the largest distance from W* in the run that this step makes. With D = "
        "2‖W*‖ and no ball around W, these runs come further than D, so that the theorem says nothing of them: "
        f"{said}. Its runs above are therefore kept in the ball of radius ‖W*‖ by projections."
    )


def _departures_in_words(departed: dict[str, dict[str, Played]], example: Sequence[tuple[Method, Runs]]) -> str:
    kinds = [method for method in DEPARTURES if method.name != "caspr"]
    said = []
    for method in kinds:
        ratios = [fmean(of[method.name].regret) / fmean(of["caspr"].regret) for of in departed.values()]
        sums = max(float(of[method.name].ladder.sums.max()) for of in departed.values())
        said.append(f"{method.label} {min(ratios):.3g} to {max(ratios):.3g} (sum up to {sums:.2g} of its bound)")
    T = example[0][1].regret.shape[-1]
    rates = ", ".join(
        f"that of the {method.label} goes from {rate(runs, T // 4):.3f} to {rate(runs, T):.3f}"
        for method, runs in example
    )
    return (
        "What the theorem needs and training does not have: regret of CASPR at its best step, in units of its own "
        f"with fresh sums: {'; '.join(said)}. On a sequence that is made for it, after Reddi et al., with the "
        f"theorem's step and ball, regret a round: {rates}, from {T // 4:,} to {T:,} rounds."
    )
