"""Captions kept as tokens: the frozen text encoder reads them in the step, and gives what states in the shards give."""

import re

import pytest
import torch

from benchmarks.tools.shards import replace_rows
from engine.config.options import CacheConfig, TrainConfig
from engine.data.format.index import Index
from engine.data.format.reader import Shards
from engine.data.identity import recipe_of
from engine.errors import UserError
from engine.loop.flops import text_flops
from engine.loop.trainer import train
from engine.models.encoder import open_encoding
from engine.models.stable_diffusion import StableDiffusionEncoding
from tests.commands import ON_GPU
from tests.data.test_shards import build, write_captions
from tests.loop.runs import SLACK, checkpoint_tensors, config
from tests.loop.test_families import config as family_config
from tests.loop.test_families import losses

WAYS = ("states", "tokens")


@pytest.fixture(scope="module")
def token_shards(model, images, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    assert train(config(model, images, directory / "shards", directory / "out", cache_text="tokens", max_train_steps=1)) == 0
    return directory / "shards"


@pytest.mark.parametrize(
    "options",
    [
        {"validation_prompts": ["a red square"]},
        {"dream_training": True, "train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"zero_stage": 3},
    ],
    ids=str,
)
def test_training_on_tokens_is_training_on_states(options, model, images, shards, token_shards, tmp_path, capsys):
    for way, of in zip(WAYS, (shards, token_shards), strict=True):
        run = config(model, images, of, tmp_path / way, cache_text=way, checkpointing_steps=4, **options)
        assert train(run) == 0
    assert "the text encoder's 14.74 k read the captions" in capsys.readouterr().err
    states, tokens = (losses(tmp_path / way) for way in WAYS)
    if ON_GPU:
        assert tokens == pytest.approx(states, rel=1e-5 * SLACK)
        return
    assert tokens == states
    weights = [checkpoint_tensors(tmp_path / way / "checkpoint-8", "weight") for way in WAYS]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    run = config(model, images, token_shards, tmp_path / "again", cache_text="tokens", **options)
    run.resume_from_checkpoint = str(tmp_path / "tokens" / "checkpoint-4")
    assert train(run) == 0
    assert losses(tmp_path / "again") == tokens[4:]


@pytest.mark.parametrize("family", ["kandinsky-prior", "wuerstchen"])
def test_other_families_read_tokens_too(family, published, photographs, tmp_path):
    for way in WAYS:
        options = {"cache_text": way, "max_train_steps": 3, "max_train_samples": 6}
        assert train(family_config(family, published(family), photographs, tmp_path / way, **options)) == 0
    states, tokens = (losses(tmp_path / way) for way in WAYS)
    assert tokens == pytest.approx(states, rel=1e-5 * SLACK)


def test_tokens_of_more_shards_than_may_be_open_are_read_in_turn(token_shards, monkeypatch):
    reader = Shards(token_shards)
    rows = reader.rows_of(reader.find(torch.tensor([0, 5, 11, 6, 1])), 1)
    found = []
    for most in (2**14, 2):
        monkeypatch.setattr(reader, "_most_open", most)
        found.append({name: torch.empty(5, *field.shape, dtype=field.dtype) for name, field in reader.fields.items()})
        reader.gather_fields(rows, found[-1], {})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_caption_takes_two_bytes_per_token(token_shards):
    fields = Shards(token_shards).fields
    assert [name for name, field in fields.items() if field.per == "caption"] == ["tokens"]
    assert (fields["tokens"].row_bytes, fields["tokens"].dtype) == (2 * 16, torch.uint16)


def test_a_caption_that_has_no_finite_states_is_refused_either_way(model, images, tmp_path, monkeypatch):
    encode = StableDiffusionEncoding.encode_tokens

    def overflowing(text_encoder, tokens):
        states = encode(text_encoder, tokens)["encoder_hidden_states"]
        return {
            "encoder_hidden_states": torch.where((tokens["tokens"].long() == rare).any(1)[:, None, None], torch.inf, states)
        }

    rare = open_encoding(config(model, images, tmp_path, tmp_path)).tokens_of(["x"])["tokens"][0, 1].item()
    monkeypatch.setattr(StableDiffusionEncoding, "encode_tokens", staticmethod(overflowing))
    data = write_captions(tmp_path / "images", ["a", "x", ["b", "x"]])
    for way in WAYS:
        index = build(model, data, tmp_path / way, "--cache_text", way)
        assert (index.records, [*index.refused]) == (2, ["caption encodes to values that are not finite"])
        assert index.total("caption_rows") == 2


def test_families_without_captions_have_the_same_shards_either_way(published):
    def recipe(way: str) -> dict:
        run = CacheConfig(family="kandinsky-decoder", resolution=64, cache_text=way, **published("kandinsky-decoder"))
        return recipe_of(run, open_encoding(run))

    assert recipe("states") == recipe("tokens")


@pytest.mark.parametrize("data", [True, False], ids=["with data", "shards alone"])
@pytest.mark.parametrize("way", WAYS)
def test_shards_of_the_other_kind_are_refused_in_a_line(way, data, model, images, shards, token_shards, tmp_path):
    built, of = ("tokens", token_shards) if way == "states" else ("states", shards)
    run = config(model, images, of, tmp_path / "out", cache_text=way)
    if not data:
        run.train_data_dir = None
    with pytest.raises(UserError, match=re.escape(f"(--cache_text {built}, now {way})")) as error:
        train(run)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize("check", ["rows", "none"])
def test_a_token_beyond_the_vocabulary_is_named_before_a_step_has_it(check, model, images, tmp_path):
    directory = tmp_path / "shards"
    options = {"cache_text": "tokens", "verify_shards": check}
    assert train(config(model, images, directory, tmp_path / "out", max_train_steps=1, **options)) == 0
    words = open_encoding(config(model, images, directory, tmp_path)).text_config.vocab_size
    rows = torch.zeros(int(Index.read(directory).shards["caption_rows"][1]), 16, dtype=torch.uint16)
    rows[-1, 3] = words
    replace_rows(directory, 1, tokens=rows)
    said = f"shard-00001.safetensors: row {len(rows) - 1} of tokens holds {words}, where numbers are below {words}; "
    with pytest.raises(UserError, match=said):
        train(config(model, images, directory, tmp_path / "again", **options))


def test_operations_of_the_text_encoder_are_counted(model):
    encoding = open_encoding(TrainConfig(family="sd", pretrained_model_name_or_path=str(model), resolution=16))
    width, inner, length, layers = 24, 48, 16, 2
    products = 2 * length * (4 * width**2 + 2 * width * inner) + 4 * length**2 * width
    assert text_flops(encoding) == layers * products
