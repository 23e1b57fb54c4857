"""Some faults of ``tests/faults.py``, so that the second tier has them; ``--count 50`` there is the long list."""

import os
import subprocess
import sys

import pytest


@pytest.mark.release
def test_runs_that_are_hit_lose_nothing() -> None:
    import faults  # reads TensorBoard, which takes a second

    kinds = faults.possible()
    command = [sys.executable, faults.__file__, "--count", str(2 * len(kinds) - len(faults.OF_RANKS))]
    own = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}  # other tests may have set it
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
