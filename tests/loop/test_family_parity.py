"""Training parity of the Kandinsky and Wuerstchen families: 20 fp32 steps, from image files on, against diffusers' own parts.

The reference prepares and encodes the photographs itself, with transformers' and diffusers' models, and shares with the engine
only the order of the records (and Wuerstchen's image encoder, which has its own reference in tests/models).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler, PriorTransformer, UNet2DConditionModel, VQModel
from diffusers.pipelines.wuerstchen import WuerstchenPrior
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from engine.config.options import TrainConfig
from engine.data.samples.order import records_of
from engine.loop.trainer import train
from engine.models.efficientnet import load_encoder
from tests import objectives, reference
from tests.loop.adapters import trained_parameters
from tests.loop.runs import SLACK, checkpoint_tensors, published_order, relative_distance

STEPS, BATCH, SEED = 20, 4, 2**41 + 3
FOLDER = {"kandinsky-prior": "prior", "kandinsky-decoder": "unet", "wuerstchen": "prior"}


def tokens(config: TrainConfig, captions: list[str]):
    tokenizer = CLIPTokenizer.from_pretrained(config.pretrained_prior_model_name_or_path, subfolder="tokenizer")
    return tokenizer(
        captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    )


class KandinskyPriorReference:
    prediction_type = "sample"

    def __init__(self, config: TrainConfig, images: list[Image.Image], captions: list[str]) -> None:
        path = config.pretrained_prior_model_name_or_path
        self.model = PriorTransformer.from_pretrained(path, subfolder="prior")
        self.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
        text_encoder = CLIPTextModelWithProjection.from_pretrained(path, subfolder="text_encoder").eval()
        image_encoder = CLIPVisionModelWithProjection.from_pretrained(path, subfolder="image_encoder").eval()
        pixels = CLIPImageProcessorPil.from_pretrained(path, subfolder="image_processor")(
            images, return_tensors="pt"
        ).pixel_values
        words = tokens(config, captions)
        text = text_encoder(words.input_ids)
        self.embeddings, self.states, self.mask = text.text_embeds, text.last_hidden_state, words.attention_mask.bool()
        self.clean = (image_encoder(pixels).image_embeds - self.model.clip_mean) / self.model.clip_std

    def predict(self, noisy, timesteps, records):
        return self.model(
            noisy, timestep=timesteps, proj_embedding=self.embeddings[records], encoder_hidden_states=self.states[records],
            attention_mask=self.mask[records],
        ).predicted_image_embedding  # fmt: skip


class KandinskyDecoderReference:
    prediction_type = "epsilon"

    def __init__(self, config: TrainConfig, images: list[Image.Image], captions: list[str]) -> None:
        path, prior = config.pretrained_decoder_model_name_or_path, config.pretrained_prior_model_name_or_path
        self.model = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
        self.scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
        image_encoder = CLIPVisionModelWithProjection.from_pretrained(prior, subfolder="image_encoder").eval()
        pixels = CLIPImageProcessorPil.from_pretrained(prior, subfolder="image_processor")(
            images, return_tensors="pt"
        ).pixel_values
        squares = []
        for image in images:
            (width, height), side = image.size, min(image.size)
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
            square = image.crop(box).resize((config.resolution,) * 2, resample=Image.BICUBIC, reducing_gap=1)
            squares.append(torch.from_numpy(np.transpose(np.array(square).astype(np.float32) / 127.5 - 1, [2, 0, 1])))
        movq = VQModel.from_pretrained(path, subfolder="movq").eval()
        self.clean = movq.encode(torch.stack(squares)).latents
        self.embeddings = image_encoder(pixels).image_embeds

    def predict(self, noisy, timesteps, records):
        condition = {"image_embeds": self.embeddings[records]}
        return self.model(noisy, timesteps, None, added_cond_kwargs=condition).sample[:, :4]


class WuerstchenReference:
    prediction_type = "epsilon"

    def __init__(self, config: TrainConfig, images: list[Image.Image], captions: list[str]) -> None:
        path = config.pretrained_prior_model_name_or_path
        self.model = WuerstchenPrior.from_pretrained(path, subfolder="prior")
        self.scheduler = DDPMWuerstchenScheduler()
        words = tokens(config, captions)
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").eval()
        self.states = text_encoder(words.input_ids, attention_mask=words.attention_mask.bool()).last_hidden_state
        mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        squares = []
        for image in images:
            (width, height), size = image.size, config.resolution
            scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
            resized = image.resize(scaled, Image.BILINEAR)
            left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
            square = resized.crop((left, top, left + size, top + size))
            squares.append((torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255 - mean) / std)
        encoder = load_encoder(load_file(config.pretrained_image_encoder_name_or_path))
        self.clean = encoder(torch.stack(squares)).add(1.0).div(42.0)

    def predict(self, noisy, timesteps, records):
        return self.model(noisy, timesteps, self.states[records])


REFERENCES = {
    "kandinsky-prior": KandinskyPriorReference, "kandinsky-decoder": KandinskyDecoderReference,
    "wuerstchen": WuerstchenReference,
}  # fmt: skip


def draw_timesteps(config: TrainConfig, scheduler, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps, and where they lie in the schedule from 0 to 1."""
    batch = BATCH * config.gradient_accumulation_steps
    if isinstance(scheduler, DDPMWuerstchenScheduler):
        timesteps = objectives.real_timesteps(config, SEED, slots, batch)
        return timesteps, timesteps
    count = scheduler.config.num_train_timesteps
    timesteps = objectives.timesteps(config, SEED, slots, batch, count)
    return timesteps, timesteps / count


def snr_of(scheduler, timesteps: torch.Tensor) -> torch.Tensor:
    if isinstance(scheduler, DDPMWuerstchenScheduler):
        signal = scheduler._alpha_cumprod(timesteps, timesteps.device)
        return signal / (1 - signal)
    return compute_snr(scheduler, timesteps)


def reference_run(config: TrainConfig, folder: Path) -> tuple[torch.nn.Module, dict, list[float]]:
    """The model, averages and losses of the independent loop."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    with torch.no_grad():
        family = REFERENCES[config.family](config, images, [row["text"] for row in rows])
    model = family.model.train()
    parameters = trained_parameters(model, config)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.adam_weight_decay, eps=1e-8
    )
    ema = EMAModel(parameters.values())
    losses = []
    accumulation = config.gradient_accumulation_steps
    for step in range(STEPS):
        step_loss = 0.0
        for part in range(accumulation):
            first = (step * accumulation + part) * BATCH
            slots = list(range(first, first + BATCH))
            records = records_of(SEED, torch.tensor(slots), len(images))
            clean = family.clean[records]
            noise = torch.from_numpy(reference.normals(SEED, slots, 0, tuple(clean.shape[1:]))).float()
            noise = objectives.with_pyramid(config, noise, SEED, slots)
            timesteps, progress = draw_timesteps(config, family.scheduler, slots)
            noisy = family.scheduler.add_noise(clean, noise, timesteps)
            target = clean if family.prediction_type == "sample" else noise
            error = family.predict(noisy, timesteps, records) - target
            snr = snr_of(family.scheduler, timesteps).double()
            loss = objectives.losses(config, error, snr, progress, family.prediction_type)
            (loss.mean() / accumulation).backward()
            step_loss += loss.mean().item() / accumulation
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters.values())
        losses.append(step_loss)
    return model, dict(zip(parameters, ema.shadow_params, strict=True)), losses


def has_gradient(family: str, name: str) -> bool:
    """Whether a parameter's gradient is more than rounding.

    A bias that all keys of an attention share shifts its scores by the same amount, which the softmax does not see; Adam then
    scales what rounding leaves up to full steps. (The decoder's attention has a second kind of keys beside.)
    """
    return family == "kandinsky-decoder" or not name.endswith("to_k.bias")


CASES = [
    {"family": family, "snr_gamma": gamma, "gradient_accumulation_steps": accumulation, "zero_stage": stage}
    for family in FOLDER
    for gamma, accumulation, stage in [(None, 1, 0), (5.0, 1, 0), (5.0, 3, 2)]
] + [
    {"family": "kandinsky-prior", "loss_weighting": "p2", "loss_type": "huber", "timestep_sampling": "stratified",
     "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0, "gradient_accumulation_steps": 2},
    {"family": "kandinsky-decoder", "loss_weighting": "soft_min_snr", "loss_type": "smooth_l1", "timestep_sampling": "mode",
     "huber_schedule": "exponential", "pyramid_noise_discount": 0.5, "min_timestep": 100},
    {"family": "wuerstchen", "loss_weighting": "debiased", "loss_type": "smooth_l1", "timestep_sampling": "logit_normal",
     "min_timestep": 0.1, "max_timestep": 0.8, "pyramid_noise_discount": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_weights_and_averages_follow_the_reference(case, published, photographs, tmp_path, record_property):
    config = TrainConfig(
        **case, **published(case["family"], dropout=0.0), train_data_dir=str(photographs), output_dir=str(tmp_path / "out"),
        resolution=128 if case["family"] == "wuerstchen" else 32, train_batch_size=BATCH, max_train_steps=STEPS,
        checkpointing_steps=STEPS, seed=SEED, learning_rate=1e-3, adam_weight_decay=0.02, max_grad_norm=0.2, use_ema=True,
        log_every=1, report_to="none", shard_records=5,
    )  # fmt: skip
    assert train(config) == 0
    model, averages, losses = reference_run(config, photographs)
    weights = dict(model.named_parameters())
    trained = Path(config.pretrained_decoder_model_name_or_path if FOLDER[case["family"]] == "unet"
                   else config.pretrained_prior_model_name_or_path)  # fmt: skip
    start = load_file(trained / FOLDER[case["family"]] / "diffusion_pytorch_model.safetensors")

    checkpoint = tmp_path / "out" / f"checkpoint-{STEPS}"
    for kind, expected in (("weight", weights), ("ema", averages)):
        ours = published_order(model, checkpoint_tensors(checkpoint, kind))
        frozen = expected.keys() - ours.keys()
        assert frozen == ({"clip_mean", "clip_std"} if case["family"] == "kandinsky-prior" else set())
        distance = relative_distance(ours, {name: expected[name] for name in ours if has_gradient(config.family, name)}, start)
        record_property(kind, distance)
        assert distance < 1e-4 * SLACK
    logged = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx(losses, rel=1e-4 * SLACK)

    result = tmp_path / "out" / ("prior_pipeline" if case["family"] == "wuerstchen" else "")
    # The classes must be those of the published pipeline: another machine's transformers may know no others.
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in (result, trained)]
    assert {k: v for k, v in indices[0].items() if k[0] != "_"} == {k: v for k, v in indices[1].items() if k[0] != "_"}
    exported = load_file(result / FOLDER[case["family"]] / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == start.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, start[name] if name in frozen else ours[name]), name
