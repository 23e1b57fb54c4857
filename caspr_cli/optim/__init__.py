"""CASPR and its family for PyTorch. Needs torch and nothing else.

>>> from caspr_cli.optim import CASPR
>>> optimizer = CASPR(model.parameters(), lr=1e-3)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caspr_cli.optim.caspr import CASPR, FullAdagrad, Shampoo

__all__ = ["CASPR", "FullAdagrad", "Shampoo"]


def __getattr__(name: str) -> type:
    """Import a class, and torch, when it is first asked for: a recipe's options are checked without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from caspr_cli.optim import caspr

    found: type = getattr(caspr, name)
    return found
