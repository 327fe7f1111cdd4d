"""What checkpoints and their files are called."""

import os
import re
from pathlib import Path

from engine.catalogue import EMBEDDING, LORA_WEIGHTS

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"  # in the output directory: the name of the checkpoint to go on from
BEST = "best"  # the same of the one of the lowest held-out loss
CHECKPOINT = "checkpoint-"
VECTORS = {"weight": EMBEDDING, "ema": "learned_embeds_ema.safetensors"}
ADAPTERS = {"weight": LORA_WEIGHTS, "ema": "pytorch_lora_weights_ema.safetensors"}
REPLACED = ".replaced"  # what a checkpoint of a step is called while another of it takes its place


def checkpoint_name(step: int) -> str:
    return f"{CHECKPOINT}{step}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for what is none."""
    match = re.fullmatch(rf"{CHECKPOINT}(0|[1-9][0-9]{{0,17}})", checkpoint.name)
    return int(match[1]) if match else -1


def rank_file(rank: int) -> str:
    """The file of a process."""
    return f"rank-{rank}.safetensors"


def rank_of(name: str) -> int | None:
    """Whose file it is, by its name; None for what is none of a process."""
    match = re.fullmatch(r"rank-(0|[1-9][0-9]{0,8})\.safetensors", name)
    return int(match[1]) if match else None


def is_for_others(name: str) -> bool:
    """Whether a file, by its path within a checkpoint, is a model, an adapter or vectors for others to open."""
    return "/" in name or name in (*ADAPTERS.values(), *VECTORS.values())


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted((path for path in directory.glob(f"{CHECKPOINT}*") if step_of(path) >= 0 and path.is_dir()), key=step_of)


def displaced_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory that made room for others of their step which never came."""
    return [
        path for path in directory.glob(f"{CHECKPOINT}*{REPLACED}")
        if step_of(path.with_suffix("")) >= 0 and path.is_dir() and not os.path.lexists(path.with_suffix(""))
    ]  # fmt: skip
