"""What the index says: the fields of a record, the shards and what they were built from.

`index.json` is small whatever it stands for; what it says of every shard lies in arrays, in a file that it names by digest.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Le, MaxLen
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, model_validator

from engine.errors import UserError
from engine.files import PARTIAL, digest, digest_of, parse_json, read_text, reading, write_atomically, write_json
from engine.tensors import DTYPES, TensorFile, bytes_of, header_of

FORMAT_VERSION = 2
INDEX = "index.json"
TABLE = "index-"  # what the names of files with arrays over shards begin with
BUILD_AGAIN = f"delete what is damaged and {INDEX} to build it again, or get a whole copy"
_GIVE_SHARDS = "give the directory of shards (a run's --shards_dir), or build some with `python -m engine.shards build`"
SHARD_NAME = "shard-"  # what the names of all begin with
SAMPLES = "sample-numbers"  # which samples they are of, for the next build; runs keep pictures in `samples`
BUCKETS = "buckets.json"  # in a directory of directories of shards, one for each size of images
SIZES = "image-sizes"  # beside it, which images have which size, for the next build
HANDED = "handed-"  # what the names of files that a launch passes around begin with
# What the index says of a shard. `variants` and `captions`: how many every record has, or one of those below.
ENTRY = np.dtype(
    [(name, np.int64) for name in ("number", "records", "image_rows", "caption_rows", "bytes", "variants", "captions",
                                   "first_sample", "samples")] + [("sha256", np.uint8, 32), ("contents", np.uint8, 32)]
)  # fmt: skip
VARYING = -1  # records have different numbers of them: offsets say where each one's begin
OWN = -2  # every record has one caption, its own: its row is the record's
MOST = 2**14  # variants or captions of a record, where all have as many
# Tensors of a shard beside the fields: those that tie rows to records and samples, and texts for people.
NUMBERS = ("source", "image_offsets", "caption_offsets", "caption_numbers", "contents")
TEXTS = ("caption_texts", "caption_texts_offsets", "names", "names_offsets", "refused")
CONTENT = 16  # bytes of the digest of a sample's content
UNKNOWN = b"\xff" * CONTENT  # in the place of one that nobody computed
CHECKSUMS = "checksums."  # and the name of a field, or of numbers that are read one by one
# Refused samples of each reason that the index names, how many reasons, and characters of what it says of one.
_LISTED, _REASONS, _LONGEST = 3, 64, 500
_LARGEST_ROW = 2**34  # bytes
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class Stored(BaseModel):
    """An object of JSON of which nothing is converted and nothing unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


def _whole_field(described: "StoredField") -> "StoredField":
    if described.to_field().row_bytes > _LARGEST_ROW:
        raise ValueError(f"a row of {described.shape} is larger than any")
    return described


def _known_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"no dtype of shards: {name}")
    return name


def _refused(item: dict[str, str]) -> dict[str, str]:
    if not {"source", "reason"} <= item.keys():
        raise ValueError("a refused sample has a source and a reason")
    return item


Count = Annotated[int, Ge(0), Le(2**48)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
RefusedSample = Annotated[dict[str, str], AfterValidator(_refused)]


@dataclass(frozen=True)
class Field:
    """One tensor of a family's record: what a row holds, and whether rows belong to images or to captions."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per: Literal["image", "caption"]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."), "per": self.per}


class StoredField(Stored):
    shape: Annotated[list[Annotated[int, Ge(1)]], MaxLen(8)]
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    per: Literal["image", "caption"]

    def to_field(self) -> Field:
        return Field(tuple(self.shape), _DTYPES[self.dtype], self.per)


class Refusals(Stored):
    """The samples that were refused for one reason: how many, and the first of them."""

    count: Count
    first: list[RefusedSample]


def count_refused(listed: Iterable[dict[str, str]]) -> dict[str, Refusals]:
    """Refused samples by reason."""
    groups: dict[str, list[dict[str, str]]] = {}
    counts: dict[str, int] = {}
    for item in listed:
        reason = _one_of(counts, item["reason"])
        counts[reason] = counts.get(reason, 0) + 1
        if len(group := groups.setdefault(reason, [])) < _LISTED:
            group.append({key: value[:_LONGEST] for key, value in item.items()})
    return {reason: Refusals(count=counts[reason], first=first) for reason, first in groups.items()}


def add_refused(parts: Iterable[dict[str, Refusals]]) -> dict[str, Refusals]:
    """The same over several shards, in their order."""
    total: dict[str, Refusals] = {}
    for part in parts:
        for reason, added in part.items():
            reason = _one_of(total, reason)
            before = total.get(reason, Refusals(count=0, first=[]))
            first = [*before.first, *added.first][:_LISTED]
            total[reason] = Refusals(count=before.count + added.count, first=first)
    return total


def _one_of(reasons: Collection[str], reason: str) -> str:
    """A reason as the index has it, which stays small however many there are: one that quotes its sample, say."""
    reason = reason[:_LONGEST]
    return reason if reason in reasons or len(reasons) < _REASONS else "other reasons"


Fields = dict[str, Annotated[StoredField, AfterValidator(_whole_field)]]


def check_fields(fields: Fields, identity: dict[str, Any], fingerprint: str) -> None:
    """Raises `ValueError` where the fields of an index, or its identity, are none."""
    if taken := [name for name in fields if name in NUMBERS + TEXTS or name.startswith(CHECKSUMS)]:
        raise ValueError(f"a field has the name of another tensor ({', '.join(taken)})")
    if "image" not in {field.per for field in fields.values()}:
        raise ValueError("no field belongs to images")
    if not all(isinstance(identity.get(name, {}), dict) for name in ("source", "models", "preprocessing")):
        raise ValueError("identity: source, models and preprocessing are objects")
    if digest_of(identity) != fingerprint:
        raise ValueError("the fingerprint is not that of the identity")


class StoredTotals(Stored):
    """What the object in the file holds in every version."""

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


class _StoredIndex(StoredTotals):
    """The object in the file, and what must be so within it."""

    refused: dict[str, Refusals]
    shards: Digest
    made_by: Annotated[list[Digest], MaxLen(64)] = []

    @model_validator(mode="after")
    def _agrees(self) -> "_StoredIndex":
        if self.refused_count != (listed := sum(refusals.count for refusals in self.refused.values())):
            raise ValueError(f"refused_count is {self.refused_count}, those by reason are {listed}")
        check_fields(self.fields, self.identity, self.fingerprint)
        return self


def crops_randomly(identity: dict[str, Any]) -> bool:
    """Whether a sample's rows depend on its number, by which its crops are drawn."""
    return identity.get("preprocessing", {}).get("random_crops") is not None


def variants_of(identity: dict[str, Any]) -> set[int]:
    """How many rows an image may have, as far as an identity says: crops, of which there may be one alone, and flips."""
    match identity.get("preprocessing"):
        case {"random_flip": bool(flips), "random_crops": int() | None as crops}:
            return {1 + flips, (crops or 1) * (1 + flips)}
    return set()


@dataclass(frozen=True)
class Index:
    """The content of `index.json` and of the arrays beside it.

    config: how the shards were asked for; only `identity` is in the fingerprint.
    shards: of dtype `ENTRY` [shards], in the order of the samples that they cover.
    refused: by reason.
    encode_seconds: from the beginning of the last build to its index, waiting for other processes included.
    made_by: what the headers of shards may have as their fingerprint; where nothing is said, that of the index.
    """

    family: str
    fingerprint: str
    identity: dict[str, Any]
    config: dict[str, Any]
    fields: dict[str, Field]
    shards: np.ndarray
    refused: dict[str, Refusals] = field(default_factory=dict)
    encode_seconds: float = 0.0
    made_by: tuple[str, ...] = ()

    def total(self, name: str) -> int:
        """The sum over shards of `records`, `image_rows`, `caption_rows`, `bytes` or `samples`."""
        return sum(self.shards[name].tolist())  # beyond 64 bits, if an index says so

    @property
    def records(self) -> int:
        return self.total("records")

    @property
    def refused_count(self) -> int:
        return sum(refusals.count for refusals in self.refused.values())

    def check(self) -> None:
        """Raises `ValueError` where `read` would refuse what `write` writes."""
        value = self._to_json("0" * 64)
        json.dumps(value, ensure_ascii=False).encode()  # texts that are none, as JSON may hold
        _check_table(self.shards, _StoredIndex.model_validate(value))

    def write(self, directory: Path) -> None:
        """Writes the arrays, then the file that names them. `sweep` removes those that it does not name any more."""
        arrays = {name: torch.from_numpy(self.shards[name].copy()) for name in ENTRY.names or ()}
        content = header_of(arrays)[0] + b"".join(bytes_of(array).numpy().tobytes() for array in arrays.values())
        sha256 = hashlib.sha256(content).hexdigest()
        write_atomically(directory / table_name(sha256), lambda path: path.write_bytes(content))
        write_json(directory / INDEX, self._to_json(sha256))

    def _to_json(self, sha256: str) -> dict[str, Any]:
        """The object in the file, with the digest of the arrays."""
        return {
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "fingerprint": self.fingerprint,
            "records": self.records,
            "image_rows": self.total("image_rows"),
            "caption_rows": self.total("caption_rows"),
            "encode_seconds": self.encode_seconds,
            "refused_count": self.refused_count,
            "refused": {reason: refusals.model_dump() for reason, refusals in self.refused.items()},
            "identity": self.identity,
            "config": self.config,
            "fields": {name: field.to_json() for name, field in self.fields.items()},
            "shards": sha256,
            **({"made_by": list(self.made_by)} if self.made_by else {}),
        }

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """What it says of itself agrees; whether it is true of a shard is seen when that is opened.

        Raises:
            UserError: there is no index, or one that this version cannot read.
        """
        while True:
            value = read_json(directory / INDEX, FORMAT_VERSION)
            try:
                return cls.from_json(value, directory.joinpath)
            except UserError:
                if read_json(directory / INDEX, FORMAT_VERSION) == value:  # else it was replaced, and its arrays removed
                    raise

    @classmethod
    def from_json(cls, value: Any, path_of: Callable[[str], Path]) -> "Index":
        """What `read_json` gave, judged.

        Args:
            path_of: where the file of a name is.
        """
        with reading(path_of(INDEX), BUILD_AGAIN):
            stored = _StoredIndex.model_validate(value)
        table = path_of(table_name(stored.shards))
        with reading(table, BUILD_AGAIN):
            if digest(table) != stored.shards:
                raise ValueError(f"altered: its digest does not match {INDEX}")
            shards = _read_table(table)
        with reading(path_of(INDEX), BUILD_AGAIN):
            _check_table(shards, stored)
        return cls(
            stored.family,
            stored.fingerprint,
            stored.identity,
            stored.config,
            {name: field.to_field() for name, field in stored.fields.items()},
            shards,
            stored.refused,
            stored.encode_seconds,
            tuple(stored.made_by),
        )


def content_of(shards: np.ndarray) -> str:
    """What tells the records of shards, an array of `ENTRY`, from others: a SHA-256 of their contents, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(shards["contents"][shards["records"] > 0]).tobytes()).hexdigest()


def read_json(path: Path, *versions: int) -> Any:
    """The content of an `index.json` of one of these versions.

    Raises:
        UserError: it is not there, cannot be read, or is of another version.
    """
    with reading(path, BUILD_AGAIN):
        try:
            value = parse_json(read_text(path))
        except FileNotFoundError:
            raise UserError(f"{path.parent}: no {INDEX} there; {_GIVE_SHARDS}") from None
        found = value.get("format_version") if isinstance(value, dict) else None
        if type(found) is int and found not in versions:
            convert = f"convert them with `python -m engine.shards convert {path.parent}`"
            remedy = convert if found == 1 else "use the version of the engine that wrote them"
            raise UserError(f"{path}: format version {found}, where {FORMAT_VERSION} is read; {remedy}")
    return value


def sweep(directory: Path) -> None:
    """Removes what writers that were killed left half written, and arrays that the index does not name.

    For who holds a lock of the directory that excludes others: another writer's arrays have no index yet.
    """
    for name in (INDEX, TABLE, SHARD_NAME, SAMPLES, BUCKETS, SIZES, HANDED):
        for leftover in directory.glob(f"{name}*{PARTIAL}"):
            leftover.unlink(missing_ok=True)
    try:
        value = parse_json(read_text(directory / INDEX))
    except FileNotFoundError:
        value = None
    except (OSError, ValueError, RecursionError):  # whoever can read it, knows
        return
    sha256 = value.get("shards") if isinstance(value, dict) else None
    for table in directory.glob(f"{TABLE}{16 * '[0-9a-f]'}.safetensors"):
        if not isinstance(sha256, str) or table.name != table_name(sha256):
            table.unlink(missing_ok=True)


def table_name(sha256: str) -> str:
    """The file with the arrays over shards, by its digest: a new index never alters what an old one names."""
    return f"{TABLE}{sha256[:16]}.safetensors"


def shard_name(number: int) -> str:
    return f"{SHARD_NAME}{number:05d}.safetensors"


def shards_in(directory: Path) -> Iterator[int]:
    """The numbers in the names of shards in a directory."""
    with os.scandir(directory) as entries:
        for entry in entries:
            number = entry.name.removeprefix(SHARD_NAME).removesuffix(".safetensors")
            if number.isdecimal() and len(number) < 16 and entry.name == shard_name(int(number)):
                yield int(number)


def _read_table(path: Path) -> np.ndarray:
    file = TensorFile(path)
    names = ENTRY.names or ()
    if different := sorted(file.header.keys() ^ set(names)):
        raise ValueError(f"{different[0]} is {'no array of an index' if different[0] in file.header else 'missing'}")
    shards = np.empty([*file.header["number"]["shape"], 0][:1], ENTRY)
    for name in names:
        dtype, shape = (ENTRY[name].base, ENTRY[name].shape)
        found = file.tensor(name).numpy()
        if found.dtype != dtype or found.shape != (len(shards), *shape):
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)}")
        shards[name] = found
    return shards


def _check_table(shards: np.ndarray, stored: _StoredIndex) -> None:
    """Whether numbers that may be any are such that sums, products and names of files can be made of them."""
    counts = {name: shards[name] for name in ENTRY.names or () if ENTRY[name] == np.int64}
    for name, numbers in counts.items():
        least = {"variants": VARYING, "captions": OWN}.get(name, 0)
        most = MOST if name in ("variants", "captions") else 2**40
        if len(beyond := np.flatnonzero((numbers < least) | (numbers > most))):
            raise ValueError(f"{name} of shard {beyond[0]} is {numbers[beyond[0]]}")
    for name in ("records", "image_rows", "caption_rows"):
        if (total := sum(counts[name].tolist())) != getattr(stored, name):
            raise ValueError(f"{name} is {getattr(stored, name)}, those of the shards are {total}")
    if (samples := sum(counts["samples"].tolist())) < stored.records + stored.refused_count:
        raise ValueError(f"{stored.records} records and {stored.refused_count} refused samples, of {samples}")
    numbers = np.sort(counts["number"])
    if len(twice := numbers[1:][numbers[1:] == numbers[:-1]]):
        raise ValueError(f"the number {twice[0]} stands there twice")
    records, captions = counts["records"], counts["captions"]
    captioned = any(field.per == "caption" for field in stored.fields.values())
    for wrong, what in (
        (
            counts["first_sample"][1:] < (counts["first_sample"] + counts["samples"])[:-1],
            "does not go on from the samples of the shard before it",
        ),
        (counts["bytes"] <= 8, "is no file of a shard: too few bytes"),
        (records > counts["samples"], "has more records than samples"),
        ((counts["variants"] == 0) & (records > 0), "has records without images"),
        ((captions != 0) & (not captioned) | (captions == 0) & captioned & (records > 0), "has captions that have no field"),
        ((captions == OWN) & (counts["caption_rows"] != records), "has not a caption for every record"),
        (
            (counts["variants"] >= 0) & (counts["variants"] * records != counts["image_rows"]),
            "has not as many image rows as its records",
        ),
    ):
        if wrong.any():
            raise ValueError(f"shard {int(wrong.argmax()) + (len(wrong) < len(shards))} {what}")
