"""Encoding a source into a directory of shards for each bucket of sizes, with the frozen models loaded once for all.

The first process lists the data set; all read the headers of images whose sizes are not remembered; then they build one bucket
after another, each as `encode_source` builds any directory. `buckets.json` is written last.
"""

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.options import CacheConfig
from engine.data.encode import encode_source, loaded_once, opened_by_all, refuse_known, say_noticed
from engine.data.format.buckets import Bucket, Buckets, Size, is_name, name_of, size_named
from engine.data.format.index import BUCKETS, INDEX, Index, add_refused
from engine.data.found import Task, complete_index, keeps_any, look
from engine.data.identity import differences, recipe_of
from engine.data.image_sizes import measure, remember, remembered
from engine.data.records import none_usable
from engine.data.report import say_refused
from engine.data.sizes import cropped_away, nearest, options_of_buckets, sizes_of
from engine.data.sources import open_source, subset
from engine.data.sources.interface import Source, told_apart
from engine.data.together import handed_to_all, shards_held, sweep_halves
from engine.errors import UserError
from engine.messages import busy
from engine.models.encoder import Encoding
from engine.processes import Processes
from engine.storage import below

_PAUSE = 60  # seconds after which sizes that were read are remembered


@dataclass(frozen=True)
class _DataSet:
    """What the first process knows of a data set.

    sizes: of the buckets, from the narrowest to the widest.
    stamps: of each sample, uint64 [samples].
    images: their widths and heights, int32 [samples, 2]; zeros where they are not known, or cannot be read; negative where
        that may be over at another time.
    recalled: whether any was known from an earlier build.
    """

    config: CacheConfig
    encoding: Encoding
    source: Source
    sizes: list[Size]
    stamps: np.ndarray
    images: np.ndarray
    recalled: bool

    def divided(self) -> dict[str, subset.Bucket]:
        """The samples of each bucket that has any, by its name."""
        places = nearest(self.sizes, self.images)
        found = {name_of(size): np.flatnonzero(places == at) for at, size in enumerate(self.sizes)}
        return {
            name: subset.Bucket(self.source, indices, self.stamps[indices], self.images[indices, 0] < 0)
            for name, indices in found.items()
            if len(indices)
        }

    def task(self, name: str, samples: subset.Bucket) -> Task:
        config, encoding = in_bucket(self.config, name), self.encoding.of_size(*size_named(name))
        return Task(config, encoding, samples, recipe_of(config, encoding), *samples.stamps())

    def described(self, indexes: dict[str, Index]) -> Buckets:
        buckets = []
        for name, samples in self.divided().items():
            width, height = size_named(name)
            images = self.images[samples.indices]
            cropped = cropped_away((width, height), images[images[:, 0] > 0].astype(np.int64))
            buckets.append(
                Bucket(
                    width=width,
                    height=height,
                    images=indexes[name].records,
                    refused=indexes[name].refused_count,
                    cropped=round(float(cropped.mean()), 6) if len(cropped) else 0.0,
                )
            )
        return Buckets(options=options_of_buckets(self.config), buckets=buckets)


def in_bucket(config: CacheConfig, name: str) -> CacheConfig:
    """The configuration of one bucket's directory, or address."""
    return config.model_copy(update={"shards_dir": below(config.shards_dir or str(config.shards_path), name)})


def build_buckets(
    config: CacheConfig, encoding: Encoding, processes: Processes, check: Callable[[dict[str, Any]], None]
) -> list[tuple[str, Index]]:
    """The buckets with records, by their names, from the narrowest to the widest; what is missing of them is encoded.

    Args:
        check: as `encode_source` takes it, for each.

    Raises:
        UserError: as `encode_source`.
    """
    data: _DataSet | None = None

    def complete() -> dict[str, Index] | None:
        nonlocal data
        data = _listed(config, encoding)
        return _complete(data)

    indexes = processes.computed_by_first(complete)
    if indexes is None:
        indexes = _build(config, encoding, processes, check, data)
    else:
        for index in indexes.values():
            check(index.identity)
    return [(name, index) for name, index in indexes.items() if index.records]


def _listed(config: CacheConfig, encoding: Encoding) -> _DataSet:
    directory = config.shards_path
    sizes = sizes_of(config, encoding)
    _refuse_built_otherwise(config)
    with busy("Opening the data set"):
        source = open_source(config, encoding.captioned)
    with busy("Hashing the frozen models and listing the data set"):
        encoding.encoder_identity()
        stamps = told_apart(subset.each_stamp(*source.stamps()))
    images = remembered(directory, stamps)
    return _DataSet(config, encoding, source, sizes, stamps, images, bool(images.any()))


def _refuse_built_otherwise(config: CacheConfig) -> None:
    directory = config.shards_path
    if (directory / INDEX).exists():
        raise UserError(
            f"{directory}: the shards there were built without --buckets; leave that out, name another --shards_dir, or give "
            "no data options to train on these"
        )
    if (directory / BUCKETS).exists():
        before = Buckets.read(directory / BUCKETS).options
        if changed := differences(before, options_of_buckets(config)):
            raise UserError(
                f"{directory}: the shards there were built otherwise ({changed}); give the same options, name another "
                f"--shards_dir, give no data options to train on these, or delete {directory / BUCKETS} to build others"
            )


def _complete(data: _DataSet) -> dict[str, Index] | None:
    """The indexes of all buckets, if they are of the samples that the source has, as far as that is known without reading."""
    directory = data.config.shards_path
    if not (directory / BUCKETS).exists():
        return None
    indexes = {}
    for name, samples in data.divided().items():
        task = data.task(name, samples)
        if (index := complete_index(task, look(task), read=False)) is None:
            return None
        indexes[name] = index
    return indexes if Buckets.read(directory / BUCKETS) == data.described(indexes) else None


def _build(
    config: CacheConfig,
    encoding: Encoding,
    processes: Processes,
    check: Callable[[dict[str, Any]], None],
    data: _DataSet | None,
) -> dict[str, Index]:
    """Args:
    data: the first process's.
    """
    directory, of_all = config.shards_path, list[Source]()

    def whole() -> Source:
        """The source of all buckets, on every process; handed over when it is first asked for."""
        if not of_all:
            mine = data.source if data else None
            if writable and processes.computed_by_first(lambda: bool(mine and mine.portable)):
                of_all.append(handed_to_all(mine, directory, processes))
                if not processes.is_first:
                    of_all[0].noticed.clear()  # which the first one tells
            else:
                of_all.append(opened_by_all(config, encoding, processes, mine))
        return of_all[0]

    def bucket_of_all(mine: Source | None) -> Source:
        told = (mine.indices, mine.listed, mine.unmeasured) if isinstance(mine, subset.Bucket) else None
        return subset.Bucket(whole(), *handed_to_all(told, directory, processes))

    writable = processes.computed_by_first(lambda: _begin(data))
    with contextlib.ExitStack() as stack:
        if writable:
            held = stack.enter_context(shards_held(config, processes))
            if processes.is_first:
                sweep_halves(directory, held)
        _measure_unknown(config, processes, data, whole, writable)
        processes.computed_by_first(lambda: _refuse_another(data, writable))
        samples = data.divided() if data else {}
        encoder, indexes = stack.enter_context(loaded_once(processes)), dict[str, Index]()
        for name in processes.from_first([*samples]):
            bucket, sized = in_bucket(config, name), encoding.of_size(*size_named(name))
            indexes[name] = encode_source(bucket, sized, processes, check, samples.get(name), bucket_of_all, encoder)
        if writable:
            processes.computed_by_first(lambda: _end(data, indexes))
    source = data.source if data else of_all[0] if of_all else None
    say_noticed(source.noticed if source else Counter(), len(source) if source else 0, processes)
    return indexes


def _begin(data: _DataSet | None) -> bool:
    """Whether anything can be written."""
    assert data is not None  # the first process's
    refuse_known(data.config, data.source)
    data.config.shards_path.mkdir(parents=True, exist_ok=True)
    return os.access(data.config.shards_path, os.W_OK)


def _measure_unknown(
    config: CacheConfig, processes: Processes, data: _DataSet | None, whole: Callable[[], Source], writable: bool
) -> None:
    """Has all processes read the headers of images whose sizes the first one does not know."""
    directory, last = config.shards_path, time.monotonic()
    unknown = np.flatnonzero(data.images[:, 0] == 0) if data else None
    if not processes.from_first(0 if unknown is None else len(unknown)):
        return

    def keep(places: np.ndarray, sizes: np.ndarray) -> None:
        nonlocal last
        assert data is not None
        data.images[places] = sizes
        if writable and time.monotonic() > last + _PAUSE:  # those of all images are written each time
            remember(directory, data.stamps, data.images)
            last = time.monotonic()

    source = whole()
    places = handed_to_all(unknown, directory, processes) if writable else processes.from_first(unknown)
    measure(source, places, config, processes, keep)
    if writable and data:
        remember(directory, data.stamps, data.images)


def _refuse_another(data: _DataSet | None, writable: bool) -> None:
    """Raises `UserError` where there are shards, and none of them holds a sample of the source, or where nothing can be written
    and they are of other buckets."""
    assert data is not None  # the first process's
    directory = data.config.shards_path
    if not writable and (directory / BUCKETS).exists():
        before = {bucket.name for bucket in Buckets.read(directory / BUCKETS).buckets}
        if changed := ", ".join(sorted(before ^ data.divided().keys())):
            raise UserError(
                f"{directory}: the data set has changed: of {changed} there were, or are, no images; the shards there cannot "
                "be written; let them be written, name another --shards_dir, or give no data options to train on these"
            )
    if data.recalled:
        return
    tasks = [data.task(name, samples) for name, samples in data.divided().items() if (directory / name / INDEX).exists()]
    if _directories(directory) and not any(keeps_any(task, read) for read in (False, True) for task in tasks):
        raise UserError(
            f"{directory}: the shards there were built otherwise (other files or rows of data); give the same data set, name "
            f"another --shards_dir, give no data options to train on these, or delete the directory to build others"
        )


def _directories(directory: Path) -> list[str]:
    """The names of buckets of which there are shards."""
    names = (path.parent.name for path in directory.glob(f"*x*/{INDEX}"))
    return [name for name in names if is_name(name)]


def _end(data: _DataSet | None, indexes: dict[str, Index]) -> None:
    """Writes down which buckets there are. Those that are neither now nor were before, for trainings that read them, go."""
    assert data is not None  # the first process's
    directory = data.config.shards_path
    before = Buckets.read(directory / BUCKETS) if (directory / BUCKETS).exists() else None
    refused = add_refused(index.refused for index in indexes.values())
    if not any(index.records for index in indexes.values()):
        for name in () if before else indexes:
            shutil.rmtree(directory / name)
        raise UserError(none_usable(refused))
    now = data.described(indexes)
    if now != before:
        now.write(directory)
        kept = {bucket.name for buckets in (before, now) if buckets for bucket in buckets.buckets}
        for name in {*_directories(directory)} - kept:
            shutil.rmtree(directory / name)
        say_refused(len(data.source), refused, directory)
