"""Processes of one launch, as on two nodes: the first lists, finds and plans, all build, whatever locks the disk knows."""

import json
import shutil
import signal
import socket
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from engine.data.format.index import INDEX
from engine.data.handed import hand_over
from engine.data.sources.image_folder import ImageFolder
from engine.data.sources.packed import Sample, Samples
from engine.data.sources.subset import drawn_from
from engine.errors import TRY_AGAIN
from engine.shards import build_command
from tests.commands import start_two
from tests.test_processes import codes, start

BEGIN = """
import fcntl, os, struct, sys, time
from engine.errors import exit_code
from engine.shards import build_command
from engine.data import encode
from engine import liveness

first = os.environ["RANK"] == "0"
whole, locks = encode.encode_shard, fcntl.fcntl

def encode_shard(*arguments):
    print("encodes", arguments[5], flush=True)
    return whole(*arguments)

encode.encode_shard = encode_shard
"""
ALONE = """
if not first:
    from engine.data.sources import files, image_folder
    def refuse(*arguments, **named):
        raise AssertionError("another process than the first looks at the data set")
    files.Files._walk = files.Files.stat = image_folder.read_table = refuse
    encode.look = encode.recipe_of = encode.open_source = refuse
"""
END = "\nsys.exit(exit_code('program', lambda: build_command(sys.argv[1:])))\n"
LOCKS = {
    "global": "",
    "none": """
def none(descriptor, command, *arguments):
    if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
        raise OSError(37, "No locks available")
    return locks(descriptor, command, *arguments)
fcntl.fcntl = none
""",
    "of a node": """
def of_a_node(descriptor, command, *arguments):
    if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK) and not first:
        kind, whence, begin, *rest = struct.unpack("hhqqi0q", arguments[0])
        arguments = [struct.pack("hhqqi0q", kind, whence, begin + 2**45, *rest)]
    return locks(descriptor, command, *arguments)
fcntl.fcntl = of_a_node
""",
}


def options(model, data, directory, **more) -> list[str]:
    values = {"family": "sd", "pretrained_model_name_or_path": model, "train_data_dir": data, "resolution": 16,
              "shard_records": 2, "shards_dir": directory, "encode_batch_size": 1} | more  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def build(arguments: list[str], preparation: str = ""):
    program = BEGIN + preparation + END
    return start_two([sys.executable, "-c", program, *arguments], LOCAL_WORLD_SIZE="1")


@pytest.fixture(scope="session")
def alone(model, images, tmp_path_factory):
    """The shards of one process."""
    directory = tmp_path_factory.mktemp("alone") / "shards"
    assert build_command(options(model, images, directory)) == 0
    return directory


def contents(directory: Path) -> dict[str, object]:
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    index = json.loads(found.pop(INDEX)) | {"encode_seconds": 0}
    index["config"].pop("shards_dir")
    return found | {INDEX: index}


@pytest.mark.parametrize("locks", LOCKS)
def test_each_shard_is_built_once_and_the_first_alone_looks(locks, model, images, alone, tmp_path):
    both = build(options(model, images, tmp_path / "shards"), LOCKS[locks] + ALONE)
    assert codes(both) == [0, 0], [process.errors for process in both]
    assert contents(tmp_path / "shards") == contents(alone)
    encoded = [line for process in both for line in process.output.splitlines() if line.startswith("encodes")]
    assert len(encoded) == len(set(encoded)) == 6
    assert ("locks are not supported there" in both[0].errors) == (locks == "none")
    assert ("locks there hold on one node only" in both[0].errors) == (locks == "of a node")
    again = build(options(model, images, tmp_path / "shards"), ALONE)
    assert codes(again) == [0, 0], [process.errors for process in again]
    assert not [line for process in again for line in process.output.splitlines() if line.startswith("encodes")]


def test_a_mistake_in_the_data_is_every_processs_and_said_once(model, tmp_path):
    both = build(options(model, tmp_path / "none", tmp_path / "shards"), ALONE)
    assert codes(both) == [2, 2]
    assert [process.errors.count("none") for process in both] == [1, 0], [process.errors for process in both]


OTHER_MODEL = """
def slowly(*arguments):
    assert first
    time.sleep(0.3)
    return whole(*arguments)
encode.encode_shard = slowly
liveness.BEAT = 0.1
if not first:
    sys.argv = [argument.replace("/model", "/other") for argument in sys.argv]
"""


@pytest.mark.parametrize("damage", ["altered", "cut"])
def test_a_node_whose_models_are_others_encodes_nothing(damage, model, images, alone, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    other = Path(shutil.copytree(model, tmp_path / "other"))
    file = next((other / "vae").glob("*.safetensors"))
    if damage == "altered":
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:-100])
    both = build(options(tmp_path / "model", images, tmp_path / "shards"), OTHER_MODEL)
    assert codes(both) == [TRY_AGAIN, 2], [process.errors for process in both]
    assert not list((tmp_path / "shards").glob("*.partial"))
    where = f"error: node {socket.gethostname()}: {other}"
    assert (f"{where}: another vae than the first process has" if damage == "altered" else f"{where}/vae") in both[1].errors
    for shard in alone.glob("shard-*"):
        assert (tmp_path / "shards" / shard.name).read_bytes() == shard.read_bytes()


UNSEEN = """
from engine import files
liveness.BEAT, files.SEEN_WITHIN = 0.1, 1.0
if not first:
    from engine.data import handed
    handed.seen = lambda path, condition: files.seen(path.with_name("none"))
"""


def test_what_many_nodes_do_not_see_one_of_them_says(model, images, tmp_path):
    program = BEGIN + UNSEEN + END
    command = [sys.executable, "-c", program, *options(model, images, tmp_path / "shards")]
    all_three = start_two(command, world=3, LOCAL_WORLD_SIZE="1")
    assert [process.wait(60) for process in all_three] == [TRY_AGAIN, 2, 2], [process.errors for process in all_three]
    said = "".join(process.errors for process in all_three)
    assert said.count("did not come to see it as the first process does") == 1, said


SLOWLY = """
liveness.BEAT, liveness.SILENCE = 0.1, 2.0
def slowly(*arguments):
    print("encodes", flush=True)
    time.sleep(0.2 if first else 600)
    return whole(*arguments)
encode.encode_shard = slowly
"""


def test_the_shard_of_a_process_that_died_is_built_by_another(model, images, alone, tmp_path):
    both = build(options(model, images, tmp_path / "shards"), SLOWLY + LOCKS["of a node"])
    while "encodes" not in both[1].output:
        assert both[1].poll() is None, both[1].errors
        time.sleep(0.01)
    both[1].send_signal(signal.SIGKILL)
    assert codes(both) == [TRY_AGAIN, -signal.SIGKILL], both[0].errors
    for shard in alone.glob("shard-*"):
        assert (tmp_path / "shards" / shard.name).read_bytes() == shard.read_bytes()


DELETED = """
liveness.LAG = 0.3
from pathlib import Path
def deleting(*arguments):
    if not first:
        directory = Path(sys.argv[-1].removeprefix("--shards_dir="))
        while not (directory / "shard-00001.safetensors").exists():
            time.sleep(0.01)
        (directory / "shard-00000.safetensors").unlink(missing_ok=True)
        encode.encode_shard = whole
    return whole(*arguments)
encode.encode_shard = deleting
"""


def test_a_shard_that_is_deleted_meanwhile_is_built_again_though_its_builder_lives(model, images, alone, tmp_path):
    arguments = sorted(options(model, images, tmp_path / "shards"), key=lambda option: option.startswith("--shards_dir"))
    both = build(arguments, DELETED)
    assert [process.wait(60) for process in both] == [0, 0], [process.errors for process in both]
    assert contents(tmp_path / "shards") == contents(alone)


CLAIM = """
def story(processes):
    if processes.rank == 1:
        assert processes.is_mine("a shard") and processes.is_mine("a shard")
        say("claimed")
        processes.wait_for_all()
        os.kill(os.getpid(), 19)  # falls silent
    processes.wait_for_all()
    assert not processes.is_mine("a shard")
    started = time.monotonic()
    while not processes.is_mine("a shard"):
        time.sleep(0.05)
    assert time.monotonic() > started + 0.5
    say("taken over")
"""


def test_a_claim_is_given_back_when_its_process_gives_no_sign_of_life():
    both = start(CLAIM)
    both[0].wait(60)
    both[1].send_signal(signal.SIGKILL)
    assert "taken over" in both[0].output, both[0].errors


@pytest.fixture(params=["folder", "zip", "tar", "table"])
def place(request, images, tmp_path):
    """Images with captions, unpacked or in archives."""
    whole = Path(shutil.copytree(images, tmp_path / "images"))
    if request.param == "table":
        return whole
    for number, line in enumerate((whole / "metadata.jsonl").read_text().splitlines()):
        row = json.loads(line)
        (whole / row["file_name"]).with_suffix(".txt").write_text(f"{row['text']}\n" * (1 + number % 2))
    (whole / "metadata.jsonl").unlink()
    if request.param == "folder":
        return whole
    archive = tmp_path / f"images.{request.param}"
    if request.param == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(whole.iterdir()):
                file.write(path, path.name)
    else:
        with tarfile.open(archive, "w") as file:
            file.add(whole, ".")
    return archive


def test_what_is_handed_over_is_the_same_without_looking_again(place, tmp_path, monkeypatch):
    source = drawn_from(ImageFolder(place, "image", "text"), 7, 3)
    stamps, _ = source.stamps()
    told = hand_over((source, stamps), tmp_path)
    assert len(told.head) < 20_000
    monkeypatch.setattr("engine.data.sources.files.Files._walk", lambda files: pytest.fail("listed again"))
    taken, taken_stamps = told.take(tmp_path)
    (tmp_path / told.name).unlink()
    assert np.array_equal(taken_stamps, stamps)
    for number in range(len(source)):
        for what in ("name", "captions", "content", "refusal"):
            assert getattr(taken, what)(number) == getattr(source, what)(number)


def test_packed_samples_are_what_they_were():
    samples = [
        Sample("a.png", "text"), Sample("\udcff.png", ["one", "zwei ☃"]), Sample("c", None), Sample("d", 7),
        Sample("e", "\ud800"), Sample("f", b"bytes"), Sample("", ""), Sample("g", [1, "two"]),
    ]  # fmt: skip
    assert list(Samples(samples)) == samples
    assert list(Samples([])) == []


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_rows_of_the_library_are_built_together_too(kind, model, images, tmp_path):
    import datasets

    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()][:4]
    columns = {"image": [{"bytes": (images / row["file_name"]).read_bytes()} for row in lines],
               "text": [row["text"] for row in lines]}  # fmt: skip
    rows, data = datasets.Dataset.from_dict(columns), tmp_path / "data"
    if kind == "saved":
        rows.save_to_disk(data)
    else:
        data.mkdir()
        rows.to_parquet(data / "train.parquet")
    both = build(options(model, data, tmp_path / "shards"))
    assert codes(both) == [0, 0], [process.errors for process in both]
    assert build_command(options(model, data, tmp_path / "alone")) == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "alone")
