"""Shards as strangers and earlier versions of the engine write them: with the digests of whatever they hold."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.config.options import CacheConfig
from engine.data.format.index import CHECKSUMS, INDEX, NUMBERS, SAMPLES, TEXTS, Index, shard_name, table_name
from engine.data.format.shard import checksum_of, checksums_of, checksums_of_numbers
from engine.data.sources import open_source
from engine.files import digest, digest_of
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


def as_built_before(directory: Path) -> None:
    """Has the index tell the data set as it was told when nobody computed digests of samples."""
    index = Index.read(directory)
    identity = index.identity | {"source": open_source(CacheConfig.model_validate(index.config)).identity()}
    edit(directory, lambda said: said.update(identity=identity, fingerprint=digest_of(identity)))
    (directory / SAMPLES).unlink()
