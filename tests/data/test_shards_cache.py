"""The cache of whole shards: its room, its processes and users, and what it leaves alone."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import resource
import shutil
import threading

import pytest

from engine.data.format import cache
from engine.data.format.cache import ShardsCache
from engine.errors import UserError
from engine.storage import Storage, StorageError
from tests.storage_server import serving

CONTENTS = {hashlib.sha256(content).hexdigest(): content for content in (bytes([number]) * 1000 for number in range(6))}
DIGEST, CONTENT = next(iter(CONTENTS.items()))


def opened(kept: ShardsCache, digest: str = DIGEST):
    return kept.open(digest, 1000, lambda: [CONTENTS[digest][:400], CONTENTS[digest][400:]])


def names(directory) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in directory.iterdir()} - {"room.lock"}


def refused(*_) -> list[bytes]:
    raise AssertionError("fetched again")


def test_it_keeps_to_its_limit_and_to_what_is_read(tmp_path):
    kept = ShardsCache(tmp_path, 3000)
    with contextlib.ExitStack() as held:
        for number, digest in enumerate(CONTENTS):
            file = held.enter_context(opened(kept, digest))
            assert file.read() == CONTENTS[digest]
            if number > 1:
                file.close()
        there = names(tmp_path)
    assert there == {digest for number, digest in enumerate(CONTENTS) if number in (0, 1, 5)}


def test_what_was_used_last_stays_and_is_the_same_file_as_before(tmp_path):
    kept = ShardsCache(tmp_path, 2000)
    first, second, third = list(CONTENTS)[:3]
    for digest in (first, second):
        opened(kept, digest).close()
    before = (tmp_path / f"{first}.safetensors").stat()
    opened(kept, first).close()
    assert (tmp_path / f"{first}.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    opened(kept, third).close()
    assert names(tmp_path) == {first, third}


def test_other_files_are_left_alone(tmp_path):
    for name in ("model.safetensors", "poetry.lock", f"{DIGEST}.lock", f"{'A' * 64}.safetensors", "x.partial"):
        (tmp_path / name).write_bytes(bytes(5000))
    before = sorted(tmp_path.iterdir())
    kept = ShardsCache(tmp_path, 1000)
    for digest in CONTENTS:
        opened(kept, digest).close()
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / f"{digest}.safetensors", tmp_path / "room.lock"])


def _fetch(directory, barrier) -> None:
    barrier.wait()
    kept = ShardsCache(directory, 2500)

    def read():
        with (directory / "fetched.log").open("a") as log:
            log.write(f"{DIGEST}\n")
        yield CONTENT

    for _ in range(20):
        with kept.open(DIGEST, 1000, read) as file:
            assert file.read() == CONTENT


def test_processes_of_a_node_fetch_a_shard_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_fetch, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "fetched.log").read_text() == f"{DIGEST}\n"


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / f"{DIGEST}.safetensors.01234567.partial").write_bytes(b"half")
    ShardsCache(tmp_path)
    assert not names(tmp_path)


def test_a_process_that_hangs_holds_nobody_up(tmp_path, monkeypatch):
    partial = tmp_path / f"{DIGEST}.safetensors.01234567.partial"
    partial.write_bytes(b"half")
    kept = ShardsCache(tmp_path / "other")
    kept.directory = tmp_path
    with partial.open("rb") as hangs:
        fcntl.flock(hangs, fcntl.LOCK_EX)
        kept.fetch(DIGEST, 1000, refused, wait=False)  # it is left to the one that fetches it
        leaving = threading.Timer(0.1, kept.close)
        leaving.start()
        with pytest.raises(UserError, match="closed"):  # and waited for, until the end
            kept.open(DIGEST, 1000, refused)
        monkeypatch.setattr(cache, "PATIENCE", 0.1)
        with (tmp_path / "room.lock").open("wb") as room:
            fcntl.flock(room, fcntl.LOCK_EX)  # nor does one that stopped while it was making room
            with opened(ShardsCache(tmp_path)) as file:
                assert file.read() == CONTENT


@pytest.mark.parametrize("allocated", [True, False])
def test_a_full_disk_is_told_from_storage_that_fails(allocated, tmp_path, monkeypatch):
    if not allocated:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "object").write_bytes(CONTENT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = ShardsCache(tmp_path / "cache")
    with serving(tmp_path / "served") as server:
        place = Storage(server.address)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        try:
            with pytest.raises(UserError, match=f"^{kept.directory}: cannot be written: File too large; make room") as error:
                kept.open(DIGEST, 1000, lambda: place.pieces("object", 0, 1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not isinstance(error.value, StorageError)
        assert len(server.asked) == (0 if allocated else 1)
    assert not names(kept.directory)


def test_a_directory_that_goes_away_is_made_again(tmp_path):
    kept = ShardsCache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with opened(kept) as file:
        assert file.read() == CONTENT
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="cache: cannot be written: File exists; make room there, give a lower"):
        opened(kept)


def test_what_another_user_wrote_is_compared_and_kept_where_it_cannot_be_removed(tmp_path, monkeypatch):
    (tmp_path / f"{DIGEST}.safetensors").write_bytes(bytes(1000))
    sound = list(CONTENTS)[1]
    (tmp_path / f"{sound}.safetensors").write_bytes(CONTENTS[sound])
    monkeypatch.setattr(os, "getuid", lambda: 1234567)
    for path in tmp_path.iterdir():
        os.chown(path, 7654321, -1) if os.geteuid() == 0 else None
    kept = ShardsCache(tmp_path, 1000)
    with kept.open(sound, 1000, refused) as file:
        assert file.read() == CONTENTS[sound]
    with opened(kept, DIGEST) as file:
        assert file.read() == CONTENT

    def not_permitted(*_) -> None:
        raise PermissionError

    monkeypatch.setattr(cache.Path, "unlink", not_permitted)
    assert not cache._remove_unused(tmp_path / f"{DIGEST}.safetensors")
