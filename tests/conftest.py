"""Settings every test shares. Its place in ``tests/`` also makes ``references`` importable."""

import hypothesis
import torch

# The suite runs beside other processes on few cores: one thread each, and sums in one order.
torch.set_num_threads(1)

# A loaded machine is no fault of the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
