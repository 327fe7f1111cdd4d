"""Whole pipelines from text to images with random weights: tiny, small, or as published.

Small ones have the parts of the published with a part of their channels, levels and layers, for minutes on a CPU.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMWuerstchenScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    StableDiffusionPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
)
from diffusers.pipelines.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from benchmarks.tools import published
from benchmarks.tools.published import TOKENS, decoder_scheduler, sd_scheduler, text_config, vision_config
from engine.models.pipelines import combine
from examples import tiny_models

# Family -> pixels of an image's side by size.
SIDES = {
    "sd": {"tiny": 16, "small": 256, "full": 512},
    "kandinsky": {"tiny": 32, "small": 128, "full": 512},
    "wuerstchen": {"tiny": 128, "small": 512, "full": 1024},
}  # fmt: skip


def _sd(small: bool) -> dict[str, Any]:
    if not small:
        return {"unet": published.sd_1_5(), "vae": published.vae(), "text_encoder": CLIPTextModel(text_config(768, 12, 12))}
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(128, 256), layers_per_block=1, cross_attention_dim=192, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 128), layers_per_block=1, latent_channels=4, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text_config(192, 4, 4))}


def _kandinsky(small: bool) -> dict[str, Any]:
    if not small:
        return {
            "prior": published.kandinsky_prior(), "image_encoder": CLIPVisionModelWithProjection(vision_config()),
            "text_encoder": CLIPTextModelWithProjection(text_config(1280, 32, 20)), "unet": published.kandinsky_decoder(),
            "movq": published.movq(),
        }  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, image_size=224, patch_size=14,
        projection_dim=320,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=8, block_out_channels=(96, 192), layers_per_block=1, attention_head_dim=32,
        cross_attention_dim=192, encoder_hid_dim=320, encoder_hid_dim_type="image_proj", addition_embed_type="image",
        resnet_time_scale_shift="scale_shift", down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 64, 64, 64), layers_per_block=1, latent_channels=4, vq_embed_dim=4, num_vq_embeddings=256,
        norm_type="spatial", down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
    )  # fmt: skip
    return {
        "prior": PriorTransformer(embedding_dim=320, num_attention_heads=8, attention_head_dim=64, num_layers=5),
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "text_encoder": CLIPTextModelWithProjection(text_config(320, 4, 5)), "unet": unet, "movq": movq,
    }  # fmt: skip


def _wuerstchen(small: bool) -> dict[str, Any]:
    if not small:
        return {
            "prior": published.wuerstchen_prior(), "prior_text_encoder": CLIPTextModel(text_config(1280, 32, 20)),
            "decoder": WuerstchenDiffNeXt(), "vqgan": PaellaVQModel(), "text_encoder": CLIPTextModel(text_config(1024, 23, 16)),
        }  # fmt: skip
    return {
        "prior": WuerstchenPrior(c_in=16, c=384, c_cond=320, c_r=64, depth=8, nhead=6),
        "prior_text_encoder": CLIPTextModel(text_config(320, 4, 5)),
        "decoder": WuerstchenDiffNeXt(
            c_hidden=[80, 160], nhead=[-1, 5], blocks=[1, 2], level_config=["CT", "CTA"], inject_effnet=[False, True],
            c_cond=256, clip_embd=256,
        ),
        "vqgan": PaellaVQModel(embed_dim=96, bottleneck_blocks=3),
        "text_encoder": CLIPTextModel(text_config(256, 4, 4)),
    }  # fmt: skip


_PARTS = {"sd": _sd, "kandinsky": _kandinsky, "wuerstchen": _wuerstchen}


def open_whole(family: str, size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A family's pipeline from text to images, the same weights in every call on one device.

    Args:
        family: a key of `SIDES`.
        size: `tiny`, `small` or `full`.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        spelling = Path(directory)
        if size == "tiny":
            return _tiny(family, spelling).to(device, dtype)
        with device:
            parts: Any = _PARTS[family](size == "small")
        parts = {name: part.to(dtype).eval() for name, part in parts.items()}
        tokenizer = tiny_models.write_tokenizer(spelling, TOKENS)
    if family == "sd":
        return StableDiffusionPipeline(
            **parts, scheduler=sd_scheduler(), tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    if family == "kandinsky":
        decoder: Any = KandinskyV22Pipeline(unet=parts.pop("unet"), movq=parts.pop("movq"), scheduler=decoder_scheduler())
        prior: Any = KandinskyV22PriorPipeline(
            **parts, tokenizer=tokenizer, image_processor=CLIPImageProcessorPil(),
            scheduler=UnCLIPScheduler(
                variance_type="fixed_small_log", clip_sample=True, clip_sample_range=5.0, prediction_type="sample"
            ),
        )  # fmt: skip
        return combine(prior, decoder)
    first: Any = WuerstchenPriorPipeline(
        prior=parts.pop("prior"), text_encoder=parts.pop("prior_text_encoder"), tokenizer=tokenizer,
        scheduler=DDPMWuerstchenScheduler(),
    )  # fmt: skip
    second: Any = WuerstchenDecoderPipeline(**parts, tokenizer=tokenizer, scheduler=DDPMWuerstchenScheduler())
    return combine(first, second)


def _tiny(family: str, spelling: Path) -> Any:
    if family == "sd":
        return tiny_models.stable_diffusion(spelling)
    if family == "kandinsky":
        return combine(tiny_models.kandinsky_prior(spelling), tiny_models.kandinsky_decoder())
    return combine(tiny_models.wuerstchen_prior(spelling, 0.0), tiny_models.wuerstchen_decoder(spelling))
