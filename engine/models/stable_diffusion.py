"""Stable Diffusion, text to image: a UNet denoises the latents of a VAE under the hidden states of CLIP's text encoder.

Trained: `unet`, and with `--train_text_encoder` `text_encoder`. Frozen, and needed only while shards are built: `vae`,
`tokenizer`, and `text_encoder` unless it reads tokens.
"""

import inspect
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from engine.catalogue import MODEL
from engine.config.options import CacheConfig, TrainConfig
from engine.data import transforms
from engine.data.format.index import Field
from engine.diffusion.schedules import ZERO_TERMINAL, DiscreteSchedule, objective
from engine.errors import UserError
from engine.messages import say
from engine.models import inversion
from engine.models.check import absent_parts, check_pipeline, check_weights, load_model
from engine.models.configurations import read_config
from engine.models.encoder import Encoder, Encoding
from engine.models.family import PREVIEW_STEPS, Family
from engine.models.kinds import require_text_to_image
from engine.models.parts import JoinedParts
from engine.models.pipelines import load_pipeline, require_drawable
from engine.models.published import digest_parts, locate, read_scheduler, read_text_parts, require_equal
from engine.models.schedulers import use_scheduler
from engine.models.weights import present_variant, weight_files

_PREVIEW_STEPS = {"lora": 30, "dreambooth": 25, "dreambooth_lora": 25}  # where a recipe's script takes others


class StableDiffusionEncoding(Encoding):
    mean, std = "latent_mean", "latent_std"
    text_model = CLIPTextModel

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.unet_config = read_config(self.path, "unet", UNet2DConditionModel)
        self.vae_config = read_config(self.path, "vae", AutoencoderKL)
        self.text_config, self.tokenizer = read_text_parts(self.path)
        if config.placeholder_token:
            self.first_new_token = inversion.extend(self.tokenizer, config)
        if not isinstance(scaling := self.vae_config["scaling_factor"], int | float) or not 0 < scaling < math.inf:
            raise UserError(f"{self.path / 'vae' / 'config.json'}: its scaling_factor is {scaling}; download it again")
        factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        self._require_steps(factor, f"the VAE needs a multiple of {factor}")
        self.factor = factor
        require_text_to_image(self.path, self.unet_config, self.vae_config["latent_channels"])
        require_equal(
            str(self.path),
            ("unet cross_attention_dim", self.unet_config["cross_attention_dim"]),
            ("text_encoder hidden_size", self.text_config.hidden_size),
        )

    @property
    def image_fields(self) -> dict[str, Field]:
        width, height = self.size
        latent = (self.vae_config["latent_channels"], height // self.factor, width // self.factor)
        return {name: Field(latent, self.dtype, "image") for name in ("latent_mean", "latent_std")}

    @property
    def text_fields(self) -> dict[str, Field]:
        states = (self.tokenizer.model_max_length, self.text_config.hidden_size)
        return {"encoder_hidden_states": Field(states, self.dtype, "caption")}

    @property
    def limits(self) -> dict[str, int]:
        return {"tokens": len(self.tokenizer)} if self.config.placeholder_token else super().limits

    @property
    def _token_dtype(self) -> torch.dtype:
        return torch.uint16 if max(len(self.tokenizer), self.text_config.vocab_size) <= 2**16 else torch.int32

    def tokens_of(self, captions: list[str]) -> dict[str, Tensor]:
        if self.config.placeholder_token:
            captions = [inversion.spelled(caption, self.config) for caption in captions]
        return super().tokens_of(captions)

    def load_text_encoder(self, device: torch.device) -> Any:
        text_encoder = super().load_text_encoder(device)
        if self.config.placeholder_token:
            inversion.add_vectors(text_encoder, self.first_new_token, self.config.num_vectors)
        return text_encoder

    @staticmethod
    def encode_tokens(text_encoder: Any, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """The last hidden state after the final layer norm; no attention mask, as in the script."""
        return {"encoder_hidden_states": text_encoder(tokens["tokens"].long(), return_dict=False)[0]}

    def encoder_digests(self) -> dict[str, Callable[[], str]]:
        parts = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": None}
        return digest_parts(self.path, parts, self.config.variant)

    def preprocessing_identity(self) -> dict[str, Any]:
        config = self.config
        crops = None if config.center_crop else config.random_crops
        return {
            **self.size_identity,
            "interpolation": config.image_interpolation_mode,
            "random_crops": crops,
            "random_flip": config.random_flip,
        }

    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        resampling = transforms.RESAMPLING[self.config.image_interpolation_mode]
        return [{"pixels": transforms.to_tensor(crop)} for crop in self.crops(image, record, resampling)]

    def crops(self, image: Image.Image, record: int, resampling: Image.Resampling) -> list[Image.Image]:
        config = self.config
        image = transforms.resize_to_cover(image, self.size, resampling)
        if config.center_crop:
            images = [transforms.crop_centre(image, self.size)]
        else:
            images = transforms.crop_randomly(image, self.size, record, config.random_crops)
        return images + [transforms.mirror(crop) for crop in images] if config.random_flip else images

    @torch.inference_mode()
    def decode(self, rows: Tensor) -> list[Image.Image]:
        vae = load_model(self.path / "vae", AutoencoderKL, self.config.variant, torch.float32)
        return transforms.to_images(vae.decode(rows.float() / vae.config.scaling_factor).sample)

    def load_encoder(self, device: torch.device) -> "StableDiffusionEncoder":
        vae = load_model(self.path / "vae", AutoencoderKL, self.config.variant, self.dtype)
        return StableDiffusionEncoder(self, vae.to(device).eval(), self.load_text_encoder(device))


class StableDiffusionEncoder(Encoder):
    def __init__(self, encoding: StableDiffusionEncoding, vae: Any, text_encoder: Any) -> None:
        self.encoding, self.vae, self.text_encoder = encoding, vae, text_encoder

    @torch.inference_mode()
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean and standard deviation of the VAE's posterior, times its scaling factor."""
        posterior = self.vae.encode(batch["pixels"].to(self.vae.device, self.encoding.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return {"latent_mean": posterior.mean * factor, "latent_std": posterior.std * factor}


class TextToImage(JoinedParts):
    """The UNet and the text encoder that it reads captions by, trained as one."""

    unet: Any
    text_encoder: Any

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__(unet=unet, text_encoder=text_encoder)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, return_dict: bool = False) -> Any:
        """What the UNet makes of samples [B, C, H, W] at timesteps [B] under captions of tokens [B, N]."""
        states = StableDiffusionEncoding.encode_tokens(self.text_encoder, {"tokens": tokens})
        return self.unet(noisy, timesteps, states["encoder_hidden_states"], return_dict=return_dict)


class StableDiffusion(Family):
    encoding: StableDiffusionEncoding

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        zero_terminal = ZERO_TERMINAL if config.rescale_betas_zero_snr else {}
        scheduler = read_scheduler(self.encoding.path, **zero_terminal)
        self.prediction_type = config.prediction_type or scheduler.config.prediction_type
        self.schedule = DiscreteSchedule(scheduler.alphas_cumprod, self.prediction_type, objective(config))
        if config.placeholder_token:
            self.initializer = inversion.token_number(self.encoding.tokenizer, config)
        if config.dream_training and self.prediction_type != "epsilon":
            raise UserError(f"--dream_training needs prediction type epsilon, not {self.prediction_type}")
        if self.schedule.draw.end == self.schedule.timesteps and not float(self.schedule.table[4, -1]):
            say("The last timestep is pure noise, which these loss weights give none; --min_loss_weight would give it one")

    def check_files(self) -> None:
        pipeline = check_pipeline(self.encoding.path, StableDiffusionPipeline, self.config.variant)
        if self.config.draws_images:
            require_drawable(pipeline, self.encoding.path, "leave out --validation_prompts")
        unet = check_weights(self.unet, UNet2DConditionModel, self._unet_variant())
        self.try_step(unet if not self.config.joins_text_encoder else TextToImage(unet, pipeline.text_encoder))

    @cached_property
    def unet(self) -> Path:
        """The folder of the trained weights: those without --variant, as in the script, where they are kept."""
        config = self.config
        if not (config.variant or config.non_ema_revision):
            return self.encoding.path / "unet"
        revision = config.non_ema_revision or config.revision
        others = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
        try:
            return locate(config.model_copy(update={"revision": revision, "variant": None}), MODEL, skip=others) / "unet"
        except UserError:
            if config.non_ema_revision:
                raise
            return self.encoding.path / "unet"

    def _unet_variant(self) -> str | None:
        plain = weight_files(self.unet, UNet2DConditionModel, None)
        return None if plain else present_variant(self.unet, self.config.variant)

    def published_model(self) -> Any:
        unet = load_model(self.unet, UNet2DConditionModel, self._unet_variant(), torch.float32)
        if not self.config.joins_text_encoder:
            return unet
        folder = self.encoding.path / "text_encoder"
        return TextToImage(unet, load_model(folder, CLIPTextModel, self.config.variant, torch.float32))

    @staticmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        # Where the text encoder is a part of the model there are tokens alone.
        condition = record["encoder_hidden_states"] if "encoder_hidden_states" in record else record["tokens"]
        return model(noisy, timesteps, condition, return_dict=False)[0]

    def pipeline(self, parts: dict[str, Any]) -> StableDiffusionPipeline:
        return self._pipeline(parts, torch.float32)

    def preview(self, parts: dict[str, Any]) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
        pipeline = self._pipeline(parts, self.encoding.dtype, safety_checker=None)
        if self.config.validation_scheduler:
            use_scheduler(pipeline, self.config.validation_scheduler)
        return pipeline, {"num_inference_steps": _PREVIEW_STEPS.get(self.config.recipe, PREVIEW_STEPS)}

    def _pipeline(self, parts: dict[str, Any], dtype: torch.dtype, **overrides: Any) -> StableDiffusionPipeline:
        path = self.encoding.path
        given = absent_parts(path, StableDiffusionPipeline) | parts | overrides
        pipeline = load_pipeline(path, StableDiffusionPipeline, self.config.variant, dtype, **given)
        pipeline.register_to_config(_name_or_path=self.base_model)  # which may be a name on the hub
        pipeline.scheduler.register_to_config(prediction_type=self.prediction_type)
        if self.config.rescale_betas_zero_snr:
            pipeline.register_modules(scheduler=from_pure_noise(pipeline.scheduler))
        return pipeline


def from_pure_noise(scheduler: Any) -> Any:
    """A scheduler of the same configuration that starts at a last timestep without signal (arXiv:2305.08891, section 3.3).

    It is of the same class, or DDIM's, with which the paper samples, where that class knows no such schedule.
    """
    kind = type(scheduler)
    if "rescale_betas_zero_snr" in inspect.signature(kind).parameters:
        return kind.from_config(scheduler.config, **ZERO_TERMINAL)
    say(f"The pipeline samples with DDIMScheduler: {kind.__name__} has no schedule that ends in pure noise")
    # What was at the default of its class stays as it was, which DDIM's may differ from; latents are not to be clipped.
    values = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return DDIMScheduler.from_config({"clip_sample": False} | values, **ZERO_TERMINAL)
