"""Stable Diffusion, text to image: a UNet denoises the latents of a VAE under the hidden states of CLIP's text encoder.

Trained: `unet`. Frozen, and needed only while shards are built: `vae`, `text_encoder`, `tokenizer`.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from engine.config.options import CacheConfig, TrainConfig
from engine.data import transforms
from engine.data.format.index import Field
from engine.diffusion import DiscreteSchedule, weighting
from engine.errors import UserError, first_line
from engine.models.encoder import Encoder, Encoding
from engine.models.family import PREVIEW_STEPS, Family
from engine.models.published import digest_folder, read_part, read_text_parts, require_equal, tokenize


class StableDiffusionEncoding(Encoding):
    mean, std = "latent_mean", "latent_std"

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.unet_config = read_part(self.path, "unet", UNet2DConditionModel.load_config)
        self.vae_config = read_part(self.path, "vae", AutoencoderKL.load_config)
        self.text_config, self.tokenizer = read_text_parts(self.path)
        factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        self._require_steps(factor, f"the VAE needs a multiple of {factor}")
        self.latent_size = config.resolution // factor
        require_equal(
            str(self.path),
            ("unet in_channels", self.unet_config["in_channels"]),
            ("vae latent_channels", self.vae_config["latent_channels"]),
        )
        require_equal(
            str(self.path),
            ("unet cross_attention_dim", self.unet_config["cross_attention_dim"]),
            ("text_encoder hidden_size", self.text_config.hidden_size),
        )

    @property
    def record_spec(self) -> dict[str, Field]:
        latent = (self.vae_config["latent_channels"], self.latent_size, self.latent_size)
        states = (self.tokenizer.model_max_length, self.text_config.hidden_size)
        return {
            "latent_mean": Field(latent, self.dtype, "image"),
            "latent_std": Field(latent, self.dtype, "image"),
            "encoder_hidden_states": Field(states, self.dtype, "caption"),
        }

    def encoder_identity(self) -> dict[str, str]:
        return {part: digest_folder(self.path / part) for part in ("vae", "text_encoder", "tokenizer")}

    def preprocessing_identity(self) -> dict[str, Any]:
        config = self.config
        crops = None if config.center_crop else config.random_crops
        return {
            "resolution": config.resolution,
            "interpolation": config.image_interpolation_mode,
            "random_crops": crops,
            "random_flip": config.random_flip,
        }

    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        config = self.config
        size = config.resolution
        image = transforms.resize_short_side(image, size, transforms.RESAMPLING[config.image_interpolation_mode])
        if config.center_crop:
            images = [transforms.crop_centre(image, size)]
        else:
            images = transforms.crop_randomly(image, size, record, config.random_crops)
        if config.random_flip:
            images += [transforms.mirror(crop) for crop in images]
        return [{"pixels": transforms.to_tensor(crop)} for crop in images]

    @torch.inference_mode()
    def decode(self, rows: Tensor) -> list[Image.Image]:
        vae = AutoencoderKL.from_pretrained(self.path / "vae", variant=self.config.variant)
        return transforms.to_images(vae.decode(rows.float() / vae.config.scaling_factor).sample)

    def load_encoder(self, device: torch.device) -> "StableDiffusionEncoder":
        variant, dtype = self.config.variant, self.dtype
        vae = AutoencoderKL.from_pretrained(self.path / "vae", variant=variant, torch_dtype=dtype)
        text_encoder: Any = CLIPTextModel.from_pretrained(self.path / "text_encoder", variant=variant, dtype=dtype)
        return StableDiffusionEncoder(self, vae.to(device).eval(), text_encoder.to(device).eval())


class StableDiffusionEncoder(Encoder):
    def __init__(self, encoding: StableDiffusionEncoding, vae: Any, text_encoder: Any) -> None:
        self.dtype, self.tokenizer = encoding.dtype, encoding.tokenizer
        self.vae, self.text_encoder = vae, text_encoder

    @torch.inference_mode()
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean and standard deviation of the VAE's posterior, times its scaling factor."""
        posterior = self.vae.encode(batch["pixels"].to(self.vae.device, self.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return {"latent_mean": posterior.mean * factor, "latent_std": posterior.std * factor}

    @torch.inference_mode()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """The text encoder's last hidden state after its final layer norm; no attention mask, as in the script."""
        tokens, _ = tokenize(self.tokenizer, captions)
        return {"encoder_hidden_states": self.text_encoder(tokens.to(self.text_encoder.device), return_dict=False)[0]}


class StableDiffusion(Family):
    encoding: StableDiffusionEncoding

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        scheduler = read_part(self.encoding.path, "scheduler", DDPMScheduler.from_pretrained)
        self.prediction_type = config.prediction_type or scheduler.config.prediction_type
        self.schedule = DiscreteSchedule(scheduler.alphas_cumprod, self.prediction_type, weighting(config))
        if config.dream_training and self.prediction_type != "epsilon":
            raise UserError(f"--dream_training needs prediction type epsilon, not {self.prediction_type}")

    def published_model(self) -> UNet2DConditionModel:
        config = self.config
        arguments = {"subfolder": "unet", "cache_dir": config.cache_dir}
        name = config.pretrained_model_name_or_path
        try:
            return UNet2DConditionModel.from_pretrained(name, revision=config.non_ema_revision or config.revision, **arguments)
        except (OSError, ValueError) as error:
            if config.variant is None:
                raise UserError(f"{name}: the UNet cannot be loaded: {first_line(error)}") from None
            return UNet2DConditionModel.from_pretrained(name, revision=config.revision, variant=config.variant, **arguments)

    @staticmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        return model(noisy, timesteps, record["encoder_hidden_states"], return_dict=False)[0]

    def pipeline(self, model: nn.Module) -> StableDiffusionPipeline:
        return self._pipeline(model)

    def preview(self, model: nn.Module) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
        pipeline = self._pipeline(model, safety_checker=None, torch_dtype=self.encoding.dtype)
        return pipeline, {"num_inference_steps": PREVIEW_STEPS}

    def _pipeline(self, model: nn.Module, **overrides: Any) -> StableDiffusionPipeline:
        config = self.config
        pipeline = StableDiffusionPipeline.from_pretrained(
            config.pretrained_model_name_or_path,
            unet=model,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
            **overrides,
        )
        pipeline.scheduler.register_to_config(prediction_type=self.prediction_type)
        return pipeline
