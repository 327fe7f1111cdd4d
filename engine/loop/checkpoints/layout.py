"""Checkpoints on disk: which directories are complete, and which files are whole.

A directory checkpoint-N holds, per process, rank-R.safetensors with the slices it keeps in fp32: tensors named
`kind/parameter@start`, with kind `weight`, a moment of the optimizer or `ema`, flattened, `start` the first element within the
parameter (parameters are those of the training form, `models/training_form.py`). state.json holds the step and what the run
was; manifest.json the digest of every file, and no file is read that it does not name. Folders hold the models for others to
open, or a file the adapter (`models.py`), from which nothing is read here. No pickle is written or opened.
"""

import contextlib
import enum
import os
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine import launcher
from engine.errors import FailingDisk, UserError, blame_the_machine, first_line
from engine.files import (
    SEEN_WITHIN,
    asked_again,
    digest,
    digest_of,
    held,
    lies_inside,
    open_regular,
    parse_json,
    read_text,
    seen,
    unseen,
)
from engine.liveness import named as named_processes
from engine.loop.checkpoints.names import (
    BEST,
    LATEST,
    MANIFEST,
    STATE,
    complete_checkpoints,
    displaced_checkpoints,
    is_for_others,
    rank_file,
    rank_of,
    step_of,
)
from engine.loop.checkpoints.slices import OLD_LISTING, Damaged, Part, RankFiles, SliceFiles, damage, part_of
from engine.loop.checkpoints.state import State, parse_state
from engine.messages import busy, say, warn
from engine.processes import Processes

FOUND = (Damaged, UserError)  # what a process finds that all raise
_NO_OTHER = "there is no other that is whole; start again in an empty directory"

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
            with held(directory) as ours:
                for displaced in displaced_checkpoints(directory) if ours is not None else ():
                    displaced.rename(displaced.with_suffix(""))
                    say(f"{displaced}: brought back; the run that was replacing it was killed")
            time.sleep(0.01)
        except OSError as error:
            warn(f"{directory}: a checkpoint that was being replaced when its run was killed stays aside: {first_line(error)}")
            return


def find(directory: Path, resume: str, depth: Depth = Depth.DIGESTS) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None when `latest` or `best` finds none.

    Args:
        resume: a path as the scripts take it: a directory, or the name of one in the output directory; or `latest` or `best`.
        depth: how far to look at those that may be taken where `latest` names none.
    """
    if resume == BEST:
        return named_in(directory / BEST)
    if resume != LATEST:
        path = Path(resume)
        return path if path.is_dir() else directory / path.name
    pointer = directory / LATEST
    named = named_in(pointer)
    if named is not None and _has_manifest(named):
        return named
    # A crash between renaming the checkpoint and moving the pointer leaves a complete one unnamed.
    with busy(f"Looking for a checkpoint that is whole in {directory}"):
        found = _newest_whole(complete_checkpoints(directory), depth)
    if os.path.lexists(pointer):
        instead = f"taking the newest that is whole, {found.name}" if found else "and there is none that is whole"
        say(f"{pointer}: names no checkpoint there; {instead}")
    return found


def named_in(pointer: Path) -> Path | None:
    """The checkpoint beside a pointer that this holds the name of."""
    try:
        with open_regular(pointer) as file:
            named = pointer.parent / file.read(100).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return named if named.parent == pointer.parent and step_of(named) >= 0 else None


def _has_manifest(checkpoint: Path) -> bool:
    try:
        return bool(_manifest(checkpoint)[0])
    except FailingDisk:
        return True
    except Damaged:
        return False


def open_checked(checkpoint: Path, whole: bool = False, processes: Processes | None = None) -> Checkpoint:
    """Checks what a training continues from, or with every value in it the `whole` checkpoint, and opens it.

    Args:
        processes: among which the work is divided; all must call it. None for this one alone.

    Raises:
        UserError: a file is missing, altered or not named, the slices do not fit together, or the format is another.
    """
    with or_another(checkpoint, processes):
        return _checked(checkpoint, Depth.MODELS if whole else Depth.DIGESTS, processes)


def open_newest(checkpoint: Path, processes: Processes) -> Checkpoint:
    """As `open_checked`, the checkpoint that is the latest; where it is damaged, or the disk does not give it, the newest other
    that is whole, and says so.

    Those of earlier steps come first: of later ones are those that the run was taken back from.
    """
    try:
        return _checked(checkpoint, Depth.DIGESTS, processes)
    except (Damaged, FailingDisk) as error:
        fault = error.with_traceback(None)  # which would keep the files open that it leads to
    said = str(fault) if isinstance(fault, FailingDisk) else f"{checkpoint}: {fault}"

    def others() -> list[Path]:
        newest_first = reversed(_others(checkpoint))
        return sorted(newest_first, key=lambda other: step_of(other) > step_of(checkpoint))

    for other in processes.computed_by_first(others):
        with contextlib.suppress(Damaged, FailingDisk):
            found = _checked(other, Depth.DIGESTS, processes)
            warn(f"{said}; going on from {other.name}, the newest other that is whole")
            return found
    raise fault if isinstance(fault, FailingDisk) else UserError(f"{said}; {_NO_OTHER}", shared=True)


@contextlib.contextmanager
def or_another(checkpoint: Path, processes: Processes | None = None) -> Iterator[None]:
    """What is found damaged inside, by all processes, is said with the newest other checkpoint that is whole.

    Raises:
        UserError: in the place of `Damaged`.
    """
    try:
        yield
    except Damaged as error:

        def another() -> Path | None:
            with busy(f"Looking for another checkpoint beside {checkpoint}"):
                return _newest_whole(_others(checkpoint), Depth.VALUES, passed_over=(Damaged, UserError))

        other = processes.computed_by_first(another) if processes else another()
        remedy = (
            f"resume from {other} instead: --resume_from_checkpoint {shlex.quote(str(other))}" if other
            else _NO_OTHER
        )  # fmt: skip
        raise UserError(f"{checkpoint}: {error}; {remedy}", shared=processes is not None) from None


def _others(checkpoint: Path) -> list[Path]:
    """The checkpoints beside one, oldest first."""
    return [path for path in complete_checkpoints(checkpoint.parent) if path.name != checkpoint.name]


def _newest_whole(checkpoints: list[Path], depth: Depth, passed_over: tuple[type[Exception], ...] = (Damaged,)) -> Path | None:
    """The newest of checkpoints from which a training can continue.

    Raises:
        FailingDisk: there is none, and one of them may be.
    """
    failing: FailingDisk | None = None
    for checkpoint in reversed(checkpoints):
        try:
            return _checked(checkpoint, depth).path
        except passed_over:
            pass
        except FailingDisk as error:
            failing = failing or error.with_traceback(None)
    if failing:
        raise failing
    return None


@dataclass(frozen=True)
class _Share:
    """What a process found in its share of the files: what is wrong with them, by name, else what they hold."""

    faults: dict[str, str]
    parts: dict[int, Part]
    state: State | None


def _checked(checkpoint: Path, depth: Depth, processes: Processes | None = None) -> Checkpoint:
    """A checkpoint that holds what it should.

    Of n files and as many processes, each opens the manifest, its own file (once to compare it with its digest, and once to
    read from) and a share of the n others where there are more; the first also state.json, and it alone lists the directory.

    Raises:
        Damaged: what is wrong; by all processes.
    """
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    manifest, faults = _seen(checkpoint, depth, processes)
    files = RankFiles(checkpoint, patience=SEEN_WITHIN if world > 1 else 0.0)
    mine = {name: value for name, value in manifest.items() if name not in faults and (rank_of(name) or 0) % world == rank}
    look = partial(_look, files, mine, depth)
    shares = processes.all_or_none(look, FOUND) if processes else [look()]
    found = {name: problem for share in shares for name, problem in share.faults.items()}
    faults = faults | {name: found[name] for name in manifest if name in found}
    if faults:
        raise Damaged(f"damaged: {', '.join(f'{name} {problem}' for name, problem in faults.items())}")
    state, parts = shares[0].state, {number: part for share in shares for number, part in share.parts.items()}
    assert state is not None
    named = sorted(name for name in manifest if not is_for_others(name))
    if len(named) != state.world + 1 or named != sorted([STATE, *map(rank_file, range(state.world))]):
        raise Damaged(
            f"{STATE}: of {state.world} processes, and there are {', '.join(name for name in named if name != STATE)}"
        )
    if step_of(checkpoint) not in (-1, state.step):
        raise Damaged(f"{STATE}: of step {state.step}")
    if state.loss_steps > state.step or any(count > state.step for count in state.optimizer_counters.values()):
        raise Damaged(f"{STATE}: counts more steps than the {state.step} that were taken")
    slices = SliceFiles(files, [parts[number] for number in range(state.world)])
    if depth >= Depth.VALUES:
        slices.check_values()
    return Checkpoint(checkpoint, state, slices)


def _seen(checkpoint: Path, depth: Depth, processes: Processes | None) -> tuple[dict[str, str], dict[str, str]]:
    """The manifest, once this process sees the one that the first sees, and what is wrong with the files that there are.

    Raises:
        Damaged, UserError: there is none, or this process does not come to see the same; by all processes.
    """
    if processes is None or processes.world == 1:
        manifest, _ = _manifest(checkpoint)
        return manifest, _misplaced(checkpoint, manifest, depth, patience=0.0)

    mine: dict[str, str] | None = None

    def first() -> tuple[str, dict[str, str]]:
        nonlocal mine
        mine, seal = _manifest(checkpoint)
        return seal, _misplaced(checkpoint, mine, depth, OLD_LISTING)

    seal, faults = processes.computed_by_first(first, FOUND)

    def same() -> bool:
        nonlocal mine
        with contextlib.suppress(Damaged):
            manifest, ours = _manifest(checkpoint)
            mine = manifest if ours == seal else None
        return mine is not None

    sees = mine is not None or seen(checkpoint / MANIFEST, same)
    blind = [rank for rank, sees in enumerate(processes.gather_patiently(sees)) if not sees]
    if mine is None or blind:
        raise unseen(checkpoint, named_processes(blind))
    return mine, faults


def _misplaced(checkpoint: Path, manifest: dict[str, str], depth: Depth, patience: float) -> dict[str, str]:
    """What is wrong with the files that there are and those that the manifest names: file -> problem.

    What the listing lacks, which a node may have kept from when it wrote there itself, is looked up by name.

    Args:
        patience: seconds in which all that is named must come.
    """
    given_up = time.monotonic() + patience
    present = _files(checkpoint)
    strays = sorted(present - manifest.keys())
    read = [name for name in strays if Path(name).suffix.lower() in _READ or (checkpoint / name).is_dir()]
    if depth >= Depth.MODELS and len(strays) > len(read):
        say(f"{checkpoint}: named in no manifest, and read by nothing: {', '.join(sorted({*strays} - {*read}))}")
    faults = dict.fromkeys(read, f"is not named in {MANIFEST}")
    lacking = [name for name in manifest if name not in present]
    return faults | {name: "missing" for name in lacking if not seen(checkpoint / name, seconds=given_up - time.monotonic())}


def _look(files: RankFiles, share: dict[str, str], depth: Depth) -> _Share:
    """Compares files with their digests, and reads what they hold where all are whole.

    Args:
        share: file -> digest.

    Raises:
        Damaged: one is whole, and is not what it should be.
        UserError: this process does not come to see one.
    """
    faults: dict[str, str] = {}
    for name, expected in share.items():
        if not files.sees(name):
            raise UserError(
                f"{files.checkpoint / name}: process {launcher.rank()} does not come to see it, as the first process "
                "does; mount the same output directory on all nodes, and start the same again"
            )
        problem = _problem(files.checkpoint, name, expected, depth >= (Depth.MODELS if is_for_others(name) else Depth.DIGESTS))
        if problem:
            faults[name] = problem
    state = None
    if not faults and STATE in share:
        with damage(files.checkpoint / STATE):
            path = files.checkpoint / STATE
            state = parse_state(parse_json(asked_again(partial(read_text, path))), path)
    ranks = [] if faults else [number for name in share if (number := rank_of(name)) is not None]
    return _Share(faults, {number: part_of(files[number]) for number in sorted(ranks)}, state)


def _manifest(checkpoint: Path) -> tuple[dict[str, str], str]:
    """The digests of a checkpoint's files by name, and that of the manifest itself.

    Raises:
        Damaged: there is none, or it is not what it should be.
    """
    try:
        if not lies_inside(checkpoint / MANIFEST, checkpoint):
            raise ValueError(f"{MANIFEST} is a link that leads out of it")
        text = asked_again(partial(read_text, checkpoint / MANIFEST))
        manifest = parse_json(text)
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
    return manifest, digest_of(text)


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
        return None if asked_again(partial(digest, path)) == expected else "missing or altered"
    except OSError as error:
        blame_the_machine(path, error)
        return f"cannot be read ({first_line(error)})"
