"""Molecules: graph classification with many yes-or-no labels, most of them missing (OGB's ogbg-molpcba)."""

import warnings

# torch_geometric compiles helpers with torch.jit when it is imported; a user can do nothing about it.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=FutureWarning)
