"""Records that are held out of training, and the loss over them."""

import pytest
import torch

from engine.errors import UserError
from engine.loop import trainer
from engine.loop.trainer import train
from tests.loop.runs import config


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
