"""Which numbers the options of CASPR and its kin may be: one place for the library and for the recipe's keys.

The standard library alone: a recipe is checked without torch, and the library imports nothing but torch and this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

EXPONENTS = (0.5, 1.0)
SMALLEST_EPS_FLOAT32 = 1e-6  # below it, the damping is lost in the rounding of float32 statistics


class Wrong(NamedTuple):
    """A number out of its range: ``should`` and ``value`` go with "should be > 0 but is -1"."""

    key: str
    should: str
    value: Any


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 1 and value == int(value)


Range = tuple[str, Callable[[Any], bool]]
NOT_NEGATIVE: Range = ("should be >= 0", lambda value: value >= 0)
POSITIVE: Range = ("should be > 0", lambda value: value > 0)
COUNT: Range = ("should be a positive integer", _is_count)
COUNT_OR_INF: Range = ("should be a positive integer or inf", lambda value: value == math.inf or _is_count(value))
COUNT_OR_ZERO: Range = ("should be a positive integer or 0", lambda value: value == 0 or _is_count(value))
EXPONENT: Range = (f"should be {' or '.join(map(str, EXPONENTS))}", lambda value: value in EXPONENTS)

RANGES = {
    "lr": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "graft_eps": NOT_NEGATIVE, "refresh_above": NOT_NEGATIVE,
    "eps": POSITIVE, "order": COUNT_OR_INF, "exponent": EXPONENT,
    "interval": COUNT, "start_step": COUNT, "block_size": COUNT, "statistics_interval": COUNT,
    "batch_axes": COUNT_OR_ZERO,
}  # fmt: skip


def wrong(options: Mapping[str, Any]) -> Wrong | None:
    """Return the first option that is out of range; None if all are in range.

    Args:
        options: by name, words and types as such or as strings; those that are not there are not asked for.
    """
    for key, (should, holds) in RANGES.items():
        if key in options and not holds(options[key]):
            return Wrong(key, should, options[key])
    betas, statistics = options["betas"], options["statistics"]
    if found := wrong_betas(betas):
        if found.key == "betas[1]" and betas[1] == 1 and statistics == "ema":
            return found._replace(should='should be below 1 for a moving average (statistics="accumulate" is a sum)')
        return found
    single, relative = str(options["factor_dtype"]).endswith("float32"), options["damping"] == "relative"
    if single and relative and options["eps"] < SMALLEST_EPS_FLOAT32:
        should = f"should be >= {SMALLEST_EPS_FLOAT32} for float32 factors (without factor_dtype they are float64)"
        return Wrong("eps", should, options["eps"])
    return None


def wrong_betas(betas: Any) -> Wrong | None:
    """Return the first of two decay rates that is out of range, for any optimizer."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return Wrong("betas", "should be two numbers", betas)
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            return Wrong(f"betas[{i}]", "should be in [0, 1)", beta)
    return None
