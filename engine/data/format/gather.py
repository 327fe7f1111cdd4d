"""Gathering rows of files into a batch with positioned reads: in C++ where it can be built, else in Python."""

import contextlib
import ctypes
import errno
import functools
import importlib
import os
from collections.abc import Callable

import numpy as np
import torch
import xxhash
from torch import Tensor

import cpp_ext
from engine.tensors import bytes_of

THREADS = 8

Advise = Callable[[np.ndarray, np.ndarray, int], None]
Gather = Callable[..., None]


def checksums_of(rows: Tensor) -> Tensor:
    """XXH3 of the bytes of every row: int64 [rows], the bits of unsigned numbers."""
    content = bytes_of(rows).numpy().data
    size = len(content) // max(len(rows), 1)
    sums = [xxhash.xxh3_64_intdigest(content[start : start + size]) for start in range(0, len(content), size or 1)]
    return torch.from_numpy(np.array(sums, np.uint64).view(np.int64))


@functools.cache
def _xxh3() -> ctypes.c_void_p | None:
    """XXH3 as C++ can call it, None where the library keeps it to itself."""
    with contextlib.suppress(OSError):
        library = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
        for name in ("XXH3_64bits_dispatch", "XXH3_64bits"):  # the first chooses by processor
            if hasattr(library, name):
                return ctypes.cast(getattr(library, name), ctypes.c_void_p)
    return None


def gather_in_cpp(files: np.ndarray, offsets: np.ndarray, row_bytes: int, target: Tensor, sums: Tensor | None = None) -> None:
    """Reads row i, of `row_bytes` bytes, from descriptor files[i] (int32) at offsets[i] (int64) into row i of `target`.

    Args:
        sums: int64 [rows], takes what `checksums_of` gives for `target`.

    Raises:
        OSError: a row cannot be read, or its file ends early; `filename` is the row's number.
    """
    error = ctypes.c_int32()
    library = cpp_ext.load("shard_reader")
    assert library is not None
    xxh3 = _xxh3() if sums is not None else None
    failed = library.gather_rows(
        files.ctypes.data_as(ctypes.c_void_p), offsets.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(files)),
        ctypes.c_int64(row_bytes), ctypes.c_void_p(target.data_ptr()), ctypes.c_int32(THREADS), xxh3,
        ctypes.c_void_p(sums.data_ptr() if sums is not None else None), ctypes.byref(error),
    )  # fmt: skip
    if failed >= 0:
        raise OSError(error.value, os.strerror(error.value), int(failed))
    if sums is not None and xxh3 is None:
        sums.copy_(checksums_of(target))


def advise_in_cpp(files: np.ndarray, offsets: np.ndarray, row_bytes: int) -> None:
    """Tells the kernel of rows that will be gathered, so that it fetches them side by side."""
    library = cpp_ext.load("shard_reader")
    assert library is not None
    library.advise_rows(
        files.ctypes.data_as(ctypes.c_void_p), offsets.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(files)),
        ctypes.c_int64(row_bytes),
    )  # fmt: skip


def advise_in_python(files: np.ndarray, offsets: np.ndarray, row_bytes: int) -> None:
    """As `advise_in_cpp`."""
    for file, offset in zip(files.tolist(), offsets.tolist(), strict=True):
        with contextlib.suppress(OSError):  # only advice
            os.posix_fadvise(file, offset, row_bytes, os.POSIX_FADV_WILLNEED)


def gather_in_python(
    files: np.ndarray, offsets: np.ndarray, row_bytes: int, target: Tensor, sums: Tensor | None = None
) -> None:
    """As `gather_in_cpp`, on one thread."""
    buffer = (ctypes.c_char * (len(files) * row_bytes)).from_address(target.data_ptr())
    rows = memoryview(buffer)
    for number, (file, offset) in enumerate(zip(files.tolist(), offsets.tolist(), strict=True)):
        start, end = number * row_bytes, (number + 1) * row_bytes
        if offset < 0:  # which preadv takes for the place where the file was last read
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), number)
        while start < end:
            try:
                count = os.preadv(file, [rows[start:end]], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, number) from None
            if count == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), number)
            start, offset = start + count, offset + count
    if sums is not None:
        sums.copy_(checksums_of(target))


def best_advise() -> Advise:
    return advise_in_python if cpp_ext.load("shard_reader") is None else advise_in_cpp


def best_gather() -> Gather:
    library = cpp_ext.load("shard_reader")
    if library is None:
        return gather_in_python
    library.gather_rows.restype = ctypes.c_int64
    return gather_in_cpp
