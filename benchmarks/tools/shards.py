"""Shards of random rows, of any shape and number, that the engine reads as any other; altered without a trace; of version 1."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.tools.kinds import KINDS
from engine.data.format.index import ENTRY, INDEX, Field, Index, shard_name
from engine.data.format.shard import Contents, Shard, entry_of, write_shard
from engine.files import digest, digest_of, write_json

SHARD = 8192  # records of a shard
FAMILIES = {"sd": "sd", "prior": "kandinsky-prior"}  # of the kinds of records


def fields_of(kind: str) -> dict[str, Field]:
    """The fields of a kind of records, of bf16 numbers."""
    return {name: Field(shape, torch.bfloat16, per) for name, (shape, per) in KINDS[kind].items()}


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
        entries.append(entry_of(Shard(directory / shard_name(number), fields, {}), number))
    Index(family, digest_of({}), {}, {}, fields, np.array(entries, ENTRY)).write(directory)


def replace_rows(directory: Path, place: int, **rows: Tensor) -> None:
    """Writes the shard at a place of the index with other rows, and checksums and digests that say that all is well."""
    index = Index.read(directory)
    path = directory / shard_name(index.shards["number"][place])
    shard = Shard(path, index.fields, index.identity)
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
    index.shards[place] = entry_of(Shard(path, index.fields, index.identity), index.shards["number"][place])
    index.write(directory)


def write_version_1(directory: Path, old: Path) -> None:
    """The shards of a directory as version 1 had them: captions are numbered over all, and lie where they first appear."""
    index = Index.read(directory)
    old.mkdir()
    number_of: dict[str, int] = {}
    entries: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    for number in index.shards["number"].tolist():
        shard = Shard(directory / shard_name(number), index.fields, index.identity)
        records = range(shard.said.records)
        texts = [shard.text("caption_texts", row) for row in range(shard.said.caption_rows)]
        new = [row for row, text in enumerate(texts) if text not in number_of]
        number_of |= {texts[row]: len(number_of) + place for place, row in enumerate(new)}
        captions = [[number_of[texts[row]] for row in shard.caption_rows(record)] for record in records]
        rows: dict[str, Any] = {"image": slice(None), "caption": new}
        tensors = {name: shard.file.tensor(name)[rows[field.per]] for name, field in index.fields.items()}
        counts = torch.tensor([0, *(len(shard.image_rows(record)) for record in records)])
        tensors |= {
            "source": shard.numbers["source"],
            "image_offsets": counts.cumsum(0),
            "caption_offsets": torch.tensor([0, *map(len, captions)]).cumsum(0),
            "caption_numbers": torch.tensor([caption for record in captions for caption in record], dtype=torch.int64),
        }
        counted = {"records": len(records), "image_rows": int(counts.sum()), "caption_rows": len(new)}
        said = {"captions": [texts[row] for row in new], "refused": shard.refused, "fingerprint": index.fingerprint}
        path = old / shard_name(number)
        save_file(tensors, path, {"engine": json.dumps(counted | said)})
        entries.append({"file": path.name, **counted, "bytes": path.stat().st_size, "sha256": digest(path)})
        refused += shard.refused
    value = {
        "format_version": 1, "family": index.family, "fingerprint": index.fingerprint, "encode_seconds": 1.0,
        **{name: sum(entry[name] for entry in entries) for name in ("records", "image_rows", "caption_rows")},
        "refused_count": len(refused), "identity": index.identity, "config": index.config,
        "fields": {name: field.to_json() for name, field in index.fields.items()}, "shards": entries, "refused": refused,
    }  # fmt: skip
    write_json(old / INDEX, value)
