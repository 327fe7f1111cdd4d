"""Records that are held out of training, and the loss over them."""

import json
import math

import pytest
import torch

from engine.errors import UserError
from engine.loop import trainer
from engine.loop.trainer import train
from tests.loop.runs import checkpoint_tensors, config
from tests.loop.test_families import config as family_config

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
MEASURED = {"validation_fraction": 0.3, "validation_steps": 2, "validation_timesteps": 3, "max_train_steps": 4}
LOSSES = ("validation_loss", "validation_loss_ema")


def rounds(output) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def numbers(output) -> list[dict]:
    """Those of the rounds, without what differs between runs of the same weights."""
    return [
        {name: value for name, value in line.items() if name not in ("time", "validation_seconds")} for line in rounds(output)
    ]


def same_checkpoints(one, other) -> bool:
    pairs = [[checkpoint_tensors(path, kind) for path in (one, other)] for kind in KINDS]
    return all(a.keys() == b.keys() != set() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def test_what_is_held_out_is_not_trained_on_and_not_counted(model, images, shards, tmp_path, monkeypatch, capsys):
    slots, seen = set(), []
    add, begin = trainer.Metrics.add, trainer._run
    monkeypatch.setattr(
        trainer.Metrics, "add", lambda self, loss, of, many: (slots.update(of.tolist()), add(self, loss, of, many))
    )
    monkeypatch.setattr(trainer, "_run", lambda training, *others: (seen.append(training.run), begin(training, *others))[1])
    options = {"validation_fraction": 0.3, "num_train_epochs": 2, "max_train_steps": None}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    (run,) = seen
    (stream,) = run.streams.streams
    held, trained = (int(counts.sum()) for counts in (stream.split.held, stream.split.trained))
    assert held > 0
    assert held + trained == len(stream.shards)
    assert run.records == trained
    assert run.steps == -(-2 * trained // 4)
    records = stream.order(torch.tensor(sorted(slots))).tolist()
    assert len({*records}) == trained
    assert not {*records} & {*stream.split.held_records(torch.arange(held)).tolist()}

    again = {"resume_from_checkpoint": "latest", "max_train_steps": run.steps + 1}
    with pytest.raises(UserError, match="was written with --validation_fraction 0.3; leave it out, or give the same"):
        train(config(model, images, shards, tmp_path / "out", validation_fraction=0.2, **again))
    assert train(config(model, images, shards, tmp_path / "out", **again)) == 0
    assert seen[-1].records == trained, "a resume holds out what the run did"


def test_a_run_without_goes_on_without(model, images, shards, tmp_path):
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=1)) == 0
    with pytest.raises(UserError, match="was written without --validation_fraction, and trained on what would be held out now"):
        train(config(model, images, shards, tmp_path / "out", validation_fraction=0.2, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "dream_training": True, "input_perturbation": 0.1},
        {"cache_text": "tokens"},
        {"zero_stage": 1, "mixed_precision": "bf16"},
        {"zero_stage": 2},
        {"zero_stage": 3, "mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_it_changes_no_bit_of_the_training(options, model, images, tmp_path, monkeypatch):
    run = MEASURED | {"checkpointing_steps": 4} | options
    shards = tmp_path / "shards"
    assert train(config(model, images, shards, tmp_path / "with", **run)) == 0
    assert [line["step"] for line in rounds(tmp_path / "with")] == [2, 4]
    monkeypatch.setattr(trainer, "prepare_held_out", lambda *arguments: [])
    assert train(config(model, images, shards, tmp_path / "without", **run)) == 0
    assert not rounds(tmp_path / "without")
    assert same_checkpoints(tmp_path / "with" / "checkpoint-4", tmp_path / "without" / "checkpoint-4")
    for line in rounds(tmp_path / "with"):
        for name in LOSSES:
            assert math.isfinite(line[name])
            assert line[name] == pytest.approx(sum(line[f"{name}_by_timestep"].values()) / 3)
        assert list(line["validation_loss_by_timestep"]) == ["0-332", "333-665", "666-999"]


@pytest.mark.parametrize("family", ["kandinsky-prior", "kandinsky-decoder", "wuerstchen"])
def test_of_every_family(family, published, photographs, tmp_path, monkeypatch):
    models = published(family)  # Wuerstchen's with its dropout
    run = MEASURED | {"shards_dir": str(tmp_path / "shards"), "validation_timesteps": 2, "checkpointing_steps": 4}
    assert train(family_config(family, models, photographs, tmp_path / "with", **run)) == 0
    assert [line["step"] for line in rounds(tmp_path / "with")] == [2, 4]
    monkeypatch.setattr(trainer, "prepare_held_out", lambda *arguments: [])
    assert train(family_config(family, models, photographs, tmp_path / "without", **run)) == 0
    assert same_checkpoints(tmp_path / "with" / "checkpoint-4", tmp_path / "without" / "checkpoint-4")
