"""A Stable Diffusion pipeline of the real architecture with a few thousand weights, and an image folder to train it on."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from examples.tiny_models import text_config, write_tokenizer

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def tiny_unet(**overrides) -> UNet2DConditionModel:
    arguments = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**(arguments | overrides))


def write_pipeline(directory: Path, seed: int = 0, **scheduler) -> Path:
    """Saves the tiny pipeline: 16 px images, latents 4 x 8 x 8."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(directory / "spelling")
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextModel(text_config(tokenizer))
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=tiny_unet(),
        scheduler=DDPMScheduler(**({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012} | scheduler)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(directory / "pipeline")
    return directory / "pipeline"


def write_images(directory: Path, count: int = 12, size: tuple[int, int] = (16, 16)) -> Path:
    """Coloured noise with captions; the colours repeat, so that captions do too."""
    generator = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name, color = list(COLORS.items())[number % len(COLORS)]
        pixels = np.clip(np.array(color) + generator.normal(0, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f"{number:03d}.png")
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"a {name} square"}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return directory
