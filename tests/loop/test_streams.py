"""Training on several streams of different shapes: however a run is divided, captured or interrupted, it trains the same."""

import json
import re
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from engine.backends import compile_model
from engine.config.command_line import load
from engine.config.options import TrainConfig
from engine.data.format.reader import Shards
from engine.data.samples.streams import Stream, Streams
from engine.errors import UserError
from engine.loop import prepare
from engine.loop.checkpoints.state import parse_state
from engine.loop.flops import forward_flops, mean_step_flops
from engine.loop.resume import check_same_streams, unit_of
from engine.loop.trainer import cause_of_skips, train
from engine.models.family import open_family
from engine.shards import build_command
from tests import tiny
from tests.loop.runs import checkpoint_tensors, config

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(scope="module")
def two(model, shards, tmp_path_factory):
    """Directories of shards by the names of their data sets: squares, and a bucket of another size."""
    images = tiny.write_images(tmp_path_factory.mktemp("others") / "train", 8, (16, 8))
    directory = tmp_path_factory.mktemp("two") / "others"
    assert build_command([
        "--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--resolution", "16",
        "--random_flip", "--buckets", "16x8", "--shards_dir", str(directory),
    ]) == 0  # fmt: skip
    return {"squares": shards, "others": directory}


@pytest.fixture(scope="module")
def settings(model, two):
    """A run over both, of eight steps."""

    def make(output, **options) -> TrainConfig:
        options = {"train_batch_size": 4, "checkpointing_steps": 4} | options
        values = config(model, Path(), Path(), output, **options).model_dump(exclude_unset=True)
        tables = [{"name": name, "shards_dir": str(directory)} for name, directory in two.items()]
        return load(TrainConfig, values | {"train_data_dir": None, "shards_dir": None, "data_sets": tables})

    return make


@pytest.fixture
def streams(two) -> list[Stream]:
    return [
        Stream(Shards(two["squares"]), None, 12, "squares"),
        Stream(Shards(two["others"] / "16x8"), None, 8, "others", "16x8"),
    ]


def trained(directory, step: int = 8) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: checkpoint_tensors(directory / f"checkpoint-{step}", kind) for kind in KINDS}


def lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same(left, right) -> None:
    for kind in KINDS:
        assert left[kind].keys() == right[kind].keys()
        assert all(torch.equal(left[kind][name], right[kind][name]) for name in left[kind]), kind


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The output directory of such a run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train(settings(output)) == 0
    return output


def test_a_run_that_was_interrupted_continues_with_the_same_bits(whole, settings, tmp_path):
    assert train(settings(tmp_path, resume_from_checkpoint=str(whole / "checkpoint-4"))) == 0
    assert_same(trained(tmp_path), trained(whole))
    same = ("step", "epoch", "loss", "grad_norm")
    assert [[line[name] for name in same] for line in lines(tmp_path)] == [
        [line[name] for name in same] for line in lines(whole)[4:]
    ]


def test_a_checkpoint_says_what_the_streams_were(whole):
    state = json.loads((whole / "checkpoint-4" / "state.json").read_text())
    assert state["unit"] == 4
    found = [(stream["data_set"], stream["records"], stream["share"]) for stream in state["streams"]]
    assert found == [("squares", 12, "12"), ("others", 8, "8")]
    assert lines(whole)[-1]["epoch"] == 8 * 4 / 20


def test_what_resumes_must_be_of_the_same_streams(whole, streams):
    checkpoint = whole / "checkpoint-4"
    state = parse_state(json.loads((checkpoint / "state.json").read_text()), checkpoint)
    squares, others = streams
    check = partial(check_same_streams, checkpoint, state)
    check(False, Streams(0, [squares, others]))
    for others_now, said in (
        ([squares], "(others/16x8 is gone, squares is gone)"),
        ([squares, others, replace(squares, bucket="8x8")], "(squares/8x8 is new)"),
        ([squares, replace(others, share=3)], "(others/16x8 is weighed otherwise)"),
        ([others, squares], "in another order"),
    ):
        with pytest.raises(UserError, match=rf"checkpoint-4: was .*{re.escape(said)}.* --continue_on_grown_data"):
            check(False, Streams(0, others_now))
        check(True, Streams(0, others_now))
    with pytest.raises(UserError, match=r"was trained on other shards \(others/16x8: "):
        check(True, Streams(0, [squares, replace(squares, data_set="others", bucket="16x8")]))
    check_same_streams(None, None, False, Streams(0, [squares]))


def test_a_micro_batch_of_several_streams_is_refused(whole, settings):
    state = parse_state(json.loads((whole / "checkpoint-4" / "state.json").read_text()), whole)
    assert unit_of(settings(whole, train_batch_size=2), whole, state) == 4
    with pytest.raises(UserError, match=r"began with --train_batch_size 4.* give --train_batch_size 1 or 2 or 4, and as much"):
        unit_of(settings(whole, train_batch_size=8), whole, state)


def test_epochs_are_over_all_streams(settings, tmp_path):
    run = settings(tmp_path, num_train_epochs=1, max_train_steps=None)
    assert train(run) == 0
    assert lines(tmp_path)[-1]["step"] == 5  # of 4 samples, for 12 + 8


def test_streams_that_are_smaller_than_a_unit_are_said(streams, capsys):
    squares, others = streams
    prepare._say_small_streams(Streams(0, [squares, others], 9))
    assert "a micro-batch of 9 has, so that they come more than once in it: others/16x8 (8)\n" in capsys.readouterr().err
    prepare._say_small_streams(Streams(0, [squares, others], 8))
    prepare._say_small_streams(Streams(0, [others], 9))
    assert not capsys.readouterr().err


def test_samples_to_blame_are_named_with_their_stream(two, streams):
    squares, others = streams
    said = cause_of_skips([7, 19], [2, 2], [squares, others])
    assert "slot 7 (record 2 of squares), slot 19 (record 2 of others/16x8)" in said
    assert f"`python -m engine.shards info {two['others'] / '16x8'} --record 2`" in said


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"gradient_accumulation_steps": 2, "train_batch_size": 2}, 4),
        ({"zero_stage": 2}, 2),
    ],
    ids=str,
)
def test_replayed_training_of_two_shapes_is_eager_training(options, graphs, settings, recorded, tmp_path):
    """A step mixes shapes where it accumulates, and all of its graphs are in one pool."""
    for how in ("off", "on"):
        assert train(settings(tmp_path / how, cuda_graphs=how, **options)) == 0
    assert_same(trained(tmp_path / "on"), trained(tmp_path / "off"))
    same = ("loss", "grad_norm", "loss/squares", "loss/others")
    losses = [[[line[name] for name in same] for line in lines(tmp_path / how)] for how in ("on", "off")]
    assert losses[0] == losses[1]
    assert {line["loss/others"] is None for line in lines(tmp_path / "on")} == {True, False}
    assert len(recorded) == graphs, "each once: both shapes came while kinds of micro-batches warmed up"


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_compiled_code_is_made_once_for_each_shape(settings, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, options, dynamic: compile_module(module, backend="eager", dynamic=dynamic)
    )
    torch._dynamo.reset()
    counters.clear()
    model, shapes = Doubled(), 12  # beyond what torch recompiles by itself
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_model(model, settings("out", compile=True), shapes)
        for _ in range(2):
            for size in range(1, shapes + 1):
                model(torch.ones(size, 3))
    assert counters["stats"]["unique_graphs"] == shapes
    torch._dynamo.reset()


def test_the_held_out_loss_is_compiled_once_more_for_each_shape(settings, tmp_path, monkeypatch, capsys):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, options, dynamic: compile_module(module, backend="eager", dynamic=dynamic)
    )
    torch._dynamo.reset()
    counters.clear()
    held = {"validation_fraction": 0.3, "validation_steps": 4, "validation_timesteps": 2, "compile": True}
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        assert train(settings(tmp_path / "out", **held)) == 0
    assert counters["stats"]["unique_graphs"] == 2 * 2
    said = "once for each of 2 shapes, and 2 without gradients for the held-out loss"
    assert said in capsys.readouterr().err
    torch._dynamo.reset()


def test_operations_are_the_mean_over_shapes(settings, streams):
    family = open_family(settings("out"))
    model, shapes = family.load_model(), Streams(0, streams).shapes
    assert list(shapes.values()) == [Fraction(12, 20), Fraction(8, 20)]
    each = [forward_flops(family, model, shape) for shape in shapes]
    assert each[0] == forward_flops(family, model) > each[1]
    assert mean_step_flops(family, model, shapes) == pytest.approx(3 * (0.6 * each[0] + 0.4 * each[1]))
