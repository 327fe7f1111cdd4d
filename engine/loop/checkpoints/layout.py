"""Checkpoints on disk: which directories are complete, and which files are whole.

A directory checkpoint-N holds, per process, rank-R.safetensors with the slices it keeps in fp32: tensors named
`kind/parameter@start`, with kind `weight`, a moment of the optimizer or `ema`, flattened, `start` the first element within the
parameter (parameters are those of the training form, `models/training_form.py`). state.json holds the step and what the run
was; manifest.json the digest of every file, and no file is read that it does not name. Folders hold the models for others to
open (`models.py`), from which nothing is read here. No pickle is written or opened.
"""

import contextlib
import enum
import os
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError, blame_the_machine, first_line
from engine.files import digest, lies_inside, lock, open_regular, parse_json, read_text, unlock
from engine.loop.checkpoints.names import (
    LATEST,
    MANIFEST,
    STATE,
    complete_checkpoints,
    displaced_checkpoints,
    rank_file,
    step_of,
)
from engine.loop.checkpoints.slices import Damaged, SliceFiles, damage
from engine.loop.checkpoints.state import State, parse_state
from engine.messages import busy, say, warn

# What libraries look for in the folder of a model, and this engine in a checkpoint; nothing reads a README.md.
_READ = (
    ".json", ".safetensors", ".bin", ".py", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf",
    ".npz", ".model",
)  # fmt: skip


class Depth(enum.IntEnum):
    """How far a checkpoint is looked at; each looks at what those before it do, too."""

    HEADERS = 0  # which files there are, the state, and how the slices fit together
    DIGESTS = 1  # the digests of what a training reads
    VALUES = 2  # whether its values are finite
    MODELS = 3  # the digests of the models for others to open


@dataclass(frozen=True)
class Checkpoint:
    """One that was checked, and what was opened for that."""

    path: Path
    state: State
    files: SliceFiles


def bring_back(directory: Path) -> None:
    """Gives checkpoints their names back that made room for others when a run was killed just then.

    While another process holds the directory, this is its work, and takes no longer than a rename.
    """
    given_up = time.monotonic() + 5
    while displaced_checkpoints(directory) and time.monotonic() < given_up:
        try:
            held = lock(directory)
            if held is None:
                time.sleep(0.01)
                continue
            try:
                for displaced in displaced_checkpoints(directory):
                    displaced.rename(displaced.with_suffix(""))
                    say(f"{displaced}: brought back; the run that was replacing it was killed")
            finally:
                unlock(held, directory)
        except OSError as error:
            warn(f"{directory}: a checkpoint that was being replaced when its run was killed stays aside: {first_line(error)}")
            return


def find(directory: Path, resume: str, depth: Depth = Depth.DIGESTS) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None when `latest` finds none.

    Args:
        resume: a path as the scripts take it: a directory, or the name of one in the output directory; or `latest`.
        depth: how far to look at those that may be taken where `latest` names none.
    """
    if resume != LATEST:
        path = Path(resume)
        return path if path.is_dir() else directory / path.name
    pointer = directory / LATEST
    named = _named_in(pointer)
    if named is not None and _has_manifest(named):
        return named
    # A crash between renaming the checkpoint and moving the pointer leaves a complete one unnamed.
    with busy(f"Looking for a checkpoint that is whole in {directory}"):
        found = _newest_whole(complete_checkpoints(directory), depth)
    if os.path.lexists(pointer):
        instead = f"taking the newest that is whole, {found.name}" if found else "and there is none that is whole"
        say(f"{pointer}: names no checkpoint there; {instead}")
    return found


def _named_in(pointer: Path) -> Path | None:
    """The checkpoint beside a pointer that this holds the name of."""
    try:
        with open_regular(pointer) as file:
            named = pointer.parent / file.read(100).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return named if named.parent == pointer.parent and step_of(named) >= 0 else None


def _has_manifest(checkpoint: Path) -> bool:
    try:
        return bool(_manifest(checkpoint))
    except Damaged:
        return False


def open_checked(checkpoint: Path, whole: bool = False) -> Checkpoint:
    """Checks what a training continues from, or with every value in it the `whole` checkpoint, and opens it.

    Raises:
        UserError: a file is missing, altered or not named, the slices do not fit together, or the format is another.
    """
    with or_another(checkpoint):
        return _checked(checkpoint, Depth.MODELS if whole else Depth.DIGESTS)


@contextlib.contextmanager
def or_another(checkpoint: Path) -> Iterator[None]:
    """What is found damaged inside is said with the newest other checkpoint that is whole.

    Raises:
        UserError: in the place of `Damaged`.
    """
    try:
        yield
    except Damaged as error:
        with busy(f"Looking for another checkpoint beside {checkpoint}"):
            others = [path for path in complete_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
            other = _newest_whole(others, Depth.VALUES, passed_over=(Damaged, UserError))
        remedy = (
            f"resume from {other} instead: --resume_from_checkpoint {shlex.quote(str(other))}" if other
            else "there is no other that is whole; start again in an empty directory"
        )  # fmt: skip
        raise UserError(f"{checkpoint}: {error}; {remedy}") from None


def _newest_whole(checkpoints: list[Path], depth: Depth, passed_over: tuple[type[Exception], ...] = (Damaged,)) -> Path | None:
    """The newest of checkpoints from which a training can continue."""
    for checkpoint in reversed(checkpoints):
        with contextlib.suppress(*passed_over):
            return _checked(checkpoint, depth).path
    return None


def _checked(checkpoint: Path, depth: Depth) -> Checkpoint:
    """A checkpoint that holds what it should.

    Raises:
        Damaged: what is wrong.
    """
    manifest, present = _manifest(checkpoint), _files(checkpoint)
    strays = sorted(present - manifest.keys())
    read = [name for name in strays if Path(name).suffix.lower() in _READ or (checkpoint / name).is_dir()]
    faults = [f"{name} is not named in {MANIFEST}" for name in read]
    if depth >= Depth.MODELS and len(strays) > len(read):
        say(f"{checkpoint}: named in no manifest, and read by nothing: {', '.join(sorted({*strays} - {*read}))}")
    for name, expected in manifest.items():
        compared = depth >= (Depth.MODELS if "/" in name else Depth.DIGESTS)
        problem = "missing" if name not in present else _problem(checkpoint, name, expected, compared)
        if problem:
            faults.append(f"{name} {problem}")
    if faults:
        raise Damaged(f"damaged: {', '.join(faults)}")
    with damage(checkpoint / STATE):
        state = parse_state(parse_json(read_text(checkpoint / STATE)))
    named = sorted(name for name in manifest if "/" not in name)
    if len(named) != state.world + 1 or named != sorted([STATE, *map(rank_file, range(state.world))]):
        raise Damaged(
            f"{STATE}: of {state.world} processes, and there are {', '.join(name for name in named if name != STATE)}"
        )
    if step_of(checkpoint) not in (-1, state.step):
        raise Damaged(f"{STATE}: of step {state.step}")
    if state.loss_steps > state.step or any(count > state.step for count in state.optimizer_counters.values()):
        raise Damaged(f"{STATE}: counts more steps than the {state.step} that were taken")
    files = SliceFiles(checkpoint, state.world)
    if depth >= Depth.VALUES:
        files.check_values()
    return Checkpoint(checkpoint, state, files)


def _manifest(checkpoint: Path) -> dict[str, str]:
    """The digests of a checkpoint's files by name.

    Raises:
        Damaged: there is none, or it is not what it should be.
    """
    try:
        if not lies_inside(checkpoint / MANIFEST, checkpoint):
            raise ValueError(f"{MANIFEST} is a link that leads out of it")
        manifest = parse_json(read_text(checkpoint / MANIFEST))
        if not isinstance(manifest, dict):
            raise ValueError(f"{MANIFEST} is no JSON object")
        for name, value in manifest.items():
            if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
                raise ValueError(f"{MANIFEST} has no digest of {name}")
            if name == MANIFEST or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
                raise ValueError(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
        if missing := [name for name in (STATE, rank_file(0)) if name not in manifest]:
            raise ValueError(f"{MANIFEST} does not name {', '.join(missing)}")
    except Exception as error:  # files of others raise anything
        blame_the_machine(checkpoint / MANIFEST, error)
        raise Damaged(f"not a complete checkpoint ({first_line(error)})") from None
    return manifest


def _files(checkpoint: Path) -> set[str]:
    """The names of all that is in a checkpoint and is no folder, its manifest apart; what systems hide there is not ours."""
    found = set()
    for folder, folders, names in os.walk(checkpoint):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder) / name for name in names] + [
            path for name in folders if (path := Path(folder) / name).is_symlink()
        ]
        found |= {path.relative_to(checkpoint).as_posix() for path in paths if not path.name.startswith(".")}
    return found - {MANIFEST}


def _problem(checkpoint: Path, name: str, expected: str, compared: bool) -> str | None:
    """What is wrong with a file that is there."""
    path = checkpoint / name
    if not lies_inside(path, checkpoint):
        return "is a link that leads out of the checkpoint"
    if not compared:
        return None
    try:
        return None if digest(path) == expected else "missing or altered"
    except OSError as error:
        blame_the_machine(path, error)
        return f"cannot be read ({first_line(error)})"
