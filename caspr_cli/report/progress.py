"""The old place of ``Progress``."""

from caspr_cli.common.format import Progress as Progress
