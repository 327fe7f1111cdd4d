"""The limit of open files, which the connections of many processes exceed."""

import contextlib
import os

from engine import launcher
from engine.errors import UserError
from engine.files import allow_open_files

SPARE = 512  # open files for libraries, NCCL, shards and checkpoints


def allow_descriptors(rank: int, world: int) -> None:
    """Raises the limit of open files to what the connections need, and to what the store's host needs for its.

    A group of gloo takes world + 3 descriptors, and there are two: ours, and DeepSpeed's, which takes one more. The store's
    host has three connections with every process, each process three. So 1,024 need 2,056, and the host of the store 5,128.
    The first opens all files of a checkpoint, from which it writes the models for others: 1,024 more.
    """
    own, hosts = 2 * (world + 4) + SPARE + (world if rank == 0 else 0), 3 * world + SPARE
    torchrun_hosts = launcher.hosts_the_store()
    if rank == 0 and not torchrun_hosts:
        _allow(0, own + hosts, f"process 0 of {world}, which keeps their store,")
    else:
        _allow(0, own, f"each of {world} processes")
    if rank == 0 and torchrun_hosts:
        _allow(os.getppid(), hosts, f"torchrun, which keeps the store of {world} processes,")


def _allow(process: int, needed: int, who: str) -> None:
    """Raises the limit of a process, 0 for this one, as far as it is lower.

    Raises:
        UserError: its hard limit is lower.
    """
    with contextlib.suppress(OSError):  # of the parent, which may be another's
        if (allowed := allow_open_files(needed, process)) < needed:
            raise UserError(
                f"{who} needs {needed:,} open files, and this node allows {allowed:,}: raise its hard limit (ulimit -Hn, or "
                "LimitNOFILE of the service that starts the job)",
                passing=True,  # of this node
            )
