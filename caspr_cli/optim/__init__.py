"""CASPR and its family for PyTorch. Needs torch and nothing else.

>>> from caspr_cli.optim import CASPR
>>> optimizer = CASPR(model.parameters(), lr=1e-3)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caspr_cli.optim.caspr import CASPR, FullAdagrad, Shampoo
    from caspr_cli.optim.groups import param_groups

__all__ = ["CASPR", "FullAdagrad", "Shampoo", "param_groups"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch, when it is first asked for: a recipe's options are checked without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "groups" if name == "param_groups" else "caspr"
    return getattr(import_module(f"caspr_cli.optim.{module}"), name)
