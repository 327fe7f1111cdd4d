"""The published checkpoints at full size, from their configurations alone: nothing is downloaded, and weights are random.

`write` saves the configurations of every part in the published layout, so that the engine opens the family as it would open
the checkpoint; `write_pipelines` saves random weights too. `trained_model` builds what is trained, on whatever device is
current (`torch.device("meta")` for counting), `random_encoder` its frozen models. `open_tiny` opens a family of a few thousand
weights, to try a benchmark itself.
"""

import json
from collections.abc import Callable
from functools import partial
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
    WuerstchenPriorPipeline,
)
from diffusers.pipelines.wuerstchen import WuerstchenPrior
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from engine.config.options import TrainConfig
from engine.models.efficientnet import EfficientNetEncoder
from engine.models.encoder import Encoder
from engine.models.family import Family, open_family
from engine.models.kandinsky_decoder import KandinskyDecoderEncoder
from engine.models.kandinsky_prior import KandinskyPriorEncoder
from engine.models.pipelines import use_portable_names
from engine.models.stable_diffusion import StableDiffusionEncoder
from engine.models.wuerstchen import WuerstchenEncoder
from examples import tiny_models

TOKENS = 77
# Family -> resolution of its tiny pipelines.
TINY = {"sd": 16, "kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}


def sd_1_5() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd_2_1() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    )


def kandinsky_decoder() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=8, block_out_channels=(384, 768, 1152, 1536), layers_per_block=3,
        attention_head_dim=64, cross_attention_dim=768, encoder_hid_dim=1280, encoder_hid_dim_type="image_proj",
        addition_embed_type="image", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    )  # fmt: skip


def kandinsky_prior() -> PriorTransformer:
    return PriorTransformer(embedding_dim=1280)


def wuerstchen_prior() -> WuerstchenPrior:
    return WuerstchenPrior(c_in=16, c=1536, c_cond=1280, c_r=64, depth=32, nhead=24)


def movq() -> VQModel:
    return VQModel(
        block_out_channels=(128, 256, 256, 512), layers_per_block=2, latent_channels=4, vq_embed_dim=4,
        num_vq_embeddings=16384, norm_type="spatial",
        down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
    )  # fmt: skip


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def text_config(width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width,
    )  # fmt: skip


def vision_config() -> CLIPVisionConfig:
    """ViT-bigG/14."""
    return CLIPVisionConfig(
        hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16, image_size=224, patch_size=14,
        projection_dim=1280,
    )  # fmt: skip


def decoder_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
    )


def sd_scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)


# Checkpoint -> family, resolution, and the parts of its pipelines: pipeline -> part -> what gives its configuration.
Parts = dict[str, dict[str, Callable[[], Any]]]
_KANDINSKY: Parts = {
    "prior": {
        "prior": kandinsky_prior, "image_encoder": vision_config, "image_processor": CLIPImageProcessorPil,
        "text_encoder": lambda: text_config(1280, 32, 20),
    },
    "decoder": {"unet": kandinsky_decoder, "movq": movq, "scheduler": decoder_scheduler},
}  # fmt: skip
CHECKPOINTS: dict[str, tuple[str, int, Parts]] = {
    "SD 1.5, 512 px": (
        "sd", 512,
        {"model": {"unet": sd_1_5, "vae": vae, "text_encoder": lambda: text_config(768, 12, 12), "scheduler": sd_scheduler}},
    ),
    "SD 2.1, 512 px": (
        "sd", 512,
        {"model": {"unet": sd_2_1, "vae": vae, "text_encoder": lambda: text_config(1024, 23, 16), "scheduler": sd_scheduler}},
    ),
    "Kandinsky 2.2 decoder, 512 px": ("kandinsky-decoder", 512, _KANDINSKY),
    "Kandinsky 2.2 decoder, 768 px": ("kandinsky-decoder", 768, _KANDINSKY),
    "Kandinsky 2.2 prior": ("kandinsky-prior", 768, _KANDINSKY),
    "Wuerstchen v2 prior, 768 px": (
        "wuerstchen", 768, {"prior": {"prior": wuerstchen_prior, "text_encoder": lambda: text_config(1280, 32, 20)}},
    ),
}  # fmt: skip
_TRAINED = {"sd": ("model", "unet"), "kandinsky-decoder": ("decoder", "unet"), "kandinsky-prior": ("prior", "prior"),
            "wuerstchen": ("prior", "prior")}  # fmt: skip


def trained_model(checkpoint: str) -> Any:
    """What is trained of a checkpoint, with random weights."""
    family, _, parts = CHECKPOINTS[checkpoint]
    pipeline, part = _TRAINED[family]
    model = parts[pipeline][part]()
    if family == "wuerstchen":
        # Its result is divided by |1 - b|. Of random weights b has a deviation of 0.6, and bf16 rounds some of it to 1: losses
        # of 1e7, in which no two precisions can be compared.
        with torch.no_grad():
            for parameter in model.out.parameters():
                parameter.mul_(0.2)
    return model


def write(checkpoint: str, directory: Path, **options: Any) -> TrainConfig:
    """Saves a checkpoint's configurations under `directory`; returns the engine's configuration to train it.

    Args:
        options: of the training, beside what names the models.
    """
    family, resolution, pipelines = CHECKPOINTS[checkpoint]
    names = {}
    for pipeline, parts in pipelines.items():
        folder = directory / pipeline
        for part, build in parts.items():
            with torch.device("meta"):
                built = build()
            save = built.save_config if hasattr(built, "save_config") else built.save_pretrained
            save(folder / part)
        if "text_encoder" in parts:
            tiny_models.write_tokenizer(folder / "tokenizer", TOKENS).save_pretrained(folder / "tokenizer")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
        option = "pretrained_model_name_or_path" if pipeline == "model" else f"pretrained_{pipeline}_model_name_or_path"
        names[option] = str(folder)
    defaults = {"mixed_precision": "bf16", "resolution": resolution, "shards_dir": str(directory / "shards")}
    return TrainConfig.model_validate({"family": family, **names, **defaults, **options})


# Family -> the pipeline that holds what is trained, its frozen models, and parts of it that no training needs.
_PIPELINES: dict[str, tuple[Any, tuple[str, ...], Callable[[], dict[str, Any]]]] = {
    "sd": (
        StableDiffusionPipeline, ("vae", "text_encoder"),
        lambda: {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "kandinsky-prior": (
        KandinskyV22PriorPipeline, ("image_encoder", "text_encoder"), lambda: {"scheduler": UnCLIPScheduler()}
    ),
    "kandinsky-decoder": (KandinskyV22Pipeline, ("movq",), dict),
    "wuerstchen": (WuerstchenPriorPipeline, ("text_encoder",), lambda: {"scheduler": DDPMWuerstchenScheduler()}),
}  # fmt: skip


def _frozen_model(checkpoint: str, part: str) -> Any:
    """A frozen model of a checkpoint, with random weights."""
    family, _, pipelines = CHECKPOINTS[checkpoint]
    parts = {name: build for pipeline in pipelines.values() for name, build in pipeline.items()}
    if part == "text_encoder":
        kind = CLIPTextModelWithProjection if family == "kandinsky-prior" else CLIPTextModel
        return kind(parts[part]())
    if part == "image_encoder":
        return CLIPVisionModelWithProjection(parts[part]()) if part in parts else EfficientNetEncoder()
    return parts[part]()


def frozen_models(checkpoint: str) -> dict[str, Any]:
    """The frozen models beside the trained one in its pipeline, with random weights on the current device, by part."""
    return {part: _frozen_model(checkpoint, part) for part in _PIPELINES[CHECKPOINTS[checkpoint][0]][1]}


def write_pipelines(checkpoint: str, directory: Path, **options: Any) -> TrainConfig:
    """As `write`, and the pipeline of the trained model whole, with random weights, written one model at a time."""
    config = write(checkpoint, directory, **options)
    family, _, pipelines = CHECKPOINTS[checkpoint]
    kind, frozen, others = _PIPELINES[family]
    pipeline, trained = _TRAINED[family]
    folder, parts = directory / pipeline, pipelines[pipeline]
    builders = {trained: parts[trained]} | {part: partial(_frozen_model, checkpoint, part) for part in frozen}
    with torch.device("meta"):
        components = {part: build() for part, build in builders.items()}
    components |= {part: build() for part, build in parts.items() if part not in builders} | others()
    if "text_encoder" in parts:
        components["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    whole = kind(**components)
    use_portable_names(whole)
    whole.save_config(folder)
    if "scheduler" in components:
        components["scheduler"].save_pretrained(folder / "scheduler")
    for part, build in builders.items():
        build().save_pretrained(folder / part)
    return config


def random_encoder(checkpoint: str, encoding: Any, device: torch.device) -> Encoder:
    """The frozen models of a checkpoint with random weights, in the precision of its encoding."""
    name = CHECKPOINTS[checkpoint][0]
    kind, parts = _ENCODERS[name]
    with device:
        models = [_frozen_model(checkpoint, part).to(encoding.dtype).eval() for part in parts]
        if name == "kandinsky-prior":
            models.append({"clip_mean": torch.zeros(1, 1280), "clip_std": torch.ones(1, 1280)})
    return kind(encoding, *models)


# Family -> what holds its loaded frozen models, and which those are.
_ENCODERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sd": (StableDiffusionEncoder, ("vae", "text_encoder")),
    "kandinsky-prior": (KandinskyPriorEncoder, ("image_encoder", "text_encoder")),
    "kandinsky-decoder": (KandinskyDecoderEncoder, ("movq", "image_encoder")),
    "wuerstchen": (WuerstchenEncoder, ("image_encoder", "text_encoder")),
}


def random_stable_diffusion(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The text-to-image pipeline of SD 1.5 at its published size, with random weights; its tokenizer goes to `directory`."""
    with device:
        unet, encoder = sd_1_5(), vae()
        text_encoder = CLIPTextModel(text_config(768, 12, 12))
    parts: Any = {"unet": unet, "vae": encoder, "text_encoder": text_encoder}
    return StableDiffusionPipeline(
        **{name: part.to(dtype).eval() for name, part in parts.items()}, scheduler=sd_scheduler(), safety_checker=None,
        tokenizer=tiny_models.write_tokenizer(directory, TOKENS), feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def open_tiny(name: str, directory: Path, **options: Any) -> Family:
    """A family with the few thousand weights of `examples.tiny_models`."""
    models = tiny_models.WRITERS[name](directory)
    defaults = {"family": name, "resolution": TINY[name], "shards_dir": "unused"}
    return open_family(TrainConfig.model_validate({**defaults, **models, **options}))
