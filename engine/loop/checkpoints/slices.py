"""The slices of a checkpoint: which elements of which parameter lie where, checked before and while they are read."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError, blame_the_machine, first_line
from engine.loop.checkpoints.names import rank_file
from engine.loop.weights.partition import Slice
from engine.tensors import DTYPES, PIECE, TensorFile

_FP32 = ("weight", "ema")  # kinds that are never anything else
_NOT_NEGATIVE = ("exp_avg_sq",)
_OF_EVERY_PROCESS = {"metrics/loss_sum", "random/cpu"}
_SLICE = re.compile(r"([A-Za-z0-9_]+)/([^/@]+)@(0|[1-9][0-9]{0,17})")
_OTHER = re.compile(r"optimizer/([0-9]+/)?[A-Za-z0-9_]+|metrics/loss_sum|random/(cpu|cuda)")


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
class Place:
    """Where elements `start` to `stop` of a parameter lie: in a tensor of a file."""

    start: int
    stop: int
    file: TensorFile
    name: str


class SliceFiles:
    """The slices of a checkpoint's files, by kind and parameter; of each kind they cover every parameter exactly once.

    files: by rank.
    places: kind -> parameter -> where its elements lie, from the first to the last.

    Raises:
        Damaged: a file cannot be read, or the slices do not fit together.
    """

    def __init__(self, checkpoint: Path, world: int) -> None:
        self.files: list[TensorFile] = []
        self.places: dict[str, dict[str, list[Place]]] = {}
        for rank in range(world):
            path = checkpoint / rank_file(rank)
            with damage(path):
                file = TensorFile(path)
                for name in file.header:
                    self._add(file, name)
                self.files.append(file)
        for file in self.files:
            if file.header.keys() & _OF_EVERY_PROCESS != _OF_EVERY_PROCESS or self._others(file) != self._others(self.files[0]):
                raise Damaged(f"{file.path.name}: does not hold the state that every process has")
        for kind, parameters in self.places.items():
            for parameter, places in parameters.items():
                places.sort(key=lambda place: (place.start, place.stop))
                _check_cover(f"{kind}/{parameter}", places)
        self.sizes = {parameter: places[-1].stop for parameter, places in self.places.get("weight", {}).items()}
        if not self.sizes:
            raise Damaged("it holds no weights")
        for kind, parameters in self.places.items():
            self._compare({parameter: places[-1].stop for parameter, places in parameters.items()}, kind, "weight")

    def _add(self, file: TensorFile, name: str) -> None:
        match, shape = _SLICE.fullmatch(name), file.header[name]["shape"]
        kind, parameter, start = match.groups() if match else ("", "", "")
        if kind in ("optimizer", "metrics", "random") or not (match or _OTHER.fullmatch(name)):
            raise ValueError(f"{name} is no name of a slice")
        if match:
            if len(shape) != 1 or (kind in _FP32 and file.header[name]["dtype"] != "F32"):
                raise ValueError(f"{name} is {file.header[name]['dtype']} {shape}, and not a row of numbers in fp32")
            place = Place(int(start), int(start) + shape[0], file, name)
            self.places.setdefault(kind, {}).setdefault(parameter, []).append(place)

    @staticmethod
    def _others(file: TensorFile) -> set[str]:
        """The names of the optimizer's state that has no place within a parameter."""
        return {name for name in file.header if name.startswith("optimizer/")}

    def check_state(self, kinds: Collection[str], others: Collection[str]) -> None:
        """Refuses state of another optimizer; a moving average may end here.

        Args:
            kinds: of the state that is laid out as the weights; `others`: the names of what else there is of the optimizer.

        Raises:
            Damaged: there is state that this one has not.
        """
        if unknown := sorted({*self.places, *self._others(self.files[0])} - {*kinds, *others, "ema"}):
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
        buffers: dict[torch.dtype, Tensor] = {}
        for file in self.files:
            for name, described in file.header.items():
                dtype = DTYPES[described["dtype"]]
                if not dtype.is_floating_point:
                    continue
                buffer = buffers.setdefault(dtype, torch.empty(PIECE // dtype.itemsize, dtype=dtype))
                size = file.elements(name)
                for first in range(0, size, len(buffer)):
                    _read(file, name, first, buffer[: min(len(buffer), size - first)])
            generator_state(file)

    @property
    def kinds(self) -> list[str]:
        return sorted(self.places)

    def elements(self, kind: str) -> int:
        """How many numbers of a kind the files hold."""
        return sum(places[-1].stop for places in self.places[kind].values())

    def fill_parameter(self, kind: str, name: str, parameter: Tensor) -> None:
        """Copies a whole parameter from whichever files hold its pieces; it must be contiguous."""
        self.fill(kind, Slice(name, parameter.shape, 0, parameter.numel(), 0, 0), parameter.detach().view(-1))

    def fill(self, kind: str, piece: Slice, target: Tensor) -> None:
        """Copies the elements of a slice from whichever files hold them.

        Raises:
            Damaged: they are not there, are of another dtype, or are not finite.
        """
        filled = 0
        for place in self.places.get(kind, {}).get(piece.name, []):
            first, last = max(place.start, piece.start), min(place.stop, piece.start + piece.length)
            if first < last:
                stored = place.file.header[place.name]["dtype"]
                if DTYPES[stored] != target.dtype:
                    raise Damaged(f"{place.file.path.name}: {place.name} is {stored}, and not {target.dtype}")
                _read(place.file, place.name, first - place.start, target[first - piece.start : last - piece.start])
                filled += last - first
        if filled != piece.length:
            raise Damaged(
                f"holds {filled} of {piece.length} elements of {kind}/{piece.name}; was it trained with the same model and "
                "options?"
            )


def generator_state(file: TensorFile) -> Tensor:
    """The state of torch's generator on the host.

    Raises:
        Damaged: it is none.
    """
    with damage(file.path):
        state = file.tensor("random/cpu")
        torch.Generator().set_state(state)
    return state


def _check_cover(name: str, places: list[Place]) -> None:
    end = 0
    for place in places:
        if place.start != end:
            what = "overlap" if place.start < end else "leave a gap"
            raise Damaged(f"{place.file.path.name}: the slices of {name} {what} at element {min(place.start, end)}")
        end = place.stop


def _read(file: TensorFile, name: str, first: int, target: Tensor) -> None:
    """Copies elements of a tensor, and looks at each piece while it is near."""
    size = PIECE // target.element_size()
    for start in range(0, target.numel(), size):
        piece = target[start : start + size]
        with damage(file.path):
            file.read(name, first + start, piece)
        if piece.is_floating_point():
            least, most = (float(bound) for bound in torch.aminmax(piece))
            if not (-torch.inf < least and most < torch.inf):
                raise Damaged(f"{file.path.name}: {name.split('@')[0]} holds values that are not finite")
            if least < 0 and name.startswith(_NOT_NEGATIVE):
                raise Damaged(f"{file.path.name}: {name.split('@')[0]} holds values below zero")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
