"""Training on several streams of different shapes: however a run is divided, captured or interrupted, it trains the same."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.data.format.index import Index
from engine.data.format.reader import Shards
from engine.data.parts import Part
from engine.data.samples.streams import Stream, Streams
from engine.errors import UserError
from engine.loop import prepare
from engine.loop.checkpoints.state import parse_state
from engine.loop.resume import check_same_streams, unit_of
from engine.loop.trainer import cause_of_skips, train
from engine.shards import build_command
from tests import tiny
from tests.loop.runs import checkpoint_tensors, config

# The sides of the images of each data set. The second has fewer than a unit.
SIDES = {"squares": 16, "others": 32}
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(scope="module")
def two(model, images, shards, tmp_path_factory):
    """Directories of shards of two sizes, by the names of their data sets."""
    few = tiny.write_images(tmp_path_factory.mktemp("few") / "train", 3)
    directory = tmp_path_factory.mktemp("two")
    assert build_command([
        "--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(few), "--resolution", "32",
        "--shards_dir", str(directory / "others"),
    ]) == 0  # fmt: skip
    return {"squares": shards, "others": directory / "others"}


def find_parts_of(directories):
    """Takes the place of `parts.find_parts`, with a part for each of the directories."""

    def find(config, encoding, processes):
        return [
            Part(name, None, config.model_copy(update={"shards_dir": str(directory)}),
                 encoding.of_size(SIDES.get(name, 16), SIDES.get(name, 16)), Index.read(directory))
            for name, directory in directories.items()
        ]  # fmt: skip

    return find


def settings(model, output, **options):
    plain = config(model, "unused", "unused", output, train_batch_size=4, checkpointing_steps=4, **options)
    return plain.model_copy(update={"train_data_dir": None})


def trained(directory, step: int = 8) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: checkpoint_tensors(directory / f"checkpoint-{step}", kind) for kind in KINDS}


def lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same(left, right) -> None:
    for kind in KINDS:
        assert left[kind].keys() == right[kind].keys()
        assert all(torch.equal(left[kind][name], right[kind][name]) for name in left[kind]), kind


@pytest.fixture(scope="module")
def whole(model, two, tmp_path_factory):
    """A run of eight steps over both, its output directory."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "find_parts", find_parts_of(two))
        assert train(settings(model, output)) == 0
    return output


def test_a_run_that_was_interrupted_continues_with_the_same_bits(whole, model, two, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "find_parts", find_parts_of(two))
    assert train(settings(model, tmp_path, resume_from_checkpoint=str(whole / "checkpoint-4"))) == 0
    assert_same(trained(tmp_path), trained(whole))
    same = ("step", "epoch", "loss", "grad_norm")
    assert [[line[name] for name in same] for line in lines(tmp_path)] == [
        [line[name] for name in same] for line in lines(whole)[4:]
    ]


def test_a_checkpoint_says_what_the_streams_were(whole):
    state = json.loads((whole / "checkpoint-4" / "state.json").read_text())
    assert state["unit"] == 4
    found = [(stream["data_set"], stream["records"], stream["share"]) for stream in state["streams"]]
    assert found == [("squares", 12, "12"), ("others", 3, "3")]
    assert lines(whole)[-1]["epoch"] == 8 * 4 / 15


def test_what_resumes_must_be_of_the_same_streams(whole, two):
    checkpoint = whole / "checkpoint-4"
    state = parse_state(json.loads((checkpoint / "state.json").read_text()), checkpoint)
    squares, others = (
        Stream(Shards(directory), None, records, name) for (name, directory), records in zip(two.items(), (12, 3), strict=True)
    )
    check = partial(check_same_streams, checkpoint, state)
    check(False, Streams(0, [squares, others]))
    for streams, said in (
        ([squares], "(others is gone, squares is gone)"),
        ([squares, others, replace(squares, bucket="8x8")], "(squares/8x8 is new)"),
        ([squares, replace(others, share=4)], "(others is weighed otherwise)"),
        ([others, squares], "in another order"),
    ):
        with pytest.raises(UserError, match=rf"checkpoint-4: was .*{re.escape(said)}.* --continue_on_grown_data"):
            check(False, Streams(0, streams))
        check(True, Streams(0, streams))
    with pytest.raises(UserError, match=r"was trained on other shards \(others: --resolution 32, now 16"):
        check(True, Streams(0, [squares, replace(squares, data_set="others")]))
    check_same_streams(None, None, False, Streams(0, [squares]))


def test_a_micro_batch_of_several_streams_is_refused(whole, model):
    state = parse_state(json.loads((whole / "checkpoint-4" / "state.json").read_text()), whole)
    assert unit_of(settings(model, whole).model_copy(update={"train_batch_size": 2}), whole, state) == 4
    with pytest.raises(UserError, match=r"began with --train_batch_size 4.* give --train_batch_size 1 or 2 or 4, and as much"):
        unit_of(settings(model, whole).model_copy(update={"train_batch_size": 8}), whole, state)


def test_epochs_are_over_all_streams_and_small_ones_are_said(model, two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "find_parts", find_parts_of(two))
    run = settings(model, tmp_path, num_train_epochs=1).model_copy(update={"max_train_steps": None})
    assert train(run) == 0
    assert lines(tmp_path)[-1]["step"] == 4  # of 4 samples, for 12 + 3
    assert "so that they come more than once in it: others (3)\n" in capsys.readouterr().err


def test_samples_to_blame_are_named_with_their_stream(two):
    squares, others = (Stream(Shards(directory), None, 1, name) for name, directory in two.items())
    said = cause_of_skips([7, 19], [2, 2], [squares, others])
    assert "slot 7 (record 2 of squares), slot 19 (record 2 of others)" in said
    assert f"`python -m engine.shards info {two['others']} --record 2`" in said
