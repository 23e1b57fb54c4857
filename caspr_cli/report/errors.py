"""What a user got wrong, in a line that offers the nearest valid choice; without Hydra, which recipe.errors needs."""

from __future__ import annotations

from caspr_cli.common.errors import UserError
from caspr_cli.common.errors import nearest as nearest

ReportError = UserError
