"""Which sample lies in which shard.

A sample gets a number when it is first seen, and keeps it: those of the first build are numbered as the source has them, those
that come later from the last number on. A shard covers a block of numbers; a sample that is gone leaves a gap in its block.

Nothing here grows with the samples of a file: rows of a table that lie in one file, under consecutive numbers, are one run.
"""

import functools
import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash

from engine.data.format.index import SAMPLES
from engine.files import write_atomically
from engine.tensors import TensorFile, bytes_of, header_of

# Consecutive samples of a file, from `offset` in it on: the file's stamp, the number of the first, and how many they are.
RUN = np.dtype([("stamp", np.uint64), ("offset", np.int64), ("first", np.int64), ("count", np.int64)])
# A range of numbers, and the shard that covers it, by the number in its name.
BLOCK = np.dtype([("first_sample", np.int64), ("samples", np.int64), ("number", np.int64)])
UNNUMBERED = -1  # in the place of a number
_MOST = 2**40


@dataclass(frozen=True)
class Plan:
    """The numbers of a source's samples, and the blocks of its shards.

    runs: of dtype `RUN`, one after another as the source has its samples.
    blocks: of dtype `BLOCK`, in the order of their numbers; each has a sample.
    again: int64 [samples], the numbers of those to be tried again: they were refused for what may be over.
    """

    runs: np.ndarray
    blocks: np.ndarray
    again: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @functools.cached_property
    def by_number(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The first number of each run, that behind its last, its place in the source, and how many samples have smaller
        numbers, in the order of numbers."""
        order = np.argsort(self.runs["first"], kind="stable")
        places = np.cumsum(self.runs["count"]) - self.runs["count"]
        firsts, counts = self.runs["first"][order], self.runs["count"][order]
        return firsts, firsts + counts, places[order], np.cumsum(counts) - counts

    def samples(self, block: np.void) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a block's samples, increasing, and their places in the source: int64 [samples] each."""
        firsts, ends, places, _ = self.by_number
        begin, end = block["first_sample"], block["first_sample"] + block["samples"]
        part = slice(np.searchsorted(ends, begin, side="right"), np.searchsorted(firsts, end))
        starts, stops = np.maximum(firsts[part], begin), np.minimum(ends[part], end)
        lengths = stops - starts
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return within + np.repeat(starts, lengths), within + np.repeat(places[part] + starts - firsts[part], lengths)

    def counts(self, blocks: np.ndarray) -> np.ndarray:
        """How many samples blocks have: int64 [blocks]."""
        return self._below(blocks["first_sample"] + blocks["samples"]) - self._below(blocks["first_sample"])

    def _below(self, numbers: np.ndarray) -> np.ndarray:
        """How many samples have smaller numbers."""
        firsts, ends, _, before = self.by_number
        if not len(firsts):
            return np.zeros(len(numbers), np.int64)
        run = np.searchsorted(firsts, numbers, side="right") - 1
        return np.where(run < 0, 0, before[run] + np.minimum(numbers, ends[run]) - firsts[run])

    def is_of(self, stamps: np.ndarray, counts: np.ndarray) -> bool:
        """Whether it is a plan of these files, in this order."""
        runs = known(self.runs, stamps, counts)
        return len(runs) == len(self.runs) and bool((runs["first"] == self.runs["first"]).all())

    def equals(self, other: "Plan | None") -> bool:
        return other is not None and np.array_equal(self.runs, other.runs) and np.array_equal(self.blocks, other.blocks)

    def write(self, directory: Path, recipe: str, *indexes: str | None) -> None:
        """Leaves the plan with the shards.

        Args:
            recipe: of the shards.
            indexes: the fingerprints of those that it goes with, before and after the shards of the plan are complete.
        """
        arrays = {
            f"{kind}.{name}": torch.from_numpy(table[name].view(np.int64).copy())
            for kind, table in (("runs", self.runs), ("blocks", self.blocks))
            for name in table.dtype.names or ()
        }
        arrays["again"] = torch.from_numpy(self.again)
        content = [bytes_of(array).numpy().tobytes() for array in arrays.values()]
        said = {"recipe": recipe, "indexes": [*filter(None, indexes)], "check": _check_of(content)}
        content.insert(0, header_of(arrays, {"engine": json.dumps(said)})[0])

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(content)

        write_atomically(directory / SAMPLES, write)


def read_plan(directory: Path, recipe: str, index: str | None) -> Plan | None:
    """The plan that a build left with its shards, if it is there and whole, of the same recipe and with the index there is."""
    try:
        file = TensorFile(directory / SAMPLES)
        if file.metadata["recipe"] != recipe or (index and index not in file.metadata["indexes"]):
            return None
        arrays = {name: file.tensor(name).numpy() for name in file.header}
        if file.metadata["check"] != _check_of([array.tobytes() for array in arrays.values()]):
            return None
        again, tables = arrays["again"].astype(np.int64), []
        for kind, dtype in (("runs", RUN), ("blocks", BLOCK)):
            columns = {name: arrays[f"{kind}.{name}"] for name in dtype.names or ()}
            table = np.zeros(len(next(iter(columns.values()))), dtype)
            for name, column in columns.items():
                table[name] = column.view(dtype[name])
            tables.append(table)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # it only saves work
    runs, blocks = tables
    limits = [(runs[name], least) for name, least in (("offset", 0), ("first", 0), ("count", 1))]
    limits += [(blocks[name], least) for name, least in (("first_sample", 0), ("samples", 1), ("number", 0))]
    if any(len(column) and (column.min() < least or column.max() > _MOST) for column, least in limits):
        return None
    if _overlap(runs["first"], runs["count"]) or len(beside(blocks[:0], blocks)) < len(blocks):
        return None
    return Plan(runs, blocks, again)


def begun_with(directory: Path) -> str | None:
    """The recipe of the plan that a build left."""
    try:
        return TensorFile(directory / SAMPLES).metadata["recipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_of(content: list[bytes]) -> str:
    total = xxhash.xxh3_64()
    for piece in content:
        total.update(piece)
    return total.hexdigest()


def known(before: np.ndarray, stamps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The runs of files, by their stamps and how many samples each has: those of `before`, and of a file that is not among
    these one whose first number is unknown."""
    before = before[np.lexsort((before["offset"], before["stamp"]))]
    low, high = (np.searchsorted(before["stamp"], stamps, side=side) for side in ("left", "right"))
    ends = np.cumsum(np.append(0, before["count"]))
    same = (ends[high] - ends[low] == counts) & (high > low)
    pieces = np.where(same, high - low, counts > 0)
    file = np.repeat(np.arange(len(stamps)), pieces)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    runs = np.zeros(len(file), RUN)
    runs["stamp"], runs["count"], runs["first"] = stamps[file], counts[file], UNNUMBERED
    runs[same[file]] = before[(low[file] + within)[same[file]]]
    return runs


def without_numbers(runs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Runs in which samples of these numbers have none."""
    numbers = np.unique(numbers)
    low, high = (np.searchsorted(numbers, end) for end in (runs["first"], runs["first"] + runs["count"]))
    pieces, last = [], 0
    for place in np.flatnonzero(low < high).tolist():
        stamp, offset, first, count = runs[place].item()
        of_it = numbers[low[place] : high[place]].tolist()
        starts = sorted({first, *of_it, *(number + 1 for number in of_it)} - {first + count})
        cut = [
            (stamp, offset + start - first, UNNUMBERED if start in of_it else start, end - start)
            for start, end in itertools.pairwise([*starts, first + count])
        ]
        pieces += [runs[last:place], np.array(cut, RUN)]
        last = place + 1
    return np.concatenate([*pieces, runs[last:]])


def place_of(number: int, runs: np.ndarray) -> int | None:
    """Where in the source the sample of a number is, by runs of all that it has; None where they do not say."""
    found = np.flatnonzero((runs["first"] >= 0) & (runs["first"] <= number) & (number < runs["first"] + runs["count"]))
    return int(runs["count"][: found[0]].sum() + number - runs["first"][found[0]]) if len(found) else None


def recognised(runs: np.ndarray, contents: Iterator[bytes], numbers: dict[bytes, list[int]]) -> np.ndarray:
    """Runs in which samples without a number have one by their content.

    Args:
        contents: digests of the contents of those samples, in order.
        numbers: content -> the numbers under which there are shards of it; those that are taken are removed.
    """
    found: list[tuple[int, int, int, int]] = []
    for run in runs:
        if run["first"] != UNNUMBERED:
            found.append(run.item())
            continue
        stamp, first_offset, _, count = run.item()
        begins = len(found)
        for offset in range(first_offset, first_offset + count):
            digest = next(contents)
            number = numbers[digest].pop(0) if numbers.get(digest) else UNNUMBERED
            last = found[-1] if len(found) > begins else None
            if last and number == (UNNUMBERED if last[2] == UNNUMBERED else last[2] + last[3]):
                found[-1] = (*last[:3], last[3] + 1)
            else:
                found.append((stamp, offset, number, 1))
    return np.array(found, RUN)


def planned(runs: np.ndarray, blocks: np.ndarray, records: int, taken: Collection[int] = ()) -> Plan:
    """The plan of runs of which some have numbers, and of blocks that are there: further samples are numbered from the last on,
    and numbers that no block covers get blocks of `records`, each where it belongs.

    Args:
        taken: numbers that no new block may have, beside those of the blocks, also of such as have no sample any more: an index
            may name their shards.
    """
    runs = runs.copy()
    new = runs["first"] == UNNUMBERED
    ends = [int((table[name] + table[count]).max()) for table, name, count in (
        (blocks, "first_sample", "samples"), (runs[~new], "first", "count")) if len(table)]  # fmt: skip
    runs["first"][new] = max(ends, default=0) + np.cumsum(runs["count"][new]) - runs["count"][new]
    end = int((runs["first"] + runs["count"]).max()) if len(runs) else 0
    added = [
        np.stack([begins, np.minimum(stop - begins, records)], 1)
        for start, stop in _gaps(blocks, ends=[*ends, end])
        if len(begins := np.arange(start, stop, records))
    ]
    whole = np.zeros(len(blocks) + sum(map(len, added)), BLOCK)
    whole[: len(blocks)] = blocks
    if added:
        whole["first_sample"][len(blocks) :], whole["samples"][len(blocks) :] = np.concatenate(added).T
    whole["number"][len(blocks) :] = UNNUMBERED
    whole = whole[np.argsort(whole["first_sample"], kind="stable")]
    whole = whole[Plan(runs, whole).counts(whole) > 0]
    return Plan(runs, _numbered(whole, {*taken, *blocks["number"].tolist()}))


def _gaps(blocks: np.ndarray, ends: list[int]) -> list[tuple[int, int]]:
    """Ranges of numbers that no block covers, up to the last of `ends`; divided where all numbers ended before."""
    starts = np.append(blocks["first_sample"], max(ends))
    stops = np.append(0, blocks["first_sample"] + blocks["samples"])
    gaps = []
    for start, stop in zip(stops.tolist(), starts.tolist(), strict=True):
        bounds = [start, *sorted(end for end in {*ends} if start < end < stop), stop]
        gaps += [(one, other) for one, other in itertools.pairwise(bounds) if one < other]
    return gaps


def _numbered(blocks: np.ndarray, taken: set[int]) -> np.ndarray:
    """Blocks of which every one has a number for the name of its shard: that behind the one before it where it is free."""
    last = max(taken, default=UNNUMBERED)
    unnamed = np.flatnonzero(blocks["number"] == UNNUMBERED)
    if len(unnamed) and unnamed[0] == len(blocks) - len(unnamed):  # all of them behind the others
        blocks["number"][unnamed] = np.arange(len(unnamed)) + last + 1
        return blocks
    for place in unnamed.tolist():
        number = int(blocks["number"][place - 1]) + 1 if place else 0
        if number in taken:
            number = last = last + 1
        blocks["number"][place] = number
        taken.add(number)
        last = max(last, number)
    return blocks


def _overlap(firsts: np.ndarray, counts: np.ndarray) -> bool:
    order = np.argsort(firsts, kind="stable")
    return bool(((firsts + counts)[order][:-1] > firsts[order][1:]).any())


def beside(blocks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Blocks and, of others, those that neither overlap one of them or before them nor have its number, in order."""
    starts, stops = blocks["first_sample"], blocks["first_sample"] + blocks["samples"]
    taken, kept, end = set(blocks["number"].tolist()), [], 0
    for block in np.sort(others, order="first_sample"):
        first, number = int(block["first_sample"]), int(block["number"])
        stop = first + int(block["samples"])
        place = int(np.searchsorted(starts, stop))
        if first >= end and number not in taken and not (place and stops[place - 1] > first):
            kept.append(block)
            taken.add(number)
            end = stop
    together = np.concatenate([blocks, np.array(kept, BLOCK)])
    return together[np.argsort(together["first_sample"], kind="stable")]
