"""The parts of a run's data: directories of shards, each of one data set and of one size of its images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.options import CacheConfig
from engine.data.encode import encode_source
from engine.data.encode_buckets import build_buckets, in_bucket
from engine.data.format.buckets import is_bucketed, read_indexes, size_named
from engine.data.format.index import Index
from engine.data.format.remote import read_buckets, read_index
from engine.errors import UserError
from engine.messages import busy
from engine.models.encoder import Encoding
from engine.processes import Processes
from engine.storage import GIVE_CREDENTIALS, NOT_THERE, Storage, StorageError, below


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
    config: CacheConfig,
    encoding: Encoding,
    processes: Processes,
    check: Callable[[dict[str, Any]], None] = lambda identity: None,
) -> list[Part]:
    """The parts of data sets that are at hand, of which what is missing is encoded.

    Args:
        check: as `encode_source` takes it.
    """
    if config.buckets:
        return [_part(config, encoding, name, index) for name, index in build_buckets(config, encoding, processes, check)]
    processes.computed_by_first(lambda: _refuse_buckets(config.shards_path))
    return [_part(config, encoding, None, encode_source(config, encoding, processes, check))]


def _part(config: CacheConfig, encoding: Encoding, bucket: str | None, index: Index) -> Part:
    if bucket is None:
        return Part("", None, config, encoding, index)
    return Part("", bucket, in_bucket(config, bucket), encoding.of_size(*size_named(bucket)), index)


def _refuse_buckets(directory: Path) -> None:
    if is_bucketed(directory):
        raise UserError(
            f"{directory}: the shards there were built with --buckets; give that too, name another --shards_dir, or give no "
            "data options to train on these"
        )


def find_parts(config: CacheConfig, encoding: Encoding, processes: Processes) -> list[Part]:
    """The parts that lie where the shards are, on a disk or on remote storage."""
    if config.shards_address:
        with busy(f"Reading the index of {config.shards_place}"):
            found = processes.computed_by_first(lambda: _on_storage(config))
    else:
        found = processes.computed_by_first(lambda: read_indexes(config.shards_path))
    return [_part(config, encoding, name or None, index) for name, index in found.items() if index.records or not name]


def _on_storage(config: CacheConfig) -> dict[str, Index]:
    """As `read_indexes`, of those with records."""
    address = config.shards_address
    assert address is not None
    try:
        return {"": read_index(Storage(address))}
    except StorageError as error:
        # Storage that may not be listed says of what is not there that it is not permitted.
        if not any(remedy in str(error) for remedy in (NOT_THERE, GIVE_CREDENTIALS)):
            raise
        try:
            buckets = read_buckets(Storage(address))
        except StorageError:
            raise error from None
    names = [bucket.name for bucket in buckets.buckets if bucket.images]
    return {name: read_index(Storage(below(address, name))) for name in names}
