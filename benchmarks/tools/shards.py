"""Shards of random rows, of any shape and number, that the engine reads as any other; and shards altered without a trace."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.data.format.index import ENTRY, Field, Index, shard_name
from engine.data.format.shard import Contents, Shard, entry_of, write_shard
from engine.files import digest_of

SHARD = 8192  # records of a shard


def write_shards(
    directory: Path,
    records: int,
    family: str,
    fields: dict[str, Field],
    size: int = SHARD,
    rows_of: Callable[[range], dict[str, Tensor]] | None = None,
) -> None:
    """Shards of `records` records with an image and, where fields are a caption's, a caption each.

    Args:
        size: records of a shard.
        rows_of: gives the rows of every field for such records; None for random ones.
    """
    entries = []
    captioned = any(field.per == "caption" for field in fields.values())
    for number, first in enumerate(range(0, records, size)):
        covers = range(first, min(first + size, records))
        if rows_of:
            rows = rows_of(covers)
        else:
            rows = {name: torch.randn(len(covers), *field.shape).to(field.dtype) for name, field in fields.items()}
        captions = [[number] * captioned for number in range(len(covers))]
        contents = Contents(covers, covers, [""] * len(covers), [1] * len(covers), captions, [""] * len(covers) * captioned, [])
        write_shard(directory / shard_name(number), rows, contents, digest_of({}))
        entries.append(entry_of(Shard(directory / shard_name(number), fields), number))
    Index(family, digest_of({}), {}, {}, fields, np.array(entries, ENTRY)).write(directory)


def replace_rows(directory: Path, place: int, **rows: Tensor) -> None:
    """Writes the shard at a place of the index with other rows, and checksums and digests that say that all is well."""
    index = Index.read(directory)
    path = directory / shard_name(index.shards["number"][place])
    shard = Shard(path, index.fields)
    records = range(shard.said.records)
    contents = Contents(
        covers=shard.covers,
        sources=shard.numbers["source"].tolist(),
        names=[shard.text("names", record) for record in records],
        variants=[len(shard.image_rows(record)) for record in records],
        captions=[shard.caption_rows(record) for record in records],
        texts=[shard.text("caption_texts", row) for row in range(shard.said.caption_rows)],
        refused=shard.refused,
        contents=shard.numbers["contents"].numpy(),
    )
    write_shard(path, {name: shard.file.tensor(name) for name in index.fields} | rows, contents, shard.said.fingerprint)
    index.shards[place] = entry_of(Shard(path, index.fields), index.shards["number"][place])
    index.write(directory)
