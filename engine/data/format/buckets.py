"""What `buckets.json` says: which sizes the images of a data set were brought to, each in a directory of shards beside it."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen
from pydantic import model_validator

from engine.data.format.index import BUCKETS, Count, Index, Stored
from engine.files import parse_json, read_text, reading, write_json

WRITE_AGAIN = "delete it and build again, which writes it and encodes nothing twice, or get a whole copy"
Side = Annotated[int, Ge(1), Le(2**20)]
Size = tuple[int, int]  # width and height


def name_of(size: Size) -> str:
    """That of the directory of a size's shards."""
    return f"{size[0]}x{size[1]}"


def size_named(name: str) -> Size:
    width, height = map(int, name.split("x"))
    return width, height


def is_name(folder: str) -> bool:
    """Whether a folder is called as one of a size's shards is."""
    return re.fullmatch(r"[1-9]\d*x[1-9]\d*", folder) is not None


class Bucket(Stored):
    """One size, and what became of the images that were brought to it.

    images: how many became records.
    refused: how many could not be used.
    cropped: which share of an image's area was cropped away, on average.
    """

    width: Side
    height: Side
    images: Count
    refused: Count
    cropped: Annotated[float, Ge(0), Le(1)]

    @property
    def name(self) -> str:
        """That of its directory."""
        return name_of((self.width, self.height))


class Buckets(Stored):
    """The content of `buckets.json`.

    options: by which the sizes were made, or chosen.
    buckets: those that have images, from the narrowest to the widest.
    """

    format_version: Literal[1] = 1
    options: dict[str, Any]
    buckets: Annotated[list[Bucket], MaxLen(2**16)]

    @model_validator(mode="after")
    def _agrees(self) -> "Buckets":
        names = [bucket.name for bucket in self.buckets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} stands there twice")
        if not any(bucket.images for bucket in self.buckets):
            raise ValueError("no bucket has an image")
        return self

    def write(self, directory: Path) -> None:
        write_json(directory / BUCKETS, json.loads(self.model_dump_json()))

    @classmethod
    def read(cls, path: Path) -> "Buckets":
        """The content of a file of others.

        Raises:
            UserError: it cannot be read.
        """
        with reading(path, WRITE_AGAIN):
            return cls.model_validate(parse_json(read_text(path)))


def read_indexes(directory: Path) -> dict[str, Index]:
    """The indexes of a directory's buckets, by their names; that of a directory of one size by "".

    Raises:
        UserError: one is not there, or cannot be read.
    """
    if not is_bucketed(directory):
        return {"": Index.read(directory)}
    return {bucket.name: Index.read(directory / bucket.name) for bucket in Buckets.read(directory / BUCKETS).buckets}


def is_bucketed(directory: Path) -> bool:
    return (directory / BUCKETS).is_file()
