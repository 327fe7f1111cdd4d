"""What shards hold, for a person: a summary in words, and a contact sheet of decoded records."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from engine.catalogue import FAMILIES
from engine.config.command_line import load
from engine.config.options import CacheConfig
from engine.data.format.buckets import Buckets, is_bucketed, size_named
from engine.data.format.index import BUCKETS, INDEX, Index, add_refused
from engine.data.format.reader import Shards
from engine.data.format.shard import open_shard
from engine.data.identity import without_source
from engine.data.plan import known, place_of, read_plan
from engine.data.report import by_count
from engine.data.sources import open_source
from engine.data.sources.interface import Source
from engine.errors import UserError, printable
from engine.files import digest_of, reading
from engine.picture import labelled_grid

if TYPE_CHECKING:  # the libraries of the models take seconds, and a summary needs none
    from engine.models.encoder import Encoding

DATA = ("dataset_name", "dataset_config_name", "train_data_dir", "cache_dir")  # options that name a data set


def summary(directory: Path, indexes: dict[str, Index]) -> str:
    """What the indexes of a directory say, for a person.

    Args:
        indexes: as `read_indexes` gives them.
    """
    first, *others = indexes.values()

    def total(name: str) -> int:
        return sum(index.total(name) for index in indexes.values())

    refused = add_refused(index.refused for index in indexes.values())
    lines = [
        f"shards         {directory} ({sum(len(index.shards) for index in indexes.values())} files, "
        f"{total('bytes') / 2**20:.1f} MiB)",
        f"family         {first.family}",
        f"records        {total('records')}",
        f"image rows     {total('image_rows')}",
        f"captions       {total('caption_rows')}",
        f"refused        {sum(refusals.count for refusals in refused.values())}",
    ]
    lines += [f"  {refusals.count:6d}       {reason}" for reason, refusals in by_count(refused)]
    for name, field in first.fields.items():
        shapes = zip(*(index.fields[name].shape for index in (first, *others)), strict=True)
        shape = " x ".join(str(sides[0]) if len({*sides}) == 1 else "*" for sides in shapes)
        lines.append(f"field          {name}: {shape} {str(field.dtype).removeprefix('torch.')} per {field.per}")
    if is_bucketed(directory):
        lines += table_of_buckets(Buckets.read(directory / BUCKETS))
    lines += [f"fingerprint    {index.fingerprint}{f' ({name})' * bool(name)}" for name, index in indexes.items()]
    return "\n".join(map(printable, lines))


def table_of_buckets(buckets: Buckets) -> list[str]:
    """How many images every bucket has, and how much of them is cropped away on average."""
    images = sum(bucket.images for bucket in buckets.buckets)
    return [
        f"bucket         {bucket.name:>11} {bucket.images:9d} images {bucket.images / images:7.2%} "
        f"{bucket.cropped:7.2%} cropped away"
        for bucket in buckets.buckets
    ]


def describe_record(directory: Path, indexes: dict[str, Index], number: int, given: dict[str, str]) -> str:
    """Where a record lies, and what it came from.

    Args:
        number: counted on from bucket to bucket.
        given: options that name the data set.

    Raises:
        UserError: there is no such record.
    """
    record = number
    for name, index in indexes.items():
        if record < index.records:
            return _describe_record(directory / name, index, record, given)
        record -= index.records
    raise UserError(f"{directory}: no record {number}; the last is {number - record - 1}")


def _describe_record(directory: Path, index: Index, record: int, given: dict[str, str]) -> str:
    place = Shards(directory).find(torch.tensor([record]))
    number = int(place.shards[0])
    row = record - index.shards["records"][:number].sum()
    shard = open_shard(directory, index, number)
    sample, name = int(shard.numbers["source"][row]), shard.text("names", row)
    images = shard.image_rows(row)
    lines = [
        f"record         {record}",
        f"shard          {shard.path.name}, image rows {images.start} to {images.stop - 1}",
        f"sample         {sample} of the data set",
        f"file           {_file_of(directory, index, sample, name, given)}",
    ]
    texts = [shard.text("caption_texts", caption) for caption in shard.caption_rows(row)]
    return "\n".join(map(printable, [*lines, *(f"caption        {text!r}" for text in texts)]))


def list_refused(directory: Path, indexes: dict[str, Index]) -> Iterator[str]:
    """Every refused sample with the reason, in the order of the data set, or of that within each bucket."""
    for name, index in indexes.items():
        for number in range(len(index.shards)):
            for item in open_shard(directory / name, index, number).refused:
                detail = f": {item['detail']}" if "detail" in item else ""
                yield printable(f"{item['source']}: {item['reason']}{detail}")


def _file_of(directory: Path, index: Index, sample: int, name: str, given: dict[str, str]) -> str:
    """The file of a sample in the data set that is given, else its name in the shards; an index may name any place, which is
    not opened."""
    if not given.keys() & {"dataset_name", "train_data_dir"}:
        return name or "give the data set to name it: --train_data_dir or --dataset_name"
    try:
        config, source = open_as_built(directory, index.config, given)
    except UserError as error:
        return f"unknown: {error}"
    place = None
    if plan := read_plan(directory, digest_of(without_source(index.identity)), index.fingerprint):
        place = place_of(sample, known(plan.runs, *source.stamps()))
    elif source.identity() == index.identity.get("source"):
        place = sample
    if place is not None and place < len(source):
        return f"{source.name(place)} of {config.source}"
    return f"{name} when it was encoded" if name else f"unknown: {config.source} has changed since, or is a copy"


def open_as_built(directory: Path, built: dict[str, Any], given: dict[str, str]) -> tuple[CacheConfig, Source]:
    """The data set that is given, opened with all other options as the index of a directory has them.

    Raises:
        UserError: it cannot be.
    """
    with reading(directory / INDEX, "build the shards again"):
        others = {key: value for key, value in built.items() if key not in DATA}
        config = load(CacheConfig, others | given, str(directory / INDEX))
        return config, open_source(config, FAMILIES[config.family].captioned)


def contact_sheet(directory: Path, indexes: dict[str, Index], encoding: "Encoding", count: int) -> Image.Image:
    """Records spread evenly over the shards of each bucket, decoded, each under its caption."""
    records = sum(index.records for index in indexes.values())
    rows: list[tuple[str, list[Image.Image]]] = []
    for name, index in indexes.items():
        if index.records:
            sized = encoding.of_size(*size_named(name)) if name else encoding
            rows += _drawn(directory / name, index, sized, max(1, round(count * index.records / records)))
    return labelled_grid(rows)


def _drawn(directory: Path, index: Index, encoding: "Encoding", count: int) -> list[tuple[str, list[Image.Image]]]:
    if index.fields != encoding.record_spec:
        raise UserError(
            f"{directory / INDEX}: the shards hold other records than these models make; give those that built them"
        )
    shards = Shards(directory)
    count = min(count, len(shards))
    records = torch.linspace(0, len(shards) - 1, count, dtype=torch.float64).round().long()
    places = shards.find(records)
    rows = shards.rows_of(places)
    latents = torch.empty(count, *index.fields[encoding.mean].shape, dtype=index.fields[encoding.mean].dtype)
    shards.gather(encoding.mean, rows, latents)
    opened = functools.lru_cache(1)(lambda number: open_shard(directory, index, number))  # records go from shard to shard
    labels = [f"{record}" for record in records]
    if "caption" in rows:
        captions = zip(places.shards.tolist(), rows["caption"].tolist(), strict=True)
        labels = [opened(shard).text("caption_texts", caption) for shard, caption in captions]
    images = encoding.decode(latents)
    if "mask" in index.fields:
        masks = torch.empty(count, *index.fields["mask"].shape, dtype=torch.uint8)
        shards.gather("mask", rows, masks)
        images = [_dimmed(image, mask[0]) for image, mask in zip(images, masks, strict=True)]
    by_label: dict[str, list] = {}
    for label, image in zip(labels, images, strict=True):
        by_label.setdefault(label, []).append(image)
    return list(by_label.items())


def _dimmed(image: Image.Image, mask: Tensor) -> Image.Image:
    """An image that is dark where its mask [h, w] is black."""
    weights = Image.fromarray(mask.numpy()).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, image.point(lambda value: value // 4), weights)
