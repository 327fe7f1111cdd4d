"""The text encoder trained beside the UNet: against an independent loop, over partitions and captures, and what is saved."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import CLIPTextModel

from engine.checkpoint import export_command
from engine.config.checks import check_options
from engine.config.options import TrainConfig
from engine.data.samples.order import records_of
from engine.errors import UserError
from engine.loop.trainer import train
from engine.models.stable_diffusion import StableDiffusion
from tests import objectives, reference
from tests.commands import run_two
from tests.loop.adapters import trained_parameters
from tests.loop.runs import SLACK, checkpoint_tensors, command, config, published_order, relative_distance

STEPS, BATCH, SEED = 20, 4, 2**40 + 9
ADAPTED = ["to_k", "to_q", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
PARTS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


@pytest.fixture(scope="module")
def token_shards(model, images, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    assert train(config(model, images, directory / "shards", directory / "out", cache_text="tokens", max_train_steps=1)) == 0
    return directory / "shards"


def opened(folder: Path, suffix: str = "") -> torch.nn.ModuleDict:
    """Both parts in a folder, as their libraries open them."""
    return torch.nn.ModuleDict(
        {name: part.from_pretrained(folder, subfolder=f"{name}{suffix}") for name, part in PARTS.items()}
    )


def reference_run(model: Path, shards: Path, config: TrainConfig) -> tuple[dict, dict, dict, list[float], list[float]]:
    """Weights at first and at last, averages, losses and gradient norms of a loop of the libraries' parts, at two rates."""
    parts = opened(model).train()
    trained = trained_parameters(parts, config.model_copy(update={"lora_targets": ADAPTED}))
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    scheduler, data = DDPMScheduler.from_pretrained(model, subfolder="scheduler"), reference.PlainShards(shards)
    rates = {"unet": config.learning_rate, "text_encoder": config.text_encoder_lr}
    optimizer = torch.optim.AdamW(
        [{"params": parts[name].parameters(), "lr": rate} for name, rate in rates.items()],
        weight_decay=config.adam_weight_decay,
    )
    ema, losses, norms = EMAModel(trained.values()), [], []
    for step in range(STEPS):
        step_loss = 0.0
        for part in range(accumulation := config.gradient_accumulation_steps):
            first = (step * accumulation + part) * BATCH
            slots = list(range(first, first + BATCH))
            records = records_of(SEED, torch.tensor(slots), len(data.images)).tolist()
            latents, noise, tokens = reference.batch(data, records, slots, SEED)
            timesteps = objectives.timesteps(config, SEED, slots, BATCH * accumulation, scheduler.config.num_train_timesteps)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = parts["unet"](noisy, timesteps, parts["text_encoder"](tokens.long())[0]).sample
            snr = compute_snr(scheduler, timesteps)
            weights = torch.minimum(snr, torch.full_like(snr, config.snr_gamma)) / snr
            loss = ((prediction - noise).square().mean((1, 2, 3)) * weights).mean() / accumulation
            loss.backward()
            step_loss += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained.values())
        losses.append(step_loss)
    return start, trained, dict(zip(trained, ema.shadow_params, strict=True)), losses, norms


def parity(model: Path, images: Path, shards: Path, output: Path, **options) -> TrainConfig:
    return config(
        model, images, shards, output, seed=SEED, max_train_steps=STEPS, checkpointing_steps=STEPS, train_text_encoder=True,
        text_encoder_lr=3e-3, adam_weight_decay=0.02, snr_gamma=5.0, lr_warmup_steps=0, **options,
    )  # fmt: skip


def compare(ours: dict, expected: dict, start: dict) -> None:
    """Each part by itself; but for biases of keys, whose gradients are rounding alone."""
    assert ours.keys() == expected.keys()
    for part in PARTS:
        names = [name for name in ours if name.startswith(part) and not name.endswith("k_proj.bias")]
        assert relative_distance(ours, {name: expected[name] for name in names}, start) < 1e-4 * SLACK


def compare_numbers(run: TrainConfig, losses: list[float], norms: list[float]) -> None:
    assert max(norms) > run.max_grad_norm, "clipping must be active"
    lines = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-4 * SLACK)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=1e-3 * SLACK)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 3}, {"zero_stage": 3, "gradient_checkpointing": True}], ids=str
)
def test_weights_and_averages_follow_the_reference(options, model, images, token_shards, tmp_path):
    run = parity(model, images, token_shards, tmp_path / "out", max_grad_norm=0.2, **options)
    assert train(run) == 0
    start, weights, averages, losses, norms = reference_run(model, token_shards, run)
    compare_numbers(run, losses, norms)
    checkpoint = tmp_path / "out" / f"checkpoint-{STEPS}"
    for kind, suffix, expected in (("weight", "", weights), ("ema", "_ema", averages)):
        ours = published_order(opened(model), checkpoint_tensors(checkpoint, kind))
        compare(ours, expected, start)
        there = dict(opened(checkpoint, suffix).named_parameters())
        assert all(torch.equal(there[name], ours[name]) for name in ours)
    result = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    exported = {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(result, part).named_parameters()}
    assert all(torch.equal(exported[name], ours[name]) for name in ours)
    assert {name.split(".")[0] for name in load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")} == {"text_model"}


def test_adapters_of_both_follow_the_reference(model, images, token_shards, tmp_path):
    run = parity(model, images, token_shards, tmp_path / "out", max_grad_norm=0.02, lora_rank=4, gradient_accumulation_steps=2)
    assert train(run) == 0
    start, weights, averages, losses, norms = reference_run(model, token_shards, run)
    compare_numbers(run, losses, norms)
    start, weights, averages = (
        {name.replace(".default", ""): tensor for name, tensor in each.items()} for each in (start, weights, averages)
    )
    for suffix, expected in (("", weights), ("_ema", averages)):
        file = tmp_path / "out" / f"checkpoint-{STEPS}" / f"pytorch_lora_weights{suffix}.safetensors"
        ours = {name.replace("text_encoder.text_model.", "text_encoder."): tensor for name, tensor in load_file(file).items()}
        compare(ours, expected, start)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    for part in PARTS:
        loaded = {f"{part}.{name}": tensor for name, tensor in getattr(pipeline, part).named_parameters() if "lora" in name}
        loaded = {name.replace(".default_0", ""): tensor for name, tensor in loaded.items()}
        assert loaded.keys() == {name for name in ours if name.startswith(part)}
        assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.items())


@pytest.fixture(scope="module")
def one_process(model, images, token_shards, tmp_path_factory) -> TrainConfig:
    """A run with all that looks at captions or weights beside the step; what validation images are drawn with."""
    run = config(
        model, images, token_shards, tmp_path_factory.mktemp("one") / "out", train_text_encoder=True, text_encoder_lr=3e-3,
        checkpointing_steps=4, train_batch_size=2, gradient_accumulation_steps=2, proportion_empty_prompts=0.3,
        validation_fraction=0.25, validation_steps=4, validation_timesteps=2, lr_warmup_steps=0,
    )  # fmt: skip
    assert train(run) == 0
    return run


def metrics(run: TrainConfig) -> list[dict]:
    lines = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "validation_loss", "validation_loss_ema")
    return [{name: line[name] for name in kept if name in line} for line in lines if line["step"] > 4]


def test_it_goes_on_from_a_checkpoint_and_draws_with_what_it_trained(one_process, tmp_path, monkeypatch):
    drawn_with = {}

    def preview(family, parts):
        drawn_with.update(
            {name: {key: tensor.clone() for key, tensor in part.state_dict().items()} for name, part in parts.items()}
        )
        return real(family, parts)

    real = StableDiffusion.preview
    monkeypatch.setattr(StableDiffusion, "preview", preview)
    again = one_process.model_copy(update={
        "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": f"{one_process.output_dir}/checkpoint-4",
        "validation_prompts": ["a red square"],
    })  # fmt: skip
    assert train(again) == 0
    assert metrics(again) == metrics(one_process)
    assert (tmp_path / "out" / "samples" / "step-8.png").is_file()
    parts = opened(tmp_path / "out")
    for name, part in parts.items():
        assert drawn_with[name].keys() == part.state_dict().keys()
        assert all(torch.equal(tensor, drawn_with[name][key]) for key, tensor in part.state_dict().items())
    assert export_command([f"{again.output_dir}/checkpoint-8", "--output_dir", str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "text_encoder" / "model.safetensors")
    result = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert exported.keys() == result.keys()
    assert all(torch.equal(exported[name], result[name]) for name in result)


@pytest.mark.two_processes
def test_two_processes_go_on_as_one(one_process, tmp_path):
    two = one_process.model_copy(update={
        "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": f"{one_process.output_dir}/checkpoint-4",
        "gradient_accumulation_steps": 1, "zero_stage": 2,
    })  # fmt: skip
    run_two(command(two))
    for ours, theirs in zip(metrics(two), metrics(one_process), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4 * SLACK)
    start = opened(Path(one_process.pretrained_model_name_or_path))
    weights = [dict(opened(Path(run.output_dir)).named_parameters()) for run in (two, one_process)]
    assert relative_distance(*weights, dict(start.named_parameters())) < 1e-4 * SLACK


def test_it_compiles_into_one_graph(one_process, tmp_path, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, options: compile_module(module, backend="aot_eager"))
    run = one_process.model_copy(update={"output_dir": str(tmp_path / "out"), "compile": True})
    torch._dynamo.reset()
    counters.clear()
    assert train(run) == 0
    for ours, theirs in zip(metrics(run), metrics(one_process), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4 * SLACK)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 2, "one of them for the held-out loss"
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_text_encoder": True, "cache_text": "states"}, "--train_text_encoder: what --cache_text states keeps"),
        ({"text_encoder_lr": 1e-5}, "--text_encoder_lr needs --train_text_encoder"),
    ],
)
def test_options_that_contradict_are_refused(options, said, model, images, tmp_path):
    with pytest.raises(UserError, match=said):
        check_options(config(model, images, tmp_path, tmp_path, **options))


def test_shards_of_states_are_refused(model, images, shards, tmp_path):
    with pytest.raises(UserError, match=re.escape("(--cache_text states, now tokens)")):
        train(config(model, images, shards, tmp_path / "out", train_text_encoder=True))
