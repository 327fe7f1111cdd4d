"""Values that are not finite never reach the weights: their steps are skipped, counted, and named when there are too many."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.tools.shards import replace_rows
from engine.data.format.index import shard_name
from engine.data.samples.order import records_of
from engine.errors import UserError
from engine.loop.trainer import cause_of_skips, train
from tests.loop.runs import checkpoint_tensors, config

RECORD = 7
SLOTS = torch.arange(32)  # of 8 steps in batches of 4
BAD_SLOTS = SLOTS[records_of(11, SLOTS, 12) == RECORD].tolist()


@pytest.fixture(scope="module")
def poisoned(shards, tmp_path_factory) -> Path:
    """The shards with a NaN in every variant of one record, and digests that say that all is well."""
    directory = tmp_path_factory.mktemp("poisoned") / "shards"
    shutil.copytree(shards, directory)
    place, row = divmod(RECORD, 5)
    latents = load_file(directory / shard_name(place))["latent_mean"]
    latents[2 * row : 2 * row + 2, 0, 0, 0] = float("nan")
    replace_rows(directory, place, latent_mean=latents)
    return directory


def run(model, poisoned, output, **options):
    given = config(model, poisoned, poisoned, output, checkpointing_steps=8, **options)
    return train(given.model_copy(update={"train_data_dir": None}))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_planted_nan_skips_its_steps_and_nothing_else(stage, model, poisoned, tmp_path):
    assert run(model, poisoned, tmp_path / "out", zero_stage=stage) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    bad_steps = {slot // 4 + 1 for slot in BAD_SLOTS}
    assert 0 < len(bad_steps) < 8
    assert [line["skipped_steps"] for line in lines] == [sum(step <= line["step"] for step in bad_steps) for line in lines]
    assert {line["step"] for line in lines if line["grad_norm"] is None} == bad_steps
    assert all(line["loss"] > 0 for line in lines)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        tensors = checkpoint_tensors(tmp_path / "out" / "checkpoint-8", kind)
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_too_many_stop_the_run_and_the_samples_are_named(model, poisoned, tmp_path):
    expected = rf"1 steps were skipped .* slot {BAD_SLOTS[0]} \(record {RECORD}\)\. .* --record {RECORD}` .* touched no weight"
    with pytest.raises(UserError, match=expected):
        run(model, poisoned, tmp_path / "out", max_skipped_steps=0)


def test_weights_that_diverged_are_not_blamed_on_samples():
    slots = list(range(40, 56))
    said = cause_of_skips(slots, [slot % 12 for slot in slots])
    assert said.startswith("no loss was in the last 16 samples, whatever they hold: the weights have diverged")
    assert "record" not in said
    assert cause_of_skips([], []).startswith("every loss was, so the gradients overflowed")
    assert "slot 7 (record 7), slot 19 (record 7)" in cause_of_skips([7, 19], [7, 7])
    # One bad record that comes twice in a row is still a bad record.
    assert "(record 7)" in cause_of_skips([7, 8], [7, 7])
