"""Pipelines of the published architectures with a few thousand weights, built from configurations, for a CPU without a network.

Embeddings are 24 wide and captions 16 tokens long, instead of 1280 and 77. The weights are random: what comes out of them
are not pictures of anything, but every part has its real shape and does its real work.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
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
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from engine.data.transforms import to_tensor
from engine.models.efficientnet import EfficientNetEncoder
from engine.models.pipelines import use_portable_names
from engine.models.wuerstchen import IMAGENET_MEAN, IMAGENET_STD
from examples.photographs import photographs

WIDTH = 24
TOKENS = 16


def write_tokenizer(directory: Path, length: int = TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer that spells words in letters."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=length)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=WIDTH, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
    )  # fmt: skip


def stable_diffusion(directory: Path, **scheduler: Any) -> Any:
    """The text-to-image pipeline: 16 px images, latents 4 x 8 x 8."""
    tokenizer = write_tokenizer(directory)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text_encoder = CLIPTextModel(text_config(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=WIDTH, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=DDPMScheduler(**(betas | scheduler)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def kandinsky_prior(directory: Path) -> Any:
    """The prior pipeline: 32 px CLIP images, embeddings of 24 numbers."""
    tokenizer = write_tokenizer(directory)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=WIDTH,
    )  # fmt: skip
    prior: Any = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH, num_embeddings=TOKENS,
    )  # fmt: skip
    with torch.no_grad():
        prior.clip_mean.normal_(0, 0.1)
        prior.clip_std.uniform_(0.5, 1.5)
    pipeline: Any = KandinskyV22PriorPipeline(
        prior=prior, image_encoder=CLIPVisionModelWithProjection(vision),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)), tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", clip_sample=True, clip_sample_range=5.0, prediction_type="sample"
        ),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )  # fmt: skip
    use_portable_names(pipeline)
    return pipeline


def kandinsky_decoder() -> Any:
    """The decoder pipeline: latents at half the side of an image, images in steps of 4 px."""
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=8, cross_attention_dim=16, encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj",
        addition_embed_type="image", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 32), norm_num_groups=8, latent_channels=4, vq_embed_dim=4, num_vq_embeddings=32,
        norm_type="spatial", layers_per_block=1, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
    )
    return KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)


def wuerstchen_prior(directory: Path, dropout: float = 0.1) -> Any:
    """The stage C pipeline: latents of 16 channels."""
    tokenizer = write_tokenizer(directory)
    prior = WuerstchenPrior(c_in=16, c=32, c_cond=WIDTH, c_r=16, depth=2, nhead=2, dropout=dropout)
    with torch.no_grad():
        prior.out[1].weight.mul_(0.1)  # the prediction is divided by 1 minus some of these channels
    return WuerstchenPriorPipeline(
        prior=prior,
        text_encoder=CLIPTextModel(text_config(tokenizer)), tokenizer=tokenizer, scheduler=DDPMWuerstchenScheduler(),
    )  # fmt: skip


def wuerstchen_decoder(directory: Path) -> Any:
    """The pipeline of stages B and A."""
    tokenizer = write_tokenizer(directory)
    decoder = WuerstchenDiffNeXt(
        c_r=16, c_cond=WIDTH, c_hidden=[16, 32], nhead=[-1, 2], blocks=[1, 1], level_config=["CT", "CTA"],
        inject_effnet=[False, True], clip_embd=WIDTH,
    )  # fmt: skip
    return WuerstchenDecoderPipeline(
        decoder=decoder, vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32),
        text_encoder=CLIPTextModel(text_config(tokenizer)), tokenizer=tokenizer, scheduler=DDPMWuerstchenScheduler(),
    )  # fmt: skip


def calibrate(encoder: EfficientNetEncoder) -> None:
    """Gives random weights the running statistics of photographs, without which latents would be thousands or nothing."""
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    squares = [image.resize((128, 128), Image.Resampling.BILINEAR) for image in photographs().values()]
    encoder.train()
    with torch.no_grad():
        encoder(torch.stack([to_tensor(square, IMAGENET_MEAN, IMAGENET_STD) for square in squares]))
    encoder.eval()


def write_stable_diffusion(directory: Path, seed: int = 0, **scheduler: Any) -> dict[str, str]:
    """Saves the pipeline of Stable Diffusion; returns the option that names it."""
    torch.manual_seed(seed)
    stable_diffusion(directory / "spelling", **scheduler).save_pretrained(directory / "pipeline")
    return {"pretrained_model_name_or_path": str(directory / "pipeline")}


def write_kandinsky(directory: Path, seed: int = 0) -> dict[str, str]:
    """Saves both pipelines of Kandinsky 2.2; returns the options that name them."""
    torch.manual_seed(seed)
    kandinsky_prior(directory / "spelling").save_pretrained(directory / "prior")
    kandinsky_decoder().save_pretrained(directory / "decoder")
    return {
        "pretrained_prior_model_name_or_path": str(directory / "prior"),
        "pretrained_decoder_model_name_or_path": str(directory / "decoder"),
    }


def write_wuerstchen(directory: Path, seed: int = 0, dropout: float = 0.1) -> dict[str, str]:
    """Saves both pipelines of Wuerstchen and an image encoder, which has its full size; returns the options that name them."""
    torch.manual_seed(seed)
    wuerstchen_prior(directory / "spelling", dropout).save_pretrained(directory / "prior")
    wuerstchen_decoder(directory / "spelling").save_pretrained(directory / "decoder")
    encoder = EfficientNetEncoder()
    calibrate(encoder)
    save_file(encoder.state_dict(), directory / "efficientnet.safetensors")
    return {
        "pretrained_prior_model_name_or_path": str(directory / "prior"),
        "pretrained_decoder_model_name_or_path": str(directory / "decoder"),
        "pretrained_image_encoder_name_or_path": str(directory / "efficientnet.safetensors"),
    }


WRITERS = {
    "sd": write_stable_diffusion, "kandinsky-prior": write_kandinsky, "kandinsky-decoder": write_kandinsky,
    "wuerstchen": write_wuerstchen,
}  # fmt: skip
