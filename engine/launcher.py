"""What a launcher (torchrun, deepspeed) says of a process in its environment; without one there is a single process."""

import os
from pathlib import Path


def rank() -> int:
    """Which of all processes this one is."""
    return int(os.environ.get("RANK") or 0)


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def launch() -> str:
    """What tells one torchrun of a node from all others: its folder of logs, the same in all attempts. Empty without torchrun.

    Its count of restarts tells nothing: of several nodes some count an attempt, and others not.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_N/LOCAL_RANK/error.json
    return str(Path(error_file).parents[2]) if error_file else os.environ.get("TORCHELASTIC_RUN_ID", "")


def keeps_its_store() -> bool:
    """Whether torchrun, over restarts on several nodes, keeps the store in which processes find each other."""
    several, restarts = (int(os.environ.get(name) or 0) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    return several > 1 and restarts > 0 and hosts_the_store()


def hosts_the_store() -> bool:
    """Whether the store in which processes find each other is torchrun's, and not the first process's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def local_rank(otherwise: int = 0) -> int:
    """Which of its node's processes this one is; `otherwise`, if that is not negative, where no launcher says."""
    return int(os.environ.get("LOCAL_RANK") or max(otherwise, 0))


def local_world() -> int:
    """How many processes its node has; where the launcher does not say, as many as there are."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    return min(int(next(filter(None, map(os.environ.get, names)), world())), world())


def boot() -> str:
    """What tells this start of the node's system from others.

    Raises:
        OSError: the system does not say.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
