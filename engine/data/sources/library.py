"""Data sets that the `datasets` library opens: of the hub, parquet and arrow files, and what `save_to_disk` wrote."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.sources.decode import Decoding, clean_captions, content_of, decode, size_of
from engine.data.sources.interface import Refused, Source, is_address, stamp_of, told_apart
from engine.data.sources.local import is_saved, packed_rows, saved_rows
from engine.data.sources.parquet import Column, ParquetRows
from engine.data.sources.room import room
from engine.errors import UserError, first_line

_TEXT = ("string", "large_string", "null")


class LibraryDataset(Source):
    """The `train` split of what the library opens, hub or local; images stay encoded until asked for.

    Paths in a local data set are relative to its folder, and stay within it.

    Args:
        keep_empty: takes empty captions, and rows that hold none, for captions.
    """

    def __init__(
        self,
        name: str,
        image_column: str,
        caption_column: str | None,
        configuration: str | None = None,
        cache_dir: str | None = None,
        data_dir: str | None = None,
        decoding: Decoding | None = None,
        follow_links: bool = False,
        keep_empty: bool = False,
        mask_column: str | None = None,
    ) -> None:
        import datasets

        self.keep_empty = keep_empty
        self.decoding = decoding or Decoding()
        self.bare: set[int] = set()  # rows that were found to have no mask
        self.noticed = self.decoding.noticed
        self.image_column, self.caption_column, self.mask_column = image_column, caption_column, mask_column
        try:
            rows = self._rows(_loaded(name, configuration, cache_dir, data_dir, follow_links), name)
        except UserError:
            raise
        except Exception as error:  # the library raises whatever a builder, a file system or a connection does
            said = first_line(error.__cause__ or error)
            raise UserError(f"--dataset_name {name}: cannot be loaded: {said}") from None
        self.portable = isinstance(rows, ParquetRows)  # what the library unpacked may lie on this node alone
        self._image_at, self._texts_at, self._mask_at = (
            _column(rows, column) for column in (image_column, caption_column, mask_column)
        )
        self.folder = Path(name) if Path(name).is_dir() else Path(name).resolve().parent
        # Where the library may have put its files, and where a local data set keeps its own.
        roots = [Path(cache_dir or datasets.config.HF_DATASETS_CACHE), Path(datasets.config.HF_CACHE_HOME)]
        if Path(name).exists():
            roots.append(self.folder)
        if data_dir:
            roots.append(Path(data_dir))
        self.roots = [root.resolve() for root in roots]
        # Arrow tables may be read from several threads, but the library's formatting is not documented to be safe.
        self.lock = threading.Lock()

    def _rows(self, loaded: Any, name: str) -> Any:
        """The two columns of the training rows, of kinds that the library opens nothing for."""
        import datasets

        if not isinstance(loaded, (datasets.Dataset, ParquetRows)):
            if "train" not in loaded:
                raise UserError(f"--dataset_name {name}: has no split `train` (it has {', '.join(loaded)})")
            loaded = loaded["train"]
        named = {"image_column": self.image_column, "caption_column": self.caption_column, "mask_column": self.mask_column}
        for flag, column in named.items():
            if column and column not in loaded.column_names:
                raise UserError(f"--{flag} {column}: not a column of {name}; it has {', '.join(loaded.column_names)}")
        for flag, of in (("image_column", "images"), ("mask_column", "masks")):
            if not (column := named[flag]):
                continue
            held = loaded.features[column]
            if type(held) is datasets.Image:
                if isinstance(loaded, datasets.Dataset):
                    loaded = loaded.cast_column(column, datasets.Image(decode=False))
            elif not _is_undecoded(held):
                raise UserError(f"--{flag} {column}: no images but {_kind(held)}; name the column of the {of}")
        self.fingerprint = {
            "kind": "data set",
            "name": Path(name).name,
            "rows": len(loaded),
            "fingerprint": loaded.fingerprint if isinstance(loaded, ParquetRows) else loaded._fingerprint,
        }
        if self.caption_column and not _is_text(held := loaded.features[self.caption_column]):
            raise UserError(
                f"--caption_column {self.caption_column}: neither texts nor lists of texts but {_kind(held)}; "
                "name the column of the captions"
            )
        self.files = loaded.stats() if isinstance(loaded, ParquetRows) else [loaded._fingerprint]
        self.counts = np.diff(loaded.starts) if isinstance(loaded, ParquetRows) else np.array([len(loaded)])
        return loaded

    def __len__(self) -> int:
        return int(self.counts.sum())

    def name(self, index: int) -> str:
        return f"row {index}"

    def refusal(self, index: int) -> Refused | None:
        return None

    def captions(self, index: int) -> list[str]:
        value = self._texts_at(index)
        return clean_captions("" if value is None and self.keep_empty else value, self.keep_empty)

    def content(self, index: int) -> bytes:
        with room.turn():
            return content_of(self._opened(index))

    def size(self, index: int) -> tuple[int, int]:
        return size_of(self._opened(index))

    def _opened(self, index: int) -> Path | bytes:
        with self.lock:
            value = self._image_at(index)
        return self._held(value)

    def mask(self, index: int) -> bytes | None:
        if self.mask_column is None:
            return None
        with self.lock:
            value = self._mask_at(index)
        empty = value in (None, "") or (isinstance(value, dict) and not any(value.values()))
        if empty:
            if index not in self.bare:
                self.bare.add(index)
                self.decoding.notice("no mask, trained whole")
            return None
        with room.turn():
            return content_of(self._held(value))

    def _held(self, value: Any) -> Path | bytes:
        """The file of a cell's image, or what it holds."""
        if isinstance(value, dict) and value.get("bytes") is not None:
            value = value["bytes"]
        if isinstance(value, bytes):
            return value
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            raise Refused("no image")
        if is_address(path):
            raise Refused("an address, not a file; download the images first", path[:80])
        tried = (Path(os.path.realpath(place)) for place in (path, self.folder / path))
        resolved = next((place for place in tried if place.exists()), None)
        if resolved is None:
            raise Refused("no such image file", f"{path[:200]!r} was looked for")
        if not any(resolved.is_relative_to(root) for root in self.roots):
            raise Refused("path leaves the data set")
        return resolved

    def decode(self, content: bytes) -> Image.Image:
        return decode(content, self.decoding)

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        columns = (self.image_column, self.caption_column, *filter(None, [self.mask_column]))
        stamps = [stamp_of(file, *columns) for file in self.files]
        return told_apart(stamps), self.counts

    def identity(self) -> dict[str, Any]:
        return self.fingerprint


def _nothing(row: int) -> None:
    """The value of a column that is not asked for."""


def _column(rows: Any, name: str | None) -> Callable[[int], Any]:
    """The values of a column by row."""
    if name is None:
        return _nothing
    if isinstance(rows, ParquetRows):
        return Column(rows, name).__getitem__
    selected = rows.with_format(None).select_columns([name])
    return lambda index: selected[index][name]


def _loaded(name: str, configuration: str | None, cache_dir: str | None, data_dir: str | None, follow_links: bool) -> Any:
    """The rows by split; `name` is a data set of the hub, a folder or a file."""
    import datasets

    place = Path(name)
    if is_saved(place):
        return saved_rows(place, follow_links)
    if place.exists():
        return packed_rows(place, data_dir, configuration, cache_dir, follow_links)
    return datasets.load_dataset(name, name=configuration, cache_dir=cache_dir, data_dir=data_dir)


def _is_undecoded(feature: Any) -> bool:
    """Whether a column holds images as bytes, paths or both, which the library hands out as they are."""
    import datasets

    if isinstance(feature, dict):
        plain = all(isinstance(inner, datasets.Value) for inner in feature.values())
        return plain and any(name in feature and _is_undecoded(feature[name]) for name in ("bytes", "path"))
    return type(feature) is datasets.Value and feature.dtype in (*_TEXT, "binary", "large_binary")


def _is_text(feature: Any) -> bool:
    """Whether a column holds texts or lists of texts."""
    import datasets

    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return type(feature) is datasets.Value and feature.dtype in _TEXT


def _kind(feature: Any) -> str:
    return str(feature)[:100]
