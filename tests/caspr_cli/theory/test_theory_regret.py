"""Online convex problems, the learners on them, every inequality of the regret bound, and where each stops holding."""

import math

import pytest
import torch
from pandas import to_numeric
from references.kronecker import damped, preconditioner, spectral_power
from references.stream import full_matrix, low_rank_stream, random_stream, statistics

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.theory import problems, regret
from caspr_cli.theory.choices import Seeds
from caspr_cli.theory.online import DEPARTURES, METHODS, RUNGS, Learner, Method, damping, ladder, of_theorem, play
from caspr_cli.theory.problems import LINEAR, SIGMOID, SOFTMAX, SQUARES, Problem, best_in_hindsight, least_squares
from caspr_cli.theory.regret import ordered

EPS = torch.tensor(1e-3, dtype=torch.float64)
# All numbers of a table together, as they were: everything is float64, and the seed decides it.
SUMS = {
    "problems": 563.441536, "practice": 1541.22279, "comparison": 22.1315987, "theorem": 4501801.37,
    "methods": 356.599695, "ladder": 100.149391, "traces": 17225.8355, "forgetting": 470.448522,
}  # fmt: skip


def targets(loss, m, samples, seed):
    drawn = random_stream(m, samples, steps=1, seed=seed)[0]
    if loss is SOFTMAX:
        return torch.softmax(drawn, 0)
    if loss is SIGMOID:
        return torch.where(drawn > 1, torch.nan, torch.sigmoid(drawn))
    return drawn


def problem(rank=2, rounds=20, seeds=(0, 1), condition=1e2):
    return least_squares("p", "", rank, (condition, 1), rounds=rounds, seeds=list(seeds), shape=(3, 4))


@pytest.mark.parametrize("loss", [SQUARES, SOFTMAX, SIGMOID, LINEAR], ids=lambda loss: loss.name)
def test_slopes_are_the_derivatives_of_the_values(loss):
    Z, Y = random_stream(3, 4, steps=1, seed=1)[0].requires_grad_(), targets(loss, 3, 4, seed=2)
    (slope,) = torch.autograd.grad(loss.value(Z, torch.where(torch.isnan(Y), torch.sigmoid(Z.detach()), Y)), Z)
    assert torch.allclose(loss.slope(Z, Y), slope)  # at its own prediction a target has no slope: as if unobserved
    assert torch.isfinite(loss.value(Z, Y))


@pytest.mark.parametrize("loss", [SQUARES, SOFTMAX, SIGMOID], ids=lambda loss: loss.name)
def test_the_best_in_hindsight_has_no_slope_and_the_least_length(loss):
    X = torch.stack(random_stream(4, 2, steps=30, seed=3))
    X[:, 3] = X[:, 2]  # of two equal features only the sum of weights matters
    Y = torch.stack([targets(loss, 3, 2, seed=10 + t) for t in range(30)])
    best = best_in_hindsight(loss, X, Y)
    slope = sum(loss.slope(best @ x, y) @ x.mT for x, y in zip(X, Y, strict=True))
    assert slope.abs().max() < 1e-7
    assert torch.allclose(best[:, 2], best[:, 3])
    if loss is SQUARES:
        x, y = (part.movedim(0, 1).flatten(1) for part in (X, Y))
        assert torch.allclose(best, y @ torch.linalg.pinv(x))
    if loss is SOFTMAX:
        assert best.sum(0).abs().max() < 1e-9  # a number added to all rows changes nothing


def test_a_best_that_is_not_reached_is_none(monkeypatch):
    monkeypatch.setattr(problems, "NEWTON_STEPS", 2)
    X, Y = torch.tensor([[[1.0, -1.0]]]).double(), torch.tensor([[[0.99, 0.01], [0.01, 0.99]]]).double()
    with pytest.raises(ValueError, match="no best W"):
        best_in_hindsight(SOFTMAX, X, Y)


FULL, DIAGONAL, DESCENT = METHODS[0], METHODS[5], METHODS[6]


def seen(method, gradients):
    learner = Learner(method, torch.Size((3, 4)), EPS)
    for G in gradients:
        learner.see(G)
    return learner


def check(learner, X, G):
    """All faces of a learner against its preconditioner as the references have it."""
    assert torch.linalg.matrix_norm(learner.root.dense() - X) < 1e-9 * torch.linalg.matrix_norm(X)
    assert torch.allclose(learner.trace(), torch.trace(X))
    assert torch.allclose(X @ learner.root.power(-1).apply(G).flatten(), G.flatten(), atol=1e-8)


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_kronecker_learners_are_the_references(order):
    gradients = low_rank_stream(3, 4, 2, steps=6, seed=4)
    sides = [damped(side, float(EPS), "absolute") for side in statistics(gradients, "accumulate", 0.0)]
    check(seen(Method("", "", order), gradients), preconditioner(sides, order), gradients[-1])


def test_an_average_is_taken_as_often_as_there_are_rounds_and_old_roots_stay():
    gradients = random_stream(3, 4, steps=6, seed=8)
    sides = [damped(6 * side, float(EPS), "absolute") for side in statistics(gradients, "ema", 0.9)]
    check(seen(Method("", "", 2, beta=0.9), gradients), preconditioner(sides, 2), gradients[-1])
    for method, age in ((Method("", "", 2, interval=4), 5), (Method("", "", 2, interval=4, fresh=6), 6)):
        sides = [damped(side, float(EPS), "absolute") for side in statistics(gradients[:age], "accumulate", 0.0)]
        check(seen(method, gradients), preconditioner(sides, 2), gradients[-1])


def test_the_other_learners_are_the_references():
    gradients = random_stream(3, 4, steps=6, seed=5)
    F = full_matrix(gradients, float(EPS))
    check(seen(FULL, gradients), spectral_power(F, 1 / 2), gradients[-1])
    check(seen(DIAGONAL, gradients), torch.diag(F.diagonal().sqrt()), gradients[-1])
    size = math.sqrt(6) * max(torch.linalg.matrix_norm(G) for G in gradients)
    descent = seen(DESCENT, gradients)
    assert torch.allclose(descent.root.dense(), size * torch.eye(12, dtype=torch.float64))
    assert torch.allclose(descent.trace(), size)


@pytest.mark.parametrize(("optimizer", "order"), [(CASPR, 2), (Shampoo, math.inf)])
def test_a_match_is_played_as_the_library_s_optimizer_would(optimizer, order):
    one = problem(seeds=(3,))
    W = torch.nn.Parameter(torch.zeros_like(one.best[0]))
    settings = {"betas": (0.0, 0.9), "statistics": "accumulate", "damping": "absolute", "graft": "none"}
    library = optimizer([W], lr=0.3, eps=damping(one).item(), interval=1, start_step=1, **settings)
    seen = []
    eta = torch.full((1, 1), 0.3, dtype=torch.float64)
    play(one, Method("", "", order), eta, watch=lambda learner, G, U, off: seen.append(off[0, 0] + one.best[0]))
    for t, played in enumerate(seen):
        assert torch.allclose(played, W, rtol=1e-6, atol=1e-7)
        W.grad = one.play(t, W.detach()[None, None])[1][0, 0]
        library.step()
    assert len(seen) == one.rounds


def test_damping_is_in_units_of_the_squared_gradients_at_zero():
    one = problem()
    zero = torch.zeros_like(one.best)[:, None]
    squares = torch.stack([one.play(t, zero)[1].square().sum((1, 2, 3)) for t in range(one.rounds)])
    assert torch.allclose(damping(one), 1e-6 * squares.mean(0))


def test_regret_is_counted_as_it_is_defined():
    one = problem()
    eta = torch.full((2, 1), 0.2, dtype=torch.float64)
    seen = []
    runs = play(one, METHODS[2], eta, watch=lambda learner, G, U, off: seen.append(off + one.best[:, None]))
    paid, best = (((W @ one.X - one.Y) ** 2).sum((1, 2, 3)) / 2 for W in (torch.cat(seen, 1), one.best[:, None]))
    assert torch.allclose(runs.at_end, (paid - best)[:, None])


@pytest.mark.parametrize("method", [FULL, METHODS[2]], ids=lambda m: m.name)
def test_projections_are_the_nearest_in_their_norm(method):
    made = seen(method, random_stream(3, 4, steps=3, seed=6))
    W, radius = random_stream(3, 4, steps=1, seed=7)[0], torch.tensor(1.0, dtype=torch.float64)
    V, X = made.projected(W, radius), made.root.dense()
    assert torch.linalg.matrix_norm(V).item() == pytest.approx(1, abs=1e-9)
    pull = (X @ (W - V).flatten()).reshape(3, 4)  # = nu V with nu >= 0
    assert torch.allclose(pull, (pull * V).sum() * V, atol=1e-8)
    assert (pull * V).sum() > 0
    assert torch.allclose(made.projected(W / 10, radius), W / 10)  # inside, nothing happens
    cut = seen(DIAGONAL, [W]).projected(W, radius / 2)
    assert torch.equal(cut, W.clamp(-0.5, 0.5))


@pytest.mark.parametrize(("method", "rank"), list(zip(METHODS, (1, 3, 1, 3, 1, 3, 1), strict=True)))
def test_every_inequality_of_the_bound(method, rank):
    one = problem(rank)
    eta, radius = of_theorem(one, method)
    for scale, ball in ((1, radius), (0.1, None), (3, None)):
        found = ladder(one, method, scale * eta, ball)
        assert ordered([found.rungs[name] for name in RUNGS])
        assert found.growth.min() > -1e-9
        assert found.sums.max() <= 1
    kept = play(one, method, eta, radius)
    limit = math.sqrt(2 * kept.rank) * 2 * radius[:, 0] * kept.sizes[:, 0, -1]
    assert (kept.distance <= 2 * radius * (1 + 1e-9)).all()
    assert (kept.at_end[:, 0] <= limit).all()


# What does not hold.


def test_false_that_the_preconditioner_of_an_average_grows():
    average = next(m for m in DEPARTURES if m.name == "average")
    found = ladder(problem(), average, *of_theorem(problem(), average))
    assert (found.growth < -1e-3).any()


def test_false_for_old_roots_that_the_sum_is_below_its_bound():
    """A gradient in a direction that the roots have not seen is divided by eps^(1/2) alone."""
    Y = torch.zeros(1, 4, 2, 1, dtype=torch.float64)
    Y[0, 0, 0], Y[0, 1:, 1] = 1, 1
    one = Problem("", "", LINEAR, torch.ones(1, 4, 1, 1).double(), Y, torch.full((1, 2, 1), -1.0).double())
    eta = torch.ones(1, 1, dtype=torch.float64)
    assert ladder(one, Method("", "", 2), eta).sums < 1
    assert ladder(one, Method("", "", 2, interval=10), eta).sums > 10


def test_a_run_that_is_lost_has_infinite_regret_and_harms_no_other():
    one = problem()
    stale = Method("", "", 1, interval=10)
    eta = torch.tensor([[1e9, 1e-3]] * 2, dtype=torch.float64)
    runs = play(one, stale, eta)
    assert torch.isinf(runs.at_end[:, 0]).all()
    assert torch.allclose(runs.at_end[:, 1], play(one, stale, eta[:, 1:]).at_end[:, 0])


def test_the_answer_holds_and_its_tables_agree_with_each_other(monkeypatch):
    monkeypatch.setattr(regret, "QUICK_ROUNDS", 11)  # with which roots every 10 rounds are old in the end
    monkeypatch.setattr(regret, "EXAMPLE_ROUNDS", 8 * 120)
    found = regret.answer(Seeds(quick=True, seed=4))
    assert all(held for _, held in found.claims)
    assert (len(found.counterexamples), len(found.figures)) == (3, 3)
    assert found.finding.startswith("CASPR's regret is ")
    assert len(found.finding.split()) <= 30
    assert "words" in set(found.tables["problems"]["problem"])
    practice, departures, methods = (found.tables[name] for name in ("practice", "departures", "methods"))
    assert practice.groupby("problem")["ratio"].min().eq(1).all()
    own = practice[practice["method"] == "CASPR"].set_index("problem")["regret"]
    same = departures[departures["ratio"] == 1].set_index("problem")["regret"]
    assert own.to_dict() == pytest.approx(same.to_dict())
    assert found.tables["ladder"]["bound"].eq(1).all()
    factors = methods.set_index("method")
    assert factors.loc["CASPR", list(RUNGS[1:])].prod() == pytest.approx(factors.loc["CASPR", "together"])
    assert factors.loc["full-matrix Adagrad", "bound"] == pytest.approx(1, rel=1e-6)  # it is its own F~
    pairs = practice.pivot(index="problem", columns="method", values="regret")
    least = found.tables["comparison"].iloc[0]["least"]
    assert least == pytest.approx((pairs["CASPR"] / pairs["Shampoo"]).min())
    traces = found.tables["traces"]
    assert (traces["caspr"] / traces["shampoo"]).tolist() == pytest.approx(traces["ratio"].tolist())
    lost = found.tables["forgetting"].set_index(["method", "rounds"])
    assert [rounds for _, rounds in lost.index] == 2 * [15, 30, 60, 120]
    assert lost.loc[("moving average, beta 0.9", 120), "rate"] > lost.loc[("sum", 120), "rate"]
    sums = {name: to_numeric(found.tables[name].stack(), errors="coerce").sum() for name in SUMS}
    assert sums == pytest.approx(SUMS, rel=1e-5)
    assert "failed" in regret.finding(regret.DataFrame(), False)
