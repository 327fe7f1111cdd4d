"""Data sets that the `datasets` library opens: of the hub, parquet and arrow files, and what `save_to_disk` wrote."""

import io
import os
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.sources.decode import Decoding, clean_captions, decode
from engine.data.sources.interface import Refused, is_address
from engine.errors import UserError, first_line


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


class LibraryDataset:
    """The `train` split of what the library opens, hub or local; images stay encoded until asked for.

    Paths in a local data set are relative to its folder, and stay within it.
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
    ) -> None:
        import datasets

        self.decoding = decoding or Decoding()
        self.noticed = self.decoding.noticed
        self.image_column, self.caption_column = image_column, caption_column
        rows = _training_rows(name, configuration, cache_dir, data_dir)
        for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column is not None and column not in rows.column_names:
                raise UserError(f"--{flag} {column}: not a column of {name}; it has {', '.join(rows.column_names)}")
        if isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.images = rows.select_columns([image_column])
        self.texts = rows.select_columns([caption_column]) if caption_column else None
        self.fingerprint = {
            "kind": "data set",
            "name": Path(name).name,
            "rows": len(rows),
            "fingerprint": rows._fingerprint,
        }
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

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"row {index}"

    def refusal(self, index: int) -> Refused | None:
        return None

    def captions(self, index: int) -> list[str]:
        return clean_captions(self.texts[index][self.caption_column] if self.texts else None)

    def image(self, index: int) -> Image.Image:
        with self.lock:
            value = self.images[index][self.image_column]
        if isinstance(value, dict) and value.get("bytes") is not None:
            value = value["bytes"]
        if isinstance(value, bytes):
            return decode(io.BytesIO(value), self.decoding)
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
        return decode(resolved, self.decoding)

    def identity(self) -> dict[str, Any]:
        return self.fingerprint


def _training_rows(name: str, configuration: str | None, cache_dir: str | None, data_dir: str | None) -> Any:
    """The `train` split; `name` is a data set of the hub, a folder or a file."""
    import datasets

    arguments: dict[str, Any] = {"path": name}
    file = Path(name).resolve()
    if file.is_file():
        arguments = {"path": file.suffix.lstrip("."), "data_files": str(file)}
    try:
        if is_saved(Path(name)):
            loaded = datasets.load_from_disk(name)
            for rows in loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]:
                rows.data.validate(full=True)  # whose offsets would be read past the file otherwise
        else:
            loaded = datasets.load_dataset(**arguments, name=configuration, cache_dir=cache_dir, data_dir=data_dir)
    except Exception as error:  # the library raises whatever a builder, a file system or a connection does
        raise UserError(f"--dataset_name {name}: cannot be loaded: {first_line(error)}") from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if "train" not in loaded:
        raise UserError(f"--dataset_name {name}: has no split `train` (it has {', '.join(loaded)})")
    return loaded["train"]
