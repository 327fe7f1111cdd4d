"""Gathering rows of files into a batch with positioned reads: in C++ where it can be built, else in Python."""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable

import numpy as np
from torch import Tensor

import cpp_ext

THREADS = 8

Advise = Callable[[np.ndarray, np.ndarray, int], None]
Gather = Callable[[np.ndarray, np.ndarray, int, Tensor], None]


def gather_in_cpp(files: np.ndarray, offsets: np.ndarray, row_bytes: int, target: Tensor) -> None:
    """Reads row i, of `row_bytes` bytes, from descriptor files[i] (int32) at offsets[i] (int64) into row i of `target`.

    Raises:
        OSError: a row cannot be read, or its file ends early; `filename` is the row's number.
    """
    error = ctypes.c_int32()
    library = cpp_ext.load("shard_reader")
    assert library is not None
    failed = library.gather_rows(
        files.ctypes.data_as(ctypes.c_void_p), offsets.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(files)),
        ctypes.c_int64(row_bytes), ctypes.c_void_p(target.data_ptr()), ctypes.c_int32(THREADS), ctypes.byref(error),
    )  # fmt: skip
    if failed >= 0:
        raise OSError(error.value, os.strerror(error.value), int(failed))


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


def gather_in_python(files: np.ndarray, offsets: np.ndarray, row_bytes: int, target: Tensor) -> None:
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


def best_advise() -> Advise:
    return advise_in_python if cpp_ext.load("shard_reader") is None else advise_in_cpp


def best_gather() -> Gather:
    library = cpp_ext.load("shard_reader")
    if library is None:
        return gather_in_python
    library.gather_rows.restype = ctypes.c_int64
    return gather_in_cpp
