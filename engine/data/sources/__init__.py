"""Source samples, read one at a time, with a reason for each one that cannot be used."""

import os
from pathlib import Path

from engine.config.options import CacheConfig
from engine.data.sources.decode import Decoding
from engine.data.sources.files import ARCHIVES, is_hidden, suffix_of
from engine.data.sources.image_folder import METADATA_NAMES, ImageFolder
from engine.data.sources.interface import Source
from engine.data.sources.kinds import looks_like_image
from engine.data.sources.library import LibraryDataset
from engine.data.sources.local import PACKED, is_saved
from engine.data.sources.subset import Prompted, drawn_from
from engine.data.sources.tables import TABLES
from engine.errors import UserError

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def open_source(config: CacheConfig, captioned: bool = True) -> Source:
    """The source that a configuration names, cut to --max_train_samples.

    Args:
        captioned: whether the family trains on captions; else the source need not have any.

    Raises:
        UserError: nothing there, or not readable.
    """
    caption_column = config.caption_column if captioned and config.prompt is None else None
    decoding = Decoding(config.image_mode, config.background_color)
    place = _local_place(config)
    source: Source
    if place is not None and not _is_for_the_library(place):
        source = ImageFolder(
            place,
            config.image_column,
            caption_column,
            encoding=config.metadata_encoding,
            follow_links=config.follow_links,
            decoding=decoding,
            keep_empty=config.keep_empty_captions,
            mask_column=config.mask_column,
            masks_may_lack=config._masks_may_lack,
        )
    elif config.source:
        source = LibraryDataset(
            config.source,
            config.image_column,
            caption_column,
            configuration=config.dataset_config_name,
            cache_dir=config.cache_dir,
            data_dir=config.train_data_dir if config.dataset_name else None,
            decoding=decoding,
            follow_links=config.follow_links,
            keep_empty=config.keep_empty_captions,
            mask_column=config.mask_column,
        )
    else:
        raise UserError("no data to build shards from: give --train_data_dir or --dataset_name")
    if len(source) == 0:
        raise UserError(f"{config.source}: no samples found")
    if captioned and config.prompt is not None:
        source = Prompted(source, config.prompt)
    if config.max_train_samples is not None and config.max_train_samples < len(source):
        return drawn_from(source, config.max_train_samples, config.sample_seed)
    return source


def _local_place(config: CacheConfig) -> Path | None:
    """The folder or file that holds the data set, by whichever option; None where it is the hub's."""
    name, folder = config.dataset_name, config.train_data_dir
    if name is None or (name == "imagefolder" and folder and not Path(name).exists()):
        return Path(folder) if folder else None
    if not Path(name).exists():
        return None
    return Path(name, folder) if folder else Path(name)


def _is_for_the_library(place: Path) -> bool:
    """Whether `datasets` reads this folder or file, which is not images with captions beside them.

    Raises:
        UserError: neither of them can.
    """
    kinds = {place.suffix.lower()} if place.is_file() else set()
    if is_saved(place):
        _refuse_others_than_files(place)
        return True
    for _, folders, files in os.walk(place):
        if any(name in files for name in METADATA_NAMES):
            return False
        folders[:] = [name for name in folders if not is_hidden(name)]
        kinds |= {suffix_of(name) for name in files if not is_hidden(name)}
    if kinds & {*PACKED}:
        _refuse_others_than_files(place)
        return True
    if kinds & {*ARCHIVES, *TABLES} or (place.is_dir() and any(map(_is_of_images, kinds))):
        return False
    if kinds & {*_COMPRESSED}:
        raise UserError(f"{place}: compressed archives are not read in any order; unpack them, or make .zip or .tar of them")
    raise UserError(
        f"{place}: no images, no tables ({', '.join(TABLES)}) and no archives ({', '.join(ARCHIVES)}) there; "
        f"it holds {', '.join(sorted(kinds - {''})) or 'nothing'}"
    )


def holds_data(folder: Path) -> bool:
    """Whether anything below a folder is called as data are, readable or not; links are data, wherever they lead."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        kinds = {suffix_of(name) for name in files if not is_hidden(name)}
        if kinds & {*ARCHIVES, *TABLES, *PACKED, *_COMPRESSED} or any(map(_is_of_images, kinds)):
            return True
        if any(Path(place, name).is_symlink() for name in folders):
            return True
    return False


def _is_of_images(suffix: str) -> bool:
    return looks_like_image(f"image{suffix}")


def _refuse_others_than_files(place: Path) -> None:
    """Raises `UserError` for a pipe or a device, which the library would open and wait for."""
    for folder, _, files in os.walk(place):
        for file in files:
            path = Path(folder, file)
            if path.exists() and not path.is_file():
                raise UserError(f"{path}: not a regular file; take it away")
