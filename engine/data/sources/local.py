"""Local data sets in the forms of the `datasets` library, read from files inside their folder and from no others.

The library itself follows what a folder's README names, wherever that lies, and chooses what reads a folder by what else lies
there. So the files are listed here, and only the library's readers of parquet and arrow are given them. Where they lie, how
they are split and what the rows are called is as the library has it, so that shards built before keep their fingerprint.
"""

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from engine.data.sources.files import Files, suffix_of
from engine.data.sources.parquet import ParquetRows
from engine.data.sources.tables import rows_at_once
from engine.errors import UserError
from engine.files import lies_inside, open_regular, parse_json, read_text
from engine.messages import say

if TYPE_CHECKING:
    import datasets

PACKED = (".parquet", ".arrow")
_LARGEST_CARD = 2**20  # bytes of a README
_LONGEST_PATTERN, _MOST_WILDCARDS = 1000, 8  # more would take their time
_LEAST_BOUND, _MOST_TIMES = 2**28, 16  # bytes that rows may take in any case, and for each byte of their files


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def saved_rows(place: Path, follow_links: bool) -> "dict[str, datasets.Dataset]":
    """The rows that `save_to_disk` wrote; of several splits those of `train` alone.

    Raises:
        UserError: they are said to lie out of the folder.
    """
    import datasets

    folder = place
    if (place / "dataset_dict.json").is_file():
        _check_inside(place / "dataset_dict.json", place, follow_links)
        splits = parse_json(read_text(place / "dataset_dict.json"))["splits"]
        if "train" not in splits:
            return dict.fromkeys(splits)
        folder = place / "train"
    for name in ("state.json", "dataset_info.json"):
        _check_inside(folder / name, place, follow_links)
    for entry in parse_json(read_text(folder / "state.json"))["_data_files"]:
        name = entry["filename"]
        if name in ("", ".", "..") or PurePosixPath(name).name != name:
            raise UserError(f"{folder / 'state.json'}: {name!r} is no file of its folder; save the data set again")
        _check_inside(folder / name, place, follow_links)
        _check_unpacked(folder / name)
    rows = datasets.Dataset.load_from_disk(str(folder))
    rows.data.validate(full=True)  # whose offsets would be read past the file otherwise
    return {"train": rows}


def packed_rows(
    place: Path, data_dir: str | None, configuration: str | None, cache_dir: str | None, follow_links: bool
) -> "dict[str, datasets.Dataset] | dict[str, ParquetRows | None]":
    """The rows of a folder or of one file, by split: where they lie, of parquet, and of `train` alone; else unpacked into the
    library's cache.

    Raises:
        UserError: the folder leads out of itself.
    """
    if place.is_file():
        builder = _file_builder(place.resolve(), configuration, cache_dir)
    else:
        builder = _folder_builder(place, data_dir, configuration, cache_dir, follow_links)
    files = [Path(file) for split in builder.config.data_files.values() for file in split]
    for file in files:
        _check_inside(file, file if place.is_file() else place, follow_links)
        if file.suffix.lower() == ".arrow":
            _check_unpacked(file)
    if getattr(builder.config, "filters", ()) is None:  # of parquet, all rows
        return {
            str(split): ParquetRows(list(map(Path, files)), builder._get_dataset_fingerprint(split))
            if split == "train"
            else None
            for split, files in builder.config.data_files.items()
        }
    if hasattr(builder.config, "batch_size"):
        builder.config.batch_size = min(map(_rows_at_once, files))
    builder._generate_tables = _bounded(builder._generate_tables, _bound(files))
    builder.download_and_prepare()
    return builder.as_dataset()


def _check_inside(file: Path, folder: Path, follow_links: bool) -> None:
    if "::" in str(file):  # which the library takes for an archive and a file in it
        raise UserError(f"{file}: `::` in the name of a file means something else to `datasets`; rename it")
    if not follow_links and not lies_inside(file, folder):
        raise UserError(f"{file}: a link to {file.resolve()}, out of the data set; --follow_links follows links")
    open_regular(file).close()


def _rows_at_once(file: Path) -> int:
    with open_regular(file) as content:
        return rows_at_once(content)


def _bound(files: list[Path]) -> int:
    """Bytes that the rows of files may take."""
    return max(_LEAST_BOUND, _MOST_TIMES * sum(file.stat().st_size for file in files))


def _check_unpacked(file: Path) -> None:
    """Raises `ValueError` for an arrow file whose buffers, unpacked a batch at once, become too large by what they say."""
    import pyarrow

    left = _bound([file])
    with pyarrow.memory_map(str(file)) as source:
        source.seek(8 if source.read(6) == b"ARROW1" else 0)  # a stream, within a file that also has a table of contents
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            left -= _unpacked_size(message)
            if left < 0:
                raise ValueError(f"{file}: its rows take many times its size")


def _unpacked_size(message: Any) -> int:
    """Bytes of the buffers of an arrow message: where they are compressed, each begins with what it becomes."""
    if message.type not in ("record batch", "dictionary batch"):
        return 0
    data = memoryview(message.metadata)

    def number(place: int, kind: str = "<I") -> int:
        return struct.unpack_from(kind, data, place)[0]

    def pointed(table: int, field: int) -> int:
        """Where a field of a table of FlatBuffers points to; 0 for one that is absent."""
        fields = table - number(table, "<i")
        offset = number(fields + 4 + 2 * field, "<H") if 4 + 2 * field < number(fields, "<H") else 0
        return table + offset + number(table + offset) if offset else 0

    batch = pointed(number(0), 2)
    if message.type == "dictionary batch":
        batch = pointed(batch, 1)
    buffers, compressed = pointed(batch, 2), pointed(batch, 3)
    if not compressed or not buffers:
        return message.body.size if message.body else 0
    places = struct.iter_unpack("<qq", data[buffers + 4 : buffers + 4 + 16 * number(buffers)])
    body = memoryview(message.body)
    return sum(max(struct.unpack_from("<q", body, place)[0], length - 8) for place, length in places if length > 0)


def _bounded(generate: Callable[..., Iterator], most: int) -> Callable[..., Iterator]:
    """`generate`, which is an error as soon as its tables take more than so many bytes."""
    total = 0

    def tables(*arguments: Any, **keywords: Any) -> Iterator:
        nonlocal total
        for key, table in generate(*arguments, **keywords):
            total += table.nbytes + 8 * table.num_rows * table.num_columns
            if total > most:
                raise ValueError(f"its rows take more than {most >> 20} MiB, many times the size of its files")
            yield key, table

    return tables


def _file_builder(file: Path, configuration: str | None, cache_dir: str | None) -> Any:
    from datasets import load
    from datasets.data_files import DataFilesDict

    reader = suffix_of(file.name)[1:]
    module, digest = load._PACKAGED_DATASETS_MODULES[reader]
    files = DataFilesDict({"train": _listed([str(file)])})
    return load.import_main_class(module)(
        cache_dir=cache_dir, dataset_name=reader, config_name=configuration, hash=digest, data_files=files
    )


def _folder_builder(
    place: Path, data_dir: str | None, configuration: str | None, cache_dir: str | None, follow_links: bool
) -> Any:
    """What `datasets.load_dataset_builder` makes of a folder; the same files have the same fingerprint."""
    from datasets import load
    from datasets.data_files import DataFilesDict, DataFilesPatternsDict
    from datasets.fingerprint import Hasher

    listing = _Listing(Path(place, data_dir or ""), follow_links)
    card, infos = _card(place, follow_links)
    for described in card.values():
        described.setdefault("data_files", listing.patterns(described.get("data_dir")))
    first = next(iter(card.values()))["data_files"] if card and not data_dir else None
    files = listing.resolve(load.sanitize_patterns(first) if first else listing.patterns())
    kinds = Counter(suffix for split in files.values() for file in split if (suffix := suffix_of(file)) in PACKED)
    if not kinds:
        raise UserError(f"{place}: no {' or '.join(PACKED)} files in its splits ({', '.join(files)})")
    reader = kinds.most_common(1)[0][0][1:]
    files = files.filter(extensions=load._MODULE_TO_EXTENSIONS[reader])
    module = load._PACKAGED_DATASETS_MODULES[reader][0]
    main_class = load.import_main_class(module)
    configs, default = [main_class.BUILDER_CONFIG_CLASS(data_files=files)], None
    if card:
        configs, default = load.create_builder_configs_from_metadata_configs(module, card)
        for config in configs:  # the library keeps its own patterns by splits, and others by their names
            if isinstance(patterns := card[config.name]["data_files"], dict):
                config.data_files = DataFilesPatternsDict.from_patterns(patterns, load._ALL_ALLOWED_EXTENSIONS)
    default = default or (next(iter(infos)) if len(infos) == 1 else None)
    digest = Hasher.hash({"dataset_infos": infos, "builder_configs": configs})
    for config in configs:  # what is resolved here the library does not look for
        if not isinstance(config.data_files, DataFilesDict):
            config.data_files = files if data_dir else listing.resolve(config.data_files, config.data_dir)
    name = configuration or default
    builder = load.configure_builder_class(main_class, configs, default, dataset_name=place.name)
    return builder(
        cache_dir=cache_dir,
        dataset_name=place.name,
        config_name=name,
        hash=digest,
        info=None if data_dir else infos.get(name),
        **({"data_dir": data_dir, "data_files": files} if data_dir else {}),
    )


def _card(place: Path, follow_links: bool) -> tuple[Any, Any]:
    """What the README of a data set (and the file that it was before) says of its subsets, and of their columns.

    Raises:
        UserError: it names a place out of the folder, or no version.
    """
    from datasets.info import DatasetInfo, DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    found = [path for name in ("README.md", ".huggingface.yaml", "dataset_infos.json") if (path := place / name).is_file()]
    for path in found:
        _check_inside(path, place, follow_links)
        if path.stat().st_size > _LARGEST_CARD:
            raise UserError(f"{path}: larger than {_LARGEST_CARD >> 20} MiB; take it away")
        if path.name == ".huggingface.yaml":
            raise UserError(f"{path}: not read; take it away, or write what it says into README.md")
    says = DatasetCard(read_text(place / "README.md")).data if place / "README.md" in found else DatasetCardData()
    card, infos = MetadataConfigs.from_dataset_card_data(says), DatasetInfosDict.from_dataset_card_data(says)
    if place / "dataset_infos.json" in found:
        older = {
            name: DatasetInfo.from_dict(info) for name, info in parse_json(read_text(place / "dataset_infos.json")).items()
        }
        infos = DatasetInfosDict(({"default": next(iter(older.values()))} if len(older) == 1 else older) | infos)
    for name, described in card.items():
        if name.startswith(".") or not re.fullmatch(r"\d+\.\d+\.\d+", str(described.get("version", "0.0.0"))):
            raise UserError(f"{place / 'README.md'}: subset {name!r}: not a name and a version; mend its `configs`")
    return card, infos


class _Listing:
    """The files below a folder, found by the library's patterns as the library finds them."""

    def __init__(self, base: Path, follow_links: bool) -> None:
        from datasets.data_files import FILES_TO_IGNORE
        from datasets.load import _ALL_ALLOWED_EXTENSIONS

        found = Files(base, follow_links)
        for remark in found.remarks:
            say(f"{base}: {remark}")
        self.base = found.folder
        allowed, ignored = set(_ALL_ALLOWED_EXTENSIONS), set(FILES_TO_IGNORE)
        self.names = sorted(
            name
            for name in found.names
            if not any(part.startswith("__") for part in name.split("/")[:-1])
            and (file := name.rpartition("/")[2]) not in ignored
            and any(f".{part}" in allowed for part in file.split(".")[1:])
        )

    def patterns(self, folder: str | None = None) -> dict[str, list[str]]:
        """The library's own patterns that fit the names."""
        from datasets.data_files import _get_data_files_patterns

        return _get_data_files_patterns(lambda pattern: self._matching(pattern, folder))

    def resolve(self, patterns: dict[str, list[str]], folder: str | None = None) -> Any:
        from datasets.data_files import DataFilesDict

        return DataFilesDict(
            {
                split: _listed([f"{self.base}/{name}" for pattern in several for name in self._matching(pattern, folder)])
                for split, several in patterns.items()
            }
        )

    def _matching(self, pattern: str, folder: str | None) -> list[str]:
        from fsspec.utils import glob_translate

        whole = os.path.normpath(f"{folder or '.'}/{pattern}")
        if Path(pattern).is_absolute() or ":" in pattern or whole.startswith(("..", "/")):
            raise UserError(f"{self.base / 'README.md'}: {pattern[:200]!r} leads out of the data set; mend its `configs`")
        if len(whole) > _LONGEST_PATTERN or whole.count("*") > _MOST_WILDCARDS:
            raise UserError(f"{self.base / 'README.md'}: {pattern[:200]!r} has too many `*`; mend its `configs`")
        known = re.compile(glob_translate(whole))
        found = [name for name in self.names if known.match(name)]
        if not found and not has_magic(whole):
            raise FileNotFoundError(f"no file {whole}")
        return found


def _listed(files: list[str]) -> Any:
    from datasets.data_files import DataFilesList, _get_origin_metadata

    return DataFilesList(files, _get_origin_metadata(files))
