"""The slices of a checkpoint: which elements of which parameter lie where, checked before and while they are read."""

import contextlib
import re
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError, blame_the_machine, first_line
from engine.files import SEEN_WITHIN, asked_again, seen
from engine.loop.checkpoints.names import rank_file
from engine.loop.weights.partition import Slice
from engine.tensors import DTYPES, PIECE, TensorFile, host_buffer

OLD_LISTING = 60.0  # seconds for which NFS keeps what it once knew of a directory (acdirmax)
OPEN = 16  # files at a time; the header of one of stage 3 takes some 2 MB
_Found = tuple[str, int, int, Tensor]  # a tensor of a file, its elements, the first that is wanted, and where to
_Read = tuple[int, str, Tensor]  # a position in a file, the tensor that lies there, and where to
_PRECISIONS = {"weight": ("F32", "BF16"), "ema": ("F32",)}  # of kinds that are never in others
_NOT_NEGATIVE = ("exp_avg_sq",)
_OF_EVERY_PROCESS = {"metrics/loss_sum", "random/cpu"}
_LACKS_STATE = "does not hold the state that every process has"
_SLICE = re.compile(r"([A-Za-z0-9_]+)/([^/@]+)@(0|[1-9][0-9]{0,17})")
_OTHER = re.compile(r"optimizer/(.+/)?[A-Za-z0-9_]+|metrics/(loss_sum|of_data_sets)|random/(cpu|cuda)")


class Damaged(Exception):
    """What is wrong with a checkpoint, in one line; `layout.or_another` says with it which other one to take."""


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Whatever the reading of a file raises, the checkpoint is damaged there; but for lack of memory and failing disks."""
    try:
        yield
    except (Damaged, UserError):
        raise
    except Exception as error:  # files that are made to do harm raise anything
        blame_the_machine(path, error)
        raise Damaged(f"{path.name}: {first_line(error)}") from None


@dataclass(frozen=True)
class Part:
    """What the file of a process holds, without its values, small enough to be told to all.

    Of SD 1.5 on 1,024 processes at most 2 KB each, and 60 KB at ZeRO stage 3, where each has a slice of every parameter; to put
    all together takes 0.04 s, and 2 s.

    names: `kind/parameter` of its slices, as `_packed` has them; spans [n, 2], int64: which elements, from where to where.
    others: the names of the optimizer's state that has no place within a parameter.
    """

    names: bytes
    spans: np.ndarray
    others: tuple[str, ...]


def _packed(names: list[str]) -> bytes:
    return zlib.compress("@".join(names).encode(), 1)  # no name of a parameter has an @


def _unpacked(names: bytes) -> list[str]:
    text = zlib.decompress(names).decode()
    return text.split("@") if text else []


def part_of(file: TensorFile) -> Part:
    """What a file holds, by its header.

    Raises:
        Damaged: it is not what a process writes.
    """
    names, spans = [], []
    with damage(file.path):
        for name, described in file.header.items():
            match, shape = _SLICE.fullmatch(name), described["shape"]
            kind, parameter, start = match.groups() if match else ("", "", "")
            if kind in ("optimizer", "metrics", "random") or not (match or _OTHER.fullmatch(name)):
                raise ValueError(f"{name} is no name of a slice")
            if match:
                if len(shape) != 1 or described["dtype"] not in _PRECISIONS.get(kind, (described["dtype"],)):
                    raise ValueError(f"{name} is {described['dtype']} {shape}, and not a row of numbers in fp32")
                names.append(f"{kind}/{parameter}")
                spans.append((int(start), int(start) + shape[0]))
        packed = _packed(names)
    if file.header.keys() & _OF_EVERY_PROCESS != _OF_EVERY_PROCESS:
        raise Damaged(f"{file.path.name}: {_LACKS_STATE}")
    others = tuple(sorted(name for name in file.header if name.startswith("optimizer/")))
    return Part(packed, np.array(spans, np.int64).reshape(-1, 2), others)


class RankFiles(dict[int, TensorFile]):
    """The files of a checkpoint by rank, each opened when it is asked for; only so many stay open, the others are forgotten.

    Args:
        most: files that stay open.
        patience: seconds from now on in which files must come that another process has seen.
    """

    def __init__(self, checkpoint: Path, patience: float = 0.0, most: int = OPEN) -> None:
        super().__init__()
        self.most = most
        self.checkpoint, self._given_up = checkpoint, time.monotonic() + patience

    @cached_property
    def room(self) -> Tensor:
        """For what is read before it goes where it belongs; one for all files."""
        return host_buffer()

    def sees(self, name: str) -> bool:
        """Whether a file of the checkpoint is there, or comes in time."""
        return seen(self.checkpoint / name, seconds=self._given_up - time.monotonic())

    def __missing__(self, rank: int) -> TensorFile:
        path = self.checkpoint / rank_file(rank)
        self.sees(path.name)
        if len(self) == self.most:
            del self[next(iter(self))]
        with damage(path):
            self[rank] = asked_again(partial(TensorFile, path))
        return self[rank]


def open_slices(checkpoint: Path, world: int) -> "SliceFiles":
    """The slices of the files of `world` processes, all of which are opened, as soon as this one sees them, and stay open.

    Raises:
        Damaged: a file cannot be read, or the slices do not fit together.
    """
    files = RankFiles(checkpoint, SEEN_WITHIN if world > 1 else 0.0, most=world)
    return SliceFiles(files, [part_of(files[rank]) for rank in range(world)])


class SliceFiles:
    """The slices of a checkpoint's files, by kind and parameter; of each kind they cover every parameter exactly once.

    files: by rank; opened where values are read.
    places: `kind/parameter` -> where its elements lie, [n, 3] int64: from which element to which, in the file of which rank.

    Args:
        parts: of all files, by rank.

    Raises:
        Damaged: the slices do not fit together.
    """

    def __init__(self, files: RankFiles, parts: Sequence[Part]) -> None:
        self.files, self.world, self.others = files, len(parts), set(parts[0].others)
        for rank, part in enumerate(parts):
            if part.others != parts[0].others:
                raise Damaged(f"{rank_file(rank)}: {_LACKS_STATE}")
        self.places = _places(parts)
        for name, rows in self.places.items():
            _check_cover(name, rows)
        self.kinds = sorted({name.split("/")[0] for name in self.places})
        self.sizes = self._sizes("weight")
        if not self.sizes:
            raise Damaged("it holds no weights")
        for kind in self.kinds:
            self._compare(self._sizes(kind), kind, "weight")

    def _sizes(self, kind: str) -> dict[str, int]:
        """Parameter -> its elements."""
        of = f"{kind}/"
        return {name.removeprefix(of): int(rows[-1, 1]) for name, rows in self.places.items() if name.startswith(of)}

    def check_state(self, kinds: Collection[str], others: Collection[str]) -> None:
        """Refuses state of another optimizer; a moving average may end here.

        Args:
            kinds: of the state that is laid out as the weights; `others`: the names of what else there is of the optimizer.

        Raises:
            Damaged: there is state that this one has not.
        """
        if unknown := sorted({*self.kinds, *self.others} - {*kinds, *others, "ema"}):
            raise Damaged(f"holds {_some(unknown)}, which this optimizer has not; was it trained with the same options?")

    def _compare(self, sizes: Mapping[str, int], one: str, other: str) -> None:
        """Refuses parameters of another name or size than the weights have."""
        for parameter in sizes.keys() | self.sizes.keys():
            ours, theirs = sizes.get(parameter, 0), self.sizes.get(parameter, 0)
            if ours != theirs:
                raise Damaged(f"{parameter} has {ours} elements in {one}, and {theirs} in {other}")

    def check_model(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuses another model's parameters.

        Raises:
            Damaged: one of the model is missing or of another size, or there are others.
        """
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        if missing := sorted(sizes.keys() - self.sizes.keys()):
            raise Damaged(f"lacks {_some(missing)} of the model; was it trained with the same model and options?")
        if others := sorted(self.sizes.keys() - sizes.keys()):
            raise Damaged(f"holds {_some(others)}, which the model has not; was it trained with the same model and options?")
        for name, size in sizes.items():
            if self.sizes[name] != size:
                raise Damaged(
                    f"holds {self.sizes[name]} elements of {name}, of which the model has {size}; was it trained with the same "
                    "model and options?"
                )

    def check_values(self) -> None:
        """Reads everything.

        Raises:
            Damaged: a value is not finite.
        """
        room = torch.empty(PIECE, dtype=torch.uint8)
        for file in map(self.files.__getitem__, range(self.world)):
            for name, described in file.header.items():
                buffer = room.view(DTYPES[described["dtype"]])
                size = file.elements(name) if buffer.is_floating_point() else 0
                for first in range(0, size, len(buffer)):
                    self._read(file, [(file.position(name, first), name, buffer[: size - first])])
            generator_state(file)

    def elements(self, kind: str) -> int:
        """How many numbers of a kind the files hold."""
        return sum(self._sizes(kind).values())

    def fill_parameter(self, kind: str, name: str, parameter: Tensor) -> None:
        """Copies a whole parameter from whichever files hold its pieces, from their precision; it must be contiguous."""
        whole, stored = Slice(name, parameter.shape, 0, parameter.numel(), 0, 0), parameter.detach().view(-1)
        if places := self.places.get(f"{kind}/{name}", np.empty((0, 3), np.int64)).tolist():
            start, _, rank = places[0]
            described = self.files[rank].header.get(f"{kind}/{name}@{start}", {})
            stored = stored.to(DTYPES.get(described.get("dtype", ""), parameter.dtype))
        self.fill([(kind, whole, stored)])
        parameter.detach().view(-1).copy_(stored)

    def fill(self, wanted: Iterable[tuple[str, Slice, Tensor]]) -> None:
        """Copies the elements of slices, each of a kind into a tensor, from whichever files hold them.

        One file is read after another, from its beginning to its end, and what lies side by side there at once.

        Raises:
            Damaged: they are not there, are of another dtype, or are not finite.
        """
        found: dict[int, list[_Found]] = {}
        for kind, piece, target in wanted:
            filled, end = 0, piece.start + piece.length
            rows = self.places.get(f"{kind}/{piece.name}", np.empty((0, 3), np.int64))
            overlapping = slice(np.searchsorted(rows[:, 1], piece.start, "right"), np.searchsorted(rows[:, 0], end))
            for start, stop, rank in rows[overlapping].tolist():
                first, last = max(start, piece.start), min(stop, end)
                if first < last:
                    part = target[first - piece.start : last - piece.start]
                    found.setdefault(rank, []).append((f"{kind}/{piece.name}@{start}", stop - start, first - start, part))
                    filled += last - first
            if filled != piece.length:
                raise Damaged(
                    f"holds {filled} of {piece.length} elements of {kind}/{piece.name}; was it trained with the same model and "
                    "options?"
                )
        for rank in sorted(found):
            self._read_file(self.files[rank], found.pop(rank))

    def _read_file(self, file: TensorFile, found: list[_Found]) -> None:
        reads: list[_Read] = []
        for name, size, first, target in found:
            stored = file.header.get(name)
            if stored is None or stored["shape"] != [size]:
                raise Damaged(f"{file.path.name}: is another file than was compared with its digest")
            if DTYPES[stored["dtype"]] != target.dtype:
                raise Damaged(f"{file.path.name}: {name} is {stored['dtype']}, and not {target.dtype}")
            for part in target.split(PIECE // target.element_size()):
                reads.append((file.position(name, first), name, part))
                first += part.numel()
        reads.sort(key=lambda read: read[0])
        for side_by_side in _side_by_side(reads):
            self._read(file, side_by_side)

    def _read(self, file: TensorFile, reads: list[_Read]) -> None:
        """Reads what lies side by side, of one kind, and looks at it while it is near."""
        position, first_name, target = reads[0]
        lengths = [part.numel() for _, _, part in reads]
        direct = len(reads) == 1 and target.device.type == "cpu"
        values = target if direct else self.files.room[: sum(lengths) * target.element_size()].view(target.dtype)
        with damage(file.path):
            asked_again(partial(file.read_at, position, values))
        parts = values.split(lengths)
        if _fault(first_name, values):
            for (_, name, _), part in zip(reads, parts, strict=True):
                if fault := _fault(name, part):
                    raise Damaged(f"{file.path.name}: {name.split('@')[0]} holds {fault}")
        if not direct:
            for (_, _, to), part in zip(reads, parts, strict=True):
                to.copy_(part, non_blocking=True)
            if target.is_cuda:
                torch.cuda.current_stream(target.device).synchronize()  # before the room is used again


def generator_state(file: TensorFile) -> Tensor:
    """The state of torch's generator on the host.

    Raises:
        Damaged: it is none.
    """
    with damage(file.path):
        state = file.tensor("random/cpu")
        torch.Generator().set_state(state)
    return state


def _places(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """`SliceFiles.places`."""
    numbers: dict[str, int] = {}  # in the order in which the files have them
    rows = np.empty((sum(len(part.spans) for part in parts), 4), np.int64)
    end = 0
    for rank, part in enumerate(parts):
        own = rows[end : (end := end + len(part.spans))]
        own[:, 0] = [numbers.setdefault(name, len(numbers)) for name in _unpacked(part.names)]
        own[:, 1:3], own[:, 3] = part.spans, rank
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    bounds = np.searchsorted(rows[:, 0], np.arange(len(numbers) + 1))
    return {name: rows[bounds[number] : bounds[number + 1], 1:] for name, number in numbers.items()}


def _check_cover(name: str, rows: np.ndarray) -> None:
    ends = np.concatenate(([0], rows[:-1, 1]))  # of what comes before each
    if len(wrong := np.flatnonzero(rows[:, 0] != ends)):
        start, _, rank = rows[wrong[0]].tolist()
        end = int(ends[wrong[0]])
        what = "overlap" if start < end else "leave a gap"
        raise Damaged(f"{rank_file(rank)}: the slices of {name} {what} at element {min(start, end)}")


def _side_by_side(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Reads in the order of a file, in groups of one kind that follow one another there and fill a piece at most."""
    group: list[_Read] = []
    end, kind, room = -1, "", 0
    for position, name, target in reads:
        size = target.numel() * target.element_size()
        if group and (position != end or name.split("/")[0] != kind or size > room):
            yield group
            group = []
        if not group:
            kind, room = name.split("/")[0], PIECE
        group.append((position, name, target))
        end, room = position + size, room - size
    if group:
        yield group


def _fault(name: str, values: Tensor) -> str | None:
    """What is wrong with numbers of a kind."""
    if values.is_floating_point():
        least, most = (float(bound) for bound in torch.aminmax(values))
        if not (-torch.inf < least and most < torch.inf):
            return "values that are not finite"
        if least < 0 and name.startswith(_NOT_NEGATIVE):
            return "values below zero"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
