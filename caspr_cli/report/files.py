"""The old place of ``write_whole``."""

from caspr_cli.common.files import write_whole as write_whole
