"""Textual inversion: vectors of a new token against an independent loop, and what is loaded of them."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from engine.checkpoint import export_command
from engine.config.checks import check_options
from engine.config.options import TrainConfig
from engine.data.samples.order import records_of
from engine.errors import UserError
from engine.files import digest
from engine.loop.trainer import train
from engine.models.family import Family, open_family
from tests import reference
from tests.loop.runs import SLACK, config, relative_distance
from tests.loop.test_families import losses

STEPS, BATCH, SEED = 12, 4, 2**40 + 11
TOKEN = "<digit>"
OPTIONS = {"placeholder_token": TOKEN, "initializer_token": "a", "num_vectors": 2, "caption_prefix": TOKEN}


def embedding(folder: Path, name: str = "learned_embeds") -> torch.Tensor:
    (found,) = load_file(folder / f"{name}.safetensors").items()
    assert found[0] == TOKEN
    return found[1]


def opened(run: TrainConfig) -> Family:
    check_options(run)
    return open_family(run)


@pytest.fixture(scope="module")
def trained(model, images, tmp_path_factory) -> TrainConfig:
    root = tmp_path_factory.mktemp("inversion")
    before = {path: digest(path) for path in sorted(model.rglob("*")) if path.is_file()}
    run = config(
        model, images, root / "shards", root / "out", seed=SEED, max_train_steps=STEPS, checkpointing_steps=4,
        max_grad_norm=0.0, adam_weight_decay=0.02, lr_warmup_steps=0, validation_prompts=[f"a {TOKEN}"], **OPTIONS,
    )  # fmt: skip
    assert train(run) == 0
    assert before == {path: digest(path) for path in before}
    return run


def reference_run(model: Path, run: TrainConfig) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Vectors at first and at last, and losses, of a loop that trains the whole embedding and puts the known rows back."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    text_encoder, tokenizer = (kind.from_pretrained(model, subfolder=name) for kind, name in
                               ((CLIPTextModel, "text_encoder"), (CLIPTokenizer, "tokenizer")))  # fmt: skip
    tokenizer.add_tokens([TOKEN, f"{TOKEN}_1"])
    text_encoder.resize_token_embeddings(len(tokenizer))
    weight = text_encoder.get_input_embeddings().weight
    (initializer,) = tokenizer.encode(run.initializer_token, add_special_tokens=False)
    new = tokenizer.convert_tokens_to_ids([TOKEN, f"{TOKEN}_1"])
    with torch.no_grad():
        weight[new] = weight[initializer].clone()
    known = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=run.learning_rate, weight_decay=run.adam_weight_decay)
    scheduler, data = DDPMScheduler.from_pretrained(model, subfolder="scheduler"), reference.PlainShards(run.shards_path)
    found = []
    for step in range(STEPS):
        slots = list(range(step * BATCH, (step + 1) * BATCH))
        records = records_of(SEED, torch.tensor(slots), len(data.images)).tolist()
        latents, noise, tokens = reference.batch(data, records, slots, SEED)
        timesteps = torch.tensor([reference.choice(SEED, s, 2, scheduler.config.num_train_timesteps) for s in slots])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        assert {tuple(row.tolist()) for row in tokens[:, 1:3]} == {tuple(new)}
        loss = (unet(noisy, timesteps, text_encoder(tokens.long())[0]).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            others = torch.ones(len(weight), dtype=torch.bool)
            others[new] = False
            weight[others] = known[others]
        found.append(loss.item())
    return known[new], weight[new].detach(), found


def test_the_vectors_follow_the_reference(trained, model):
    start, expected, of_reference = reference_run(model, trained)
    output = Path(trained.output_dir)
    checkpoint = output / f"checkpoint-{STEPS}"
    assert losses(output) == pytest.approx(of_reference, rel=1e-4 * SLACK)
    ours = embedding(checkpoint)
    assert relative_distance({"": ours}, {"": expected}, {"": start}) < 1e-4 * SLACK
    assert torch.equal(embedding(checkpoint, "learned_embeds_ema"), embedding(output))
    assert not (output / "unet").exists()


def test_a_pipeline_loads_them_and_reads_captions_as_the_shards_do(trained, model):

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_textual_inversion(trained.output_dir, weight_name="learned_embeds.safetensors")
    tokens = pipeline.tokenizer(pipeline.maybe_convert_prompt(f"{TOKEN} a", pipeline.tokenizer)).input_ids
    own = open_family(trained).encoding
    assert own.tokens_of([f"{TOKEN} a"])["tokens"][0, : len(tokens)].tolist() == tokens
    rows = pipeline.text_encoder.get_input_embeddings().weight[tokens[1:3]]
    assert torch.equal(rows, embedding(Path(trained.output_dir)))


@pytest.mark.parametrize("options", [{"zero_stage": 3}, {"cuda_graphs": "on", "gradient_checkpointing": True}], ids=str)
def test_other_ways_give_the_same_vectors(options, trained, tmp_path, recorded):
    again = trained.model_copy(update={
        "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": f"{trained.output_dir}/checkpoint-4",
        "validation_prompts": None, **options,
    })  # fmt: skip
    assert train(again) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(Path(trained.output_dir))[4:], rel=1e-6 * SLACK)
    torch.testing.assert_close(embedding(tmp_path / "out"), embedding(Path(trained.output_dir)), rtol=0, atol=1e-6 * SLACK)


def test_captions_must_hold_the_token(trained, tmp_path, capsys):
    run = trained.model_copy(update={"output_dir": str(tmp_path / "out"), "max_train_steps": 1, "validation_prompts": None})
    with pytest.raises(UserError, match=f"--placeholder_token {TOKEN}: no caption holds it, so that nothing would be learned"):
        train(run.model_copy(update={"shards_dir": str(tmp_path / "shards"), "caption_prefix": ""}))
    with pytest.raises(UserError, match=r"--lr_of unet: no weight .* named as text_encoder.embeddings.vectors"):
        train(run.model_copy(update={"lr_of": ["unet=1"]}))
    assert train(run.model_copy(update={"lr_of": ["text_encoder.embeddings.vectors=0"], "adam_weight_decay": 0.0})) == 0
    assert "captions without it" not in capsys.readouterr().err


def test_a_checkpoint_is_exported(trained, tmp_path):
    assert export_command([f"{trained.output_dir}/checkpoint-8", "--output_dir", str(tmp_path)]) == 0
    there = embedding(Path(trained.output_dir) / "checkpoint-8", "learned_embeds_ema")
    assert torch.equal(embedding(tmp_path), there)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"initializer_token": None}, "--placeholder_token and --initializer_token need each other"),
        ({"placeholder_token": None, "initializer_token": None}, "--num_vectors needs --placeholder_token"),
        (
            {"train_text_encoder": True},
            "the vectors of a token alone; leave out --train_text_encoder",
        ),
        ({"cache_text": "states"}, "--placeholder_token: what --cache_text states keeps"),
        ({"placeholder_token": "a</w>"}, "--placeholder_token a</w>: the tokenizer has this token; give one that is new"),
        ({"initializer_token": "redred"}, "--initializer_token redred: makes "),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options, said, model, images, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        opened(config(model, images, tmp_path, tmp_path, **OPTIONS | options))
