"""CASPR for PyTorch, and the experiment runner around it.

>>> from caspr_cli import CASPR, param_groups
>>> optimizer = CASPR(param_groups(model), lr=1e-3)  # doctest: +SKIP

Importing this package alone imports neither torch nor Hydra, so that the command line answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caspr_cli.optim import CASPR, FullAdagrad, Shampoo, param_groups

__all__ = ["CASPR", "FullAdagrad", "Shampoo", "param_groups"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what :mod:`caspr_cli.optim` has, and torch, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from caspr_cli import optim

    return getattr(optim, name)
