"""Source samples, read one at a time, with a reason for each one that cannot be used."""

from pathlib import Path

from engine.config.options import CacheConfig
from engine.data.sources.image_folder import ImageFolder
from engine.data.sources.interface import Source
from engine.data.sources.library import LibraryDataset
from engine.data.sources.subset import Subset
from engine.errors import UserError


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
        source = LibraryDataset(
            config.dataset_name,
            config.image_column,
            caption_column,
            configuration=config.dataset_config_name,
            cache_dir=config.cache_dir,
            data_dir=config.train_data_dir,
        )
    elif config.train_data_dir:
        source = ImageFolder(Path(config.train_data_dir), config.image_column, caption_column)
    else:
        raise UserError("no data to build shards from: give --train_data_dir or --dataset_name")
    if len(source) == 0:
        raise UserError(f"{config.data}: no samples found")
    if config.max_train_samples is not None and config.max_train_samples < len(source):
        return Subset(source, config.max_train_samples, config.sample_seed)
    return source
