"""Samples that are trained without their condition: which they are, and what they have in its place."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import KandinskyV22PriorPipeline

from engine import philox
from engine.data.format.reader import Shards
from engine.data.samples.batch import BatchPlan
from engine.data.samples.dropout import Dropout
from engine.data.samples.loader import Loader
from engine.errors import UserError
from engine.loop.trainer import train
from engine.models.encoder import open_encoding
from tests.data.test_loader import CPU, PLAN, SCHEDULES, SEED, streams_of
from tests.data.test_shards import build, write_captions
from tests.loop.runs import checkpoint_tensors, config
from tests.loop.test_families import config as family_config
from tests.loop.test_families import losses

CAPTIONED = ["sd", "kandinsky-prior", "wuerstchen"]
EMPTY = torch.full((16, 24), 7.0)


@pytest.fixture(scope="module")
def without_captions(photographs, tmp_path_factory) -> Path:
    """The photographs with empty captions."""
    folder = tmp_path_factory.mktemp("without") / "train"
    shutil.copytree(photographs, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row | {"text": ""}) + "\n" for row in rows))
    return folder


def run(family: str, models: dict[str, str], images: Path, output: Path, **options):
    return family_config(family, models, images, output, **{"max_train_steps": 3, "max_train_samples": 6} | options)


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(output / f"checkpoint-{step}", "weight")


@pytest.mark.parametrize("way", ["states", "tokens"])
@pytest.mark.parametrize("family", CAPTIONED)
def test_dropping_all_captions_is_training_on_empty_ones(family, way, published, photographs, without_captions, tmp_path):
    models, options = published(family), {"cache_text": way, "proportion_empty_prompts": 1.0}
    assert train(run(family, models, photographs, tmp_path / "dropped", **options)) == 0
    options = {"cache_text": way, "keep_empty_captions": True}
    assert train(run(family, models, without_captions, tmp_path / "empty", **options)) == 0
    assert losses(tmp_path / "dropped") == losses(tmp_path / "empty")
    dropped, empty = (weights(tmp_path / name, 3) for name in ("dropped", "empty"))
    assert all(torch.equal(dropped[name], empty[name]) for name in dropped | empty)


def test_the_decoder_has_the_embedding_that_the_published_pipeline_guides_against(published, photographs, tmp_path):
    models = published("kandinsky-decoder")
    options = run("kandinsky-decoder", models, photographs, tmp_path / "out", proportion_empty_images=1.0)
    prior = KandinskyV22PriorPipeline.from_pretrained(models["pretrained_prior_model_name_or_path"])
    (row,) = open_encoding(options).unconditional(torch.device("cpu")).values()
    assert torch.equal(row, prior.get_zero_embed()[0])
    assert train(options) == 0
    assert train(run("kandinsky-decoder", models, photographs, tmp_path / "plain")) == 0
    assert losses(tmp_path / "out") != losses(tmp_path / "plain")


def test_shards_alone_need_the_image_encoder_and_say_so(published, photographs, tmp_path):
    models = published("kandinsky-decoder")
    prior = tmp_path / "prior"
    shutil.copytree(models["pretrained_prior_model_name_or_path"], prior)
    assert train(run("kandinsky-decoder", models, photographs, tmp_path / "out")) == 0
    for file in (prior / "image_encoder").glob("*.safetensors"):
        file.unlink()
    alone = {"shards_dir": str(tmp_path / "out" / "shards"), "pretrained_prior_model_name_or_path": str(prior)}
    options = run("kandinsky-decoder", models | alone, photographs, tmp_path / "alone").model_copy(
        update={"train_data_dir": None}
    )
    assert train(options) == 0
    options = options.model_copy(update={"proportion_empty_images": 0.5, "output_dir": str(tmp_path / "dropped")})
    with pytest.raises(UserError, match=re.escape(f"--proportion_empty_images: {prior / 'image_encoder'}: no weights there")):
        train(options)


def test_a_resumed_run_drops_the_same_captions_from_shards_alone(model, images, shards, tmp_path):
    options = {"proportion_empty_prompts": 0.5, "checkpointing_steps": 4}
    assert train(config(model, images, shards, tmp_path / "whole", **options)) == 0
    resumed = config(model, images, shards, tmp_path / "resumed", **options)
    resumed.train_data_dir, resumed.resume_from_checkpoint = None, str(tmp_path / "whole" / "checkpoint-4")
    assert train(resumed) == 0
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[4:]


def records(shards: Path, proportion: float, plan: BatchPlan) -> dict[int, torch.Tensor]:
    """The hidden states of every slot of two steps."""
    dropout = Dropout(proportion, {"encoder_hidden_states": EMPTY})
    loader = Loader(streams_of(Shards(shards)), plan, SEED, SCHEDULES[0], CPU, 0, 2, dropout=dropout)
    batches = list(loader)
    return {
        slot: row
        for batch in batches
        for slot, row in zip(batch.slots.tolist(), batch.record["encoder_hidden_states"], strict=True)
    }


def test_what_is_dropped_is_a_function_of_seed_and_slot_alone(shards):
    one = BatchPlan(micro_batch=12, accumulation=1, rank=0, world=1)
    plain, some, all_of_them = (records(shards, proportion, one) for proportion in (0.0, 0.4, 1.0))
    words = philox.draw_words(torch.tensor([SEED]), torch.arange(24), philox.CAPTION_DROPOUT, 1)[:, 0, 0] >> 8
    for slot in range(24):
        expected = EMPTY if (words[slot].item() + 0.5) / 2**24 < 0.4 else plain[slot]
        assert torch.equal(some[slot], expected)
        assert torch.equal(all_of_them[slot], EMPTY)
    for rank in (0, 1):
        divided = records(shards, 0.4, replace(PLAN, rank=rank))
        assert all(torch.equal(some[slot], row) for slot, row in divided.items())


def test_chances_end_where_they_should():
    seed, slots = torch.tensor([3]), torch.arange(200_000)
    assert philox.chances(seed, slots, philox.CAPTION_DROPOUT, 1.0).all()
    assert not philox.chances(seed, slots, philox.CAPTION_DROPOUT, 0.0).any()
    assert philox.chances(seed, slots, philox.CAPTION_DROPOUT, 0.1).double().mean().item() == pytest.approx(0.1, abs=0.003)


def test_empty_captions_are_kept_when_asked_for(model, tmp_path):
    data = write_captions(tmp_path / "images", ["a", "", None, ["b", "  "], []])
    index = build(model, data, tmp_path / "refused")
    assert (index.records, {reason: of.count for reason, of in index.refused.items()}) == (
        2, {"empty caption": 1, "no caption": 2},
    )  # fmt: skip
    kept = build(model, data, tmp_path / "kept", "--keep_empty_captions")
    assert (kept.records, kept.refused, kept.total("caption_rows")) == (5, {}, 3)
    with pytest.raises(UserError, match=re.escape("--keep_empty_captions False, now True")):
        build(model, data, tmp_path / "refused", "--keep_empty_captions")
