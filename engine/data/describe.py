"""What shards hold, for a person: a summary in words, and a contact sheet of decoded records."""

import bisect
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from engine.catalogue import FAMILIES
from engine.config.command_line import load
from engine.config.options import CacheConfig
from engine.data.format.index import INDEX, Index
from engine.data.format.shard import Shards, open_shard
from engine.data.report import by_reason
from engine.data.sources import open_source
from engine.errors import UserError, printable
from engine.files import reading
from engine.picture import labelled_grid

if TYPE_CHECKING:  # the libraries of the models take seconds, and a summary needs none
    from engine.models.encoder import Encoding

DATA = ("dataset_name", "dataset_config_name", "train_data_dir", "cache_dir")  # options that name a data set


def summary(directory: Path, index: Index) -> str:
    """What an index says, for a person."""
    size = sum(shard.bytes for shard in index.shards)
    lines = [
        f"shards         {directory} ({len(index.shards)} files, {size / 2**20:.1f} MiB)",
        f"family         {index.family}",
        f"records        {index.records}",
        f"image rows     {sum(shard.image_rows for shard in index.shards)}",
        f"captions       {sum(shard.caption_rows for shard in index.shards)} distinct",
        f"refused        {len(index.refused)}",
    ]
    lines += [f"  {len(items):6d}       {reason}" for reason, items in by_reason(index.refused).items()]
    for name, field in index.fields.items():
        shape = " x ".join(map(str, field.shape))
        lines.append(f"field          {name}: {shape} {str(field.dtype).removeprefix('torch.')} per {field.per}")
    lines.append(f"fingerprint    {index.fingerprint}")
    return "\n".join(map(printable, lines))


def describe_record(directory: Path, index: Index, record: int, given: dict[str, str]) -> str:
    """Where a record lies, and what it came from; with the data set the name of its file.

    Args:
        given: options that name the data set.

    Raises:
        UserError: there is no such record.
    """
    if record >= index.records:
        raise UserError(f"{directory}: no record {record}; the last is {index.records - 1}")
    ends = list(itertools.accumulate(shard.records for shard in index.shards))
    number = bisect.bisect_right(ends, record)
    entry = index.shards[number]
    row = record - (ends[number] - entry.records)
    shard = open_shard(directory, index, number)
    sample = int(shard.source[row])
    first, end = shard.caption_offsets[row : row + 2].tolist()
    first_image, end_image = shard.image_offsets[row : row + 2].tolist()
    lines = [
        f"record         {record}",
        f"shard          {entry.file}, image rows {first_image} to {end_image - 1}",
        f"sample         {sample} of the data set",
        f"file           {_file_of(directory, index, sample, given)}",
    ]
    texts = _captions(directory, index, shard.caption_numbers[first:end].tolist())
    return "\n".join(map(printable, [*lines, *(f"caption        {text!r}" for text in texts)]))


def _file_of(directory: Path, index: Index, sample: int, given: dict[str, str]) -> str:
    """The file of a sample in the data set that is given; an index may name any place, which is not opened."""
    if not given.keys() & {"dataset_name", "train_data_dir"}:
        return "give the data set to name it: --train_data_dir or --dataset_name"
    try:
        with reading(directory / INDEX, "build the shards again"):
            built = {name: value for name, value in index.config.items() if name not in DATA}
            config = load(CacheConfig, built | given, str(directory / INDEX))
            source = open_source(config, FAMILIES[config.family].captioned)
    except UserError as error:
        return f"unknown: {error}"
    changed = "" if source.identity() == index.identity.get("source") else " (of a data set that has changed since)"
    return (
        f"{source.name(sample)} of {config.data}{changed}"
        if sample < len(source)
        else "unknown: the data set has changed since"
    )


def _captions(directory: Path, index: Index, numbers: list[int]) -> list[str]:
    ends = index.caption_ends
    places = [(bisect.bisect_right(ends, number), number) for number in numbers]
    texts = {shard: open_shard(directory, index, shard).said.captions for shard in {shard for shard, _ in places}}
    return [texts[shard][number - ends[shard]] for shard, number in places]  # counted from the shard's end


def contact_sheet(directory: Path, index: Index, encoding: "Encoding", count: int) -> Image.Image:
    """Records spread evenly over the shards, decoded, each under its caption."""
    if index.fields != encoding.record_spec:
        raise UserError(
            f"{directory / INDEX}: the shards hold other records than these models make; give those that built them"
        )
    shards = Shards(directory)
    count = min(count, len(shards))
    records = torch.linspace(0, len(shards) - 1, count).round().long()
    rows = shards.rows_of(records)
    latents = torch.empty(count, *index.fields[encoding.mean].shape, dtype=index.fields[encoding.mean].dtype)
    shards.gather(encoding.mean, rows["image"], latents)
    texts = [text for shard in range(len(index.shards)) for text in open_shard(directory, index, shard).said.captions]
    labels = [texts[number] for number in rows["caption"].tolist()] if "caption" in rows else [f"{r}" for r in records]
    images = encoding.decode(latents)
    by_label: dict[str, list] = {}
    for label, image in zip(labels, images, strict=True):
        by_label.setdefault(label, []).append(image)
    return labelled_grid(list(by_label.items()))
