"""Training on shards of remote storage: the weights of a run on the disk, and nothing of a secret in what it leaves."""

import itertools
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from engine import storage
from engine.config.checks import check_machine, check_options
from engine.config.command_line import load
from engine.config.options import TrainConfig
from engine.data.format.index import ENTRY
from engine.errors import UserError
from engine.files import digest
from engine.loop.prepare import _warn_of_a_small_cache
from engine.loop.trainer import train
from engine.processes import Processes
from engine.shards import build_command, verify_command
from tests.commands import Command
from tests.loop.runs import command, config
from tests.storage_server import serving

WEIGHTS = "checkpoint-3/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def on_disk(model, images, shards, tmp_path) -> TrainConfig:
    return config(model, images, shards, tmp_path / "disk", max_train_steps=3, use_ema=False, shuffle="blocks")


def elsewhere(on_disk: TrainConfig, address: str, **options) -> TrainConfig:
    return on_disk.model_copy(update={"train_data_dir": None, "shards_dir": address, **options})


def test_a_run_over_http_ends_in_the_weights_of_one_on_the_disk(on_disk, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.001,) * 5)
    assert train(on_disk) == 0
    with serving(shards, lambda name, span, before: "cut" if not before else None, "token=geheim") as server:
        address = f"{server.address}?token=geheim"
        limit = str(4 * max(path.stat().st_size for path in shards.glob("shard-*")))
        for name, options in {
            "ranges": {},
            "cache": {"shards_cache": str(tmp_path / "cache"), "shards_cache_limit": limit},
        }.items():
            assert train(elsewhere(on_disk, address, output_dir=str(tmp_path / name), shuffle=None, **options)) == 0
            assert digest(tmp_path / name / WEIGHTS) == digest(tmp_path / "disk" / WEIGHTS)
            for path in (tmp_path / name).rglob("*.*"):
                assert path.is_dir() or b"geheim" not in path.read_bytes(), path
            assert f'shards_dir = "{server.address}"' in (tmp_path / name / "config.toml").read_text()
    said = capsys.readouterr()
    assert "geheim" not in said.out + said.err


def test_storage_that_goes_away_costs_no_step(on_disk, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.001,))
    questions = itertools.count()
    with serving(shards, lambda name, *_: 503 if name.startswith("shard") and next(questions) > 12 else None) as server:
        run = elsewhere(on_disk, server.address, output_dir=str(tmp_path / "out"), max_train_steps=200)
        with pytest.raises(UserError, match=r"503 Service Unavailable, 2 times; .*; step \d+ is saved in .*/checkpoint-\d+"):
            train(run)
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_a_killed_run_leaves_nothing_half_written_in_the_cache(on_disk, shards, tmp_path):
    cache = tmp_path / "cache"
    with serving(shards, lambda name, span, before: "slow") as server:
        run = elsewhere(on_disk, server.address, output_dir=str(tmp_path / "out"), shards_cache=str(cache))
        killed = Command(command(run))
        while killed.poll() is None and not list(cache.glob("*.partial")):
            time.sleep(0.002)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        kept = {path.stem: digest(path) for path in cache.glob("*.safetensors")}
        assert all(name == content for name, content in kept.items())
        assert train(run) == 0
        assert {path.suffix for path in cache.iterdir()} == {".safetensors", ".lock"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_data_dir": "images"}, "--shards_dir s3://b/a: shards are read there, and not built"),
        ({"verify_shards": "all"}, "--verify_shards all would read every shard over the network"),
        ({"shards_dir": "here", "shards_cache": "c"}, "--shards_cache keeps shards of remote storage"),
        ({"shards_cache_limit": "1GB"}, "--shards_cache_limit needs --shards_cache"),
        ({"shards_cache": "c", "shards_cache_limit": "much"}, "--shards_cache_limit much: give a size, for example 500GB"),
        ({"shards_dir": "https://h/a?token=geheim", "report_to": "wandb"}, "--shards_dir with a password or token and"),
        ({"shuffle": "global", "shuffle_window": 3}, "--shuffle_window needs --shuffle blocks"),
        ({"shards_dir": "here", "shuffle_window": 3}, "--shuffle_window needs --shuffle blocks"),
        ({"shards_dir": "https://h/a/index.json?token=geheim"}, "--shards_dir https://h/a/index.json: is a file; give the"),
        ({"shards_dir": "http:/h/a"}, "--shards_dir http:/h/a: no such directory; an address begins with https://"),
        ({"shards_dir": "host:80/a"}, "--shards_dir host:80/a: no such directory; an address begins with https://"),
        ({"shards_dir": "typo"}, "--shards_dir typo: no such directory; name the directory of the shards"),
        ({"continue_on_grown_data": True}, "--continue_on_grown_data needs --resume_from_checkpoint"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    values = {"family": "sd", "pretrained_model_name_or_path": str(model), "shards_dir": "s3://b/a"} | options
    with pytest.raises(UserError, match=said) as error:
        check_machine(load(TrainConfig, values))
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    ("said", "meant"), [("500GB", 500 * 10**9), ("1.5 TiB", 3 * 2**39), ("2m", 2 * 10**6), ("4096", 4096), ("7B", 7)]
)
def test_sizes_are_read_as_people_write_them(said, meant):
    run = TrainConfig(
        family="sd", pretrained_model_name_or_path="m", shards_dir="s3://b/a", shards_cache_limit=said, shards_cache="c"
    )
    check_options(run)
    check_options(run.model_copy(update={"shuffle_window": 3}))  # blocks is the default there
    assert run.cache_bytes == meant


@pytest.mark.parametrize("resumed", [False, True])
def test_a_cache_for_fewer_shards_than_are_read_is_told_what_it_may_do(resumed, capsys):
    run = TrainConfig(
        family="sd", pretrained_model_name_or_path="m", shards_dir="s3://b/a", shards_cache="c", shards_cache_limit="500",
        shuffle="blocks", shuffle_window=8,
    )  # fmt: skip
    shards = np.zeros(100, ENTRY)
    shards["bytes"] = 100
    _warn_of_a_small_cache(run, [shards], resumed)
    said = capsys.readouterr().err
    other = "" if resumed else ", or --shuffle blocks --shuffle_window 2"
    expected = (
        "holds 5 shards, and 8 are read at a time (--shuffle blocks), so they may be fetched again and again; give 1600 bytes"
    )
    assert said.endswith(f"{expected}{other}\n")
    for options in ({"shards_cache_limit": "1600"}, {"shuffle_window": 2}):
        check_options(taken := run.model_copy(update=options))
        _warn_of_a_small_cache(taken, [shards], resumed)
    assert not capsys.readouterr().err


def test_shards_that_are_replaced_while_processes_open_them_are_refused(on_disk, monkeypatch):
    def gather(self, value):
        of_parts = isinstance(value, list) and all(isinstance(each, set) for each in value)
        return [value, [{("another", b"")} for _ in value]] if of_parts else [value]

    monkeypatch.setattr(Processes, "gather_objects", gather)
    with pytest.raises(UserError, match="/index.json: replaced while the processes opened it; start the same again"):
        train(on_disk.model_copy(update={"train_data_dir": None, "verify_shards": "none"}))


def test_nothing_is_written_to_remote_storage(model, images, tmp_path):
    arguments = ["--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images)]
    with pytest.raises(UserError, match="--shards_dir s3://b/a: shards are read there, and not built"):
        build_command([*arguments, "--shards_dir", "s3://b/a"])
    with pytest.raises(UserError, match="https://h/a is an address; copy the shards to a directory of this machine"):
        verify_command(["https://me:geheim@h/a?token=geheim"])
    assert not Path("s3:").exists()
