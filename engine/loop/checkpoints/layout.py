"""Checkpoints on disk: which directories are complete, which files are whole, and where a parameter's elements lie.

A directory checkpoint-N holds, per process, rank-R.safetensors with the slices it keeps in fp32: tensors named
`kind/parameter@start`, with kind `weight`, a moment of the optimizer or `ema`, flattened, `start` the first element within the
parameter (parameters are those of the training form, `models/training_form.py`). state.json holds the step and what the run
was; manifest.json the digest of every file. Folders hold the models for others to open (`models.py`), from which nothing is
read here. No pickle is written or opened.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.errors import UserError
from engine.files import digest
from engine.loop.weights.partition import Slice
from engine.tensors import TensorFile

FORMAT_VERSION = 2
LATEST = "latest"


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted((path for path in directory.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for what is none."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def find(directory: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None when `latest` finds none.

    A path as the scripts take it: a directory, or the name of one in the output directory.
    """
    if resume != LATEST:
        path = Path(resume)
        return path if path.is_dir() else directory / path.name
    pointer = directory / LATEST
    if pointer.is_file() and (directory / pointer.read_text().strip()).is_dir():
        return directory / pointer.read_text().strip()
    # A crash between renaming the checkpoint and moving the pointer leaves a complete one unnamed.
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def read_state(checkpoint: Path, whole: bool = False) -> dict[str, Any]:
    """Checks the digests of what a training continues from, or of the `whole` checkpoint, and returns state.json.

    Raises:
        UserError: a file is missing or altered, or the format is another.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        damaged = [
            name for name, expected in manifest.items() if (whole or "/" not in name)
            and not ((checkpoint / name).is_file() and digest(checkpoint / name) == expected)
        ]  # fmt: skip
        state = json.loads((checkpoint / "state.json").read_text()) if not damaged else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: not a complete checkpoint ({error}); {_others(checkpoint)}") from None
    if damaged:
        raise UserError(f"{checkpoint}: damaged: {', '.join(damaged)} missing or altered; {_others(checkpoint)}")
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(f"{checkpoint}: format version {state['format_version']}, this engine reads {FORMAT_VERSION}")
    return state


def _others(checkpoint: Path) -> str:
    others = [path for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
    return f"resume from {others[-1]} instead" if others else "there is no other; start again in an empty directory"


class SliceFiles:
    """The slices of a checkpoint's files, found by kind and parameter."""

    def __init__(self, checkpoint: Path) -> None:
        self.files = [TensorFile(path) for path in sorted(checkpoint.glob("rank-*.safetensors"))]
        self.places: dict[str, list[tuple[int, TensorFile, str]]] = {}
        for file in self.files:
            for name in file.header:
                if "@" in name:
                    whole, start = name.rsplit("@", 1)
                    self.places.setdefault(whole, []).append((int(start), file, name))

    @property
    def kinds(self) -> list[str]:
        return sorted({whole.split("/", 1)[0] for whole in self.places})

    def elements(self, kind: str) -> int:
        """How many numbers of a kind the files hold."""
        return sum(file.elements(name) for whole, places in self.places.items() if whole.startswith(f"{kind}/")
                   for _, file, name in places)  # fmt: skip

    def fill_parameter(self, kind: str, name: str, parameter: Tensor) -> None:
        """Copies a whole parameter from whichever files hold its pieces; it must be contiguous."""
        self.fill(kind, Slice(name, parameter.shape, 0, parameter.numel(), 0, 0), parameter.detach().view(-1))

    def fill(self, kind: str, piece: Slice, target: Tensor) -> None:
        """Copies the elements of a slice from whichever files hold them."""
        filled = 0
        for start, file, name in self.places.get(f"{kind}/{piece.name}", []):
            first = max(start, piece.start)
            last = min(start + file.elements(name), piece.start + piece.length)
            if first < last:
                file.read(name, first - start, target[first - piece.start : last - piece.start])
                filled += last - first
        if filled != piece.length:
            raise UserError(f"the checkpoint holds {filled} of {piece.length} elements of {kind}/{piece.name}; was it trained "
                            "with the same model and options?")  # fmt: skip
