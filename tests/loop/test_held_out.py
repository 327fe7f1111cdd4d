"""Records that are held out of training, and the loss over them."""

import json
import math
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import UserError
from engine.loop import curves, held_out, log, trainer
from engine.loop.stop import StopSignal
from engine.loop.trainer import train
from engine.loop.weights.ema import Ema
from tests.commands import Command, run_two
from tests.loop.runs import checkpoint_tensors, command, config
from tests.loop.test_damage import damage
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
        trainer.Metrics, "add", lambda self, loss, of, many: (slots.update(of.slots.tolist()), add(self, loss, of, many))
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
    assert "trained on" not in capsys.readouterr().err


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


def test_it_repeats_itself_whatever_divides_the_work(model, images, shards, tmp_path):
    # At a learning rate of 0 the weights stay what they were, so that every round is over the same ones.
    still = MEASURED | {"learning_rate": 0.0, "adam_weight_decay": 0.0}
    assert train(config(model, images, shards, tmp_path / "one", **still)) == 0
    first, second = numbers(tmp_path / "one")
    for name in LOSSES:
        assert first[name] == second[name] == first["validation_loss"]
        assert first[f"{name}_by_timestep"] == second[f"{name}_by_timestep"]
    accumulated = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 12, "max_train_steps": 2}
    assert train(config(model, images, shards, tmp_path / "smaller", **still | accumulated)) == 0
    assert numbers(tmp_path / "smaller")[0]["validation_loss"] == pytest.approx(first["validation_loss"], rel=1e-5)
    assert (
        train(config(model, images, shards, tmp_path / "few", **still | {"max_validation_samples": 2, "max_train_steps": 2}))
        == 0
    )
    assert numbers(tmp_path / "few")[0]["validation_loss"] != first["validation_loss"]


def test_a_grid_that_cannot_be_is_refused_before_anything_is_built(model, images, tmp_path):
    few = MEASURED | {"validation_timesteps": 21, "min_timestep": 80, "max_timestep": 100}
    with pytest.raises(UserError, match=r"^--validation_timesteps 21: there are 20; give that at the most$"):
        train(config(model, images, tmp_path / "shards", tmp_path / "out", **few))
    assert not (tmp_path / "shards").exists()


@pytest.mark.two_processes
@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_take_the_same_loss(stage, model, images, shards, tmp_path):
    still = MEASURED | {"learning_rate": 0.0, "adam_weight_decay": 0.0, "max_train_steps": 2}
    assert train(config(model, images, shards, tmp_path / "one", **still)) == 0
    run_two(command(config(model, images, shards, tmp_path / "two", zero_stage=stage, **still)))
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")


def test_a_resumed_run_takes_the_same_losses(model, images, shards, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = MEASURED | {"checkpointing_steps": 3, "max_train_steps": 6}
    assert train(config(model, images, shards, whole, **run)) == 0
    assert train(config(model, images, shards, resumed, **run, resume_from_checkpoint=str(whole / "checkpoint-3"))) == 0
    assert numbers(resumed) == numbers(whole)[1:]
    best = [json.loads((output / "checkpoint-6" / "state.json").read_text())["best"] for output in (whole, resumed)]
    assert best[0] == best[1]


@pytest.mark.parametrize(
    ("options", "graphs"), [({"cache_text": "tokens", "gradient_accumulation_steps": 2}, 2), ({"zero_stage": 1}, 1)], ids=str
)
def test_it_is_captured_as_the_step_is(options, graphs, recorded, model, images, tmp_path):
    run = MEASURED | {"max_train_steps": 6, "checkpointing_steps": 6} | options
    for name, how in (("eager", "off"), ("captured", "on")):
        assert train(config(model, images, tmp_path / "shards", tmp_path / name, cuda_graphs=how, **run)) == 0
    assert len(recorded) == graphs + 2, "its own twice: given back while the step still warms up"
    assert numbers(tmp_path / "captured") == numbers(tmp_path / "eager")
    assert same_checkpoints(*(tmp_path / name / "checkpoint-6" for name in ("captured", "eager")))


def test_a_data_set_of_its_own(model, images, shards, tmp_path):
    own = MEASURED | {"validation_fraction": None, "validation_data_dir": str(images)}
    assert train(config(model, images, tmp_path / "shards", tmp_path / "built", **own)) == 0
    assert (tmp_path / "shards" / "validation" / "index.json").is_file()
    opened = own | {"validation_data_dir": str(tmp_path / "shards" / "validation")}
    assert train(config(model, images, tmp_path / "shards", tmp_path / "opened", **opened)) == 0
    assert numbers(tmp_path / "built") == numbers(tmp_path / "opened")
    assert all(math.isfinite(line["validation_loss"]) for line in rounds(tmp_path / "built"))


def test_damaged_records_end_the_run_with_a_checkpoint(model, images, shards, tmp_path):
    damaged = tmp_path / "held_out"
    shutil.copytree(shards, damaged)
    damage(damaged)
    own = MEASURED | {"validation_fraction": None, "validation_data_dir": str(damaged)}
    with pytest.raises(UserError, match=r"held_out/shard-.*; step 2 is saved in .*checkpoint-2, from where"):
        train(config(model, images, shards, tmp_path / "out", **own))
    assert (tmp_path / "out" / "checkpoint-2" / "state.json").is_file()


def falls_and_rises(monkeypatch, losses):
    """Has the rounds give these losses, one after another."""
    given = iter(losses)
    monkeypatch.setattr(held_out, "_mean", lambda losses: next(given))


def test_the_best_checkpoint_stays_and_patience_ends_the_run(model, images, shards, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    run = MEASURED | {"use_ema": False, "validation_timesteps": 1, "validation_steps": 1, "max_train_steps": 9}
    run |= {"checkpointing_steps": 4, "checkpoints_total_limit": 1, "best_checkpoint": True, "patience": 3}
    falls_and_rises(monkeypatch, [each for loss in (0.5, 0.3, None, 0.4, 0.3) for each in (loss, loss)])
    with monkeypatch.context() as patch:
        patch.setattr(log, "curves", curves.curves)
        assert train(config(model, images, shards, output, **run)) == 0
    assert np.asarray(Image.open(output / "curves.png").convert("L")).std() > 5
    said = "the held-out loss has not been below the 0.3 of step 2, kept as checkpoint-2, in 3 rounds (--patience 3)"
    exports = f"`python -m engine.checkpoint export {output / 'best'} --output_dir DIR` writes one"
    ended = (
        f"{said}; the pipeline is in {output}, with the last weights; of step 2, whose held-out loss is the lowest, {exports}"
    )
    assert f"Trained 5 steps of 9: {ended}\n" in capsys.readouterr().out
    assert (output / "model_index.json").is_file()
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    assert [(output / name).read_text() for name in ("best", "latest")] == ["checkpoint-2\n", "checkpoint-5\n"]
    assert [line["validation_loss"] for line in rounds(output)] == [0.5, 0.3, None, 0.4, 0.3]
    state = json.loads((output / "checkpoint-5" / "state.json").read_text())["best"]
    assert {name: state[name] for name in ("loss", "step", "last", "rounds")} == {
        "loss": 0.3,
        "step": 2,
        "last": 5,
        "rounds": 3,
    }

    again = run | {"resume_from_checkpoint": "latest"}
    assert train(config(model, images, shards, output, **again)) == 0
    said_again = capsys.readouterr()
    assert f"Trained 5 steps of 9: {said}" in said_again.out
    assert "The training has ended" in said_again.out + said_again.err

    falls_and_rises(monkeypatch, [each for loss in (0.4, 0.2) for each in (loss, loss)])
    further = again | {"patience": 5, "max_train_steps": 7}
    assert train(config(model, images, shards, output, **further)) == 0
    assert capsys.readouterr().out.endswith(f"Trained 7 steps; the pipeline is in {output}\n"), "the last is the best"
    assert (output / "best").read_text() == "checkpoint-7\n"
    assert not (output / "checkpoint-2").exists()

    falls_and_rises(monkeypatch, [0.1] * 4)
    assert train(config(model, images, shards, tmp_path / "other", **run | {"max_train_steps": 1})) == 0
    named = {"resume_from_checkpoint": "best", "max_train_steps": 2, "patience": None}
    assert train(config(model, images, shards, tmp_path / "other", **run | named)) == 0
    (tmp_path / "other" / "best").unlink()
    with pytest.raises(UserError, match="no `best` checkpoint there; a run with --best_checkpoint keeps one"):
        train(config(model, images, shards, tmp_path / "other", **run | named))


def test_a_checkpoint_that_was_the_best_goes_if_it_was_written_for_that_alone(model, images, shards, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run = MEASURED | {"use_ema": False, "validation_timesteps": 1, "validation_steps": 1, "checkpointing_steps": 100}
    run |= {"best_checkpoint": True, "resume_from_checkpoint": "latest"}
    for losses, steps, options, kept in (
        ((0.5, 0.3, 0.4), 3, {}, [2, 3]),
        ((0.2, 0.1), 5, {}, [3, 5]),  # 5 is there as the last, too
        ((0.05, 0.06), 7, {}, [3, 5, 6, 7]),
        ((0.9, 0.8), 8, {"validation_timesteps": 2}, [3, 5, 6, 7, 8]),  # another loss, from step 7 on
    ):
        falls_and_rises(monkeypatch, [loss for loss in losses for _ in range(1 + options.get("validation_timesteps", 1))])
        assert train(config(model, images, shards, output, **run | options | {"max_train_steps": steps})) == 0
        assert sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*")) == kept


KILLED = """
import os, signal, sys
from engine import run
from engine.loop.checkpoints.writer import Writer
Writer.name_best = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(run.main())
"""


@pytest.mark.parametrize("how", ["killed", "left"])
def test_the_best_is_named_where_a_run_ended_at_its_round(how, model, images, shards, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run = MEASURED | {"checkpointing_steps": 2, "max_train_steps": 4, "checkpoints_total_limit": 1, "best_checkpoint": True}
    first = config(model, images, shards, output, **run)
    if how == "killed":  # between `latest` and `best`
        assert Command(command(first, sys.executable, "-c", KILLED)).wait() == -signal.SIGKILL
    else:
        with monkeypatch.context() as patched:
            agreed = iter([False, True])
            patched.setattr(StopSignal, "agreed", lambda stop: next(agreed))
            assert train(first) == 0
    assert (output / "latest").read_text() == "checkpoint-2\n"
    assert not (output / "best").exists()
    assert len(rounds(output)) == (how == "killed")
    measure = held_out.HeldOutLoss.measure
    worse = {"validation_loss": math.inf, "validation_loss_ema": math.inf}
    monkeypatch.setattr(held_out.HeldOutLoss, "measure", lambda self, step: measure(self, step) | (worse if step == 4 else {}))
    assert train(config(model, images, shards, output, resume_from_checkpoint="latest", **run)) == 0
    assert (output / "best").read_text() == "checkpoint-2\n"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert [line["step"] for line in rounds(output)] == [2, 4], "each once"


def test_a_round_that_fails_loses_no_step(model, images, shards, tmp_path, monkeypatch, capsys):
    def fail(self, batch):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(held_out.HeldOutLoss, "compare", fail)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        train(config(model, images, shards, tmp_path / "out", **MEASURED))
    assert (tmp_path / "out" / "latest").read_text() == "checkpoint-2\n"
    assert f"Step 2 is saved in {tmp_path / 'out' / 'checkpoint-2'}" in capsys.readouterr().err


@pytest.mark.parametrize("offload", [False, True])
def test_weights_and_average_change_places_without_a_bit(offload):
    masters = [torch.randn(size) for size in (7, 1000)]
    ema = Ema(masters, offload, slice_bytes=64)
    for master in masters:
        master += 1
    before = [[tensor.clone() for tensor in tensors] for tensors in (masters, ema.averages)]
    for expected in (before[::-1], before):
        ema.exchange(most=64)
        for tensors, others in zip((masters, ema.averages), expected, strict=True):
            assert all(map(torch.equal, tensors, others))
