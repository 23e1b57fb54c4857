"""The exit codes of the commands, as ``--help`` has them."""

OK, RUN_FAILED, BAD_USAGE, SOME_FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
