"""Shards that turn out to be damaged in the middle of a run: what was trained is saved, and goes on once they are mended."""

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from engine.data.format.index import shard_name
from engine.data.format.reader import Shards
from engine.data.samples.order import records_of
from engine.errors import UserError
from engine.loop.checkpoints.writer import Writer
from engine.loop.trainer import train
from engine.tensors import read_header
from tests.commands import start_two
from tests.loop.runs import SLACK, checkpoint_tensors, command, config

SLOT = 10  # of step 3, in its second half


def damage(shards: Path) -> None:
    """Alters every variant of the record that a slot reads, or mends it again."""
    place, row = divmod(int(records_of(11, torch.tensor([SLOT]), 12)), 5)
    path = shards / shard_name(place)
    header, _, start = read_header(path)
    content = bytearray(path.read_bytes())
    for variant in range(2):
        content[start + header["latent_mean"]["data_offsets"][0] + (2 * row + variant) * 4 * 8 * 8 * 4] ^= 1
    path.write_bytes(content)


def same(left: Path, right: Path, tolerance: float = 0.0) -> bool:
    pairs = [[checkpoint_tensors(path, kind) for path in (left, right)] for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")]
    return all(torch.allclose(ours[name], theirs[name], tolerance, tolerance) for ours, theirs in pairs for name in theirs)


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return shutil.copytree(shards, tmp_path / "shards")


def test_the_steps_before_are_saved(model, images, copy, tmp_path):
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "checkpoint_async": True}
    run = config(model, images, copy, tmp_path / "out", max_train_steps=4, **options)
    assert train(run.model_copy(update={"output_dir": str(tmp_path / "whole")})) == 0
    damage(copy)
    with pytest.raises(UserError) as error:
        train(run)
    assert re.search(
        r"shard-0000\d.safetensors: altered: row \d of latent_mean does not match its checksum .*; step 2 is saved in "
        rf"{tmp_path / 'out' / 'checkpoint-2'}, from where --resume_from_checkpoint latest goes on$",
        str(error.value),
    )
    assert len(error.value.lines) == 1
    going_on = run.model_copy(update={"resume_from_checkpoint": "latest"})
    with pytest.raises(UserError, match="latent_mean does not match its checksum"):
        train(going_on)  # nothing was trained since
    damage(copy)
    assert train(going_on) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("out", "whole")]
    assert lines[0] == lines[1]
    assert same(tmp_path / "out" / "checkpoint-4", tmp_path / "whole" / "checkpoint-4")


def test_what_is_being_written_is_waited_for(model, images, copy, tmp_path, monkeypatch):
    write = Writer._write

    def late(*arguments) -> None:
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(Writer, "_write", late)
    damage(copy)
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "checkpoint_async": True, "checkpointing_steps": 2}
    with pytest.raises(UserError, match="step 2 is saved in"):
        train(config(model, images, copy, tmp_path / "out", max_train_steps=4, **options))
    assert (tmp_path / "out" / "latest").read_text() == "checkpoint-2\n"


@pytest.mark.two_processes
@pytest.mark.parametrize(("most", "log_every"), [(3, 1), (40, 4)], ids=["at the end", "steps later"])
def test_all_processes_leave_when_one_meets_damage(most, log_every, model, images, copy, tmp_path):
    """Where the others hear of it steps later, what lines and checkpoints say of the steps between is taken back."""
    whole = config(model, images, copy, tmp_path / "whole", max_train_steps=4, checkpointing_steps=3, log_every=log_every)
    assert train(whole) == 0
    damage(copy)
    options = {
        "log_every": log_every,
        "checkpointing_steps": 6,
        "train_batch_size": 2,
        "zero_stage": 1,
        "max_train_steps": most,
    }
    run = config(model, images, copy, tmp_path / "out", **options)
    both = start_two(command(run))
    assert [process.wait() for process in both] == [2, 2]
    assert "step 2 is saved in" in both[0].errors
    assert "Traceback" not in both[0].errors + both[1].errors
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    damage(copy)
    alone = whole.model_copy(update={"output_dir": run.output_dir, "resume_from_checkpoint": "latest"})
    assert train(alone) == 0
    assert same(tmp_path / "out" / "checkpoint-3", tmp_path / "whole" / "checkpoint-3", 1e-4)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("out", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6 * SLACK)


def test_a_disk_that_fails_while_rows_are_read_is_no_other(model, images, copy, tmp_path, monkeypatch):
    gathered, gather = [], Shards.gather_fields

    def failing(*arguments) -> None:
        gathered.append(gather(*arguments))
        if len(gathered) > 5:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a/file")

    monkeypatch.setattr(Shards, "gather_fields", failing)
    run = config(model, images, copy, tmp_path / "out", max_train_steps=9, use_ema=False)
    with pytest.raises(UserError, match=r"^Too many open files: a/file; mend .*; step \d is saved in .*, from where"):
        train(run)
    assert list((tmp_path / "out").glob("checkpoint-*"))
