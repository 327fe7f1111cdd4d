"""Checkpoints: complete or absent, checked, portable, and exact."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.distributed import HashStore

from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.files import digest, discard, lock, write_json
from engine.loop.checkpoints import layout, writer
from engine.loop.checkpoints.names import rank_file
from engine.loop.checkpoints.slices import open_slices
from engine.loop.checkpoints.snapshot import restore, take
from engine.loop.checkpoints.writer import Writer
from engine.loop.metrics import Metrics
from engine.loop.optimizers.interface import Optimizer
from engine.loop.run import Run
from engine.loop.trainer import train
from engine.loop.weights import partition as weights_partition
from engine.loop.weights.flat import FlatPartition
from engine.processes import Processes
from engine.tensors import pieces_of
from tests.loop.runs import SLACK, checkpoint_tensors, config, flip_last_byte, published_order


def metrics(output) -> dict[int, dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


@pytest.fixture(scope="module")
def uninterrupted(model, images, shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config(model, images, shards, output, checkpointing_steps=3, max_train_steps=9)) == 0
    return output


def continue_from(uninterrupted, output, model, images, shards, step: int, **options):
    """Resumes a copy of the checkpoint after `step` to the ninth step."""
    output.mkdir(exist_ok=True)
    shutil.copytree(uninterrupted / f"checkpoint-{step}", output / f"checkpoint-{step}")
    shutil.copy(uninterrupted / "metrics.jsonl", output)
    resume = options.pop("resume_from_checkpoint", "latest")
    run = config(
        model,
        images,
        shards,
        output,
        checkpointing_steps=3,
        resume_from_checkpoint=resume,
        **({"max_train_steps": 9} | options),
    )
    return train(run)


def same_tensors(left, right, kinds=("weight", "exp_avg", "exp_avg_sq", "ema")) -> bool:
    for kind in kinds:
        ours, theirs = checkpoint_tensors(left, kind), checkpoint_tensors(right, kind)
        assert ours.keys() == theirs.keys()
        assert ours, f"no {kind} in the checkpoint"
        if not all(torch.equal(ours[name], theirs[name]) for name in ours):
            return False
    return True


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_is_bit_identical(step, uninterrupted, model, images, shards, tmp_path):
    assert continue_from(uninterrupted, tmp_path / "out", model, images, shards, step) == 0
    assert same_tensors(tmp_path / "out" / "checkpoint-9", uninterrupted / "checkpoint-9")
    ours, theirs = metrics(tmp_path / "out"), metrics(uninterrupted)
    assert [ours[n]["loss"] for n in range(1, 10)] == [theirs[n]["loss"] for n in range(1, 10)]


def test_a_checkpoint_beyond_the_last_step_is_trained_for_one_more(uninterrupted, model, images, shards, tmp_path, capsys):
    options = {"max_train_steps": 3, "checkpointing_steps": 1}
    copied = tmp_path / "out" / "checkpoint-6"
    shutil.copytree(uninterrupted / "checkpoint-6", copied)
    assert train(config(model, images, shards, tmp_path / "out", resume_from_checkpoint="checkpoint-6", **options)) == 0
    output = capsys.readouterr()
    assert "The checkpoint is of step 6, beyond the 3 asked for: training one step more\n" in output.err
    assert "Trained 7 steps" in output.out
    assert [path.name for path in layout.complete_checkpoints(tmp_path / "out")] == ["checkpoint-6", "checkpoint-7"]
    assert metrics(tmp_path / "out")[7]["loss"] == metrics(uninterrupted)[7]["loss"]


def test_losses_agree_when_a_checkpoint_falls_between_log_points(model, images, shards, tmp_path):
    options = {"log_every": 5, "checkpointing_steps": 3, "max_train_steps": 10}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config(model, images, shards, whole, **options)) == 0
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    assert train(config(model, images, shards, parts, resume_from_checkpoint="latest", **options)) == 0
    assert {n: line["loss"] for n, line in metrics(parts).items()} == {n: line["loss"] for n, line in metrics(whole).items()}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_is_bit_identical_on_partitions(precision, stage, model, images, tmp_path):
    options = {"zero_stage": stage, "mixed_precision": precision, "checkpointing_steps": 3, "max_train_steps": 6}
    whole, parts, shards = tmp_path / "whole", tmp_path / "parts", tmp_path / "shards"
    assert train(config(model, images, shards, whole, **options)) == 0
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    assert train(config(model, images, shards, parts, resume_from_checkpoint="latest", **options)) == 0
    assert same_tensors(parts / "checkpoint-6", whole / "checkpoint-6")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_resumed_run_with_8bit_adam_is_bit_identical(stage, model, images, shards, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"zero_stage": stage, "use_8bit_adam": True, "checkpointing_steps": 3, "max_train_steps": 6}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config(model, images, shards, whole, **options)) == 0
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    assert train(config(model, images, shards, parts, resume_from_checkpoint="latest", **options)) == 0
    assert same_tensors(parts / "checkpoint-6", whole / "checkpoint-6", kinds=("weight", "state1", "state2", "ema"))


def test_a_checkpoint_continues_under_another_zero_stage(uninterrupted, model, images, shards, tmp_path):
    output = tmp_path / "out"
    assert continue_from(uninterrupted, output, model, images, shards, 6, zero_stage=2) == 0
    for kind in ("weight", "ema"):
        ours, theirs = (
            checkpoint_tensors(output / "checkpoint-9", kind),
            checkpoint_tensors(uninterrupted / "checkpoint-9", kind),
        )
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5 * SLACK, atol=1e-7 * SLACK)


def test_the_limit_keeps_the_newest(model, images, shards, tmp_path):
    options = {"checkpointing_steps": 2, "checkpoints_total_limit": 2}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    assert [path.name for path in layout.complete_checkpoints(tmp_path / "out")] == ["checkpoint-6", "checkpoint-8"]
    assert (tmp_path / "out" / "latest").read_text().strip() == "checkpoint-8"


def test_a_run_ends_with_a_checkpoint_of_its_last_step(model, images, shards, tmp_path, monkeypatch):
    output, saved = tmp_path / "out", []
    save = Writer.save
    monkeypatch.setattr(Writer, "save", lambda self, step, *others: (saved.append(step), save(self, step, *others)))
    options = {"checkpointing_steps": 3, "checkpoints_total_limit": 1}
    assert train(config(model, images, shards, output, max_train_steps=5, **options)) == 0
    assert [path.name for path in layout.complete_checkpoints(output)] == ["checkpoint-5"]
    assert layout.find(output, "latest") == output / "checkpoint-5"
    assert train(config(model, images, shards, output, max_train_steps=6, resume_from_checkpoint="latest", **options)) == 0
    assert train(config(model, images, shards, output, max_train_steps=6, resume_from_checkpoint="latest", **options)) == 0
    assert saved == [3, 5, 6], "none of a step that has one"


def test_a_damaged_checkpoint_is_named_and_another_offered(uninterrupted, tmp_path):
    for step in (3, 6):
        shutil.copytree(uninterrupted / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    flip_last_byte(tmp_path / "checkpoint-6" / "rank-0.safetensors")
    with pytest.raises(UserError, match=r"checkpoint-6: damaged: rank-0.safetensors.*resume from .*checkpoint-3 instead"):
        layout.open_checked(tmp_path / "checkpoint-6")


def test_a_truncated_manifest_is_refused(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        layout.open_checked(tmp_path / "checkpoint-3")


def test_latest_without_a_pointer_takes_the_newest_complete_one(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-6.partial").mkdir()
    assert layout.find(tmp_path, "latest") == tmp_path / "checkpoint-3"


def test_latest_in_an_empty_directory_starts_from_nothing(model, images, shards, tmp_path):
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=2, resume_from_checkpoint="latest")) == 0


@pytest.mark.parametrize(
    ("options", "named"), [({"train_batch_size": 2}, "global_batch 4, this run has 2"), ({"seed": 12}, "seed 11")]
)
def test_a_different_run_is_refused(options, named, uninterrupted, model, images, shards, tmp_path):
    with pytest.raises(UserError, match=named):
        continue_from(uninterrupted, tmp_path / "out", model, images, shards, 3, **options)


def test_the_seed_of_the_resumed_run_is_taken_over(uninterrupted, model, images, shards, tmp_path):
    assert continue_from(uninterrupted, tmp_path / "out", model, images, shards, 6, seed=None) == 0
    assert same_tensors(tmp_path / "out" / "checkpoint-9", uninterrupted / "checkpoint-9")


def test_no_pickle_is_written(uninterrupted):
    suffixes = {path.suffix for path in (uninterrupted / "checkpoint-9").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_checkpoints_beside_the_training_hold_the_same(uninterrupted, model, images, shards, tmp_path, capsys):
    output = tmp_path / "out"
    options = {"checkpointing_steps": 3, "max_train_steps": 9, "checkpoint_async": True}
    assert train(config(model, images, shards, output, **options)) == 0
    for step in (3, 6, 9):
        assert same_tensors(output / f"checkpoint-{step}", uninterrupted / f"checkpoint-{step}")
    assert (output / "latest").read_text().strip() == "checkpoint-9"
    assert [line for line in capsys.readouterr().err.splitlines() if "Saved checkpoint-9: copied in" in line]
    assert continue_from(output, tmp_path / "again", model, images, shards, 6, checkpoint_async=True) == 0
    assert same_tensors(tmp_path / "again" / "checkpoint-9", uninterrupted / "checkpoint-9")


def test_a_checkpoint_holds_the_state_of_its_step_however_late_it_is_written(model, images, shards, tmp_path, monkeypatch):
    write, steps = Writer._write, []

    def late(self, snapshot, pieces):
        time.sleep(0.5)  # the training goes on meanwhile
        steps.append(snapshot.step)
        write(self, snapshot, pieces)

    monkeypatch.setattr(Writer, "_write", late)
    options = {"checkpointing_steps": 3, "max_train_steps": 6}
    for name, beside in (("beside", True), ("between", False)):
        assert train(config(model, images, shards, tmp_path / name, checkpoint_async=beside, **options)) == 0
    assert steps == [3, 6, 3, 6]
    for step in (3, 6):
        assert same_tensors(tmp_path / "beside" / f"checkpoint-{step}", tmp_path / "between" / f"checkpoint-{step}")


@pytest.mark.parametrize("beside", [True, False])
def test_a_checkpoint_that_cannot_be_written_names_the_last_good_one(beside, model, images, shards, tmp_path, monkeypatch):
    write_pieces = writer.write_pieces

    failing = ["checkpoint-6", "checkpoint-8"] if beside else ["checkpoint-6"]

    def full(path, header, pieces):
        if any(name in str(path) for name in failing):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write_pieces(path, header, pieces)

    monkeypatch.setattr(writer, "write_pieces", full)
    expected = rf"{failing[-1]} cannot be written: No space left on device; the last complete one is .*checkpoint-3\."
    with pytest.raises(UserError, match=expected):
        train(config(model, images, shards, tmp_path / "out", checkpointing_steps=3, checkpoint_async=beside))
    assert layout.find(tmp_path / "out", "latest") == tmp_path / "out" / "checkpoint-3"
    monkeypatch.undo()
    assert train(config(model, images, shards, tmp_path / "out", resume_from_checkpoint="latest")) == 0
    assert not list((tmp_path / "out").glob("*.partial"))


def test_the_step_after_one_that_could_not_be_written_beside_is_tried(model, images, shards, tmp_path, monkeypatch, capsys):
    write_pieces = writer.write_pieces

    def full(path, *others):
        if "checkpoint-3" in str(path):
            raise OSError(28, "No space left on device")
        return write_pieces(path, *others)

    monkeypatch.setattr(writer, "write_pieces", full)
    options = {"checkpointing_steps": 3, "max_train_steps": 6, "checkpoint_async": True}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    assert "checkpoint-3 cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


def test_what_is_written_beside_a_training_that_fails_is_ended(model, images, shards, tmp_path, monkeypatch):
    write = Writer._write

    def failing(self, *unused) -> None:
        raise UserError("no")

    def late(*arguments) -> None:
        monkeypatch.setattr("engine.loop.trainer.Training._after_step", failing)
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(Writer, "_write", late)
    with pytest.raises(UserError, match="^no$"):
        train(config(model, images, shards, tmp_path / "out", checkpointing_steps=2, checkpoint_async=True))
    assert layout.open_checked(tmp_path / "out" / "checkpoint-2").state.step == 2


def test_two_runs_in_one_output_directory_are_refused(model, images, shards, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    held = lock(output)
    with pytest.raises(UserError, match="another run is writing there; wait for its end, or name another --output_dir"):
        train(config(model, images, shards, output))
    os.close(held)
    assert train(config(model, images, shards, output, max_train_steps=1)) == 0


@pytest.mark.parametrize("stages", [(0, 3), (3, 0), (2, 3), (3, 1)])
def test_a_checkpoint_of_any_stage_continues_under_any_other(stages, uninterrupted, model, images, shards, tmp_path):
    before, after = stages
    options = {"checkpointing_steps": 3}
    assert train(config(model, images, shards, tmp_path / "out", zero_stage=before, max_train_steps=6, **options)) == 0
    resumed = {"resume_from_checkpoint": "latest", "zero_stage": after, "max_train_steps": 9}
    assert train(config(model, images, shards, tmp_path / "out", **options, **resumed)) == 0
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        ours = checkpoint_tensors(tmp_path / "out" / "checkpoint-9", kind)
        theirs = checkpoint_tensors(uninterrupted / "checkpoint-9", kind)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_that_the_library_wrote_is_read(uninterrupted, model, images, shards, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(uninterrupted / "checkpoint-6", older / "checkpoint-6")
    shutil.copy(uninterrupted / "metrics.jsonl", older)
    file, manifest = older / "checkpoint-6" / "rank-0.safetensors", older / "checkpoint-6" / "manifest.json"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file)
    write_json(manifest, json.loads(manifest.read_text()) | {file.name: digest(file)})
    assert continue_from(older, tmp_path / "out", model, images, shards, 6) == 0
    assert same_tensors(tmp_path / "out" / "checkpoint-9", uninterrupted / "checkpoint-9")


def growth(work: Callable[[], object]) -> int:
    """How many bytes of memory this process holds at the most while it works, beyond what it holds before."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    work()
    return read("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available(), reason="needs Linux without a GPU")
def test_the_state_is_written_and_read_without_copies(tmp_path):
    config = TrainConfig(family="sd", pretrained_model_name_or_path="unused", use_ema=True)
    processes = Processes()
    partition = FlatPartition(nn.Linear(4096, 4096, bias=False), config, processes)
    run = Run(seed=0, global_batch=1, fingerprint="", records=1, steps=2)
    metrics = Metrics(run, processes)
    state = 16 * 4096 * 4096
    between, beside = (Writer(tmp_path / name, run, processes, 1, name == "beside", "token") for name in ("between", "beside"))
    assert growth(lambda: between.save(1, partition, metrics)) < 0.2 * state

    def save_beside() -> None:
        beside.save(1, partition, metrics)
        beside.wait()

    # One copy, kept for the next.
    assert state <= growth(save_beside) < 1.3 * state
    assert growth(save_beside) < 0.2 * state
    for directory in (tmp_path / "between", tmp_path / "beside"):
        found = directory / "checkpoint-1"
        read = layout.open_checked(found)
        assert growth(lambda: restore(read, partition, metrics)) < 0.2 * state  # noqa: B023


def opened(checkpoint: Path, folder: str) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(checkpoint.parent, subfolder=f"{checkpoint.name}/{folder}").state_dict()


@pytest.mark.parametrize("options", [{}, {"checkpoint_async": True}, {"zero_stage": 3}, {"mixed_precision": "bf16"}], ids=str)
def test_diffusers_opens_the_models_of_a_checkpoint(options, model, images, tmp_path):
    run = {"max_train_steps": 4, "checkpointing_steps": 2, "shards_dir": str(tmp_path / "shards"), **options}
    assert train(config(model, images, tmp_path / "shards", tmp_path / "out").model_copy(update=run)) == 0
    last = tmp_path / "out" / "checkpoint-4"
    assert (tmp_path / "out" / "checkpoint-2" / "unet" / "config.json").is_file()
    dtype = torch.bfloat16 if "mixed_precision" in options else torch.float32
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    for kind, folder in (("weight", "unet"), ("ema", "unet_ema")):
        expected = published_order(unet, checkpoint_tensors(last, kind))
        ours = opened(last, folder)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name].to(dtype).float()) for name in expected)
    assert layout.open_checked(last, whole=True).state.step == 4
    flip_last_byte(last / "unet" / "diffusion_pytorch_model.safetensors")
    assert layout.open_checked(last).state.step == 4, "a training reads nothing of it"
    with pytest.raises(UserError, match="damaged: unet/diffusion_pytorch_model.safetensors"):
        layout.open_checked(last, whole=True)


def test_checkpoints_hold_no_models_where_they_are_not_wanted(model, images, shards, tmp_path):
    options = {"max_train_steps": 2, "checkpointing_steps": 2, "openable_checkpoints": False}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    assert {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()} == {
        "manifest.json", "rank-0.safetensors", "state.json",
    }  # fmt: skip


class Keeper(Optimizer):
    """State of every kind, some of it as large as the weights without being laid out as they are."""

    laid_out, counters, bound = ("momentum",), ("step", "calls"), ("scales", "rows")

    def create_state(self, masters, allocate, *others):
        super().create_state(masters, allocate)
        for master in masters:
            self.state[master] = {
                "momentum": torch.randn_like(master), "step": torch.tensor(5.0), "calls": 7,
                "scales": torch.randn_like(master), "rows": torch.randn(3),
            }  # fmt: skip


def keep(directory: Path, monkeypatch) -> tuple[FlatPartition, Metrics]:
    def keeper(masters, *others, **named):
        return Keeper([{"name": "weights", "params": masters}], 0.0, None, defaults={"lr": 1.0})

    monkeypatch.setattr(weights_partition, "create_optimizer", keeper)
    processes = Processes()
    config = TrainConfig(family="sd", pretrained_model_name_or_path="unused")
    partition = FlatPartition(nn.Linear(8, 8), config, processes)
    run = Run(seed=0, global_batch=1, fingerprint="", records=1, steps=2)
    metrics = Metrics(run, processes)
    Writer(directory, run, processes, None, False, "token").save(9, partition, metrics)
    return partition, metrics


def test_state_is_kept_by_what_the_optimizer_declares_and_not_by_its_size(tmp_path, monkeypatch):
    partition, metrics = keep(tmp_path, monkeypatch)
    found = tmp_path / "checkpoint-9"
    files = open_slices(found, 1)
    assert files.kinds == ["momentum", "weight"]
    assert files.elements("momentum") == 8 * 8 + 8, "without the padding of the flat buffer"
    names = [name for name in files.files[0].header if name.startswith("optimizer/")]
    assert sorted(names) == ["optimizer/0/rows", "optimizer/0/scales", "optimizer/step"]
    state = partition.optimizer.state_of(partition.masters[0])
    expected = {kind: value.clone() if torch.is_tensor(value) else value for kind, value in state.items()}
    for kind in ("momentum", "scales", "rows", "step"):
        state[kind].zero_()
    state["calls"] = 0
    restore(layout.open_checked(found), partition, metrics)
    for piece in partition.slices:
        kept = partition.view(piece, [expected["momentum"]])
        assert torch.equal(partition.view(piece, [state["momentum"]]), kept)
    assert all(torch.equal(state[kind], expected[kind]) for kind in ("scales", "rows", "step"))
    assert state["calls"] == 7


def test_state_that_fits_one_partition_is_refused_by_another(tmp_path, monkeypatch):
    partition, metrics = keep(tmp_path, monkeypatch)
    partition.optimizer.state[partition.masters[0]]["rows"] = torch.zeros(4)
    found = layout.open_checked(tmp_path / "checkpoint-9")
    with pytest.raises(UserError, match="holds no optimizer/0/rows for this optimizer and number of processes"):
        restore(found, partition, metrics)
    with pytest.raises(UserError, match="keeps state that fits 2 processes only; start as many$"):
        restore(replace(found, state=found.state.model_copy(update={"world": 2})), partition, metrics)
    partition.slices[0] = replace(partition.slices[0], start=1, length=3)
    with pytest.raises(UserError, match="keeps state that fits the pieces of one --zero_stage only; give the same$"):
        restore(found, partition, metrics)


@pytest.mark.parametrize("beside", [True, False])
def test_a_checkpoint_that_fails_leaves_nothing_on_a_full_disk(beside, tmp_path, monkeypatch):
    partition, metrics = keep(tmp_path, monkeypatch)
    write_pieces = writer.write_pieces

    def full(path, *others):
        write_pieces(path, *others)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_pieces", full)
    failing = Writer(tmp_path, metrics.run, metrics.processes, None, beside, "token")
    with pytest.raises(
        UserError, match=r"checkpoint-10 cannot be written: No space left.*the last complete one is .*checkpoint-9"
    ):
        [failing.save(10, partition, metrics), failing.wait()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9", "latest"]


def test_what_keeps_the_first_process_from_publishing_is_raised_by_all(tmp_path, monkeypatch):
    partition, metrics = keep(tmp_path, monkeypatch)
    snapshot, store = take(10, metrics.run, partition, metrics), HashStore()
    writers = [Writer(tmp_path, metrics.run, Processes(), None, False, "token", _store=store) for _ in range(2)]
    for rank, one in enumerate(writers):
        one.processes.rank, one.processes.world = rank, 2
    first, second = writers

    def full(*others):
        assert {path.name for path in first._aside(10).iterdir()} == {rank_file(0), rank_file(1), "state.json", "manifest.json"}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(first, "_publish", full)
    writing = threading.Thread(target=second._work, args=(snapshot, pieces_of(snapshot.tensors)))
    writing.start()
    first._work(snapshot, pieces_of(snapshot.tensors))
    writing.join()
    assert "No space left on device; the last complete one is" in str(first._error)
    assert str(second._error) == str(first._error)
    assert not first._aside(10).exists()


def test_where_there_is_no_room_for_the_pointer_nothing_is_published(tmp_path, monkeypatch):
    partition, metrics = keep(tmp_path, monkeypatch)

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writer, "write_text", full)
    with pytest.raises(UserError, match="checkpoint-10 cannot be written: No space left.*the last complete one is .*-9"):
        Writer(tmp_path, metrics.run, metrics.processes, None, False, "other").save(10, partition, metrics)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9", "latest"]


def test_nobody_waits_while_old_checkpoints_are_removed(tmp_path, monkeypatch):
    partition, metrics = keep(tmp_path, monkeypatch)
    gone_on = threading.Event()

    def slow(path):
        if path.name == "checkpoint-9":
            assert gone_on.wait(10)
        discard(path)

    monkeypatch.setattr(writer, "discard", slow)
    limited = Writer(tmp_path, metrics.run, metrics.processes, 1, False, "token")
    limited.save(10, partition, metrics)
    assert (tmp_path / "checkpoint-9").is_dir()
    gone_on.set()
    limited.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "latest"]


def test_a_checkpoint_that_made_room_in_vain_has_its_name_back(tmp_path, monkeypatch):
    partition, metrics = keep(tmp_path, monkeypatch)
    rename = Path.rename

    def fail(path, target):
        if path.suffix == ".partial" and path.is_dir():
            raise OSError(5, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    again = Writer(tmp_path, metrics.run, metrics.processes, None, False, "other")
    with pytest.raises(UserError, match="checkpoint-9 cannot be written: Input/output error; the last complete one is .*-9"):
        again.save(9, partition, metrics)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9", "latest"]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    partition, metrics = keep(tmp_path, monkeypatch)
    (tmp_path / "checkpoint-9").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "elsewhere")
    limited = Writer(tmp_path, metrics.run, metrics.processes, 1, False, "token")
    limited.save(10, partition, metrics)
    limited.close()
    assert not os.path.lexists(tmp_path / "checkpoint-9")
    assert (tmp_path / "elsewhere" / "state.json").is_file()
    (tmp_path / "checkpoint-11").symlink_to("nowhere")  # in the place of the one to come

    def refuse(path):
        if path.name == "checkpoint-10":
            raise PermissionError(13, "Permission denied", str(path))
        discard(path)

    monkeypatch.setattr(writer, "discard", refuse)
    limited.save(11, partition, metrics)
    limited.close()
    assert "checkpoint-10: cannot be removed: Permission denied" in capsys.readouterr().err
    assert layout.open_checked(tmp_path / "checkpoint-11").state.step == 11


def test_what_was_left_half_written_goes_when_a_run_takes_the_directory_over(model, images, shards, tmp_path):
    output = tmp_path / "out"
    (output / "samples").mkdir(parents=True)
    left = [
        "checkpoint-3-0123abcd.partial", "metrics.jsonl.0123abcd.partial", "pipeline.partial", "samples/a.png.0123abcd.partial",
        "checkpoint-3.replaced",
    ]  # fmt: skip
    theirs = ["movie.partial", "checkpoint-of-mine.partial", "mine.replaced"]
    for name in left + theirs:
        (output / name).touch()
    assert train(config(model, images, shards, output, max_train_steps=1)) == 0
    assert not [name for name in left if (output / name).exists()]
    assert all((output / name).exists() for name in theirs)
