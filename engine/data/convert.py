"""Shards of version 1 written again as version 2: the same records, rows, fingerprint and identity, without an encoder."""

import bisect
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from pydantic import AfterValidator, ConfigDict, StringConstraints, model_validator

from engine.data.format.index import (
    BUILD_AGAIN,
    ENTRY,
    INDEX,
    SHARD_NAME,
    Count,
    Digest,
    Field,
    Fields,
    Index,
    RefusedSample,
    Stored,
    check_fields,
    count_refused,
    read_json,
    shard_name,
)
from engine.data.format.shard import Contents, Shard, check_numbers, check_offsets, entry_of, write_shard
from engine.errors import UserError
from engine.files import PARTIAL, digest, excludes_others, lock, reading
from engine.messages import Progress
from engine.tensors import DTYPES, TensorFile, read_header

_OF_RECORDS = ("source", "image_offsets", "caption_offsets", "caption_numbers")
_NAME = r"shard-(\d{1,9})\.safetensors"
_OPEN = 64  # shards open at a time; captions lie where they first appear


def _file_name(name: str) -> str:
    if name in (".", ".."):
        raise ValueError("not the name of a file")
    return name


class _Entry(Stored):
    """What the index said of a shard."""

    file: Annotated[str, StringConstraints(pattern=r"^[^/\\\x00-\x1f\x7f]{1,200}$"), AfterValidator(_file_name)]
    records: Count
    image_rows: Count
    caption_rows: Count
    bytes: Count
    sha256: Digest


class _Index(Stored):
    format_version: int
    family: str
    fingerprint: Digest
    records: Count
    image_rows: Count
    caption_rows: Count
    encode_seconds: Annotated[float, Ge(0)]
    refused_count: Count
    identity: dict[str, Any]
    config: dict[str, Any]
    fields: Fields
    shards: list[_Entry]
    refused: list[RefusedSample]

    @model_validator(mode="after")
    def _agrees(self) -> "_Index":
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")
        check_fields(self.fields, self.identity, self.fingerprint)
        return self


class _Header(Stored):
    model_config = ConfigDict(extra="ignore")

    records: Count
    image_rows: Count
    caption_rows: Count
    captions: list[str]
    refused: list[RefusedSample]
    fingerprint: Digest


class _Shard:
    """A shard of version 1, whose records point to rows and captions that exist.

    Args:
        captions: how many there are in the shards up to this one.

    Raises:
        UserError: it is not what the index says, or what it says is not so.
    """

    def __init__(self, path: Path, entry: _Entry, fields: dict[str, Field], fingerprint: str, captions: int) -> None:
        with reading(path, BUILD_AGAIN):
            self.file = TensorFile(path)
            self.said = said = _Header.model_validate(self.file.metadata)
            for name, value in (entry.model_dump(exclude={"file", "bytes", "sha256"}) | {"fingerprint": fingerprint}).items():
                if getattr(said, name) != value:
                    raise ValueError(f"{name} is {getattr(said, name)}, and {value} in {INDEX}")
            rows = {"image": said.image_rows, "caption": len(said.captions)}
            described = {name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in self.file.header.items()}
            expected = {name: (field.dtype, [rows[field.per], *field.shape]) for name, field in fields.items()}
            numbers = described.get("caption_numbers", (torch.int64, [0]))[1][:1]
            lengths = ([said.records], [said.records + 1], [said.records + 1], numbers)
            expected |= {name: (torch.int64, length) for name, length in zip(_OF_RECORDS, lengths, strict=True)}
            if described != expected or said.caption_rows != len(said.captions):
                raise ValueError("its tensors are not those of a shard of these fields and numbers")
            source, images, places, self.numbers = map(self.file.tensor, _OF_RECORDS)
            check_offsets("image_offsets", images, said.image_rows)
            captioned = any(field.per == "caption" for field in fields.values())
            check_offsets("caption_offsets", places, len(self.numbers), strictly=captioned)
            check_numbers("caption_numbers", self.numbers, 0, captions)
            self.source, self.variants, self.lengths = source.tolist(), images.diff().tolist(), places.diff().tolist()


def convert(directory: Path, output: Path) -> Index:
    """Writes the shards of a directory as version 2; a conversion that was interrupted is gone on with.

    Within the same directory the new shards have numbers that are not taken; the new index takes the place of the old one at
    once, and then the old shards are removed.

    Raises:
        UserError: the shards are not of version 1, or damaged; another process converts them; or `output` holds others.
    """
    output.mkdir(parents=True, exist_ok=True)
    if (held := lock(output)) is None:
        raise UserError(f"{output}: another run is building or converting shards there; wait for its end")
    try:
        if excludes_others(held):
            for leftover in output.glob(f"{SHARD_NAME}*{PARTIAL}"):
                leftover.unlink()
        in_place = output.samefile(directory)
        if not in_place and (output / INDEX).exists():
            raise UserError(f"{output}: shards are there already; name another --output")
        if not in_place or not _is_converted(directory):
            _write(directory, output, in_place)
        index = Index.read(output)
        if in_place:
            _remove_old(output, index.fingerprint)
        return index
    finally:
        os.close(held)


def _is_converted(directory: Path) -> bool:
    try:
        Index.read(directory)
    except UserError:
        return False
    return True


def _write(directory: Path, output: Path, in_place: bool) -> None:
    with reading(directory / INDEX, BUILD_AGAIN):
        old = _Index.model_validate(read_json(directory, 1, BUILD_AGAIN))
    fields = {name: field.to_field() for name, field in old.fields.items()}
    ends = np.cumsum([0, *(entry.caption_rows for entry in old.shards)]).tolist()
    with Progress(len(old.shards), "Comparing digests", "shard") as bar:
        for entry in old.shards:
            with reading(directory / entry.file, BUILD_AGAIN):
                if digest(directory / entry.file) != entry.sha256:
                    raise ValueError(f"its digest does not match {INDEX}")
            bar.update()

    @functools.lru_cache(_OPEN)
    def opened(number: int) -> _Shard:
        entry = old.shards[number]
        return _Shard(directory / entry.file, entry, fields, old.fingerprint, ends[number + 1])

    taken = [int(found[1]) for entry in old.shards if (found := re.fullmatch(_NAME, entry.file))] if in_place else []
    first_number, first_sample = max(taken, default=-1) + 1, 0
    entries, refused = [], []
    with Progress(len(old.shards), "Converting", "shard") as bar:
        for place in range(len(old.shards)):
            shard = opened(place)
            number = first_number + place
            covers = range(first_sample, first_sample := first_sample + len(shard.source) + len(shard.said.refused))
            if not _is_whole(output / shard_name(number), fields, old.fingerprint, covers):
                _write_shard(output / shard_name(number), shard, fields, opened, ends, covers)
            entries.append(entry_of(Shard(output / shard_name(number), fields), number))
            refused += shard.said.refused
            bar.update()
    shards = np.array(entries, ENTRY)
    index = Index(
        old.family, old.fingerprint, old.identity, old.config, fields, shards, count_refused(refused), old.encode_seconds
    )
    index.write(output)


def _is_whole(path: Path, fields: dict[str, Field], fingerprint: str, covers: range) -> bool:
    """Whether an earlier conversion left this shard."""
    try:
        shard = Shard(path, fields)
    except UserError:
        return False
    return (shard.said.fingerprint, shard.covers) == (fingerprint, covers) and not shard.damage()


def _write_shard(
    path: Path,
    shard: _Shard,
    fields: dict[str, Field],
    opened: Callable[[int], _Shard],
    ends: list[int],
    covers: range,
) -> None:
    """Writes one shard with those captions that its records have, in the order in which they first appear in it."""
    numbers = dict.fromkeys(shard.numbers.tolist())
    homes = [bisect.bisect_right(ends, number) - 1 for number in numbers]
    places = [(opened(home), number - ends[home]) for home, number in zip(homes, numbers, strict=True)]
    row_of = {number: row for row, number in enumerate(numbers)}
    rows = {}
    for name, field in fields.items():
        if field.per == "image":
            rows[name] = shard.file.tensor(name)
            continue
        rows[name] = torch.empty(len(places), *field.shape, dtype=field.dtype)
        for (home, row), target in zip(places, rows[name], strict=True):
            home.file.read(name, row * target.numel(), target.view(-1))
    contents = Contents(
        covers=covers,
        sources=shard.source,
        names=[""] * len(shard.source),  # nobody wrote them down
        variants=shard.variants,
        captions=[[row_of[number] for number in of.tolist()] for of in shard.numbers.split(shard.lengths)],
        texts=[home.said.captions[row] for home, row in places],
        refused=shard.said.refused,
    )
    write_shard(path, rows, contents, shard.said.fingerprint)


def _remove_old(directory: Path, fingerprint: str) -> None:
    """Removes the shards of version 1 that a directory's index no longer names."""
    for path in directory.glob("*.safetensors"):
        try:
            said = read_header(path)[1]
        except (OSError, ValueError, RecursionError):
            continue
        if "format_version" not in said and said.get("fingerprint") == fingerprint:
            path.unlink()
