"""Settings every test shares. Its place in ``tests/`` also makes ``references`` importable."""

import torch

# The suite runs beside other processes on few cores: one thread each, and sums in one order.
torch.set_num_threads(1)
