"""Streams: sets of records that share a shape and a role, from which the slots of a training are filled."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from engine.data.format.reader import Shards
from engine.data.samples.held_out import Split
from engine.data.samples.order import Order, Units

Shape = tuple[tuple[str, tuple[int, ...]], ...]  # of a record: of each of its fields


def shape_of(shards: Shards) -> Shape:
    return tuple((name, field.shape) for name, field in shards.fields.items())


@dataclass(frozen=True)
class Stream:
    """One set of records.

    order: of its records, over an endless sequence of its own.
    share: of the units, relative to the other streams'.
    data_set, bucket: as its part has them.
    split: what is held out of its shards; None for nothing.
    """

    shards: Shards
    order: Order
    share: int | Fraction = 1
    data_set: str = ""
    bucket: str | None = None
    split: Split | None = None

    @property
    def name(self) -> str:
        """As messages have it: dogs, 640x384 or dogs/640x384; "" for a single one."""
        return "/".join(filter(None, (self.data_set, self.bucket)))

    @property
    def records(self) -> int:
        """How many are trained on."""
        return len(self.shards) if self.split is None else int(self.split.trained.sum())


@dataclass(frozen=True)
class Streams:
    """All streams of a run.

    unit: how many slots that follow each other belong to one stream.
    """

    seed: int = 0
    streams: Sequence[Stream] = ()
    unit: int = 1

    @property
    def data_sets(self) -> list[str]:
        """Their names, in the order of the streams."""
        return list(dict.fromkeys(stream.data_set for stream in self.streams))

    @functools.cached_property
    def shapes(self) -> dict[Shape, Fraction]:
        """The shapes of records, and which part of the units each has."""
        total = sum(stream.share for stream in self.streams)
        found: dict[Shape, Fraction] = {}
        for stream in self.streams:
            shape = shape_of(stream.shards)
            found[shape] = found.get(shape, Fraction(0)) + Fraction(stream.share) / total
        return found

    @functools.cached_property
    def data_set_numbers(self) -> Tensor:
        """Of each stream the place of its data set in `data_sets`: int64 [S]."""
        return torch.tensor([self.data_sets.index(stream.data_set) for stream in self.streams])

    def find(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The stream of each slot [B] and the record in it: int64 [B] each."""
        if len(self.streams) == 1:
            return torch.zeros_like(slots), self.streams[0].order(slots)
        numbers = slots.numpy()
        units, where = np.unique(numbers // self.unit, return_inverse=True)
        found, before = (each[where] for each in self._units.find(units))
        own = torch.from_numpy(before * self.unit + numbers % self.unit)  # slots of the streams' own sequences
        streams, records = torch.from_numpy(found), torch.empty_like(slots)
        for number in np.unique(found).tolist():
            here = streams == number
            records[here] = self.streams[number].order(own[here])
        return streams, records

    @functools.cached_property
    def _units(self) -> Units:
        return Units(self.seed, [stream.share for stream in self.streams])

    def close(self) -> None:
        """Ends what their shards are fetching."""
        for stream in self.streams:
            stream.shards.close()
