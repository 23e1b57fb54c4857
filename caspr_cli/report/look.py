"""The old name of ``report.style``, until ``caspr_cli.theory`` uses the new one."""

from caspr_cli.report.style import *  # noqa: F403
