"""Shards of random rows, of any shape and number, that the engine reads as any other."""

from pathlib import Path

import torch

from engine.data.format.index import Field, Index, ShardEntry
from engine.data.format.shard import shard_name, write_shard
from engine.files import digest, digest_of

SHARD = 8192  # records of a shard


def write_shards(directory: Path, records: int, family: str, fields: dict[str, Field]) -> None:
    """Shards of `records` records with an image and, where fields are a caption's, a caption each, whose rows are random."""
    entries: list[ShardEntry] = []
    captioned = any(field.per == "caption" for field in fields.values())
    for first in range(0, records, SHARD):
        count = min(SHARD, records - first)
        numbers = torch.arange(first, first + count)
        offsets = torch.arange(count + 1)
        rows = {name: torch.randn(count, *field.shape).to(field.dtype) for name, field in fields.items()}
        described = {
            "source": numbers, "image_offsets": offsets, "caption_offsets": offsets.clone() * captioned,
            "caption_numbers": numbers.clone() if captioned else numbers[:0].clone(),
        }  # fmt: skip
        path = directory / shard_name(len(entries))
        counts = {"records": count, "image_rows": count, "caption_rows": count * captioned}
        said = {"captions": [""] * count * captioned, "refused": [], "fingerprint": digest_of({})}
        write_shard(path, rows | described, counts | said)
        entries.append(ShardEntry(file=path.name, bytes=path.stat().st_size, sha256=digest(path), **counts))
    Index(family, digest_of({}), {}, {}, fields, entries, []).write(directory)
