"""Read the words of a command line, ``key=value`` in Hydra's grammar, and list the jobs of a sweep."""

import itertools
import math
import re
from collections.abc import Sequence
from functools import cache

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from caspr_cli.recipe.errors import ConfigError

MOST_JOBS = 10_000  # in one sweep; more are a slip, as in seed=range(1000000)
LONGEST = 10_000  # characters of a word; the grammar takes seconds for more


@cache
def parse(word: str) -> Override:
    """Return a word as Hydra reads it. Raises ConfigError if it cannot be read."""
    try:
        if len(word) > LONGEST:
            raise ConfigError(f"cannot read '{word[:40]}...': it has more than {LONGEST:,} characters")
        found = OverridesParser.create().parse_override(word)
    except (HydraException, RecursionError) as error:
        raise ConfigError(_unreadable(word)) from error
    if not found.key_or_group or found.key_or_group.startswith("."):
        raise ConfigError(_unreadable(word))
    return found


def _unreadable(word: str) -> str:
    if re.fullmatch(r"[\w./-]*", word):
        return f"cannot read '{word}': a word is key=value, as in seed=1 (caspr-train --help)"
    return (
        f"cannot read '{word}': a word is key=value; quote a value that has blanks, commas, =, ~, brackets, quotes or "
        "accents, as in \"key='a, b'\""
    )


def is_hydras(word: Override) -> bool:
    """Return whether a word sets a key of Hydra and not of the recipe."""
    places = (word.key_or_group, word.package or "")
    return any(place == "hydra" or place.startswith(("hydra.", "hydra/")) for place in places)


def split(words: Sequence[str]) -> list[list[str]]:
    """Return the words of each job: all combinations; the last key changes fastest. The last of equal keys counts.

    Raises ConfigError if a sweep is over no list of values, or there are too many jobs.
    """
    values: dict[str, list[str]] = {}
    for word in words:
        found = parse(word)
        key = found.get_key_element()
        if found.is_interval_sweep():
            raise ConfigError(f"{word}: a sweep is over values, as in {key}=1,2 or {key}=range(3)")
        if found.is_sweep_override():
            found.config_loader = GlobalHydra.instance().config_loader()  # which glob(*) asks for the choices
            try:
                each = list(itertools.islice(found.sweep_string_iterator(), MOST_JOBS + 1))
            except HydraException as error:
                raise ConfigError(f"{word}: {str(error).splitlines()[0]}") from error
        else:
            each = [found.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in each]
    if (count := math.prod(map(len, values.values()))) > MOST_JOBS:
        raise ConfigError(f"a sweep of {count:,} jobs or more; at most {MOST_JOBS:,} fit into one")
    return [list(job) for job in itertools.product(*values.values())]
