"""The parts of a run's data: directories of shards, each of one data set and of one size of its images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.config.options import CacheConfig
from engine.data.encode import encode_source
from engine.data.format.index import Index
from engine.data.format.remote import read_index
from engine.messages import busy
from engine.models.encoder import Encoding
from engine.processes import Processes
from engine.storage import Storage


@dataclass(frozen=True)
class Part:
    """One directory of shards.

    data_set: its name; "" where there is one, without a name.
    bucket: the size of its images, as 640x384; None where all images have that of the run.
    config: as the run's, with the options of this data set; `shards_dir` is the part's own directory or address.
    encoding: of its size.
    """

    data_set: str
    bucket: str | None
    config: CacheConfig
    encoding: Encoding
    index: Index


def build_parts(
    config: CacheConfig, encoding: Encoding, processes: Processes, check: Callable[[dict[str, Any]], None]
) -> list[Part]:
    """The parts of data sets that are at hand, of which what is missing is encoded.

    Args:
        check: as `encode_source` takes it.
    """
    return [Part("", None, config, encoding, encode_source(config, encoding, processes, check))]


def find_parts(config: CacheConfig, encoding: Encoding, processes: Processes) -> list[Part]:
    """The parts that lie where the shards are, on a disk or on remote storage."""
    if config.shards_address:
        with busy(f"Reading the index of {config.shards_place}"):
            index = read_index(Storage(config.shards_address))
    else:
        index = processes.computed_by_first(lambda: Index.read(config.shards_path))
    return [Part("", None, config, encoding, index)]
