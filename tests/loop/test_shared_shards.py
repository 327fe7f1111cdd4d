"""Shards that more than one run uses: one builds them while others wait, and nobody trains on another model's unawares."""

import contextlib
import os
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

from engine.data import encode
from engine.data.format.index import INDEX
from engine.data.format.reader import Shards
from engine.data.format.verify import verify
from engine.errors import UserError
from engine.files import lock
from engine.loop import prepare
from engine.loop.prepare import _refuse_other_models
from engine.loop.trainer import train
from engine.models.encoder import Encoding
from engine.shards import build_command
from tests.commands import Command
from tests.loop.runs import config


@pytest.fixture
def run(model, images, tmp_path):
    """A training of one step over shards in the test's own directory."""
    plain = config(model, images, tmp_path / "shards", tmp_path / "out", max_train_steps=1)
    return lambda **options: train(plain.model_copy(update=options))


def meanwhile(monkeypatch, held: int, work) -> list[float]:
    """Lets another run, which holds a lock, do its work and end while this one waits for the second time."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            work()
            os.close(held)

    monkeypatch.setattr(encode.time, "sleep", sleep)
    return waited


def test_a_run_waits_for_another_that_builds_and_takes_its_shards(run, shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "shards").mkdir()
    held = lock(tmp_path / "shards")
    waited = meanwhile(monkeypatch, held, lambda: shutil.copytree(shards, tmp_path / "shards", dirs_exist_ok=True))
    monkeypatch.setattr(encode, "_build", lambda *arguments: pytest.fail("both built"))
    assert run() == 0
    assert waited == [1, 1]
    assert capsys.readouterr().err.count("another run is building these shards; waiting for its end") == 1


def test_a_run_builds_where_the_other_one_gave_up(run, shards, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    meanwhile(monkeypatch, lock(tmp_path / "shards"), lambda: None)
    assert run() == 0
    for file in shards.glob("*.safetensors"):
        assert (tmp_path / "shards" / file.name).read_bytes() == file.read_bytes()


def test_shards_in_the_output_directory_itself_do_not_wait_for_their_own_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(encode.time, "sleep", lambda seconds: pytest.fail("waits for itself"))
    assert run(shards_dir=str(tmp_path / "out")) == 0


def with_another(part: str, model, directory):
    """A copy of a pipeline in which one number of a part's weights differs."""
    shutil.copytree(model, directory)
    file = next((directory / part).glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_shards_of_another_encoder_are_refused_by_name_unless_they_are_trusted(part, run, model, shards, tmp_path):
    options = {
        "shards_dir": str(shards), "train_data_dir": None,
        "pretrained_model_name_or_path": with_another(part, model, tmp_path / "model"),
    }  # fmt: skip
    with pytest.raises(UserError, match=rf"were built with other models than .* \(another {part}\); .* --trust_shards"):
        run(**options)
    assert run(trust_shards=True, **options) == 0


def test_shards_of_held_out_records_are_compared_with_the_models_of_the_run(run, model, shards, tmp_path):
    held_out, other = tmp_path / "held_out", with_another("vae", model, tmp_path / "model")
    assert run(shards_dir=str(held_out), pretrained_model_name_or_path=other, max_train_steps=1) == 0
    options = {
        "train_data_dir": None,
        "shards_dir": str(shards),
        "validation_data_dir": str(held_out),
        "overwrite": True,
        "max_train_steps": 1,
    }
    with pytest.raises(UserError, match=r"held_out: the shards were built with other models .* \(another vae\); .* --trust"):
        run(**options)
    assert run(trust_shards=True, **options) == 0


def test_another_unet_is_no_other_encoder(run, model, shards, tmp_path):
    changed = with_another("unet", model, tmp_path / "model")
    assert run(shards_dir=str(shards), train_data_dir=None, pretrained_model_name_or_path=changed) == 0


def test_models_that_are_not_at_hand_are_not_compared():
    def absent() -> str:
        raise UserError("no weights there")

    index = SimpleNamespace(family="sd", identity={"models": {"movq": "a" * 64, "image_encoder": "b" * 64}})
    part = SimpleNamespace(index=index, config=SimpleNamespace(shards_place="there"))
    for now, expected in (("a" * 64, contextlib.nullcontext()), ("c" * 64, pytest.raises(UserError, match="another movq"))):
        asked = []
        digests = {"movq": lambda now=now, asked=asked: asked.append(now) or now, "image_encoder": absent}
        encoding = SimpleNamespace(_identity={}, encoder_digests=lambda digests=digests: digests)
        encoding.encoder_identity = partial(Encoding.encoder_identity, encoding)
        family = SimpleNamespace(config=SimpleNamespace(family="sd"), encoding=encoding)
        with expected:
            _refuse_other_models([part] * 40, family)
        assert asked == [now], "for all parts together"
    with pytest.raises(UserError, match="another image_encoder"):  # than that of the training's shards
        _refuse_other_models([part], family, {"image_encoder": "d" * 64})


def test_the_shards_of_all_parts_are_divided_together(monkeypatch):
    """Each process looks at as many, and one exchange tells all."""
    looked, damaged = [], {"shard-0": "truncated"}

    def verify(directory, index, numbers, contents, progress):
        looked.append((directory, numbers))
        return damaged if directory == "3" else {}

    monkeypatch.setattr(prepare, "verify", verify)
    parts = [
        SimpleNamespace(index=SimpleNamespace(shards=range(count)), config=SimpleNamespace(shards_path=str(place), source=None))
        for place, count in enumerate((2, 1, 1, 3))
    ]
    gather = Mock(side_effect=lambda found: [{}, found])
    with pytest.raises(UserError, match=r"^3: damaged shards: shard-0: truncated; copy or build them again$"):
        prepare._verify(SimpleNamespace(verify_shards="size"), parts, SimpleNamespace(rank=1, world=3, gather_patiently=gather))
    assert looked == [("0", [1]), ("3", [0])]
    gather.assert_called_once()


def test_an_index_is_written_once(run, tmp_path):
    assert run() == 0
    before = (tmp_path / "shards" / INDEX).stat().st_mtime_ns
    assert run(overwrite=True) == 0
    assert (tmp_path / "shards" / INDEX).stat().st_mtime_ns == before


WITHOUT_LOCKS = """
import fcntl, errno
whole = fcntl.fcntl
def locks(descriptor, command, *arguments):
    if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
        raise OSError(errno.ENOLCK, "No locks available")
    return whole(descriptor, command, *arguments)
fcntl.fcntl = locks
"""
BUILD = """
import sys
from engine.errors import exit_code
from engine.shards import build_command
sys.exit(exit_code("program", lambda: build_command(sys.argv[1:])))
"""


@pytest.mark.parametrize("preparation", ["", WITHOUT_LOCKS], ids=["locks", "no locks"])
def test_two_builders_at_once_arrive_at_the_same_shards(preparation, model, images, tmp_path):
    directory = tmp_path / "shards"
    directory.mkdir()
    leftovers = [directory / f"{name}.0123abcd.partial" for name in ("shard-00001.safetensors", "index.json")]
    for leftover in leftovers:
        leftover.write_bytes(b"of a run that was killed")
    (directory / "other.partial").touch()
    options = {"family": "sd", "pretrained_model_name_or_path": model, "train_data_dir": images, "resolution": 16,
               "shard_records": 5, "shards_dir": directory, "encode_batch_size": 1}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()] + ["--random_flip"]
    both = [Command([sys.executable, "-c", preparation + BUILD, *arguments]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.errors for process in both]
    assert len(Shards(directory)) == 12
    assert verify(directory, Shards(directory).index, range(3), rows=True) == {}
    assert [leftover.exists() for leftover in leftovers] == [bool(preparation)] * 2, "swept by who holds the lock alone"
    assert sum(file.suffix == ".partial" for file in directory.iterdir()) == (3 if preparation else 1)


def test_the_shard_in_hand_is_all_that_a_killed_builder_loses(model, images, tmp_path, monkeypatch):
    options = {"family": "sd", "pretrained_model_name_or_path": model, "train_data_dir": images, "resolution": 16,
               "shard_records": 1, "shards_dir": tmp_path / "shards", "encode_batch_size": 1}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()] + ["--random_flip"]
    slowly = "import engine.data.encode as encode, time; whole = encode.encode_shard\n"
    slowly += "encode.encode_shard = lambda *arguments: (time.sleep(0.3), whole(*arguments))[1]\n"
    killed = Command([sys.executable, "-c", slowly + BUILD, *arguments])
    while len(list((tmp_path / "shards").glob("shard-*.safetensors"))) < 2:
        assert killed.poll() is None, killed.errors
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    complete = len(list((tmp_path / "shards").glob("shard-*.safetensors")))
    encoded = []
    whole = encode.encode_shard
    monkeypatch.setattr(encode, "encode_shard", lambda *arguments: (encoded.append(arguments[5]), whole(*arguments))[1])
    read = []
    monkeypatch.setattr(encode.Shard, "damage", lambda shard: read.append(shard.path))
    assert build_command(arguments) == 0
    assert len(encoded) == 12 - complete
    assert len(read) <= 1, "one that was written and not yet said to be"
    assert verify(tmp_path / "shards", Shards(tmp_path / "shards").index, range(12), rows=True) == {}
