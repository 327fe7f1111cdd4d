"""Shards as strangers and earlier versions of the engine write them: with the digests of whatever they hold."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.data.format.index import CHECKSUMS, INDEX, NUMBERS, TEXTS, Index, shard_name, table_name
from engine.data.format.shard import Shard, checksum_of, checksums_of, checksums_of_numbers
from engine.files import digest, write_json
from engine.tensors import read_header


def edit(directory: Path, change: Any) -> None:
    """Changes the object in `index.json`. What is linked to the same bytes keeps its own, here and below."""
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).unlink()
    (directory / INDEX).write_text(json.dumps(index))


def edit_table(directory: Path, change: Any) -> None:
    """Changes the arrays over shards; the index names them by their new digest."""
    path = directory / table_name(json.loads((directory / INDEX).read_text())["shards"])
    table = load_file(path)
    change(table)
    path.unlink()
    save_file(table, path)
    name_table(directory, path)


def name_table(directory: Path, path: Path) -> None:
    """Has the index name a file of arrays by the digest that it has now."""
    sha256 = digest(path)
    path.rename(directory / table_name(sha256))
    edit(directory, lambda index: index.update(shards=sha256))


def say_of(directory: Path, place: int, tensors: dict | None = None, metadata: dict | None = None) -> None:
    """Writes a shard with other tensors or metadata, or without tensors that are None: its checksums and the index say that all
    is well."""
    path = directory / shard_name(place)
    said = {name: tensor for name, tensor in (load_file(path) | (tensors or {})).items() if tensor is not None}
    fields = json.loads((directory / INDEX).read_text())["fields"]
    given = tensors or said
    said |= {f"{CHECKSUMS}{name}": checksums_of(said[name]) for name in fields if name in given and name in said}
    said |= {name: sums for name, sums in checksums_of_numbers(said).items() if name in said and name not in given}
    checksums = {"checksum": checksum_of(NUMBERS, said), "texts_checksum": checksum_of(TEXTS, said)}
    header = read_header(path)[1] | checksums | (metadata or {})
    save_file({name: tensor for name, tensor in said.items() if tensor is not None}, path, {"engine": json.dumps(header)})
    index_shard(directory, place, path)


def index_shard(directory: Path, place: int, path: Path) -> None:
    """Has the index say a shard's size and digest."""

    def change(table: dict[str, torch.Tensor]) -> None:
        table["bytes"][place] = path.stat().st_size
        table["sha256"][place] = torch.frombuffer(bytearray.fromhex(digest(path)), dtype=torch.uint8)

    edit_table(directory, change)


def write_version_1(directory: Path, old: Path) -> None:
    """The shards of a directory as version 1 had them: captions are numbered over all, and lie where they first appear."""
    index = Index.read(directory)
    old.mkdir()
    number_of: dict[str, int] = {}
    entries, refused = [], []
    for number in index.shards["number"].tolist():
        shard = Shard(directory / shard_name(number), index.fields)
        records = range(shard.said.records)
        texts = [shard.text("caption_texts", row) for row in range(shard.said.caption_rows)]
        new = [row for row, text in enumerate(texts) if text not in number_of]
        number_of |= {texts[row]: len(number_of) + place for place, row in enumerate(new)}
        captions = [[number_of[texts[row]] for row in shard.caption_rows(record)] for record in records]
        rows = {"image": slice(None), "caption": new}
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
