"""The sizes of a data set's images: read from their headers, by all threads and processes, and remembered with the shards."""

import concurrent.futures
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from engine.config.options import CacheConfig
from engine.data.format.buckets import Size
from engine.data.format.index import SIZES
from engine.data.sources.interface import Refused, Source
from engine.files import write_atomically
from engine.messages import Progress
from engine.processes import Processes
from engine.tensors import TensorFile, bytes_of, header_of

_READERS = 8  # threads that read headers, of a file system that may be a network's
_AT_ONCE = 2**14  # headers that a process reads before all of them are remembered
_LONGEST_SIDE = 2**31 - 1


def remembered(directory: Path, stamps: np.ndarray) -> np.ndarray:
    """Widths and heights of images by their stamps, as `remember` left them: int32 [images, 2], zeros of others."""
    found = np.zeros([len(stamps), 2], np.int32)
    try:
        file = TensorFile(directory / SIZES)
        before, sizes = file.tensor("stamps").numpy().view(np.uint64), file.tensor("sizes").numpy()
        whole = file.metadata["check"] == _check_of(before, sizes) and sizes.dtype == np.int32 and sizes.ndim == 2
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return found  # it only saves work
    if whole and len(before):
        places = np.minimum(np.searchsorted(before, stamps), len(before) - 1)
        same = before[places] == stamps
        found[same] = sizes[places[same]]
    return found


def remember(directory: Path, stamps: np.ndarray, sizes: np.ndarray) -> None:
    """Leaves the sizes of images with their shards, of all of which they are known."""
    known = np.flatnonzero(sizes[:, 0] > 0)
    known = known[np.argsort(stamps[known], kind="stable")]
    arrays = {"stamps": torch.from_numpy(stamps[known].view(np.int64)), "sizes": torch.from_numpy(sizes[known])}
    header = header_of(arrays, {"engine": f'{{"check": "{_check_of(stamps[known], sizes[known])}"}}'})[0]

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.writelines([header, *(bytes_of(array).numpy().data for array in arrays.values())])

    write_atomically(directory / SIZES, write)


def _check_of(*arrays: np.ndarray) -> str:
    total = xxhash.xxh3_64()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def measure(
    source: Source,
    places: np.ndarray,
    config: CacheConfig,
    processes: Processes,
    keep: Callable[[np.ndarray, np.ndarray], None] = lambda places, sizes: None,
) -> None:
    """Reads the headers of the images at some places, by all processes.

    Args:
        keep: is given places and sizes, int32 [images, 2], by the first process again and again; zeros where none can be read,
            and negative ones where that may be over at another time.
    """

    def size_at(place: int) -> Size:
        try:
            width, height = (0, 0) if source.refusal(place) else source.size(place)
        except Refused as why:
            return (-1, -1) if why.passing else (0, 0)  # as it will be when its pixels are asked for, and then said
        return (width, height) if 0 < min(width, height) <= max(width, height) <= _LONGEST_SIDE else (0, 0)

    rank, world, threads = processes.rank, processes.world, max(config.dataloader_num_workers, _READERS)
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        Progress(len(places), "Reading the sizes of images", "image") as progress,
    ):
        for first in range(0, len(places), _AT_ONCE * world):
            part = places[first : first + _AT_ONCE * world]
            mine = np.zeros([len(part[rank::world]), 2], np.int32)
            for number, size in enumerate(pool.map(size_at, part[rank::world].tolist())):
                mine[number] = size
                progress.update(min(world, first + len(part) - progress.done))
            sizes = np.zeros([len(part), 2], np.int32)
            for other, read in enumerate(processes.gather_patiently(mine)):
                sizes[other::world] = read
            if processes.is_first:
                keep(part, sizes)
