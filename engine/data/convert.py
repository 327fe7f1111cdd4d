"""Shards of version 1 written again as version 2: the same records, rows, fingerprint and identity, without an encoder."""

import concurrent.futures
import contextlib
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from pydantic import AfterValidator, ConfigDict, StringConstraints, model_validator
from torch import Tensor

from engine.data.describe import open_as_built
from engine.data.format.gather import best_gather
from engine.data.format.index import (
    BUILD_AGAIN,
    CONTENT,
    ENTRY,
    FORMAT_VERSION,
    INDEX,
    Count,
    Digest,
    Field,
    Index,
    RefusedSample,
    Stored,
    StoredTotals,
    check_fields,
    count_refused,
    read_json,
    shard_name,
    sweep,
)
from engine.data.format.shard import (
    MOST_NUMBERS,
    Contents,
    Header,
    Shard,
    check_numbers,
    check_offsets,
    entry_of,
    is_written,
    write_shard,
)
from engine.data.sources.interface import Source
from engine.errors import UserError
from engine.files import digest, excludes_others, held, open_regular, reading
from engine.messages import Progress, say
from engine.tensors import DTYPES, TensorFile, read_header

_OF_RECORDS = ("source", "image_offsets", "caption_offsets", "caption_numbers")
_NAME = r"shard-(\d{1,9})\.safetensors"


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


class _Index(StoredTotals):
    shards: list[_Entry]
    refused: list[RefusedSample]

    @model_validator(mode="after")
    def _agrees(self) -> "_Index":
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")
        for name in ("records", "image_rows", "caption_rows"):
            if (total := sum(getattr(shard, name) for shard in self.shards)) != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, those of the shards are {total}")
        check_fields(self.fields, self.identity, self.fingerprint)
        return self


class _Header(Stored):
    model_config = ConfigDict(extra="ignore")

    records: Annotated[int, Ge(0), Le(MOST_NUMBERS)]
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
            if numbers[0] > MOST_NUMBERS:
                raise ValueError(f"{numbers[0]} caption numbers are more than any shard has")
            source, images, places, self.numbers = map(self.file.tensor, _OF_RECORDS)
            check_offsets("image_offsets", images, said.image_rows)
            captioned = any(field.per == "caption" for field in fields.values())
            check_offsets("caption_offsets", places, len(self.numbers), strictly=captioned)
            check_numbers("caption_numbers", self.numbers, 0, captions)
            self.source, self.variants, self.lengths = source.tolist(), images.diff().tolist(), places.diff().tolist()


class _Captions:
    """The captions of the shards that were opened: each lies where it first appeared, and is numbered over all shards.

    Texts are kept, and of rows where they lie: files are opened when rows are read, and one at a time.
    """

    def __init__(self, fields: dict[str, Field]) -> None:
        self.fields = {name: field for name, field in fields.items() if field.per == "caption"}
        self.paths: list[Path] = []
        self.starts: list[dict[str, int]] = []
        self.firsts: list[int] = []
        self.texts: list[str] = []
        self._gather = best_gather()

    def add(self, shard: _Shard) -> None:
        file = shard.file
        self.paths.append(file.path)
        self.starts.append({name: file.data_start + file.header[name]["data_offsets"][0] for name in self.fields})
        self.firsts.append(len(self.texts))
        self.texts += shard.said.captions

    def rows(self, numbers: list[int]) -> dict[str, Tensor]:
        """The rows of captions, of every field [captions, *shape]."""
        wanted = np.array(numbers, np.int64)
        homes = np.searchsorted(self.firsts, wanted, side="right") - 1
        rows = {name: torch.empty(len(numbers), *field.shape, dtype=field.dtype) for name, field in self.fields.items()}
        for home in np.unique(homes).tolist():
            places = np.flatnonzero(homes == home)
            with reading(self.paths[home], BUILD_AGAIN), open_regular(self.paths[home]) as file:
                files = np.full(len(places), file.fileno(), np.int32)
                for name, field in self.fields.items():
                    part = torch.empty(len(places), *field.shape, dtype=field.dtype)
                    offsets = self.starts[home][name] + (wanted[places] - self.firsts[home]) * field.row_bytes
                    self._gather(files, offsets, field.row_bytes, part)
                    rows[name][torch.from_numpy(places)] = part
        return rows


def convert(directory: Path, output: Path, given: dict[str, str] | None = None) -> Index:
    """Writes the shards of a directory as version 2; a conversion that was interrupted is gone on with.

    Args:
        given: options that name the data set, as it was when they were built; its files are read, and their digests written
            down. None where the shards shall know none.

    Within the same directory the new shards have numbers that are not taken; the new index takes the place of the old one at
    once, and then the old shards are removed.

    Raises:
        UserError: the shards are not of version 1, or damaged; another process converts them; or `output` holds others.
    """
    value = read_json(directory / INDEX, 1, FORMAT_VERSION)
    old = None
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        with reading(directory / INDEX, BUILD_AGAIN):
            old = _Index.model_validate(value)
    in_place = output.exists() and output.samefile(directory)
    if old is None and not in_place:
        raise UserError(f"{directory}: the shards there are of format version {FORMAT_VERSION}; there is nothing to convert")
    output.mkdir(parents=True, exist_ok=True)
    with held(output) as ours:
        if ours is None:
            raise UserError(f"{output}: another run is building or converting shards there; wait for its end")
        alone = excludes_others(ours, output)
        if alone:
            sweep(output)
        if old and (in_place or not _is_converted(output, old)):
            _write(directory, old, output, in_place, _source_of(directory, old, given) if given else None)
        else:
            stays = "; what they know of the data set stays as it is" if given else ""
            say(f"{output}: the shards are of format version {FORMAT_VERSION} already{stays}")
        index = Index.read(output)
        if in_place:
            _remove_old(output, index.fingerprint)
        if alone:
            sweep(output)
        return index


def _is_converted(output: Path, old: _Index) -> bool:
    """Whether a conversion came to its end here.

    Raises:
        UserError: there are other shards.
    """
    if not (output / INDEX).exists():
        return False
    with contextlib.suppress(UserError):
        index = Index.read(output)
        if (index.fingerprint, index.records, index.total("image_rows")) == (old.fingerprint, old.records, old.image_rows):
            return True
    raise UserError(f"{output}: shards are there already; name another --output")


def _source_of(directory: Path, old: _Index, given: dict[str, str]) -> Source:
    """The data set that the shards of a directory were built of.

    Raises:
        UserError: the one that is given is another, or has changed.
    """
    config, source = open_as_built(directory, old.config, given)
    if source.identity() != old.identity.get("source") or len(source) != old.records + old.refused_count:
        raise UserError(
            f"{config.source}: is not, or no longer, what the shards of {directory} were built of; give that, as it was, "
            "or none"
        )
    return source


def _contents_of(source: Source, covers: range, captioned: bool) -> np.ndarray:
    """Digests of what samples hold: uint8 [samples, CONTENT]."""
    from engine.data.records import read_sample  # whose libraries take seconds

    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(lambda place: read_sample(source, place, captioned, masked=False).content, covers)
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, CONTENT)


def _write(directory: Path, old: _Index, output: Path, in_place: bool, source: Source | None) -> None:
    fields = {name: field.to_field() for name, field in old.fields.items()}
    taken = [int(found[1]) for entry in old.shards if (found := re.fullmatch(_NAME, entry.file))] if in_place else []
    numbers = range(first := max(taken, default=-1) + 1, first + len(old.shards))
    for number in numbers:
        _refuse_foreign(output / shard_name(number), old.fingerprint)
    with Progress(len(old.shards), "Comparing digests", "shard") as bar:
        for entry in old.shards:
            with reading(directory / entry.file, BUILD_AGAIN):
                if digest(directory / entry.file) != entry.sha256:
                    raise ValueError(f"its digest does not match {INDEX}")
            bar.update()
    captions, entries, refused, first_sample = _Captions(fields), [], [], 0
    with Progress(len(old.shards), "Converting", "shard") as bar:
        for number, entry in zip(numbers, old.shards, strict=True):
            before = len(captions.texts)
            shard = _Shard(directory / entry.file, entry, fields, old.fingerprint, before + entry.caption_rows)
            captions.add(shard)
            covers = range(first_sample, first_sample := first_sample + len(shard.source) + len(shard.said.refused))
            path = output / shard_name(number)
            with reading(directory / INDEX, BUILD_AGAIN):
                if first_sample > old.records + old.refused_count:
                    raise ValueError(f"refused_count is {old.refused_count}, those in the shards are more")
            digests = _contents_of(source, covers, bool(captions.fields)) if source else None
            _write_shard(path, shard, fields, captions, covers, digests)
            entries.append(entry_of(Shard(path, fields, old.identity), number))
            refused += shard.said.refused
            bar.update()
    shards = np.array(entries, ENTRY)
    index = Index(
        old.family, old.fingerprint, old.identity, old.config, fields, shards, count_refused(refused), old.encode_seconds
    )
    with reading(directory / INDEX, BUILD_AGAIN):
        index.check()
        if index.refused_count != old.refused_count:
            raise ValueError(f"refused_count is {old.refused_count}, those in the shards are {index.refused_count}")
    index.write(output)


def _refuse_foreign(path: Path, fingerprint: str) -> None:
    """Raises `UserError` where what has the name of a new shard is none that a conversion of these shards left there."""
    try:
        said = Header.model_validate(read_header(path)[1])
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        said = None
    if said is None or said.fingerprint != fingerprint:
        raise UserError(f"{path}: is no shard of these, and one is to be written there; move it, or name another --output")


def _write_shard(
    path: Path, shard: _Shard, fields: dict[str, Field], captions: _Captions, covers: range, digests: np.ndarray | None
) -> None:
    """Writes one shard, unless a conversion left that very one, with those captions that its records have, in the order in
    which they first appear in it."""
    row_of = {number: row for row, number in enumerate(dict.fromkeys(shard.numbers.tolist()))}
    of_captions = captions.rows([*row_of])
    rows = {name: of_captions[name] if name in of_captions else shard.file.tensor(name) for name in fields}
    contents = Contents(
        covers=covers,
        sources=shard.source,
        names=[""] * len(shard.source),  # nobody wrote them down
        variants=shard.variants,
        captions=[[row_of[number] for number in of.tolist()] for of in shard.numbers.split(shard.lengths)],
        texts=[captions.texts[number] for number in row_of],
        refused=shard.said.refused,
        contents=digests,
    )
    if not is_written(path, rows, contents, shard.said.fingerprint):
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
