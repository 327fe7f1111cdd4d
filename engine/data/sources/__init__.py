"""Source samples: image folders and data sets, read one sample at a time, with a reason for each one that cannot be used."""

import csv
import io
import json
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from engine.config.options import CacheConfig
from engine.errors import UserError, first_line
from engine.files import digest, digest_of

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class Refused(Exception):
    """This sample cannot be trained on; the message says why, in a few words."""


class Source(Protocol):
    """Samples by number. `image` and `captions` raise `Refused` for a sample that cannot be used."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a sample in a report."""
        ...

    def captions(self, index: int) -> list[str]: ...

    def image(self, index: int) -> Image.Image:
        """The decoded image in RGB. Called from several threads."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells this data set from another, for the fingerprint of the shards."""
        ...


def open_source(config: CacheConfig, captioned: bool = True) -> Source:
    """The source that a configuration names, cut to --max_train_samples.

    Args:
        captioned: whether the family trains on captions; else the source need not have any.

    Raises:
        UserError: nothing there, or not readable.
    """
    source: Source
    caption_column = config.caption_column if captioned else None
    if config.dataset_name:
        source = LibraryDataset(config, caption_column)
    elif config.train_data_dir:
        source = ImageFolder(Path(config.train_data_dir), config.image_column, caption_column)
    else:
        raise UserError("no data to build shards from: give --train_data_dir or --dataset_name")
    if len(source) == 0:
        raise UserError(f"{config.dataset_name or config.train_data_dir}: no samples found")
    if config.max_train_samples is not None and config.max_train_samples < len(source):
        return Subset(source, config.max_train_samples, config.seed or 0)
    return source


def decode(data: Path | io.BytesIO) -> Image.Image:
    """Reads an image whole, upright and in RGB, as `datasets` and the scripts do together.

    Raises:
        Refused: not an image, truncated, or so large that decoding it could exhaust memory (PIL's limit).
    """
    try:
        # PIL warns between one and two times its pixel limit, and refuses above; only the refusal matters here. The scripts
        # drop a palette's transparency too.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency")
            with Image.open(data) as image:
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise Refused("image too large to decode safely") from None
    except FileNotFoundError:
        raise Refused("no such image file") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise Refused(f"unreadable image: {first_line(error)[:120]}") from None


def clean_captions(value: Any) -> list[str]:
    """A caption column's value as a list of captions that are not empty.

    Raises:
        Refused: none is left, or the value is neither text nor a list of texts.
    """
    if value is None or (isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0):
        raise Refused("no caption")
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, np.ndarray)) or not all(isinstance(item, str) for item in values):
        raise Refused("caption is neither text nor a list of texts")
    captions = [item for item in values if item.strip()]
    if not captions:
        raise Refused("empty caption")
    return captions


class ImageFolder:
    """A folder of images with captions in `metadata.jsonl` or `metadata.csv`, in the folder itself or in subfolders.

    Each line names its image, relative to the metadata file, in `file_name` (or `<image column>_file_name`). Images that no
    metadata names are listed as refused. Without a caption column no metadata are needed, and every image counts.
    """

    def __init__(self, folder: Path, image_column: str, caption_column: str | None) -> None:
        self.folder = folder.resolve()
        self.caption_column = caption_column
        self.metadata_files = sorted(path for name in METADATA_NAMES for path in self.folder.rglob(name) if path.is_file())
        if not self.metadata_files and caption_column:
            raise UserError(
                f"--train_data_dir {folder}: no metadata.jsonl or metadata.csv there; "
                'write one with a line {"file_name": "image.png", "text": "a caption"} per image'
            )
        file_columns = ["file_name"] if image_column == "image" else [f"{image_column}_file_name", "file_name"]
        self.samples: list[tuple[Path, Any]] = []
        for metadata in self.metadata_files:
            for number, row in _read_metadata(metadata):
                file_column = next((column for column in file_columns if column in row), None)
                if file_column is None:
                    raise UserError(f"{metadata}: line {number} has no {file_columns[0]}; name the image in that column")
                if caption_column and caption_column not in row:
                    found = ", ".join(sorted(set(row) - {file_column})) or "none"
                    raise UserError(
                        f"{metadata}: line {number} has no column {caption_column!r} (others: {found}); set --caption_column"
                    )
                self.samples.append(
                    (metadata.parent / str(row[file_column]), row.get(caption_column) if caption_column else None)
                )
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


class LibraryDataset:
    """The `train` split of anything that `datasets.load_dataset` opens, hub or local; images stay encoded until asked for."""

    def __init__(self, config: CacheConfig, caption_column: str | None) -> None:
        import datasets

        name = str(config.dataset_name)
        self.local = Path(name).resolve() if Path(name).exists() else None
        arguments: dict[str, Any] = {"path": name}
        if self.local is not None and self.local.is_file():
            arguments = {"path": self.local.suffix.lstrip(".").replace("jsonl", "json"), "data_files": str(self.local)}
        try:
            loaded = datasets.load_dataset(
                **arguments, name=config.dataset_config_name, cache_dir=config.cache_dir, data_dir=config.train_data_dir
            )
        except Exception as error:  # the library raises whatever a builder, a file system or a connection does
            raise UserError(f"--dataset_name {name}: cannot be loaded: {first_line(error)}") from None
        if "train" not in loaded:
            raise UserError(f"--dataset_name {name}: has no split `train` (it has {', '.join(loaded)})")
        rows = loaded["train"]
        for flag, column in (("image_column", config.image_column), ("caption_column", caption_column)):
            if column is not None and column not in rows.column_names:
                raise UserError(f"--{flag} {column}: not a column of {name}; it has {', '.join(rows.column_names)}")
        if isinstance(rows.features[config.image_column], datasets.Image):
            rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
        self.images = rows.select_columns([config.image_column])
        self.texts = rows.select_columns([caption_column]) if caption_column else None
        self.image_column, self.caption_column = config.image_column, caption_column
        cache_root = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE).resolve()
        self.roots = [cache_root, Path(datasets.config.HF_CACHE_HOME).resolve()]
        if self.local is not None:
            self.roots.append(self.local if self.local.is_dir() else self.local.parent)
        if config.train_data_dir:
            self.roots.append(Path(config.train_data_dir).resolve())
        self.fingerprint = {
            "kind": "data set",
            "name": Path(name).name,
            "rows": len(rows),
            "fingerprint": rows._fingerprint,
        }
        # Arrow tables may be read from several threads, but the library's formatting is not documented to be safe.
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"row {index}"

    def captions(self, index: int) -> list[str]:
        return clean_captions(self.texts[index][self.caption_column] if self.texts else None)

    def image(self, index: int) -> Image.Image:
        with self.lock:
            value = self.images[index][self.image_column]
        if isinstance(value, dict) and value.get("bytes") is not None:
            value = value["bytes"]
        if isinstance(value, bytes):
            return decode(io.BytesIO(value))
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            raise Refused("no image")
        resolved = Path(path).resolve()
        if not any(resolved.is_relative_to(root) for root in self.roots):
            raise Refused("path leaves the data set")
        return decode(resolved)

    def identity(self) -> dict[str, Any]:
        return self.fingerprint


class Subset:
    """The first `count` samples of another source in a seeded random order, the one `datasets.Dataset.shuffle` takes."""

    def __init__(self, source: Source, count: int, seed: int) -> None:
        self.source, self.count, self.seed = source, count, seed
        self.indices = np.random.default_rng(seed).permutation(len(source))[:count]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.indices[index]))

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.indices[index]))

    def identity(self) -> dict[str, Any]:
        return self.source.identity() | {"samples": self.count, "sample_seed": self.seed}
