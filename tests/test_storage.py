"""Remote storage over HTTP: proxies, credentials, and servers that are busy, elsewhere, or send something else."""

import re
import time
from base64 import b64encode
from types import SimpleNamespace

import huggingface_hub
import pytest

from engine import storage
from engine.errors import UserError
from engine.storage import Storage, StorageError
from tests.storage_server import serving


@pytest.fixture
def place(tmp_path):
    (tmp_path / "object").write_bytes(b"content")
    return tmp_path


def basic(given: str) -> str:
    return f"Basic {b64encode(given.encode()).decode()}"


@pytest.mark.parametrize("form", ["http://me:ge%20heim@{}", "me:ge%20heim@{}"])
@pytest.mark.parametrize("name", ["http_proxy", "all_proxy"])
def test_a_proxy_is_asked_and_told_who_asks(form, name, place, monkeypatch):
    with serving(place) as server:
        monkeypatch.setenv("no_proxy", "")
        for other in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, form.format(server.address.removeprefix("http://").removesuffix("/data")))
        assert Storage("http://you:pässword@host.invalid/data").read("object", 0, 7) == b"content"
    assert server.told["Proxy-Authorization"] == basic("me:ge heim")
    assert server.told["Authorization"] == basic("you:pässword")


@pytest.mark.parametrize("proxy", ["socks5://me:geheim@host:1080", "http://me:geheim@host:much", "http://"])
def test_what_is_no_proxy_over_http_is_refused_by_its_name(proxy, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(
        UserError, match="^https_proxy: no proxy over HTTP, .*; set it to http://host:port, or no_proxy to h$"
    ) as error:
        Storage("https://h/a")
    assert "geheim" not in str(error.value)


def test_a_server_that_is_busy_says_for_how_long(place, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.001,) * 2)
    busy = (503, {"Retry-After": "1"})
    with serving(place, lambda name, span, before: busy if not before else None) as server:
        started = time.monotonic()
        assert Storage(server.address).read("object", 0, 7) == b"content"
        assert time.monotonic() - started >= 1


def test_another_place_is_asked_without_the_credentials(place):
    with serving(place) as other, serving(place, lambda *_: (302, {"Location": f"{other.address}/object"})) as server:
        address = server.address.replace("http://", "http://me:geheim@")
        assert Storage(address).read("object", 2, 7) == b"ntent"
        assert server.told["Authorization"] == basic("me:geheim")
        assert other.told["Authorization"] is None


@pytest.mark.parametrize(
    ("answer", "said", "asked"),
    [
        ((302, {"Location": "object"}), "redirected 6 times; give the address", 6),
        ((206, {"Content-Encoding": "gzip"}), "the server sends it as gzip, unasked; have it serve these files as they are", 1),
        ((503, {"Retry-After": "0"}), "503 Service Unavailable, 3 times; look at the storage", 3),
    ],
)
def test_answers_that_lead_nowhere_are_called_by_their_names(answer, said, asked, place, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.001,) * 2)
    with serving(place, lambda *_: answer) as server:
        with pytest.raises(StorageError, match=f"/object, bytes 0 to 7: {said}"):
            Storage(server.address).read("object", 0, 7)
        assert len(server.asked) == asked


def test_what_a_server_says_of_memory_is_not_of_this_machine(place, monkeypatch):
    def failing(*_):
        raise OSError("503 Out of memory")

    monkeypatch.setattr(storage, "PAUSES", (0.001,))
    with serving(place) as server:
        asked = Storage(server.address)
        monkeypatch.setattr(asked._reader, "pieces", failing)
        with pytest.raises(StorageError, match=re.escape("/object, bytes 0 to 7: 503 Out of memory, 2 times; look at")):
            asked.read("object", 0, 7)


def test_secrets_are_hidden_in_whatever_form_they_are_quoted():
    asked = Storage("https://me:ge%2Fheim@host/a?to%20ken")
    assert asked._masked("me:ge/heim ge%2Fheim to ken to%20ken") == "me:... ... ... ..."


def test_a_folder_on_the_hub_is_read_as_it_was_at_first(monkeypatch):
    place = SimpleNamespace(repo_id="me/data", repo_type="dataset", revision="main", path_in_repo="shards")
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", lambda *_: place)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "repo_info", lambda *_, **options: SimpleNamespace(sha=f"{options['revision']}-1")
    )
    asked = Storage("hf://datasets/me/data/shards")
    assert asked._reader.url("index.json").endswith("/datasets/me/data/resolve/main-1/shards/index.json")
