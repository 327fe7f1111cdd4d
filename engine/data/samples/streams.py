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
from engine.data.samples.order import Order, Units, seed_of_stream

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
    loss_weight: what the losses of its samples are multiplied by.
    weighs_alike: its losses are weighed alike at all timesteps, whatever the objective says.
    """

    shards: Shards
    order: Order
    share: int | Fraction = 1
    data_set: str = ""
    bucket: str | None = None
    split: Split | None = None
    loss_weight: float = 1.0
    weighs_alike: bool = False

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
    in_turn: units are of one data set after another, in turn; else as the shares have it, which then are of the units of a
        data set.
    """

    seed: int = 0
    streams: Sequence[Stream] = ()
    unit: int = 1
    in_turn: bool = False

    @property
    def data_sets(self) -> list[str]:
        """Their names, in the order of the streams."""
        return list(dict.fromkeys(stream.data_set for stream in self.streams))

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of each data set what the losses of its samples are multiplied by."""
        return {stream.data_set: stream.loss_weight for stream in self.streams}

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
        found, before = (each[where] for each in self._find(units))
        own = torch.from_numpy(before * self.unit + numbers % self.unit)  # slots of the streams' own sequences
        streams, records = torch.from_numpy(found), torch.empty_like(slots)
        for number in np.unique(found).tolist():
            here = streams == number
            records[here] = self.streams[number].order(own[here])
        return streams, records

    def _find(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each unit [N], and how many units of that stream come before it: int64 [N] each."""
        streams, before = np.empty_like(units), np.empty_like(units)
        for turn, (members, order) in enumerate(self._turns):
            here = units % len(self._turns) == turn
            found, before[here] = order.find(units[here] // len(self._turns))
            streams[here] = members[found]
        return streams, before

    @functools.cached_property
    def _turns(self) -> list[tuple[np.ndarray, Units]]:
        """The numbers of the streams that share every n-th of n units, and the order of theirs."""
        numbers = [self.data_sets.index(stream.data_set) if self.in_turn else 0 for stream in self.streams]
        turns = []
        for turn in range(max(numbers) + 1):
            members = np.flatnonzero(np.array(numbers) == turn)
            shares = [self.streams[number].share for number in members.tolist()]
            turns.append((members, Units(seed_of_stream(self.seed, turn), shares)))
        return turns

    def close(self) -> None:
        """Ends what their shards are fetching."""
        for stream in self.streams:
            stream.shards.close()
