import math

import numpy as np
import pytest
from composing import frozen
from hypothesis import given
from hypothesis import strategies as st

from caspr_cli.recipe import compose, search
from caspr_cli.recipe.configs import choices
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import OPTIMIZERS

SPACE: search.Space = {
    "a": {"log": [1e-4, 1e-1]},
    "b": {"linear": [-1, 3]},
    "c": {"one_minus_log": [1e-3, 0.1]},
    "d": {"choice": [1, 2, 3]},
}


def test_a_trial_is_a_function_of_its_index() -> None:
    """Whatever was drawn before it; and the numbers themselves, since a record must mean the same on any machine."""
    forward = [search.draw(SPACE, k) for k in range(5)]
    assert [search.draw(SPACE, k) for k in (4, 2, 0)] == [forward[4], forward[2], forward[0]]
    rates = [search.draw({"optim.lr": {"log": [1e-3, 1e-1]}}, k)["optim.lr"] for k in range(6)]
    assert rates == [0.02553, 0.001243, 0.004789, 0.07377, 0.03824, 0.007856]


@given(st.integers(0, 2**20 - 1))
def test_values_lie_in_their_ranges(trial: int) -> None:
    values = search.draw(SPACE, trial)
    assert 1e-4 <= values["a"] <= 1e-1
    assert -1 <= values["b"] <= 3
    assert 0.9 <= values["c"] <= 0.999
    assert values["d"] in (1, 2, 3)


@given(st.integers(0, 4096))
def test_what_is_near_one_keeps_the_digits_of_its_distance(trial: int) -> None:
    space: search.Space = {"beta": {"one_minus_log": [1e-7, 1e-2]}}
    beta = search.draw(space, trial)["beta"]
    assert 1e-7 <= 1 - beta * (1 - 1e-15) <= 1.00001e-2
    assert math.isclose(1 - beta, float(f"{1 - beta:.4g}"), rel_tol=1e-8)


@pytest.mark.parametrize("count", [4, 8, 64])
def test_the_first_trials_cover_each_range_evenly(count: int) -> None:
    """The net property of the sequence: one of 2^m points in each of 2^m equal parts, in the scale of the range."""
    drawn = [search.draw(SPACE, k) for k in range(count)]
    places = {
        "a": [math.log(d["a"] / 1e-4) / math.log(1e3) for d in drawn],
        "b": [(d["b"] + 1) / 4 for d in drawn],
        "c": [math.log((1 - d["c"]) / 1e-3) / math.log(100) for d in drawn],
    }
    for key, u in places.items():
        cells = np.clip(np.floor(np.array(u) * count), 0, count - 1)
        assert len(set(cells.tolist())) >= count - 2, key  # a value at a border may round to the other side


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "search.space is empty"),
        ({"optim.lr": {"logg": [1, 2]}}, "Did you mean log?"),
        ({"optim.lr": {"log": [1, 2], "linear": [1, 2]}}, "should have one of"),
        ({"optim.lr": {"log": [0, 1]}}, "should begin above 0"),
        ({"optim.lr": {"log": [1e-2, 1e-3]}}, "low < high"),
        ({"optim.lr": {"log": [1e-2]}}, "two numbers"),
        ({"optim.lr": {"linear": ["a", 1]}}, "two numbers"),
        ({"optim.lr": {"linear": [0, math.inf]}}, "low < high"),
        ({"optim.lr": {"one_minus_log": [0.1, 2]}}, "end at 1 or below"),
        ({"optim.lr": {"choice": []}}, "choice is empty"),
    ],
)
def test_malformed_spaces_are_refused_in_one_line(space: search.Space, message: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.space") as refused:
        search.draw(space, 0)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_trial_is_put_into_the_recipe_and_the_record_says_from_where() -> None:
    recipe = frozen("optim=adamw", "search=algoperf", "trial=3")
    plain = compose.to_plain(recipe)
    values = search.draw(plain["search"]["space"], 3)
    assert recipe.optim.lr == values["optim.lr"]
    assert list(recipe.optim.betas) == [values["optim.betas.0"], 0.999]
    assert recipe.optim.weight_decay == values["optim.weight_decay"]
    assert search.drawn(plain) == values
    assert compose.parse(compose.save(recipe)) == recipe


def test_what_the_command_line_sets_stays_and_changes_no_other_value() -> None:
    whole = frozen("search=algoperf", "trial=5")
    given = frozen("search=algoperf", "trial=5", "optim.lr=0.5")
    assert given.optim.lr == 0.5
    assert given.optim.weight_decay == whole.optim.weight_decay
    assert given.optim.betas == whole.optim.betas
    assert sorted(given.search.space) == ["optim.betas.0", "optim.weight_decay"]
    betas = frozen("search=algoperf", "trial=5", "optim.betas=[0.5,0.6]")
    assert list(betas.optim.betas) == [0.5, 0.6]


def test_the_command_line_gives_a_range_in_place_of_that_of_its_key() -> None:
    given = frozen("search=lr", "search.space={optim.lr:{choice:[0.5,0.25]},optim.eps:{log:[1e-9,1e-7]}}", "trial=1")
    assert given.search.space["optim.lr"] == {"choice": [0.5, 0.25]}
    assert given.optim.lr in (0.5, 0.25)
    assert 1e-9 <= given.optim.eps <= 1e-7
    own = frozen("search.name=own", "search.trials=2", "search.space={optim.lr:{log:[1,2]}}", "trial=0")
    assert 1 <= own.optim.lr <= 2


def test_trials_are_other_recipes_and_their_number_is_not_part_of_them() -> None:
    names = {compose.identity(frozen("search=lr", f"trial={k}")) for k in range(6)}
    assert len(names) == 6
    assert compose.identity(frozen("search=lr", "trial=2", "search.trials=50")) in names
    assert compose.identity(frozen("search=lr", trial=2)) in names


@pytest.mark.parametrize(
    ("name", "optim"),
    [
        (name, optim)
        for name in choices("search")
        if name != "none"
        for optim in OPTIMIZERS
        if optim == "adamw" or optim in choices(f"search/{name}")
    ],
)
def test_every_space_fits_its_optimizers(name: str, optim: str) -> None:
    recipe = frozen(f"optim={optim}", f"search={name}", trial=1)
    low, high = recipe.search.space["optim.lr"]["log"]
    assert low <= recipe.optim.lr <= high


def test_a_joint_space_has_what_an_optimizer_has() -> None:
    rest = {"optim.lr", "optim.weight_decay", "schedule.warmup"}
    betas, scale, momentum = {"optim.betas.0", "optim.betas.1"}, {"optim.adamw_lr_scale"}, {"optim.momentum"}
    own = {"caspr": betas | scale, "soap": betas | scale, "muon": betas | scale | momentum, "adamw": betas | scale,
           "sgd": momentum | scale}  # fmt: skip
    drawn = {optim: frozen(f"optim={optim}", "search=joint", trial=5) for optim in own}
    assert {optim: set(recipe.search.space) for optim, recipe in drawn.items()} == {
        optim: rest | keys for optim, keys in own.items()
    }
    assert len({recipe.search.trials for recipe in drawn.values()}) == 1
    for recipe in drawn.values():
        values = search.drawn(compose.to_plain(recipe))
        assert values == search.draw(recipe.search.space, 5)


def test_an_untuned_run_has_the_optimizers_own_values_and_those_of_the_command_line() -> None:
    own = OPTIMIZERS["caspr_sum"](eps=1e-3)
    recipe = frozen("optim=caspr_sum", "search=joint", "trial=default", "optim.eps=1e-3")
    assert compose.to_plain(recipe.optim) == compose.to_plain(own)
    assert (recipe.trial, recipe.search.name, recipe.search.space) == ("default", None, {})
    assert recipe.schedule.decay == 0.8  # as the trials have it
    alone = frozen("optim=caspr_sum", "trial=default")
    assert frozen("optim=caspr_sum").optim.lr != alone.optim.lr == own.lr  # conf/tuned has another
    assert compose.identity(alone) != compose.identity(frozen("optim=caspr_sum", "optim.lr=1e-3"))
    assert compose.parse(compose.save(recipe)) == recipe


def test_learning_rates_of_one_trial_lie_at_the_same_place_of_each_range() -> None:
    adamw, sgd = (frozen(f"optim={o}", "search=lr", "trial=4").optim.lr for o in ("adamw", "sgd"))
    assert math.isclose(sgd / adamw, 20, rel_tol=2e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search=lr"], "add -m trial='range(6)'"),
        (["trial=1"], "trial=1 needs a search"),
        (["search=lr", "trial=-1"], "trial should be from 0 to"),
        (["search=lr", "trial=few"], "trial should be an integer, best, top1, top2, ..., or default, but is 'few'"),
        (["search=lr", "trial=1", "search.trials=0"], "search.trials should be at least 1"),
        (["optim=sgd", "search=algoperf", "trial=1", "search.space={optim.beta.0:{linear:[0,1]}}"],
         "search.space: optim.beta.0 is a key of no optimizer. Did you mean betas?"),
        (["search=algoperf", "trial=1", "search.space={schedule.warmups:{linear:[0,1]}}"],
         "search.space: schedule.warmups is not a key. Did you mean schedule.warmup?"),
    ],
)  # fmt: skip
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        frozen(*overrides)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("kinds", "here", "tried", "expected"),
    [
        ({"log": [1e-3, 1]}, 0.08, [], [0.04, 0.16, 0.05657, 0.1131]),
        ({"log": [1e-3, 1]}, 0.08, [0.04, 0.16], [0.05657, 0.1131, 0.06727, 0.09514]),
        ({"log": [1e-3, 1]}, 0.04, [0.08, 0.16], [0.02, 0.05657, 0.02828, 0.04757]),
        ({"log": [1e-3, 1]}, 0.04, [8 * 0.04], [0.02, 0.08, 0.02828, 0.05657]),  # at most a factor of two
        ({"one_minus_log": [1e-2, 0.3]}, 0.9, [], [0.95, 0.8, 0.9293, 0.8586]),
        ({"linear": [0, 8]}, 3.0, [5.0], [1.0, 4.0, 2.0, 3.5]),
    ],
)
def test_the_values_beside_the_best(
    kinds: search.Range, here: float, tried: list[float], expected: list[float]
) -> None:
    points = [{"x": each, "y": 0.1} for each in (here, *tried)]
    others = [{"x": 1.01 * here, "y": 0.2}]  # another setting says nothing of these
    found = search.beside("x", kinds, {"x": here, "y": 0.1}, points + others)
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_learning_rate_is_refined_first_and_choices_are_not() -> None:
    assert search.turns({"a": {"log": [1, 2]}, "b": {"choice": [1]}, "optim.lr": {"log": [1, 2]}}) == ["optim.lr", "a"]
