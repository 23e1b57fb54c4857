"""Several machines and one run: where they meet."""

import re
from collections.abc import Mapping

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import TrainerConf

# Ports for SLURM jobs, by job number: neighbours on a machine do not meet each other.
FIRST_PORT, PORTS = 20000, 20000


def meeting_place(trainer: TrainerConf, environment: Mapping[str, str]) -> str:
    """Return HOST:PORT: the given one, or that of the first machine of a SLURM job. Raises ConfigError without any."""
    if trainer.rendezvous is not None:
        return trainer.rendezvous
    hosts, job = environment.get("SLURM_JOB_NODELIST"), environment.get("SLURM_JOB_ID", "")
    if not hosts or not job.isdigit():
        raise ConfigError(
            f"trainer.nodes={trainer.nodes} needs trainer.rendezvous=HOST:PORT: a free port of one of the machines, "
            "the same on all"
        )
    return f"{first_host(hosts)}:{FIRST_PORT + int(job) % PORTS}"


def first_host(hosts: str) -> str:
    """Return the first host of SLURM's list.

    >>> first_host("gpu[007-012,031],login1")
    'gpu007'
    """
    found = re.match(r"([^,\[]+)(?:\[([^\]-]+?)(?=[,\-\]])[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts
