"""CASPR for PyTorch, and the experiment runner around it.

The optimizer is a library of its own: ``from caspr_cli.optim import CASPR``. Importing this package alone
imports neither torch nor Hydra, so that the command line answers at once.
"""

__version__ = "0.1.0"
