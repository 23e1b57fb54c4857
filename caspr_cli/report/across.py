"""Which rows of several tables are the same: by their settings, as labels say only what differs within a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from caspr_cli.report.model import Row, Table
from caspr_cli.report.rows import differing, setting


def labels(tables: Sequence[Table]) -> list[list[str]]:
    """A label for each row of each table: its own, with the settings in which any table has variants.

    So the one ``caspr`` of a table is the ``caspr eps=1e-06`` of another, and not its ``caspr eps=0.0001``.
    """
    told: dict[str, set[str]] = defaultdict(set)
    for table in tables:
        for optim in {row.optim for row in table.rows}:
            told[optim].update(differing([row.settings for row in table.rows if row.optim == optim]))
    return [[_label(row, told[row.optim]) for row in table.rows] for table in tables]


def _label(row: Row, keys: set[str]) -> str:
    name, *own = row.label.split(" ")
    more = {setting(key, row.settings[key]) for key in keys if key in row.settings}
    return " ".join([name, *sorted({*own, *more})])
