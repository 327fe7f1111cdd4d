"""Shards on remote storage: the bytes of the disk, whatever goes wrong on the way, and what is said where nothing helps."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from benchmarks.tools.ranks import free_port
from engine import storage
from engine.data.format import remote
from engine.data.format.cache import ShardsCache
from engine.data.format.index import Index, shard_name
from engine.data.format.reader import Shards
from engine.data.format.remote import CachedShards, RangedShards
from engine.data.samples.batch import BatchPlan
from engine.data.samples.loader import Loader
from engine.data.samples.order import order_of
from engine.data.samples.streams import Stream, Streams
from engine.diffusion.schedules import DiscreteSchedule
from engine.errors import UserError
from engine.storage import Storage, StorageError, is_remote, shown
from engine.tensors import read_header
from tests.altered import say_of
from tests.data.test_lies import whole_varied  # noqa: F401 - a fixture
from tests.storage_server import serving

SCHEDULE = DiscreteSchedule(torch.linspace(0.99, 0.01, 1000), "epsilon")
SHARD = re.compile("shard-.*")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.001,) * 5)
    monkeypatch.setattr(storage, "TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "*")


def opened(way: str, address: str, cache, **options) -> Shards:
    if way != "cache":
        return RangedShards(Storage(address), **options)
    return CachedShards(Storage(address), ShardsCache(cache), 1, **options)


def loader_of(shards: Shards, window: int | None = None, steps: int = 20) -> Loader:
    streams = Streams(3, [Stream(shards, order_of(3, shards.index.shards["records"], window))])
    return Loader(streams, BatchPlan(4, 1, 0, 1), 3, SCHEDULE, torch.device("cpu"), 0, steps)


def records(shards: Shards, window: int | None = 2, steps: int = 20) -> list[dict[str, torch.Tensor]]:
    loader = loader_of(shards, window, steps)
    with contextlib.closing(loader), contextlib.closing(shards):
        return [batch.record for batch in loader]


def assert_same(found: list, expected: list) -> None:
    for left, right in zip(found, expected, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in right)


def alter(shard) -> None:
    """Changes a byte of every latent."""
    header, _, data = read_header(shard)
    rows = header["latent_mean"]["shape"][0]
    start, end = header["latent_mean"]["data_offsets"]
    content = bytearray(shard.read_bytes())
    for place in range(data + start, data + end, (end - start) // rows):
        content[place] ^= 1
    shard.write_bytes(content)


WAYS = pytest.mark.parametrize("way", ["ranges", "cache"])


@WAYS
@pytest.mark.parametrize("window", [None, 1, 2])
def test_rows_are_those_of_the_disk(way, window, shards, tmp_path):
    with serving(shards) as server:
        assert_same(records(opened(way, server.address, tmp_path), window), records(Shards(shards), window))
        assert not {name for name, _ in server.asked} - {path.name for path in shards.iterdir()}


@pytest.mark.parametrize(("heads", "check_rows"), [(1, True), (1, False), (2**26, True)])
def test_what_leads_to_rows_is_kept_or_asked_for_with_them(heads, check_rows, shards, request, monkeypatch):
    monkeypatch.setattr(remote, "HEADS", heads)
    for directory in (shards, request.getfixturevalue("whole_varied")):
        with serving(directory) as server:
            assert_same(records(RangedShards(Storage(server.address), check_rows), None), records(Shards(directory), None))
        heads = [name for name, (start, _) in server.asked if SHARD.match(name) and not start]
        assert len(heads) == len(set(heads))


def test_a_header_is_judged_before_it_is_followed(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_HEADER", 2**12)
    monkeypatch.setattr(remote, "HEADS", 1)
    copy = shutil.copytree(shards, tmp_path / "shards")
    for number in Index.read(copy).shards["number"]:
        say_of(copy, number, {"other": torch.zeros(2**20)}, {})
    with serving(copy) as server, pytest.raises(UserError, match="other is no tensor of these shards; put a whole copy there"):
        records(RangedShards(Storage(server.address)))
    assert {span for name, span in server.asked if SHARD.match(name)} == {(0, 2**12)}


def passing(what):
    """Some answers about shards are wrong in one way, or each in another one."""
    faults = itertools.cycle(["cut", 500, "short", 429] if what == "all" else [what])
    questions, lock = itertools.count(), threading.Lock()

    def fault(name, span, before):
        with lock:
            every = 40 if what == "wrong" else 4  # what is wrong once more is refused
            return next(faults) if SHARD.match(name) and next(questions) % every == 1 else None

    return fault


@WAYS
@pytest.mark.parametrize("what", ["cut", "short", "wrong", 500, 429, "slow", "hang", "all"])
def test_what_passes_changes_nothing(way, what, shards, tmp_path):
    with serving(shards, passing(what)) as server:
        found = records(opened(way, server.address, tmp_path), steps=4 if what in ("slow", "hang") else 20)
    assert_same(found, records(Shards(shards), steps=len(found)))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut", r"shard-0000\d.safetensors, bytes \d+ to \d+: .*, 6 times; look at the storage and the network"),
        (503, r"shard-0000\d.safetensors, bytes \d+ to \d+: 503 Service Unavailable, 6 times; look at the storage"),
        (404, r"shard-0000\d.safetensors, bytes \d+ to \d+: 404 Not Found; look at the address, or put the whole"),
        (403, r"shard-0000\d.safetensors, bytes \d+ to \d+: 403 Forbidden; give credentials that may read it"),
    ],
)
@WAYS
def test_what_does_not_pass_is_one_line(way, what, said, shards, tmp_path):
    with serving(shards, lambda name, *_: what if SHARD.match(name) else None) as server, pytest.raises(UserError) as error:
        records(opened(way, server.address, tmp_path))
    assert re.search(f"^{server.address}/{said}", str(error.value))
    assert not list(tmp_path.glob("*.safetensors*"))


@pytest.mark.parametrize(("name", "status"), [("index.json", 404), ("index-", 404), ("index.json", "cut"), ("index-", "wrong")])
def test_an_index_that_cannot_be_read_is_one_line(name, status, shards):
    with serving(shards, lambda file, *_: status if file.startswith(name) else None) as server:
        with pytest.raises(UserError, match=f"^{server.address}/{name}[^/]*: .*; ") as error:
            RangedShards(Storage(server.address))
        assert "/tmp" not in str(error.value)


@pytest.mark.parametrize("way", ["ranges", "rows", "cache"])
def test_a_row_that_is_altered_is_fetched_once_more_and_then_refused(way, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "HEADS", 1 if way == "rows" else remote.HEADS)
    copy = shutil.copytree(shards, tmp_path / "shards")
    index = Index.read(copy)
    for entry in index.shards:
        alter(copy / shard_name(entry["number"]))
    with (
        serving(copy) as server,
        pytest.raises(UserError, match=r"shard-0000\d.safetensors: altered: .*; put a whole copy there") as error,
    ):
        records(opened(way, server.address, tmp_path / "cache"))
    if way == "cache":
        assert not list((tmp_path / "cache").glob("*.safetensors*"))
        assert len([name for name, _ in server.asked if name == str(error.value).split("/")[-1].split(":")[0]]) == 2


def test_a_file_of_the_cache_that_is_altered_is_fetched_again(shards, tmp_path):
    with serving(shards) as server:
        expected = records(opened("cache", server.address, tmp_path))
        for path in tmp_path.glob("*.safetensors"):
            alter(path)
        assert_same(records(opened("cache", server.address, tmp_path)), expected)
        asked = len(server.asked)
        assert_same(records(opened("cache", server.address, tmp_path)), expected)
        assert {name for name, _ in server.asked[asked:]} <= {"index.json", *(path.name for path in shards.glob("index-*"))}


def test_a_server_without_ranges_gives_whole_shards_alone(shards, tmp_path):
    with serving(shards, lambda name, *_: "whole") as server:
        assert_same(records(opened("cache", server.address, tmp_path)), records(Shards(shards)))
        with pytest.raises(UserError, match="the server gives no ranges of it; keep whole shards with --shards_cache"):
            records(opened("ranges", server.address, tmp_path))


def test_rows_that_follow_each_other_are_asked_for_together(shards):
    with serving(shards) as server:
        reader = RangedShards(Storage(server.address))
        records(reader, 1, 24)
        rows = 24 * 4 * len(reader.fields)
    assert len(server.asked) < rows / 2


def test_a_limit_that_is_too_little_is_refused(shards, tmp_path):
    index = Index.read(shards)
    largest = int(index.shards["bytes"].max())
    said = f"--shards_cache_limit: too little .* give {8 * largest} at least"
    with serving(shards) as server, pytest.raises(UserError, match=said):
        CachedShards(Storage(server.address), ShardsCache(tmp_path, 8 * largest - 1), 2)


@pytest.mark.parametrize("way", ["ranges", "cache"])
def test_who_gives_up_asks_for_nothing_more(way, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CONNECTIONS", 2)
    with serving(shards, lambda name, span, before: "slow" if SHARD.match(name) else None) as server:
        reader = opened(way, server.address, tmp_path)
        loader = loader_of(reader)
        next(iter(loader))
        reader.close()
        loader.close()
        time.sleep(0.15)  # what was on its way
        asked = len(server.asked)
        time.sleep(0.25)
        assert len(server.asked) == asked


def test_a_shard_that_has_no_room_to_stay_is_fetched_once_for_all_fields(shards, tmp_path):
    with serving(shards) as server:
        reader = opened("cache", server.address, tmp_path)
        reader.cache.limit, reader._most_open, reader._ahead = 1, 1, 0
        assert_same(records(reader, None, 4), records(Shards(shards), None, 4))
        finding = 2 * 3  # numbers of captions, and their checksums
        assert len([name for name, _ in server.asked if SHARD.match(name)]) <= 4 * (finding + 3)


def test_leaving_early_does_not_wait_for_the_storage(shards, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (60.0,) * 5)
    with serving(shards, lambda name, span, before: 500 if SHARD.match(name) else None) as server:
        reader = RangedShards(Storage(server.address))
        loader = loader_of(reader)
        reader.close()
        loader.close()
    with pytest.raises(StorageError, match="closed"):
        reader.storage.read(shard_name(0), 0, 10)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://user:secret@host:8/a/?token=secret", "https://host:8/a"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("sftp://me:secret@host/a", "sftp://me@host/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("hf://datasets/me/data@main/a", "hf://datasets/me/data@main/a"),
        ("https://[::1]:8/a", "https://[::1]:8/a"),
        ("https://host/@me/a?at=10:20@x", "https://host/@me/a"),
    ],
)
def test_secrets_of_an_address_are_not_shown(address, said):
    assert is_remote(address)
    assert shown(address) == said


def test_secrets_are_sent_and_not_said(shards, tmp_path):
    with serving(shards, secret="token=geheim") as server:
        address = f"{server.address}/?token=geheim"
        assert_same(records(opened("ranges", address, tmp_path)), records(Shards(shards)))
        with pytest.raises(UserError, match="403") as error:
            RangedShards(Storage(f"{server.address}?token=falsch"))
    assert "falsch" not in str(error.value)
    with pytest.raises(UserError, match="refused, 6 times; look at the storage") as error:
        RangedShards(Storage(address.replace("http://", "http://me:geheim@")))
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http:///data", "cannot be opened: it names no host"),
        ("nowhere://x/y", "cannot be opened: Protocol not known: nowhere"),
        ("memory://not/there", "index.json: no such object; look at the address"),
        ("https://[", "cannot be opened: "),
        ("https://me:ge/heim@host/a", "https://...: cannot be read; write / ? # @ of a user or a password as %2F"),
        ("https://me:ge#heim@host/a", "https://...: cannot be read; write / ? # @"),
        ("sftp://me:12/heim@host/a", "sftp://...: cannot be read; write / ? # @"),
        ("zip://x::https://me:geheim@host/a.zip", "zip://...: is an address within another; give"),
        ("simplecache::s3://me:geheim@b/a", "simplecache://...: is an address within another; give"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(address, said):
    assert is_remote(address)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        RangedShards(Storage(address))
    assert "heim" not in str(error.value) + shown(address)


@pytest.mark.parametrize(("scheme", "library", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(scheme, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"^{scheme}://bucket/a: cannot be opened: .*{library}.*; install the extra `{extra}`$"):
        Storage(f"{scheme}://bucket/a")


def test_anything_that_fsspec_knows_is_read(shards):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/shards/{path.name}", path.read_bytes())
    assert_same(records(RangedShards(Storage("memory://shards"))), records(Shards(shards)))


NGINX = """
daemon off; master_process off; pid {0}/pid; error_log {0}/errors;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {0}; proxy_temp_path {0};
  fastcgi_temp_path {0}; uwsgi_temp_path {0}; scgi_temp_path {0};
  server {{ listen 127.0.0.1:{1}; location /shards/ {{ alias {2}/; }} }}
}}
"""


def test_shards_behind_nginx_are_read(shards, tmp_path, monkeypatch):
    if not (nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")):
        pytest.skip("no nginx")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(NGINX.format(tmp_path, port, shards))
    address = f"http://127.0.0.1:{port}/shards"
    with subprocess.Popen([nginx, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "errors"]) as server:
        try:
            monkeypatch.setattr(storage, "PAUSES", (0.05,) * 100)  # until it listens
            for way in ("ranges", "cache"):
                assert_same(records(opened(way, address, tmp_path / "cache"), None, 6), records(Shards(shards), None, 6))
            with pytest.raises(UserError, match="404 Not Found; look at the address"):
                RangedShards(Storage(f"{address}/none"))
        finally:
            server.terminate()


def test_shards_in_s3_are_read(shards, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import s3fs

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {"ACCESS_KEY_ID": "name", "SECRET_ACCESS_KEY": "geheim", "ENDPOINT_URL": f"http://{host}:{port}"}
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem().mkdir("bucket")
        s3fs.S3FileSystem().put(f"{shards}/", "bucket/shards/", recursive=True)
        for way in ("ranges", "cache"):
            assert_same(records(opened(way, "s3://bucket/shards", tmp_path), 2, 4), records(Shards(shards), 2, 4))
        with pytest.raises(UserError, match="s3://bucket/other/index.json: no such object; look at the address") as error:
            RangedShards(Storage("s3://bucket/other"))
        assert "geheim" not in str(error.value)
    finally:
        server.stop()
