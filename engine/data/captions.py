"""The captions of a data set: each distinct one is encoded once, and stored in the shard where it first appears."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.data.format.shard import write_shard
from engine.data.sources.interface import Refused, Source, refusing
from engine.models.encoder import Encoding
from engine.processes import Processes
from engine.tensors import TensorFile, read_header

_LONGEST = 10_000  # characters of what is listed of a refused sample, which may quote it


@dataclass(frozen=True)
class Captions:
    """Which captions every sample has, known before any image is read.

    numbers: per sample the numbers of its captions; none for a refused one.
    texts: the distinct captions in order of first appearance; a caption's number is its place here.
    first_of_shard: [shards + 1], the number of the first caption that each shard stores.
    refused: sample -> why it has none.
    """

    numbers: list[list[int]]
    texts: list[str]
    first_of_shard: list[int]
    refused: dict[int, Refused]

    @property
    def shards(self) -> int:
        return len(self.first_of_shard) - 1

    def texts_of(self, shard: int) -> list[str]:
        return self.texts[self.first_of_shard[shard] : self.first_of_shard[shard + 1]]


def number_captions(source: Source, shard_records: int, captioned: bool) -> Captions:
    """Every process comes to the same numbers on its own."""
    numbers: list[list[int]] = []
    first_of_shard, refused = [0], {}
    number_of: dict[str, int] = {}
    for sample in range(len(source)):
        try:
            with refusing("unreadable caption"):
                captions = source.captions(sample) if captioned else []
            numbers.append([number_of.setdefault(caption, len(number_of)) for caption in captions])
        except Refused as why:
            numbers.append([])
            refused[sample] = why
        if (sample + 1) % shard_records == 0 or sample + 1 == len(source):
            first_of_shard.append(len(number_of))
    return Captions(numbers, list(number_of), first_of_shard, refused)


def drop_unusable_captions(paths: list[Path], encoding: Encoding, source: Source, processes: Processes) -> None:
    """Takes captions that the encoder refused from all records, which may lie in other shards than the captions.

    Records that are left without one are refused. Doing it again changes nothing.
    """
    found = {key: why for path in paths for key, why in read_header(path)[1].get("unusable_captions", {}).items()}
    unusable = {int(key): Refused(*why) for part in processes.gather_objects(found) for key, why in part.items()}
    if not unusable:
        return
    for path in paths:
        file = TensorFile(path)
        metadata, tensors = file.metadata, {name: file.tensor(name) for name in file.header}
        numbers = [part.tolist() for part in tensors["caption_numbers"].tensor_split(tensors["caption_offsets"][1:-1])]
        usable = [[number for number in record if number not in unusable] for record in numbers]
        if usable == numbers:
            continue
        kept = torch.tensor([bool(record) for record in usable])
        variants = tensors["image_offsets"].diff()
        for name, spec in encoding.record_spec.items():
            if spec.per == "image":
                tensors[name] = tensors[name][kept.repeat_interleave(variants)]
        for sample, before in zip(tensors["source"][~kept].tolist(), itertools.compress(numbers, ~kept), strict=True):
            metadata["refused"].append(listed(source, sample, unusable[before[0]]))
        tensors |= {
            "source": tensors["source"][kept],
            "image_offsets": offsets_of(variants[kept].tolist()),
            "caption_offsets": offsets_of(len(record) for record in usable if record),
            "caption_numbers": torch.tensor([*itertools.chain(*usable)], dtype=torch.int64),
        }
        metadata |= {"records": len(tensors["source"]), "image_rows": int(tensors["image_offsets"][-1])}
        write_shard(path, tensors, metadata)


def offsets_of(lengths: Iterable[int]) -> Tensor:
    """Where ranges of these lengths begin when they lie one after another, and where the last one ends."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def listed(source: Source, sample: int, why: Refused) -> dict[str, str]:
    """A refused sample as the index lists it."""
    values = {"source": source.name(sample), "reason": why.reason} | ({"detail": why.detail} if why.detail else {})
    # Names of files are bytes, not text.
    return {key: value[:_LONGEST].encode(errors="backslashreplace").decode() for key, value in values.items()}
