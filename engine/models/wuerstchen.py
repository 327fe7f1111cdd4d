"""Wuerstchen, stage C: the prior denoises the latents of an EfficientNet under the hidden states of CLIP's text encoder.

Trained: `prior`. Frozen, and needed only while shards are built: `tokenizer`, the image encoder of `efficientnet.py`, whose
weights are published apart, and `text_encoder` unless it reads tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WuerstchenDecoderPipeline, WuerstchenPriorPipeline
from diffusers.pipelines.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS, WuerstchenDiffNeXt, WuerstchenPrior
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from engine.catalogue import DECODER
from engine.config.options import CacheConfig, TrainConfig
from engine.data import transforms
from engine.data.format.index import Field
from engine.diffusion.schedules import CosineSchedule, objective
from engine.models import efficientnet
from engine.models.check import check_pipeline, load_model
from engine.models.configurations import read_config
from engine.models.encoder import Encoder, Encoding
from engine.models.family import Family
from engine.models.pipelines import combine, load_pipeline, open_to_draw
from engine.models.published import digest_parts, digest_tensors, locate, read_text_parts, require_equal

PIXEL_STEP = 128  # stage C's latents, stage B's and the image have whole sizes together in these steps only
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class WuerstchenEncoding(Encoding):
    mean = "latent"
    text_model = CLIPTextModel

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.prior_config = read_config(self.path, "prior", WuerstchenPrior)
        self.text_config, self.tokenizer = read_text_parts(self.path)
        self._require_steps(PIXEL_STEP, f"Wuerstchen draws images in steps of {PIXEL_STEP} px")
        require_equal(
            str(self.path),
            ("prior c_cond", self.prior_config["c_cond"]),
            ("text_encoder hidden_size", self.text_config.hidden_size),
        )

    def locate_decoder(self) -> Path:
        """The directory of stages B and A, once stage B is known to take this prior's latents."""
        decoder = locate(self.config, DECODER)
        stage_b = read_config(decoder, "decoder", WuerstchenDiffNeXt)
        require_equal(
            f"{self.path} and {decoder}",
            ("the prior's c_in", self.prior_config["c_in"]),
            ("the decoder's effnet_embd", stage_b["effnet_embd"]),
        )
        return decoder

    @property
    def image_fields(self) -> dict[str, Field]:
        width, height = (side // efficientnet.STRIDE for side in self.size)
        return {"latent": Field((self.prior_config["c_in"], height, width), self.dtype, "image")}

    @property
    def text_fields(self) -> dict[str, Field]:
        states = (self.tokenizer.model_max_length, self.text_config.hidden_size)
        return {"encoder_hidden_states": Field(states, self.dtype, "caption")}

    @property
    def token_fields(self) -> dict[str, Field]:
        return super().token_fields | {"attention_mask": Field((self.tokenizer.model_max_length,), torch.bool, "caption")}

    @staticmethod
    def encode_tokens(text_encoder: Any, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """The last hidden state, computed with the attention mask."""
        mask = tokens.get("attention_mask")
        if mask is not None:  # whole, because of a mask [B, N] transformers asks the host whether it hides anything
            mask = torch.ones(2 * mask.shape[1:], dtype=torch.bool, device=mask.device).tril() & mask[:, None, None]
        return {"encoder_hidden_states": text_encoder(tokens["tokens"].long(), mask).last_hidden_state}

    def _image_encoder_weights(self) -> dict[str, Tensor]:
        name = self.config.pretrained_image_encoder_name_or_path
        weights = efficientnet.read_weights(name, self.config.cache_dir)
        channels = weights["mapper.0.weight"].shape[0] if "mapper.0.weight" in weights else None
        require_equal(
            f"{self.path} and {name}",
            ("the prior's c_in", self.prior_config["c_in"]),
            ("the image encoder's channels", channels),
        )
        return weights

    def encoder_digests(self) -> dict[str, Callable[[], str]]:
        parts = digest_parts(self.path, {"text_encoder": CLIPTextModel, "tokenizer": None}, self.config.variant)
        return parts | {"image_encoder": lambda: digest_tensors(self._image_encoder_weights())}

    def preprocessing_identity(self) -> dict[str, Any]:
        return self.size_identity

    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        (cropped,) = self.crops(image, record, Image.Resampling.BILINEAR)
        return [{"pixels": transforms.to_tensor(cropped, IMAGENET_MEAN, IMAGENET_STD)}]

    def crops(self, image: Image.Image, record: int, resampling: Image.Resampling) -> list[Image.Image]:
        return [transforms.crop_centre(transforms.resize_to_cover(image, self.size, resampling), self.size)]

    @torch.inference_mode()
    def decode(self, rows: Tensor) -> list[Image.Image]:
        """What stages B and A draw from the latents, without a prompt.

        Stage B works on 10.67 times the sides of the latents and halves it repeatedly, which comes out even for multiples of 3.
        Others are stretched to the next of those: good enough to look at.
        """
        pipeline = open_to_draw(self.locate_decoder(), WuerstchenDecoderPipeline, self.config.variant)
        pipeline.set_progress_bar_config(disable=True)
        height, width = (-(-side // 3) * 3 for side in rows.shape[-2:])
        features = nn.functional.interpolate(rows.float() * 42 - 1, (height, width), mode="bilinear")
        return [pipeline(image_features[None], prompt="").images[0] for image_features in features]

    def load_encoder(self, device: torch.device) -> "WuerstchenEncoder":
        image_encoder = efficientnet.load_encoder(self._image_encoder_weights()).to(device, self.dtype)
        return WuerstchenEncoder(self, image_encoder, self.load_text_encoder(device))


class WuerstchenEncoder(Encoder):
    def __init__(self, encoding: WuerstchenEncoding, image_encoder: Any, text_encoder: Any) -> None:
        self.encoding, self.image_encoder, self.text_encoder = encoding, image_encoder, text_encoder

    @torch.inference_mode()
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """(features + 1) / 42: what `latent_mean` and `latent_std` of the published pipeline undo."""
        device = next(self.image_encoder.parameters()).device
        features = self.image_encoder(batch["pixels"].to(device, self.encoding.dtype))
        return {"latent": (features + 1) / 42}


class Wuerstchen(Family):
    encoding: WuerstchenEncoding

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.draws_images:
            self.encoding.locate_decoder()
        self.schedule = CosineSchedule(objective(config))

    def check_files(self) -> None:
        self.try_step(check_pipeline(self.encoding.path, WuerstchenPriorPipeline, self.config.variant).prior)
        if self.config.draws_images:
            check_pipeline(self.encoding.locate_decoder(), WuerstchenDecoderPipeline, self.config.variant)

    def published_model(self) -> WuerstchenPrior:
        return load_model(self.encoding.path / "prior", WuerstchenPrior, self.config.variant, torch.float32)

    @staticmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        return model(noisy, timesteps, record["encoder_hidden_states"])

    def pipeline(self, parts: dict[str, Any]) -> WuerstchenPriorPipeline:
        return load_pipeline(self.encoding.path, WuerstchenPriorPipeline, self.config.variant, **parts)

    def preview(self, parts: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        encoding, size = self.encoding, self.config.resolution
        variant, dtype = self.config.variant, encoding.dtype
        prior = load_pipeline(encoding.path, WuerstchenPriorPipeline, variant, dtype, **parts)
        decoder = load_pipeline(encoding.locate_decoder(), WuerstchenDecoderPipeline, variant, dtype)
        return combine(prior, decoder), {"prior_timesteps": DEFAULT_STAGE_C_TIMESTEPS, "height": size, "width": size}
