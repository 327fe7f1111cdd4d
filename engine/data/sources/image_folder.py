"""Images in a folder, with captions in metadata files beside them."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.sources.decode import clean_captions, decode
from engine.data.sources.interface import Refused
from engine.errors import UserError
from engine.files import digest, digest_of

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class ImageFolder:
    """A folder of images with captions in `metadata.jsonl` or `metadata.csv`, in the folder itself or in subfolders.

    Each line names its image, relative to the metadata file, in `file_name` (or `<image column>_file_name`). Images that no
    metadata names are listed as refused. Without a caption column no metadata are needed, and every image counts.
    """

    def __init__(self, folder: Path, image_column: str, caption_column: str | None) -> None:
        self.noticed: Counter[str] = Counter()
        self.folder = folder.resolve()
        self.metadata_files = sorted(path for name in METADATA_NAMES for path in self.folder.rglob(name) if path.is_file())
        if not self.metadata_files and caption_column:
            raise UserError(
                f"--train_data_dir {folder}: no metadata.jsonl or metadata.csv there; "
                'write one with a line {"file_name": "image.png", "text": "a caption"} per image'
            )
        self.samples: list[tuple[Path, Any]] = []
        for metadata in self.metadata_files:
            self.samples.extend(_samples_of(metadata, image_column, caption_column))
        # Compared as written, without resolving links: a link that leaves the folder is refused when it is read.
        named = {os.path.normpath(path) for path, _ in self.samples}
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and os.path.normpath(path) not in named:
                self.samples.append((path, None))

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return os.path.relpath(self.samples[index][0], self.folder)

    def captions(self, index: int) -> list[str]:
        return clean_captions(self.samples[index][1])

    def image(self, index: int) -> Image.Image:
        path = self.samples[index][0].resolve()
        if not path.is_relative_to(self.folder):
            raise Refused("path leaves the folder")
        return decode(path)

    def identity(self) -> dict[str, Any]:
        files = []
        for path, _ in self.samples:
            try:
                stat = path.stat()
                files.append([os.path.relpath(path, self.folder), stat.st_size, stat.st_mtime_ns])
            except OSError:
                files.append([os.path.relpath(path, self.folder), None, None])
        metadata = {str(path.relative_to(self.folder)): digest(path) for path in self.metadata_files}
        return {"kind": "image folder", "metadata": metadata, "files": digest_of(files)}


def _samples_of(metadata: Path, image_column: str, caption_column: str | None) -> Iterator[tuple[Path, Any]]:
    """The images that a metadata file names, and their captions as they stand there."""
    file_columns = ["file_name"] if image_column == "image" else [f"{image_column}_file_name", "file_name"]
    for number, row in _read_metadata(metadata):
        file_column = next((column for column in file_columns if column in row), None)
        if file_column is None:
            raise UserError(f"{metadata}: line {number} has no {file_columns[0]}; name the image in that column")
        if caption_column and caption_column not in row:
            found = ", ".join(sorted(set(row) - {file_column})) or "none"
            raise UserError(
                f"{metadata}: line {number} has no column {caption_column!r} (others: {found}); set --caption_column"
            )
        yield metadata.parent / str(row[file_column]), row[caption_column] if caption_column else None


def _read_metadata(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a metadata file with their line numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                for row in (reader := csv.DictReader(file)):
                    yield reader.line_num, dict(row)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}: line {number} is not a JSON object")
                    yield number, row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
