"""CASPR and its family for PyTorch. Imports torch and nothing else of this project.

>>> from caspr_cli.optim import CASPR
>>> optimizer = CASPR(model.parameters(), lr=1e-3)  # doctest: +SKIP
"""

from caspr_cli.optim.caspr import CASPR, FullAdagrad, Shampoo

__all__ = ["CASPR", "FullAdagrad", "Shampoo"]
