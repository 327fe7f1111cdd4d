"""Checkpoints whose digests agree and whose content lies: one line, or the same bits."""

import errno
import gc
import json
import os
import random
import shutil
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import files, tensors
from engine.checkpoint import verify_command
from engine.config.options import TrainConfig
from engine.errors import FailingDisk, UserError
from engine.files import digest, lock, open_regular, write_json
from engine.loop.checkpoints import layout
from engine.loop.checkpoints.names import LATEST, MANIFEST, STATE, checkpoint_name, rank_file
from engine.loop.checkpoints.slices import RankFiles, open_slices
from engine.loop.checkpoints.snapshot import restore, sliced_tensors
from engine.loop.checkpoints.writer import Writer
from engine.loop.metrics import Metrics
from engine.loop.resume import announce, find_checkpoint, open_checkpoint, take_over
from engine.loop.run import Run
from engine.loop.weights.flat import FlatPartition
from engine.processes import Processes
from tests.loop.runs import flip_last_byte

RANK = rank_file(0)
VALUES = [
    None, True, -1, 0, 3, 10**6, 10**30, 0.5, "", "4", "x\n\x1b[31m", "x" * 5000, [], [1], {}, {"a": [1]}, float("nan"),
    float("inf"),
]  # fmt: skip


class Trained:
    """A tiny model with checkpoints of two steps, and what resuming the later one gives."""

    def __init__(self, directory: Path) -> None:
        processes = Processes()
        config = TrainConfig(family="sd", pretrained_model_name_or_path="unused", use_ema=True)
        self.directory = directory
        self.partition = FlatPartition(nn.Linear(6, 5), config, processes)
        run = Run(seed=3, global_batch=1, fingerprint="f" * 64, records=1, steps=9, options={"learning_rate": 1e-3})
        self.metrics = Metrics(run, processes)
        for step in (2, 4):
            self.partition.optimizer.apply([torch.ones_like(self.partition.masters[0])])
            self.metrics.end_step()
            Writer(directory, run, processes, None, False, "token").save(step, self.partition, self.metrics)
        self.bits = self.state()

    def state(self) -> list[torch.Tensor]:
        kinds = sliced_tensors(self.partition).values()
        return [self.partition.view(piece, tensors).clone() for tensors in kinds for piece in self.partition.slices]

    def resume(self, checkpoint: Path) -> bool:
        """Whether a checkpoint gives the same bits as the one that was written."""
        for kind in sliced_tensors(self.partition).values():
            for tensor in kind:
                tensor.zero_()
        restore(layout.open_checked(checkpoint), self.partition, self.metrics)
        return all(torch.equal(ours, theirs) for ours, theirs in zip(self.state(), self.bits, strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("lying") / "out")


@pytest.fixture
def output(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained.directory, tmp_path / "out"))


@pytest.fixture
def checkpoint(output) -> Path:
    return output / "checkpoint-4"


def agree(checkpoint: Path) -> None:
    """Makes the digests of the manifest those of the files."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({name: digest(checkpoint / name) for name in manifest}))


def parts(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write_parts(file: Path, header: dict, data: bytes) -> None:
    content = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + data)


def said(checkpoint: Path, whole: bool = True) -> str:
    """The one line that is said of a checkpoint."""
    with pytest.raises(UserError) as error:
        layout.open_checked(checkpoint, whole)
    [line] = error.value.lines
    assert "\x1b" not in line
    return line


def change(value: object, generator: random.Random) -> object:
    """A JSON value with one thing in it replaced, removed, added or renamed."""
    places: list[tuple[dict | list, object]] = []

    def walk(inner: object) -> None:
        for key, below in list(inner.items() if isinstance(inner, dict) else enumerate(inner)):
            places.append((inner, key))
            if isinstance(below, (dict, list)):
                walk(below)

    walk(value)
    inner, key = generator.choice(places)
    kind = generator.choice(("replace", "replace", "remove", "rename"))
    if kind == "replace":
        inner[key] = generator.choice(VALUES)
    elif kind == "remove" or not isinstance(inner, dict):
        del inner[key]
    else:
        inner[f"{key}{generator.choice(('x', ' ', '@1', '/'))}"] = inner.pop(key)
    return generator.choice([value] * 40 + [[], 1, None])


@pytest.mark.parametrize("name", [STATE, MANIFEST, RANK])
def test_a_mutated_checkpoint_is_refused_in_a_line_or_gives_the_same_bits(name, trained, checkpoint, capsys):
    """A seed, options or counters that another run may have had are as good as those that were written."""
    generator, original, refused = random.Random(f"15 {name}"), (checkpoint / name).read_bytes(), 0
    whole = (checkpoint / MANIFEST).read_bytes()
    for number in range(200):
        file = checkpoint / name
        if number % 4 == 3:
            content = bytearray(original if name != RANK else original[: 8 + struct.unpack("<Q", original[:8])[0]])
            content[generator.randrange(len(content))] = generator.randrange(256)
            file.write_bytes(bytes(content) + original[len(content) :])
        elif name == RANK:
            header, data = parts(file)
            write_parts(file, change(header, generator), data)
        else:
            file.write_text(json.dumps(change(json.loads(original), generator)))
        if name != MANIFEST:
            agree(checkpoint)
        lines: list[str] = []
        try:
            assert trained.resume(checkpoint), file.read_bytes()[:200]
        except UserError as error:
            lines = error.lines
        refused += len(lines)
        assert not lines or (len(lines) == 1 and "--resume_from_checkpoint" in lines[0])
        file.write_bytes(original)
        (checkpoint / MANIFEST).write_bytes(whole)
    assert refused > 100
    assert trained.resume(checkpoint)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": 5}, "state.json: of step 5"),
        ({"step": -1}, "state.json: step: Input should be greater than or equal to 0"),
        ({"world": 2}, "state.json: of 2 processes, and there are rank-0.safetensors"),
        ({"world": 10**9}, "state.json: of 1000000000 processes"),
        ({"loss_steps": 5}, "state.json: counts more steps than the 4"),
        ({"loss_scaler": {"cur_scale": 0.0}}, "cur_scale: not positive"),
        ({"run": {"seed": "3"}}, "run.seed: Input should be a valid integer; run.global_batch: Field required"),
        ({"options": {"lr_scheduler": "x"}}, "options: lr_scheduler: Input should be 'constant'"),
        ({"format_version": 3}, "format version 3, this engine reads 2"),
        ({"data": [[]] * 3}, "data: Input should be a valid dictionary"),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_is_refused(change, named, checkpoint):
    write_json(checkpoint / STATE, json.loads((checkpoint / STATE).read_text()) | change)
    agree(checkpoint)
    assert f"{checkpoint}: {named}" in said(checkpoint) or named in said(checkpoint)


def test_a_state_of_earlier_versions_is_read(checkpoint):
    state = json.loads((checkpoint / STATE).read_text())
    write_json(checkpoint / STATE, {name: value for name, value in state.items() if name not in ("options", "data")})
    agree(checkpoint)
    assert layout.open_checked(checkpoint).state.data is None
    write_json(checkpoint / STATE, state | {"options": {"an_option_of_once": 1}})
    agree(checkpoint)
    assert layout.open_checked(checkpoint).state.options == {}


def test_deep_nesting_is_a_line(checkpoint):
    for text in ("[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900):
        (checkpoint / STATE).write_text(text)
        agree(checkpoint)
        assert "state.json: " in said(checkpoint)


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        ({}, "manifest.json does not name state.json, rank-0.safetensors"),
        ({STATE: "0" * 64}, "manifest.json does not name rank-0.safetensors"),
        ({STATE: "0" * 64, RANK: None}, "manifest.json has no digest of rank-0.safetensors"),
        ({STATE: "0" * 64, RANK: "0" * 64, "../out/x": "0" * 64}, "names '../out/x', which is no file of a checkpoint"),
        ({STATE: "0" * 64, RANK: "0" * 64, "/etc/passwd": "0" * 64}, "names '/etc/passwd', which is no file"),
        ([], "manifest.json is no JSON object"),
    ],
    ids=str,
)
def test_a_manifest_that_names_too_little_or_what_is_elsewhere_is_none(manifest, named, checkpoint):
    write_json(checkpoint / MANIFEST, manifest)
    line = said(checkpoint)
    assert f"{checkpoint}: not a complete checkpoint" in line
    assert named in line


def test_files_that_the_manifest_does_not_name_are_said_and_never_read(checkpoint, tmp_path):
    shutil.copy(checkpoint / RANK, checkpoint / rank_file(1))
    assert "damaged: rank-1.safetensors is not named in manifest.json; resume from" in said(checkpoint, whole=False)
    write_json(checkpoint / MANIFEST, json.loads((checkpoint / MANIFEST).read_text()) | {rank_file(1): "0" * 64})
    agree(checkpoint)
    assert "of 1 processes, and there are rank-0.safetensors, rank-1.safetensors" in said(checkpoint)


def test_files_that_nothing_reads_may_lie_beside_those_of_the_manifest(trained, checkpoint, capsys):
    (checkpoint / "unet").mkdir()
    (checkpoint / ".cache" / "huggingface").mkdir(parents=True)
    for name in ("README.md", ".gitattributes", "curve.png", "unet/LICENSE", "unet/._x", ".cache/huggingface/x.json"):
        (checkpoint / name).touch()
    assert trained.resume(checkpoint)
    assert capsys.readouterr().err == ""
    assert verify_command([str(checkpoint)]) == 0
    assert "read by nothing: README.md, curve.png, unet/LICENSE\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/x.PY", "x.safetensors.index.json", "evil.py", "rank-1.pt"],
)
def test_files_that_a_library_would_read_may_not(name, checkpoint):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).touch()
    assert f"damaged: {name} is not named in manifest.json" in said(checkpoint, whole=False)
    (checkpoint / name).unlink()
    (checkpoint / "vae").symlink_to(checkpoint.parent)
    assert "damaged: vae is not named in manifest.json" in said(checkpoint)


def test_a_start_opens_each_file_of_a_checkpoint_once_to_compare_and_once_to_read(trained, checkpoint, monkeypatch):
    opened: list[str] = []

    def count(path):
        opened.append(path.name)
        return open_regular(path)

    for module in (files, tensors):
        monkeypatch.setattr(module, "open_regular", count)
    values = {"family": "sd", "pretrained_model_name_or_path": "unused", "train_batch_size": 1}
    config = TrainConfig.model_validate(values | {"output_dir": str(checkpoint.parent)})
    found = open_checkpoint(checkpoint, config, Processes())
    announce(found, config, trained.metrics.run, 1)
    restore(found, trained.partition, trained.metrics)
    assert sorted(opened) == [MANIFEST, RANK, RANK, STATE, STATE]


def test_how_far_a_checkpoint_is_looked_at_when_it_is_looked_for(output, monkeypatch):
    (output / LATEST).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(tensors.TensorFile, "read", None)  # as only values need
        assert layout.find(output, LATEST) == output / "checkpoint-4"
        patched.setattr(layout, "digest", None)
        assert layout.find(output, LATEST, layout.Depth.HEADERS) == output / "checkpoint-4"
    flip_last_byte(output / "checkpoint-4" / RANK)
    assert layout.find(output, LATEST) == output / "checkpoint-2", "the newest that verifies"


def test_a_link_that_leads_out_is_refused_and_a_linked_checkpoint_is_not(trained, checkpoint, tmp_path):
    (checkpoint.parent / "elsewhere").mkdir()
    (checkpoint / RANK).rename(tmp_path / RANK)
    (checkpoint / RANK).symlink_to(tmp_path / RANK)
    assert "rank-0.safetensors is a link that leads out of the checkpoint" in said(checkpoint)
    (checkpoint / RANK).unlink()
    (tmp_path / RANK).rename(checkpoint / RANK)
    checkpoint.rename(tmp_path / "moved")
    checkpoint.symlink_to(tmp_path / "moved")
    assert trained.resume(checkpoint)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(checkpoint):
    for name in (STATE, RANK, MANIFEST):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        assert "not a regular file" in said(checkpoint)
        (checkpoint / name).unlink()
        (checkpoint / name).write_bytes(content)


def slices(*entries: tuple[str, int]) -> tuple[dict, bytes]:
    """A header and data of slices by name and number of elements."""
    header, end = {}, 0
    for name, size in entries:
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]}
        end += 4 * size
    return header, bytes(end)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ([("weight/weight@0", 30), ("weight/weight@20", 10)], "the slices of weight/weight overlap at element 20"),
        ([("weight/weight@0", 10), ("weight/weight@11", 19)], "the slices of weight/weight leave a gap at element 10"),
        ([("weight/weight@1", 29)], "the slices of weight/weight leave a gap at element 0"),
        ([("weight/weight@01", 29)], "weight/weight@01 is no name of a slice"),
        ([("weight/weight@-1", 29)], "weight/weight@-1 is no name of a slice"),
        ([("random/weight@0", 29)], "random/weight@0 is no name of a slice"),
        ([("other", 29)], "other is no name of a slice"),
        ([("weight/weight@0", 30)], "rank-0.safetensors: does not hold the state that every process has"),
        ([("ema/weight@0", 30)], "it holds no weights"),
        ([("weight/weight@0", 30), ("ema/weight@0", 29)], "weight has 29 elements in ema, and 30 in weight"),
        ([("weight/weight@0", 30), ("weight/bias@0", 5), ("ema/weight@0", 30)], "bias has 0 elements in ema, and 5 in weight"),
    ],
    ids=str,
)
def test_slices_that_do_not_fit_together_are_refused(entries, named, checkpoint):
    always = [("metrics/loss_sum", 1), ("random/cpu", 1)] if "every process" not in named else []
    write_parts(checkpoint / RANK, *slices(*entries, *always))
    agree(checkpoint)
    assert named in said(checkpoint, whole=False)


def test_parameters_of_another_model_are_named(trained, checkpoint):
    files = open_slices(checkpoint, 1)
    for shapes, named in (
        ({"weight": (5, 6)}, "holds bias, which the model has not"),
        ({"weight": (5, 6), "bias": (5,), "more": (1,)}, "lacks more of the model"),
        ({"weight": (5, 7), "bias": (5,)}, "holds 30 elements of weight, of which the model has 35"),
    ):
        with pytest.raises(Exception, match=named):
            files.check_model({name: torch.Size(shape) for name, shape in shapes.items()})
    with pytest.raises(Exception, match="holds exp_avg_sq, optimizer/step, which this optimizer has not"):
        files.check_state(["weight", "exp_avg"], [])


@pytest.mark.parametrize("kind", ["weight", "ema", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_when_they_are_read(kind, value, trained, checkpoint):
    header, data = parts(checkpoint / RANK)
    start = header[f"{kind}/weight@0"]["data_offsets"][0] + 4 * 17
    write_parts(checkpoint / RANK, header, data[:start] + struct.pack("<f", value) + data[start + 4 :])
    agree(checkpoint)
    expected = (
        rf"checkpoint-4: rank-0.safetensors: {kind}/weight holds values that are not finite; resume from .*checkpoint-2 "
        r"instead: --resume_from_checkpoint .*checkpoint-2$"
    )
    with pytest.raises(UserError, match=expected):
        trained.resume(checkpoint)
    with pytest.raises(UserError, match=expected):
        layout.open_checked(checkpoint, whole=True)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("optimizer/step", struct.pack("<f", float("nan")), "optimizer/step is not finite"),
        ("optimizer/step", struct.pack("<f", 1e9), "optimizer/step is 1000000000.0, after 4 steps"),
        ("metrics/loss_sum", struct.pack("<f", float("inf")), "metrics/loss_sum is not finite"),
        ("random/cpu", b"\xff" * 5056, "rank-0.safetensors: "),
    ],
)
def test_counters_sums_and_generators_that_cannot_be_are_refused(name, content, named, trained, checkpoint):
    header, data = parts(checkpoint / RANK)
    start, stop = header[name]["data_offsets"]
    content = content[: stop - start]
    write_parts(checkpoint / RANK, header, data[:start] + content + data[start + len(content) :])
    agree(checkpoint)
    with pytest.raises(UserError, match=named):
        trained.resume(checkpoint)


def test_another_checkpoint_is_offered_only_if_it_is_whole(checkpoint):
    (checkpoint / STATE).write_text("{}")
    assert "resume from" in said(checkpoint)
    other = checkpoint.with_name("checkpoint-2")
    header, data = parts(other / RANK)
    write_parts(other / RANK, header, struct.pack("<f", float("nan")) + data[4:])
    agree(other)
    assert "there is no other that is whole; start again" in said(checkpoint)


LATEST_IS = [
    b"", b"\n", b"/etc", b"..", b"checkpoint-", b"checkpoint-99", b"checkpoint-04", b"checkpoint-4/../../x", b"\xff\x00",
    b"checkpoint-4\ncheckpoint-2", b"checkpoint-" + b"9" * 5000, "checkpoint-\N{ARABIC-INDIC DIGIT FOUR}".encode(),
    b"x" * 10**6, "directory", "pipe", "dangling",
]  # fmt: skip


@pytest.mark.parametrize("content", LATEST_IS, ids=lambda content: repr(content)[:20])
def test_a_pointer_that_names_no_checkpoint_is_passed_over_and_said(content, output, capsys):
    pointer = output / LATEST
    pointer.unlink()
    if isinstance(content, bytes):
        pointer.write_bytes(content)
    elif content == "directory":
        pointer.mkdir()
    elif content == "pipe":
        os.mkfifo(pointer)
    else:
        pointer.symlink_to("nowhere")
    assert layout.find(output, LATEST) == output / "checkpoint-4"
    assert "latest: names no checkpoint there; taking the newest that is whole, checkpoint-4" in capsys.readouterr().err
    (output / "checkpoint-4" / STATE).write_text("{}")
    assert layout.find(output, LATEST) == output / "checkpoint-2"


def test_a_pointer_is_followed_and_what_it_names_is_never_passed_over_in_silence(output, capsys):
    (output / LATEST).write_text("checkpoint-2\n")
    assert layout.find(output, LATEST) == output / "checkpoint-2"
    (output / "checkpoint-2" / RANK).write_bytes(b"")
    assert layout.find(output, LATEST) == output / "checkpoint-2"
    assert "checkpoint-2: damaged: rank-0.safetensors missing or altered; resume from" in said(output / "checkpoint-2")
    (output / "checkpoint-2" / MANIFEST).unlink()
    assert layout.find(output, LATEST) == output / checkpoint_name(4)
    assert "taking the newest that is whole" in capsys.readouterr().err


def test_in_place_of_the_latest_earlier_steps_come_first_and_then_what_the_run_was_taken_back_from(output, capsys):
    later = Path(shutil.copytree(output / "checkpoint-4", output / "checkpoint-6"))
    write_json(later / STATE, json.loads((later / STATE).read_text()) | {"step": 6})
    agree(later)
    flip_last_byte(output / "checkpoint-4" / RANK)
    for taken, damaged in (("checkpoint-2", RANK), ("checkpoint-6", STATE)):
        assert layout.open_newest(output / "checkpoint-4", Processes()).path.name == taken
        assert f"checkpoint-4: damaged: {RANK} missing or altered; going on from {taken}" in capsys.readouterr().err
        flip_last_byte(output / taken / damaged)
    with pytest.raises(UserError, match=f"checkpoint-4: damaged: {RANK} missing or altered; there is no other that is whole"):
        layout.open_newest(output / "checkpoint-4", Processes())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("name", [MANIFEST, STATE, RANK])
def test_a_failing_disk_is_named_and_no_other_checkpoint_is_advised(name, number, checkpoint, monkeypatch):
    def fail(path, *others):
        if path == checkpoint / name:
            raise OSError(number, os.strerror(number), str(path))
        return open_regular(path)

    for module in (files, tensors):
        monkeypatch.setattr(module, "open_regular", fail)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    line = said(checkpoint)
    assert line.startswith(f"{checkpoint / name}: cannot be read: {os.strerror(number)}; mend what is wrong with that place")


@pytest.mark.parametrize("name", [MANIFEST, STATE, RANK])
def test_where_the_disk_does_not_give_the_latest_the_run_goes_on_from_another(name, output, monkeypatch, capsys):
    lost, failures = [output / "checkpoint-4" / name], []

    def fail(path, *others):
        if path in lost and len(failures) < 9:
            failures.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_regular(path)

    for module in (files, tensors):
        monkeypatch.setattr(module, "open_regular", fail)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    failures += 7 * lost  # it passes with the third time
    found = layout.find(output, LATEST)
    assert layout.open_newest(found, Processes()).path == output / "checkpoint-4"
    failures.clear()
    assert layout.open_newest(found, Processes()).path == output / "checkpoint-2"
    assert f"{lost[0]}: cannot be read: Input/output error; mend" in capsys.readouterr().err
    failures.clear()
    lost.append(output / "checkpoint-2" / name)
    for find in (lambda: layout.open_newest(found, Processes()), lambda: layout.find(output, LATEST)):
        with pytest.raises(FailingDisk, match="checkpoint-4/.*: cannot be read") as error:
            find()
        assert error.value.passing
        (output / LATEST).unlink(missing_ok=True)
        failures.clear()


def test_the_format_of_another_version_is_no_damage(output):
    state = output / "checkpoint-4" / STATE
    write_json(state, json.loads(state.read_text()) | {"format_version": 3})
    agree(output / "checkpoint-4")
    with pytest.raises(
        UserError, match="checkpoint-4/state.json: format version 3, this engine reads 2; go on with the version"
    ):
        layout.open_newest(output / "checkpoint-4", Processes())


def test_a_damaged_checkpoint_is_not_held_open(output):
    flip_last_byte(output / "checkpoint-4" / STATE)
    gc.disable()
    try:
        opened = layout.open_newest(output / "checkpoint-4", Processes())
        held = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    finally:
        gc.enable()
    assert opened.path == output / "checkpoint-2"
    assert str(output / "checkpoint-2" / RANK) in held
    assert str(output / "checkpoint-4" / RANK) not in held


def test_what_an_old_listing_lacks_is_looked_up_by_name(checkpoint, monkeypatch):
    monkeypatch.setattr(layout, "_files", lambda checkpoint: set())
    assert layout.open_checked(checkpoint).state.step == 4
    (checkpoint / RANK).rename(checkpoint / "late")
    threading.Timer(0.2, (checkpoint / "late").rename, (checkpoint / RANK,)).start()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert layout._misplaced(checkpoint, manifest, layout.Depth.DIGESTS, patience=5.0) == {}


def test_all_files_together_are_waited_for_so_long(checkpoint):
    """One process names what it alone does not see."""
    files, started = RankFiles(checkpoint, patience=0.2), time.monotonic()
    with pytest.raises(UserError, match="checkpoint-4/rank-7.safetensors: process 0 does not come to see it"):
        layout._look(files, {rank_file(7): ""}, layout.Depth.DIGESTS)
    assert not any(files.sees(rank_file(number)) for number in range(1, 50))
    assert time.monotonic() - started < 0.6


def test_a_lack_of_memory_is_no_damage(checkpoint, monkeypatch):
    def fail(*others):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")

    monkeypatch.setattr(tensors.TensorFile, "read_at", fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        layout.open_checked(checkpoint, whole=True)


def killed_while_replacing(output: Path) -> Path:
    """An output directory whose only checkpoint made room for another, which never came; returns where it was."""
    shutil.rmtree(output / "checkpoint-2")
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-4-0123abcd.partial")
    (output / "checkpoint-4").rename(output / "checkpoint-4.replaced")
    return output / "checkpoint-4"


@pytest.mark.parametrize("pointer", [True, False])
def test_a_checkpoint_that_made_room_is_brought_back_before_anything_is_swept(pointer, trained, output, capsys):
    lost = killed_while_replacing(output)
    if not pointer:
        (output / LATEST).unlink()
    values = {"pretrained_model_name_or_path": "unused", "output_dir": str(output), "resume_from_checkpoint": LATEST}
    config = TrainConfig.model_validate({"family": "sd", **values})
    take_over(config, None, False, set())
    assert (output / "checkpoint-4.replaced").is_dir(), "also where a run is killed after this one looked"
    assert find_checkpoint(config) == lost
    take_over(config, lost, False, set())
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-4", "config.toml", LATEST]
    assert "checkpoint-4.replaced: brought back" in capsys.readouterr().err
    assert trained.resume(lost)


def test_a_run_that_is_alive_brings_its_checkpoint_back_itself(output):
    lost = killed_while_replacing(output)
    held = lock(output)
    publishing = threading.Timer(0.2, (output / "checkpoint-4-0123abcd.partial").rename, (lost,))
    publishing.start()
    layout.bring_back(output)
    publishing.join()
    os.close(held)
    assert lost.is_dir()
    assert (output / "checkpoint-4.replaced").is_dir()


@pytest.mark.parametrize("named", ["checkpoint-4", ""])
def test_commands_bring_a_checkpoint_back(named, output, capsys):
    killed_while_replacing(output)
    assert verify_command([str(output / named)]) == 0
    assert "checkpoint-4 is whole" in capsys.readouterr().out
