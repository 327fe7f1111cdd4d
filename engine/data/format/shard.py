"""One shard on disk: written whole, and judged before a row of it is read."""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xxhash
from annotated_types import Ge, Le
from pydantic import StringConstraints
from torch import Tensor

from engine.data.format.gather import checksums_of
from engine.data.format.index import (
    BUILD_AGAIN,
    CHECKSUMS,
    CONTENT,
    ENTRY,
    INDEX,
    MOST,
    NUMBERS,
    OWN,
    TEXTS,
    UNKNOWN,
    VARYING,
    Count,
    Digest,
    Field,
    Index,
    RefusedSample,
    Stored,
    crops_randomly,
    shard_name,
    variants_of,
)
from engine.errors import UserError
from engine.files import digest, parse_json, reading, write_atomically
from engine.tensors import DTYPES, TensorFile, bytes_of, header_of, in_file_order, pieces_of, write_pieces

LARGEST_SHARD_HEADER = 2**20  # bytes
_LARGEST_TEXTS = 2**28  # bytes of the captions, the names or the refused samples of a shard
MOST_NUMBERS = 2**24  # of records of a shard, and of their captions


@dataclass
class Contents:
    """What is written into a shard, beside its image rows.

    covers: the samples of the source that became its records or were refused.
    sources, names: of its records, the numbers of their samples and what these are called.
    variants: how many image rows each record has.
    captions: of each record, the rows of its captions.
    texts: of the caption rows.
    refused: the samples that it holds no records of, as JSON.
    contents: uint8 [samples, CONTENT], of every sample a digest of its content, zeros where it is no longer in the data set;
        None where nobody computed any.
    """

    covers: range
    sources: Sequence[int]
    names: Sequence[str]
    variants: Sequence[int]
    captions: Sequence[Sequence[int]]
    texts: Sequence[str]
    refused: Sequence[dict[str, str]]
    contents: np.ndarray | None = None


_Checksum = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]


class Header(Stored):
    """What a shard's header says beside its tensors; see docs/shards.md."""

    format_version: Literal[2]
    fingerprint: Digest
    records: Annotated[int, Ge(0), Le(MOST_NUMBERS)]
    image_rows: Count
    caption_rows: Annotated[int, Ge(0), Le(MOST_NUMBERS)]
    variants: Annotated[int, Ge(VARYING), Le(MOST)]
    captions: Annotated[int, Ge(OWN), Le(MOST)]
    first_sample: Count
    samples: Count
    checksum: _Checksum
    texts_checksum: _Checksum


def write_shard(path: Path, rows: dict[str, Tensor], contents: Contents, fingerprint: str) -> None:
    """Writes one shard: complete or absent.

    Args:
        rows: of every field, [image or caption rows, *shape].

    Raises:
        UserError: its texts are more than a shard may hold.
    """
    header, tensors = _laid_out(rows, contents, fingerprint)
    for name in ("caption_texts", "names", "refused"):
        if len(tensors[name]) > _LARGEST_TEXTS:
            raise UserError(
                f"{path}: {name} would take more than {_LARGEST_TEXTS >> 20} MiB; lower --shard_records", alone=True
            )
    write_atomically(path, lambda temporary: write_pieces(temporary, header, pieces_of(tensors.values())))


def is_written(path: Path, rows: dict[str, Tensor], contents: Contents, fingerprint: str) -> bool:
    """Whether the very file is there that `write_shard` would write."""
    if not path.exists():
        return False
    header, tensors = _laid_out(rows, contents, fingerprint)
    total = hashlib.sha256(header)
    for piece in pieces_of(tensors.values()):
        total.update(piece.numpy().data)
    with reading(path, BUILD_AGAIN):
        return digest(path) == total.hexdigest()


def _laid_out(rows: dict[str, Tensor], contents: Contents, fingerprint: str) -> tuple[bytes, dict[str, Tensor]]:
    """What a shard's file begins with, and the tensors that follow, on the host and in order."""
    count = len(contents.sources)
    variants, lengths = _constant(contents.variants), list(map(len, contents.captions))
    captions = _constant(lengths)
    numbers = [number for record in contents.captions for number in record]
    if captions == 1 and numbers == [*range(len(contents.texts))]:
        captions = OWN
    tensors = {name: tensor.contiguous().cpu() for name, tensor in rows.items()}
    tensors |= {f"{CHECKSUMS}{name}": checksums_of(tensor) for name, tensor in tensors.items()}
    tensors["source"] = torch.tensor(contents.sources, dtype=torch.int64)
    if variants == VARYING:
        tensors["image_offsets"] = offsets_of(contents.variants)
    if captions == VARYING:
        tensors["caption_offsets"] = offsets_of(lengths)
    if captions not in (OWN, 0):
        tensors["caption_numbers"] = torch.tensor(numbers, dtype=torch.int64)
    tensors["caption_texts"], tensors["caption_texts_offsets"] = _texts(contents.texts)
    tensors["names"], tensors["names_offsets"] = _texts(contents.names)
    tensors["refused"] = _bytes(b"".join(json.dumps(item).encode() + b"\n" for item in contents.refused))
    contents_of = np.frombuffer(UNKNOWN * len(contents.covers), np.uint8) if contents.contents is None else contents.contents
    tensors["contents"] = torch.from_numpy(contents_of.reshape(-1, CONTENT).copy())
    tensors |= checksums_of_numbers(tensors)
    said = Header(
        format_version=2,
        fingerprint=fingerprint,
        records=count,
        image_rows=sum(contents.variants),
        caption_rows=len(contents.texts),
        variants=variants,
        captions=captions,
        first_sample=contents.covers.start,
        samples=len(contents.covers),
        checksum=checksum_of(NUMBERS, tensors),
        texts_checksum=checksum_of(TEXTS, tensors),
    )
    tensors = in_file_order(tensors)
    return header_of(tensors, {"engine": said.model_dump_json()})[0], tensors


def checksums_of_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the numbers that are read record by record: of where a record's range begins and ends, of a caption's number."""
    width = {"image_offsets": 2, "caption_offsets": 2, "caption_numbers": 1}
    read = {name: tensors[name].unfold(0, count, 1) for name, count in width.items() if name in tensors}
    return {f"{CHECKSUMS}{name}": checksums_of(numbers) for name, numbers in read.items()}


def checksum_of(names: Iterable[str], tensors: dict[str, Tensor]) -> str:
    """XXH3 of the bytes of those tensors that there are, one after another in the order of the names."""
    total = xxhash.xxh3_64()
    for name in names:
        if name in tensors:
            total.update(bytes_of(tensors[name]).numpy().data)
    return total.hexdigest()


def offsets_of(lengths: Iterable[int]) -> Tensor:
    """Where ranges of these lengths begin when they lie one after another, and where the last one ends."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64))


def _constant(counts: Sequence[int]) -> int:
    """How many all have, or that they vary."""
    return counts[0] if counts and min(counts) == max(counts) <= MOST else VARYING if counts else 0


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _texts(texts: Iterable[str]) -> tuple[Tensor, Tensor]:
    encoded = [text.encode(errors="backslashreplace") for text in texts]  # names of files are bytes, not text
    return _bytes(b"".join(encoded)), offsets_of(map(len, encoded))


class Shard:
    """A shard's file, opened, whose records point to rows that exist. Its texts are judged when they are first asked for.

    Args:
        identity: of the index, as far as it is known, which says how many rows an image has and what these depend on.
        accept: is given it once its header is judged, before anything else of it is read.

    said: what its header says of it.
    numbers: the tensors that tie rows to records.

    Raises:
        UserError: what it says is not so; also by `texts`, `refused` and `text`.
    """

    def __init__(
        self,
        path: Path,
        fields: dict[str, Field],
        identity: dict[str, Any],
        accept: Callable[["Shard"], None] = lambda shard: None,
    ) -> None:
        self.path, self.fields, self.identity = path, fields, identity
        with reading(path, BUILD_AGAIN):
            self.file = TensorFile(path, LARGEST_SHARD_HEADER)
            self.said = Header.model_validate(self.file.metadata)
            self._check_tensors()
            accept(self)
            self.numbers = {name: self.file.tensor(name) for name in NUMBERS if name in self.file.header}
            if checksum_of(NUMBERS, self.numbers) != self.said.checksum:
                raise ValueError("altered: what ties its rows to records does not match the checksum in its header")
            self._check_numbers()

    @property
    def here(self) -> np.ndarray:
        """The numbers of the samples that it knows, records and refused: int64."""
        return self.said.first_sample + np.flatnonzero(self._known())

    def _known(self) -> np.ndarray:
        """Which samples of its range it knows: bool [samples]."""
        halves = self.numbers["contents"].view(torch.int64).numpy()
        return (halves[:, 0] | halves[:, 1]) != 0

    @property
    def content(self) -> bytes:
        """What tells its records from others: a SHA-256 of their contents, and of all else that these do not tell."""
        source = self.numbers["source"]
        contents = self.numbers["contents"][source - self.said.first_sample].numpy()
        unknown = (contents == np.frombuffer(UNKNOWN, np.uint8)).all(1).any()
        total = hashlib.sha256(contents.data)
        if unknown or crops_randomly(self.identity):
            total.update(source.numpy().data)
        if unknown:
            total.update(self.said.fingerprint.encode())
        return total.digest()

    @property
    def covers(self) -> range:
        return range(self.said.first_sample, self.said.first_sample + self.said.samples)

    @functools.cached_property
    def texts(self) -> dict[str, Tensor]:
        """The tensors of texts."""
        with reading(self.path, BUILD_AGAIN):
            texts = {name: self.file.tensor(name) for name in TEXTS}
            if checksum_of(TEXTS, texts) != self.said.texts_checksum:
                raise ValueError("altered: its texts do not match the checksum in its header")
            for name in ("caption_texts", "names"):
                check_offsets(f"{name}_offsets", texts[f"{name}_offsets"], len(texts[name]), strictly=False)
            return texts

    @functools.cached_property
    def refused(self) -> list[dict[str, str]]:
        """The samples that it holds no records of, as JSON."""
        content = self.texts["refused"].numpy().tobytes()
        with reading(self.path, BUILD_AGAIN):
            refused = [_RefusedLine.model_validate({"item": parse_json(line.decode())}).item for line in content.splitlines()]
            if len(refused) + self.said.records != len(self.here):
                raise ValueError(f"{len(refused)} refused and {self.said.records} records of {len(self.here)} samples")
            return refused

    def start(self, name: str) -> int:
        """Where a tensor begins in the file; 0 where it has none of that name."""
        described = self.file.header.get(name)
        return self.file.data_start + described["data_offsets"][0] if described else 0

    def agree(self, entry: np.void, made_by: Collection[str]) -> None:
        """Raises `UserError` where the index says something else of this shard than its header."""
        found = self.said.model_dump() | {"bytes": self.file.size}
        indexed = {name: entry[name].item() for name in found if ENTRY.fields and name in ENTRY.fields}
        indexed["fingerprint"] = found["fingerprint"] if found["fingerprint"] in made_by else " or ".join(made_by)
        for name, value in indexed.items():
            if (said := found[name]) != value:
                raise UserError(f"{self.path}: {name} is {said}, and {value} in {INDEX}; {BUILD_AGAIN}")

    def image_rows(self, record: int) -> range:
        """The rows of a record, counted within the shard, as it is itself."""
        return self._range("image_offsets", self.said.variants, record)

    def caption_rows(self, record: int) -> list[int]:
        """The same of its captions."""
        if self.said.captions == OWN:
            return [record]
        places = self._range("caption_offsets", self.said.captions, record)
        return self.numbers["caption_numbers"][places.start : places.stop].tolist() if places else []

    def _range(self, offsets: str, count: int, record: int) -> range:
        if count == VARYING:
            return range(*self.numbers[offsets][record : record + 2].tolist())
        return range(record * count, (record + 1) * count)

    def text(self, name: str, number: int) -> str:
        """Of `caption_texts`, that of a caption row; of `names`, what a record's sample is called, empty if nobody knows."""
        start, end = self.texts[f"{name}_offsets"][number : number + 2].tolist()
        return self.texts[name][start:end].numpy().tobytes().decode(errors="replace")

    def damage(self) -> str | None:
        """What is wrong with its rows or texts, or None; the whole shard is read."""
        try:
            with reading(self.path, BUILD_AGAIN):
                _ = self.texts, self.refused
                for name, sums in checksums_of_numbers(self.numbers).items():
                    if not torch.equal(self.file.tensor(name), sums):
                        return f"altered: {name} are not those of {name.removeprefix(CHECKSUMS)}"
                return next(filter(None, itertools.starmap(self._altered_row, self.fields.items())), None)
        except UserError as error:
            return str(error).removeprefix(f"{self.path}: ")

    def _altered_row(self, name: str, field: Field) -> str | None:
        """The first row whose bytes are not those that its checksum was made of."""
        count, step = self.file.elements(f"{CHECKSUMS}{name}"), max(2**26 // field.row_bytes, 1)
        for first in range(0, count, step):
            rows = torch.empty(min(step, count - first), *field.shape, dtype=field.dtype)
            expected = torch.empty(len(rows), dtype=torch.int64)
            self.file.read(name, first * rows[0].numel(), rows.view(-1))
            self.file.read(f"{CHECKSUMS}{name}", first, expected)
            if len(wrong := (checksums_of(rows) != expected).nonzero()):
                return f"altered: row {first + int(wrong[0])} of {name} does not match its checksum"
        return None

    def _check_tensors(self) -> None:
        """Whether the header, which is true of its file, describes the tensors that a shard of these fields has."""
        said, header = self.said, self.file.header
        rows = {"image": said.image_rows, "caption": said.caption_rows}
        read: dict[str, list[int]] = {}  # numbers, and how many times they are read
        if said.variants == VARYING:
            read["image_offsets"] = [said.records + 1, said.records]
        if said.captions == VARYING:
            read["caption_offsets"] = [said.records + 1, said.records]
        if said.captions not in (OWN, 0):
            found = (header.get("caption_numbers", {}).get("shape") or [0])[:1]
            read["caption_numbers"] = 2 * ([said.records * said.captions] if said.captions > 0 else found)
        expected: dict[str, tuple[torch.dtype, list[int] | None]] = {
            **{name: (field.dtype, [rows[field.per], *field.shape]) for name, field in self.fields.items()},
            **{f"{CHECKSUMS}{name}": (torch.int64, [rows[field.per]]) for name, field in self.fields.items()},
            **{name: (torch.int64, [count]) for name, (count, _) in read.items()},
            **{f"{CHECKSUMS}{name}": (torch.int64, [count]) for name, (_, count) in read.items()},
            "source": (torch.int64, [said.records]),
            "caption_texts": (torch.uint8, None),
            "caption_texts_offsets": (torch.int64, [said.caption_rows + 1]),
            "names": (torch.uint8, None),
            "names_offsets": (torch.int64, [said.records + 1]),
            "refused": (torch.uint8, None),
            "contents": (torch.uint8, [said.samples, CONTENT]),
        }
        if different := sorted(header.keys() ^ expected.keys()):
            raise ValueError(f"{different[0]} is {'no tensor of these shards' if different[0] in header else 'missing'}")
        for name, (dtype, shape) in expected.items():
            shape = shape or header[name]["shape"][:1]  # of any length
            if header[name]["shape"] != shape or DTYPES[header[name]["dtype"]] != dtype:
                raise ValueError(f"{name} is {header[name]['dtype']} {header[name]['shape']}, not {dtype} {shape}")
            most = _LARGEST_TEXTS if dtype == torch.uint8 and name in TEXTS else MOST_NUMBERS
            if name in NUMBERS + TEXTS and shape[0] > most:
                raise ValueError(f"{name} is larger than that of any shard: {shape}")

    def _check_numbers(self) -> None:
        """Whether records point to what is there."""
        said, numbers = self.said, self.numbers
        captioned = any(field.per == "caption" for field in self.fields.values())
        if said.variants == VARYING:
            check_offsets("image_offsets", numbers["image_offsets"], said.image_rows)
        elif said.variants * said.records != said.image_rows or (said.records and not said.variants):
            raise ValueError(f"{said.image_rows} image rows for {said.records} records of {said.variants}")
        counts = {said.variants} if said.variants != VARYING else set(numbers["image_offsets"].diff().tolist())
        if (possible := variants_of(self.identity)) and said.records and not counts <= possible:
            raise ValueError(f"an image has not {' or '.join(map(str, sorted(possible)))} rows, as {INDEX} says")
        if said.records and captioned != bool(said.captions):
            raise ValueError(f"captions is {said.captions}, and captions have {'' if captioned else 'no '}fields")
        if said.captions == VARYING:
            check_offsets("caption_offsets", numbers["caption_offsets"], len(numbers["caption_numbers"]))
        elif said.captions == OWN and said.records != said.caption_rows:
            raise ValueError(f"{said.caption_rows} captions for {said.records} records")
        if "caption_numbers" in numbers:
            check_numbers("caption_numbers", numbers["caption_numbers"], 0, said.caption_rows)
        check_numbers("source", numbers["source"], said.first_sample, said.first_sample + said.samples)
        if not _increase(numbers["source"]):
            raise ValueError("source does not increase")
        if not self._known()[numbers["source"].numpy() - said.first_sample].all():
            raise ValueError("a record is of a sample without a content")


def without_samples(shard: Shard, numbers: np.ndarray) -> tuple[dict[str, Tensor], Contents]:
    """What a shard holds of samples with these numbers: the rows of its fields, and what else is written."""
    said, source = shard.said, shard.numbers["source"].numpy()
    records = np.flatnonzero(np.isin(source, numbers)).tolist()
    images = [row for record in records for row in shard.image_rows(record)]
    captions = [shard.caption_rows(record) for record in records]
    row_of = {row: place for place, row in enumerate(dict.fromkeys(itertools.chain(*captions)))}
    taken = {"image": images, "caption": list(row_of)}
    refused = zip(np.setdiff1d(shard.here, source), shard.refused, strict=True)
    contents = shard.numbers["contents"].numpy().copy()
    contents[np.isin(np.arange(said.samples) + said.first_sample, numbers, invert=True)] = 0
    rows = {name: _rows(shard.file.tensor(name), taken[field.per]) for name, field in shard.fields.items()}
    return rows, Contents(
        covers=shard.covers,
        sources=source[records].tolist(),
        names=[shard.text("names", record) for record in records],
        variants=[len(shard.image_rows(record)) for record in records],
        captions=[[row_of[row] for row in of] for of in captions],
        texts=[shard.text("caption_texts", row) for row in row_of],
        refused=[item for number, item in refused if number in numbers],
        contents=contents,
    )


def _rows(tensor: Tensor, numbers: list[int]) -> Tensor:
    """Rows of a tensor of any dtype, also of those that torch cannot index."""
    taken = tensor.view(len(tensor), math.prod(tensor.shape[1:])).view(torch.uint8)[torch.tensor(numbers, dtype=torch.int64)]
    return taken.view(tensor.dtype).view(len(numbers), *tensor.shape[1:])


class _RefusedLine(Stored):
    item: RefusedSample


def check_offsets(name: str, offsets: Tensor, end: int, strictly: bool = True) -> None:
    """Raises `ValueError` where offsets do not lead from 0 to `end`, over something each time where they do so strictly."""
    if offsets[0] != 0 or offsets[-1] != end or not _increase(offsets, strictly):
        raise ValueError(f"{name} does not lead from 0 to {end}, each beyond the one before it")


def check_numbers(name: str, numbers: Tensor, first: int, end: int) -> None:
    """Raises `ValueError` where one is not from `first` up to, not including, `end`."""
    if len(numbers) and (numbers.min() < first or numbers.max() >= end):
        raise ValueError(f"{name} points beyond the {end - first} that there are")


def _increase(numbers: Tensor, strictly: bool = True) -> bool:
    following, before = numbers[1:], numbers[:-1]  # not their difference, which may overflow
    return bool((following > before if strictly else following >= before).all())


def entry_of(shard: Shard, number: int) -> tuple:
    """What the index says of a shard, in the order of `ENTRY`."""
    said = shard.said.model_dump() | {"number": number, "bytes": shard.file.size}
    said["sha256"] = np.frombuffer(bytes.fromhex(digest(shard.path)), np.uint8)
    said["contents"] = np.frombuffer(shard.content, np.uint8)
    return tuple(said[name] for name in ENTRY.names or ())


def open_shard(
    directory: Path, index: Index, number: int, path: Path | None = None, fetch: Callable[[Shard], None] = lambda shard: None
) -> Shard:
    """Shard `number` of those in an index, as that describes it.

    Args:
        path: its file, where that has not its name in the directory.
        fetch: brings its `numbers` there, where so far there is its header alone.

    Raises:
        UserError: it is not.
    """
    entry = index.shards[number]

    def accept(shard: Shard) -> None:
        shard.agree(entry, (*index.made_by, index.fingerprint))
        fetch(shard)

    shard = Shard(path or directory / shard_name(entry["number"]), index.fields, index.identity, accept)
    if (found := shard.content.hex()) != (indexed := entry["contents"].tobytes().hex()):
        raise UserError(f"{shard.path}: contents is {found}, and {indexed} in {INDEX}; {BUILD_AGAIN}")
    return shard
