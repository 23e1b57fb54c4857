import gc
import platform
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from caspr_cli import __version__
from caspr_cli.bench import measure as module
from caspr_cli.bench.baselines import NEVER, Settings, enter, make, parse_given
from caspr_cli.bench.measure import Timer, blamed, eigendecompositions, measure, order, split, take_turns, waiting
from caspr_cli.bench.shapes import parse_shapes
from caspr_cli.bench.workload import Workload, workload_of
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.training.timing import PhaseTimer

CPU = torch.device("cpu")
ALL = ["caspr", "shampoo", "adamw", "muon", "soap"]


@pytest.fixture(autouse=True, scope="module")
def small_products() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.RATE_SIZE, "cpu", 32)
        patch.setattr(module, "SETTLING", 2)
        yield


def workload(text: str = "2*12x8,6", tokens: int = 10) -> Workload:
    return workload_of(parse_shapes(text), tokens, torch.float32, CPU)


def silent(text: str) -> None: ...


# ---- baselines


def test_everyone_has_weights_of_its_own_and_the_same_gradients() -> None:
    work = workload()
    ours, theirs = work.copies(), work.copies()
    for a, b in zip(ours[0]["params"], theirs[0]["params"], strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert a.grad is b.grad
    assert [group["precondition"] for group in ours] == [True, False]
    assert [p.ndim for p in ours[1]["params"]] == [1]
    assert work.train_flops == 6 * (2 * 12 * 8 + 6) * 10


def test_no_step_changes_a_gradient() -> None:
    work = workload("2*40x40,6")
    before = [g.clone() for g in work.grads.values()]
    for name in ALL:
        optimizer = enter(name, work.copies(), Settings(interval=2))
        for _ in range(3):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, work.grads.values(), strict=True))


@pytest.mark.parametrize("name", ["caspr", "soap"])
def test_held_still_nothing_is_refreshed_and_before_it_something_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where first roots take so long that the optimizer spreads them over an interval."""
    monkeypatch.setattr("caspr_cli.optim.plan.AT_ONCE", 0)
    groups = workload("3*40x40,6").copies()
    p = groups[0]["params"][-1]
    optimizer = make(name, groups, Settings(interval=NEVER))
    state = optimizer.state[p]

    def bases() -> list[torch.Tensor]:
        return list(state["Q"]) if name == "soap" else [v for k, v in state.items() if k.startswith("root_0")]

    before = [x.clone() for x in bases()]
    for _ in range(7):
        optimizer.step()
    assert before
    assert all(x.any() for x in before)
    assert all(torch.equal(a, b) for a, b in zip(before, bases(), strict=True))
    assert not any(torch.equal(x.reshape(-1, 40, 40)[0], torch.eye(40)) for x in before)


def test_options_are_read_and_reach_the_optimizer() -> None:
    assert parse_given(["apply_dtype=null"], ["caspr"]) == {"apply_dtype": None}
    given = parse_given(["order=3", "eps=1e-4", "graft=sgd", "apply_dtype=bfloat16"], ["caspr"])
    assert given == {"order": 3, "eps": 1e-4, "graft": "sgd", "apply_dtype": "bfloat16"}
    settings = Settings(interval=7, block_size=9, given=given)
    (group, _) = enter("caspr", workload().copies(), settings).param_groups
    found = [group[key] for key in ("order", "eps", "graft", "apply_dtype", "interval", "block_size", "start_step")]
    assert found == [3, 1e-4, "sgd", torch.bfloat16, 7, 9, 1]
    for name in ("shampoo", "shampoo_polar"):  # which have no order
        assert enter(name, workload().copies(), settings).param_groups[0]["eps"] == 1e-4
    mode = "caspr_polar:order=1:graft=rms"  # an option of its own wins
    (group, _) = enter(mode, workload().copies(), settings).param_groups
    assert [group[key] for key in ("polar", "order", "graft", "eps", "interval")] == [True, 1, "rms", 1e-4, 7]
    with pytest.raises(ConfigError, match=r"^--optim caspr: ordr=1: ordr is no option. Did you mean order\?"):
        enter("caspr:ordr=1", workload().copies(), settings)


@pytest.mark.parametrize(
    ("word", "names", "message"),
    [
        ("order", ["caspr"], "written KEY=VALUE"),
        ("interval=3", ["caspr"], "write --interval 3"),
        ("eps=abc", ["caspr"], "eps is 1e-06 unless it is set"),
        ("factor_dtype=float3", ["caspr"], "Did you mean float32?"),
        ("apply_dtype=float64", ["caspr"], "should be one of null, auto, bfloat16, float32."),
        ("order=3", ["adamw", "muon"], "it is for caspr and shampoo"),
    ],
)
def test_options_that_are_none(word: str, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_given([word], names)
    assert message in str(caught.value)


# ---- turns


def test_every_round_has_everyone_and_everyone_follows_every_other_just_once() -> None:
    for count in (1, 2, 3, 8, 11):
        assert all(sorted(order(turn, count)) == list(range(count)) for turn in range(2 * count))
    rows = [order(turn, 8) for turn in range(8)]
    pairs = [pair for row in rows for pair in pairwise(row)]
    assert len(set(pairs)) == len(pairs) == 8 * 7
    assert {row[0] for row in rows} == set(range(8))


def test_turns_and_garbage_collection() -> None:
    seen: list[tuple[str, bool]] = []

    def run(name: str) -> None:
        seen.append((name, gc.isenabled()))

    timers = [Timer(name, partial(run, name), turns) for name, turns in (("a", 1), ("b", 3))]
    logged: list[tuple[str, float]] = []
    take_turns(timers, 4, CPU, lambda *line: logged.append(line))
    assert [len(timer.seconds) for timer in timers] == [4, 12]
    assert not any(enabled for _, enabled in seen)
    assert gc.isenabled()
    assert logged == [("round 1/4", 0), ("round 2/4", 0.25), ("round 3/4", 0.5), ("round 4/4", 0.75)]


def test_the_wait_is_predicted_from_the_share_that_is_done() -> None:
    lines: list[str] = []
    clock = iter([100.0, 100.0, 110.0, 190.0])
    wait = waiting(lines.append, lambda: next(clock))
    wait(0, "warm-up: caspr", 0.0)
    wait(0, "warm-up: soap", 0.5)
    wait(2, "roots", 0.5)
    assert lines == [
        "[                ] warm-up: caspr",
        "[===             ] warm-up: soap  about 40.0 s left",
        "[==============  ] roots  about 10.0 s left",
    ]


def test_who_fails_is_named_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^soap fails here: IndexError: list$"), blamed("soap"):
        raise IndexError("list\nindex")
    with pytest.raises(ConfigError, match="not enough memory"), blamed("soap"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert gc.isenabled()


# ---- split


def test_parts_add_up_to_the_median_of_the_same_steps() -> None:
    seconds = [5.0, 1.0, 3.0, 100.0, 2.0, 4.0, 3.0]
    parts = [{"statistics": 0.5 * s, "roots": 0.25 * s, "apply": 0.125 * s} for s in seconds]
    found = split(seconds, parts)
    assert sum(found.values()) == pytest.approx(1e3 * float(np.median(seconds)))
    assert found == pytest.approx({"statistics": 1500.0, "roots": 750.0, "apply": 375.0, "rest": 375.0})
    held_up = split([1.0] * 8 + [50.0], [{"apply": 1.0}] * 8 + [{"roots": 50.0}])  # is not where time goes
    assert held_up == {"statistics": 0.0, "roots": 0.0, "apply": 1000.0, "rest": 0.0}
    assert split([1.0, 2.0], []) == {}


def test_phases_are_those_of_one_turn() -> None:
    phases = PhaseTimer(CPU)

    def run() -> None:
        for _ in range(2):
            with phases("apply"):
                pass

    timer = Timer("x", run, turns=3, phases=phases)
    timer.turn(CPU)
    assert len(timer.parts) == 3
    assert all(0 < part["apply"] <= second for part, second in zip(timer.parts, timer.seconds, strict=True))


# ---- rows


@pytest.fixture(scope="module")
def rows(small_products: None) -> list[module.Row]:
    return measure(workload("2*40x32,6"), ALL, Settings(interval=3), rounds=2, log=silent)


def test_a_row_for_each_in_their_order(rows: list[module.Row]) -> None:
    assert [row.optimizer for row in rows] == ALL
    assert [row.steps for row in rows] == [6, 6, 2, 2, 6]  # those with an interval make two of them
    assert [row.interval for row in rows] == [3, 3, None, None, 3]
    assert [row.optimizer for row in rows if row.floor_ms is None] == ["adamw"]
    assert [row.optimizer for row in rows if row.step_ms == row.median_ms] == ["adamw", "muon"]
    assert [row.optimizer for row in rows if row.refresh_ms is not None] == ["caspr"]
    assert [row.optimizer for row in rows if row.rest_ms is not None] == ["caspr", "shampoo"]


def test_numbers_agree_with_each_other(rows: list[module.Row]) -> None:
    caspr, adamw = rows[0], rows[2]
    for row in rows:
        assert 0 < row.median_ms <= row.p99_ms
        assert row.adamw_ratio == pytest.approx(row.median_ms / adamw.median_ms)
        assert 0 < row.share < 1
        assert row.share == pytest.approx(row.mean_ms / (row.mean_ms + row.train_ms))
        if row.floor_ms is not None:
            assert row.floor_ratio == pytest.approx(row.step_ms / row.floor_ms)
        parts = [part for part in (row.statistics_ms, row.roots_ms, row.apply_ms, row.rest_ms) if part is not None]
        assert len(parts) in (0, 4)
        assert not parts or (min(parts) >= 0 and sum(parts) == pytest.approx(row.median_ms))
    assert adamw.state_bytes_per_parameter == pytest.approx(8, abs=0.1)
    assert caspr.state_bytes_per_parameter > adamw.state_bytes_per_parameter
    assert caspr.refresh_ms > 0
    assert caspr.refresh_ratio == pytest.approx(caspr.refresh_ms / caspr.lapack_ms)


def test_adamw_is_measured_where_nobody_asked_for_its_row_and_vectors_have_no_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is looked up that need not be installed by its name."""
    monkeypatch.setattr("importlib.metadata.Distribution.from_name", Mock(side_effect=PackageNotFoundError))
    (row,) = measure(workload("6"), ["caspr"], Settings(interval=2), rounds=1, log=silent)
    expected = {"torch": None, "pytorch-optimizer": None, "caspr-cli": __version__}
    assert row.versions == expected | {"python": platform.python_version()}
    assert row.optimizer == "caspr"
    assert row.adamw_ratio > 0
    assert (row.floor_ms, row.floor_ratio, row.refresh_ms) == (None, None, None)


def test_lapack_gets_as_many_matrices_of_the_same_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = enter("caspr", workload("2*12x8,8x8").copies(), Settings())
    run = eigendecompositions(optimizer)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.linalg, "eigh", given.append)
    run()
    assert sorted(tuple(S.shape) for S in given) == [(2, 12, 12), (4, 8, 8)]
    for S in given:
        assert torch.equal(S, S.mT)
        assert bool((torch.linalg.eigvalsh(S) > 0).all())
