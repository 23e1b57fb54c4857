import math

import pytest

from caspr_cli.recipe.schema import Decay, ScheduleConf
from caspr_cli.training.schedule import factor


def curve(conf: ScheduleConf, steps: int = 100) -> list[float]:
    return [factor(s, steps, conf) for s in range(steps)]


def test_cosine_is_the_formula() -> None:
    got = curve(ScheduleConf(Decay.cosine, warmup=0.1, decay=0.9))
    assert got[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert got[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (s - 10) / 90)) for s in range(10, 100)])


def test_trapezoid() -> None:
    got = curve(ScheduleConf(Decay.linear, warmup=0.1, decay=0.2))
    assert got[9:80] == pytest.approx([1.0] * 71)
    assert got[80:] == pytest.approx([1 - (s - 80) / 20 for s in range(80, 100)])
    assert got[-1] > 0  # the last step still counts


def test_constant_after_warmup() -> None:
    assert curve(ScheduleConf(Decay.constant, warmup=0.0, decay=0.5)) == [1.0] * 100


@pytest.mark.parametrize("name", list(Decay))
def test_between_zero_and_one_at_any_length(name: Decay) -> None:
    for steps in (1, 2, 3, 7, 400):
        for warmup, decay in ((0, 0), (0, 1), (1, 0), (0.5, 0.5)):
            assert all(0 <= f <= 1 for f in curve(ScheduleConf(name, warmup, decay), steps))
