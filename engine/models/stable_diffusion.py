"""Stable Diffusion, text to image: a UNet denoises the latents of a VAE under the hidden states of CLIP's text encoder.

Trained: `unet`. Frozen, and needed only while shards are built: `vae`, `text_encoder`, `tokenizer`.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.config import CacheConfig, TrainConfig
from engine.data import transforms
from engine.data.shards import Field
from engine.diffusion import DiscreteSchedule
from engine.errors import UserError
from engine.models.family import Family, digest_folder, require


class StableDiffusion(Family):
    captioned = True
    mean, std = "latent_mean", "latent_std"

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.path = self._resolve(config)
        self.unet_config = self._read("unet", UNet2DConditionModel.load_config)
        self.vae_config = self._read("vae", AutoencoderKL.load_config)
        self.text_config = self._read("text_encoder", lambda path: CLIPTextConfig.from_pretrained(path).to_dict())
        self.tokenizer = self._read("tokenizer", CLIPTokenizer.from_pretrained)
        self.latent_size = self._check()
        scheduler = self._read("scheduler", DDPMScheduler.from_pretrained)
        training = config if isinstance(config, TrainConfig) else None
        self.prediction_type = (training and training.prediction_type) or scheduler.config.prediction_type
        self.schedule = DiscreteSchedule(
            scheduler.alphas_cumprod, self.prediction_type, training.snr_gamma if training else None
        )
        if training and training.dream_training and self.prediction_type != "epsilon":
            raise UserError(f"--dream_training needs prediction type epsilon, not {self.prediction_type}")

    @staticmethod
    def _resolve(config: CacheConfig) -> Path:
        """The pipeline's directory; a name on the hub is downloaded first, without its safety checker."""
        name = config.pretrained_model_name_or_path
        if Path(name).is_dir():
            return Path(name)
        try:
            path = StableDiffusionPipeline.download(
                name, revision=config.revision, variant=config.variant, cache_dir=config.cache_dir
            )
        except Exception as error:  # a connection, a missing repository, a gated one: the library raises many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"--pretrained_model_name_or_path {name}: neither a directory nor on the hub: {reason}") from None
        return Path(path)

    def _read(self, part: str, load: Any) -> Any:
        folder = require(self.path / part, self.config.pretrained_model_name_or_path)
        try:
            return load(str(folder))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from None

    def _check(self) -> int:
        """Refuses parts that do not fit each other or the options; returns the side of a latent."""
        factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        if self.config.resolution % factor:
            nearest = max(round(self.config.resolution / factor), 1) * factor
            raise UserError(
                f"--resolution {self.config.resolution}: the VAE needs a multiple of {factor}; the nearest is {nearest}"
            )
        pairs = {
            "unet in_channels and vae latent_channels": (
                self.unet_config["in_channels"],
                self.vae_config["latent_channels"],
            ),
            "unet cross_attention_dim and text_encoder hidden_size": (
                self.unet_config["cross_attention_dim"],
                self.text_config["hidden_size"],
            ),
        }
        for names, (left, right) in pairs.items():
            if left != right:
                raise UserError(f"{self.path}: {names} differ ({left} and {right}); these parts are not of one pipeline")
        return self.config.resolution // factor

    @property
    def record_spec(self) -> dict[str, Field]:
        latent = (self.vae_config["latent_channels"], self.latent_size, self.latent_size)
        states = (self.tokenizer.model_max_length, self.text_config["hidden_size"])
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

    def load_encoders(self, device: torch.device) -> None:
        variant, dtype = self.config.variant, self.dtype
        vae = AutoencoderKL.from_pretrained(self.path / "vae", variant=variant, torch_dtype=dtype)
        text_encoder: nn.Module = CLIPTextModel.from_pretrained(self.path / "text_encoder", variant=variant, dtype=dtype)
        self.vae, self.text_encoder = vae.to(device).eval(), text_encoder.to(device).eval()

    def free_encoders(self) -> None:
        del self.vae, self.text_encoder

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
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean and standard deviation of the VAE's posterior, times its scaling factor."""
        posterior = self.vae.encode(batch["pixels"].to(self.vae.device, self.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return {"latent_mean": posterior.mean * factor, "latent_std": posterior.std * factor}

    @torch.inference_mode()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """The text encoder's last hidden state after its final layer norm; no attention mask, as in the script."""
        tokens = self.tokenizer(
            captions,
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"encoder_hidden_states": self.text_encoder(tokens.to(self.text_encoder.device), return_dict=False)[0]}

    @torch.inference_mode()
    def decode(self, rows: Tensor) -> list[Image.Image]:
        vae = AutoencoderKL.from_pretrained(self.path / "vae", variant=self.config.variant)
        pixels = vae.decode(rows.float() / vae.config.scaling_factor).sample
        images = (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(image.numpy()) for image in images]

    def load_model(self) -> nn.Module:
        config = self.config
        assert isinstance(config, TrainConfig)
        arguments = {"subfolder": "unet", "cache_dir": config.cache_dir}
        name = config.pretrained_model_name_or_path
        try:
            unet = UNet2DConditionModel.from_pretrained(name, revision=config.non_ema_revision or config.revision, **arguments)
        except (OSError, ValueError) as error:
            if config.variant is None:
                raise UserError(f"{name}: the UNet cannot be loaded: {str(error).splitlines()[0]}") from None
            unet = UNet2DConditionModel.from_pretrained(name, revision=config.revision, variant=config.variant, **arguments)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if config.enable_xformers_memory_efficient_attention:
            try:
                unet.enable_xformers_memory_efficient_attention()
            except Exception as error:  # not installed, or built for another torch or CUDA
                raise UserError(
                    f"--enable_xformers_memory_efficient_attention: {str(error).splitlines()[0]}; install the extra "
                    "`xformers`, or leave the option out and use torch's attention"
                ) from None
        return unet.train()

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        return model(noisy, timesteps, record["encoder_hidden_states"], return_dict=False)[0]

    def pipeline(self, model: nn.Module, preview: bool) -> StableDiffusionPipeline:
        config = self.config
        overrides = {"safety_checker": None, "torch_dtype": self.dtype} if preview else {}
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
