"""Rows gathered in C++ and in Python are the same, and so are their errors."""

import os

import numpy as np
import pytest
import torch
import xxhash

import cpp_ext
from engine.data.format import gather as gathering
from engine.data.format.gather import best_gather, gather_in_cpp, gather_in_python

needs_compiler = pytest.mark.skipif(cpp_ext.load("shard_reader") is None, reason="no C++ compiler")
SIDES = [pytest.param(gather_in_cpp, marks=needs_compiler), gather_in_python]


@pytest.fixture
def files(tmp_path):
    """Three files of random bytes: their content, and open descriptors."""
    contents, descriptors = [], []
    for number in range(3):
        contents.append(np.random.default_rng(number).integers(0, 256, 100_000, np.uint8))
        path = tmp_path / str(number)
        path.write_bytes(contents[-1].tobytes())
        descriptors.append(os.open(path, os.O_RDONLY))
    yield contents, descriptors
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("gather", SIDES)
@pytest.mark.parametrize("row_bytes", [1, 7, 4096, 30_000])
def test_every_row_is_where_it_belongs(gather, row_bytes, files):
    contents, descriptors = files
    generator = np.random.default_rng(9)
    shards = generator.integers(0, 3, 50)
    offsets = generator.integers(0, 100_000 - row_bytes + 1, 50)
    target = torch.zeros(50, row_bytes, dtype=torch.uint8)
    best_gather()
    gather(np.array(descriptors, np.int32)[shards], offsets, row_bytes, target)
    for row, (shard, offset) in enumerate(zip(shards, offsets, strict=True)):
        assert np.array_equal(target[row].numpy(), contents[shard][offset : offset + row_bytes])


@needs_compiler
def test_a_batch_large_enough_for_threads_is_whole(tmp_path):
    row_bytes, rows = 2**20, 40
    content = np.random.default_rng(0).integers(0, 256, 8 * row_bytes, np.uint8)
    (tmp_path / "large").write_bytes(content.tobytes())
    descriptor = os.open(tmp_path / "large", os.O_RDONLY)
    offsets = np.arange(rows, dtype=np.int64) % 8 * row_bytes
    target = torch.zeros(rows, row_bytes, dtype=torch.uint8)
    gather_in_cpp(np.full(rows, descriptor, np.int32), offsets, row_bytes, target)
    os.close(descriptor)
    assert np.array_equal(target.numpy(), content.reshape(8, row_bytes)[np.arange(rows) % 8])


@pytest.mark.parametrize("gather", SIDES)
def test_a_file_that_ends_early_names_the_row(gather, files):
    _, descriptors = files
    best_gather()
    with pytest.raises(OSError, match="Input/output error") as error:
        gather(np.array(descriptors[:2], np.int32), np.array([0, 99_000]), 2000, torch.empty(2, 2000, dtype=torch.uint8))
    assert error.value.filename == 1


def test_without_a_compiler_python_reads_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cpp_ext.shutil, "which", lambda name: None)
    cpp_ext.load.cache_clear()
    try:
        assert best_gather() is gather_in_python
        assert "no C++ compiler" in capsys.readouterr().err
    finally:
        cpp_ext.load.cache_clear()


@needs_compiler
def test_the_library_is_built_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpp_ext.load.cache_clear()
    try:
        assert cpp_ext.load("shard_reader") is not None
        (library,) = (tmp_path / "diffusion-training-engine").glob("*.so")
        written = library.stat().st_mtime_ns
        cpp_ext.load.cache_clear()
        assert cpp_ext.load("shard_reader") is not None
        assert library.stat().st_mtime_ns == written
    finally:
        cpp_ext.load.cache_clear()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("row_bytes", [1, 16, 129, 240, 241, 1025, 70_000])
def test_checksums_are_those_of_the_library(side, exported, row_bytes, tmp_path, monkeypatch):
    best_gather()
    if not exported:  # a library that keeps its function to itself
        monkeypatch.setattr(gathering, "_xxh3", lambda: None)
    content = torch.randint(0, 256, (5, row_bytes), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    rows, sums = torch.empty_like(content[:3]), torch.empty(3, dtype=torch.int64)
    with (tmp_path / "file").open("rb") as file:
        side(np.full(3, file.fileno(), np.int32), np.array([4, 0, 2]) * row_bytes, row_bytes, rows, sums)
    expected = [xxhash.xxh3_64_intdigest(content[row].numpy().tobytes()) for row in (4, 0, 2)]
    assert sums.numpy().view(np.uint64).tolist() == expected
