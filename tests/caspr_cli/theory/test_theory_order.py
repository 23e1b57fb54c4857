"""The order of preconditioners, and one counterexample of each statement that looks like it and is false."""

import math
from itertools import pairwise

import pandas as pd
import pytest
import torch

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.theory import order
from caspr_cli.theory.chain import CLAIMS, FALSE_CLAIMS, MEASURES, NAMES, check, ridge
from caspr_cli.theory.choices import Layers
from caspr_cli.theory.gradients import low_rank_stream
from caspr_cli.theory.order import DRAWN, REAL, row_of

STREAMS = [((3, 4), 1), ((4, 3), 2), ((4, 4), 4), ((1, 4), 1), ((4, 1), 1)]


def checked(gradients, rank, steps=None):
    return check(gradients[:steps], ridge(gradients), rank)


def measured(found, measure):
    return [found[f"{measure} {name}"] for name in NAMES]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("shape", "rank"), STREAMS)
def test_all_that_should_hold_does(shape, rank, seed):
    G = low_rank_stream(shape, rank, 6, seed)
    for step in (1, 2, 6):
        found = checked(G, rank, step)
        assert found["tolerance"] < 1e-6
        for key in CLAIMS:
            if key in found:
                assert found[key] >= -found["tolerance"], CLAIMS[key]


def test_it_is_strict_where_gradients_are_general():
    """Every statement is checked, and nothing that is compared is just equal: margins are above rounding by far."""
    G = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = checked(G, 3)
    assert found.keys() >= CLAIMS.keys() | FALSE_CLAIMS.keys()
    order = ("gap_1", "gap_2", "gap_3", "gap_shampoo", "inverses", "traces", "distances", "products", "grows")
    for key in (*order, "bare_traces", "bare_distances"):
        assert found[key] > 1e3 * found["tolerance"], CLAIMS[key]


def test_margins_of_numbers_are_their_least_differences():
    found = checked(low_rank_stream((3, 4), 2, 6, 3), 2)
    t, d, p = (measured(found, measure) for measure in MEASURES)
    assert found["distances"] == pytest.approx(min(b - a for a, b in pairwise(d)))
    assert found["traces"] == pytest.approx(min((b - a) / b for a, b in pairwise(t)))
    assert found["products"] == pytest.approx(min([a - b for a, b in pairwise(p)] + [p[-1]]))
    assert (t[0], d[0], p[0]) == (1, 0, 1)


def test_tight_cases():
    """One gradient of rank r with equal singular values: F~ touches L~ x I. A smaller r is too small."""
    G = torch.eye(4, dtype=torch.float64)[None]
    exact, half = checked(G, 4), checked(G, 2)
    assert exact["lemma_left"] == pytest.approx(0, abs=1e-12)
    assert exact["gap_1"] > -1e-12
    assert half["lemma_left"] < -0.1
    assert half["gap_1"] < -0.1


@pytest.mark.parametrize(
    ("key", "shape", "rank", "least"),
    [
        ("no_rank_1", (4, 4), 4, -0.1),
        ("no_rank", (4, 4), 4, -0.1),
        ("stale", (3, 4), 1, -0.1),
        ("whole", (2, 4), 1, -1e-3),
        ("average_grows", (3, 4), 2, -1e-3),
    ],
)
def test_false(key, shape, rank, least):
    assert checked(low_rank_stream(shape, rank, 6, 1), rank)[key] < least, FALSE_CLAIMS[key]


# ---- the answer --------------------------------------------------------------------------------------------------


def made_up(*margins, source=REAL, step=10):
    """Cases with these margins of gap_2."""
    values = zip(MEASURES, ((1.0, 2.0, 3.0, 3.5, 4.0), range(5), (1.0, 0.9, 0.8, 0.7, 0.6)), strict=True)
    found = {f"{measure} {name}": x for measure, of in values for name, x in zip(NAMES, of, strict=True)}
    found |= dict.fromkeys((*CLAIMS, *FALSE_CLAIMS), 0.1) | {"tolerance": 1e-9}
    place = (source, "vit", "up", "3 x 4", 3, 0, step)
    return pd.DataFrame([row_of(place, found | {"gap_2": margin}) for margin in margins])


def test_the_finding_follows_the_numbers():
    good, bad = order.finding(made_up(0.0, 0.1)), order.finding(made_up(-1e-3, 0.0))
    assert good.startswith("At all 2 points ")
    assert "25.0 % below Shampoo's" in good
    assert bad.startswith(f"1 of {len(CLAIMS)} statements ")
    assert max(len(text.split()) for text in (good, bad)) <= 30


def test_rounding_is_no_failure_and_no_counterexample():
    assert [order.failures(made_up(margin, 0.2), "gap_2") for margin in (-1e-10, -1e-6)] == [0, 1]
    cases = pd.concat([made_up(-1e-3, -1e-7), made_up(0.3, source=DRAWN)])
    assert order.counted(cases, "gap_2", REAL) == (1, 2)
    assert order.counted(cases, "gap_2", DRAWN) == (0, 1)


def test_traces_and_layers_are_means_over_seeds_and_gaps_the_least():
    cases = pd.concat([made_up(0.2, 0.4), made_up(0.3, step=3), made_up(0.9, source=DRAWN)])
    rows = order.layers(cases).to_dict("records")
    assert [(row["step"], row["gap_2"], row["trace caspr"]) for row in rows] == [(10, 0.2, 3.0), (3, 0.3, 3.0)]
    assert order.traces(cases)["saved"].tolist() == pytest.approx([75, 50, 25, 12.5, 0])


def test_the_answer_holds():
    found = order.answer(Layers(quick=True, task="vit"))
    assert all(held for _, held in found.claims)
    assert (len(found.claims), len(found.counterexamples)) == (len(CLAIMS), len(FALSE_CLAIMS))
    assert [figure.name for figure in found.figures] == ["traces", "eigenvalues"]
    cases = found.tables["cases"]
    assert set(cases["source"]) == {REAL, DRAWN}
    assert all(math.isfinite(value) for value in cases["gap_1"])
    assert len(cases) == 2 + 4 * order.QUICK_TRIALS  # there is no gradient in the first of the steps 1, 3 and 10
    false = found.tables["counterexamples"].set_index("statement").loc[FALSE_CLAIMS["no_rank"]]
    assert (false["recorded_checked"], false["random_checked"]) == (2, 4 * order.QUICK_TRIALS)
    assert false["random_least"] == cases.loc[cases["source"] == DRAWN, "no_rank"].min()


def test_an_unknown_task_is_said_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"--task vot: no such task. Did you mean vit\?"):
        order.answer(Layers(task="vot"))
