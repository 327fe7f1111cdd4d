"""Kandinsky 2.2 decoder: a UNet denoises the latents of MoVQ under the CLIP embedding of the image itself. No captions.

Trained: the decoder's `unet`. Frozen, and needed only while shards are built: the decoder's `movq`; `image_encoder` and
`image_processor` of the prior.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline, UNet2DConditionModel, VQModel
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from engine.catalogue import PRIOR
from engine.config.options import CacheConfig, TrainConfig
from engine.data import transforms
from engine.data.format.index import Field
from engine.diffusion.schedules import DiscreteSchedule, objective
from engine.errors import UserError
from engine.models.check import check_pipeline, check_weights, load_model
from engine.models.configurations import read_config
from engine.models.encoder import Encoder, Encoding
from engine.models.family import PREVIEW_STEPS, Family
from engine.models.kinds import require_text_to_image
from engine.models.pipelines import combine, load_pipeline
from engine.models.published import digest_parts, locate, read_image_parts, read_scheduler, require_equal
from engine.models.weights import present_variant


class KandinskyDecoderEncoding(Encoding):
    mean = "latent"

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.prior_path = locate(config, PRIOR, skip=("prior", "text_encoder", "tokenizer", "scheduler"))
        self.unet_config = read_config(self.path, "unet", UNet2DConditionModel)
        self.movq_config = read_config(self.path, "movq", VQModel)
        self.vision_config, self.image_processor = read_image_parts(self.prior_path)
        require_text_to_image(self.path, self.unet_config, self.movq_config["latent_channels"], "image_proj")
        require_equal(
            f"{self.path} and {self.prior_path}",
            ("the decoder's unet encoder_hid_dim", self.unet_config.get("encoder_hid_dim")),
            ("the prior's image_encoder projection_dim", self.vision_config.projection_dim),
        )
        factor = 2 ** (len(self.movq_config["block_out_channels"]) - 1)
        self._require_steps(factor**2, f"the Kandinsky decoder draws images in steps of {factor**2} px")
        self.factor = factor

    @property
    def image_fields(self) -> dict[str, Field]:
        width, height = self.size
        latent = (self.movq_config["latent_channels"], height // self.factor, width // self.factor)
        return {
            "latent": Field(latent, self.dtype, "image"),
            "image_embedding": Field((self.vision_config.projection_dim,), self.dtype, "image"),
        }

    def encoder_digests(self) -> dict[str, Callable[[], str]]:
        image_parts = {"image_encoder": CLIPVisionModelWithProjection, "image_processor": None}
        variant = self.config.variant
        return digest_parts(self.path, {"movq": VQModel}, variant) | digest_parts(self.prior_path, image_parts, variant)

    def preprocessing_identity(self) -> dict[str, Any]:
        return self.size_identity

    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        (resized,) = self.crops(image, record, Image.Resampling.BICUBIC)
        clip_pixels = self.image_processor(image, return_tensors="pt").pixel_values[0]
        return [{"pixels": transforms.to_tensor_by_half_range(resized), "clip_pixels": clip_pixels}]

    def crops(self, image: Image.Image, record: int, resampling: Image.Resampling) -> list[Image.Image]:
        return [transforms.crop_centre_to_ratio(image, self.size).resize(self.size, resampling, reducing_gap=1)]

    @torch.inference_mode()
    def decode(self, rows: Tensor) -> list[Image.Image]:
        movq = load_model(self.path / "movq", VQModel, self.config.variant, torch.float32)
        return transforms.to_images(movq.decode(rows.float(), force_not_quantize=True).sample)

    @torch.inference_mode()
    def unconditional(self, device: torch.device) -> dict[str, Tensor]:
        """CLIP's embedding of an image of zeros, normalised ones: what `KandinskyV22PriorPipeline.get_zero_embed` makes, and
        `KandinskyV22Pipeline` guides against as `negative_image_embeds`."""
        size = self.vision_config.image_size
        pixels = torch.zeros(1, 3, size, size, device=device, dtype=self.dtype)
        return {"image_embedding": self._load_image_encoder().to(device)(pixels).image_embeds[0].cpu()}

    def _load_image_encoder(self) -> Any:
        folder, model = self.prior_path / "image_encoder", CLIPVisionModelWithProjection
        return load_model(folder, model, self.config.variant, self.dtype).eval()

    def check_image_encoder(self) -> None:
        """Compares the image encoder's weights, which training from shards alone needs for `unconditional` alone.

        Raises:
            UserError: they are not there, or do not fit.
        """
        folder = self.prior_path / "image_encoder"
        try:
            check_weights(folder, CLIPVisionModelWithProjection, present_variant(folder, self.config.variant))
        except UserError as error:
            raise UserError(*(f"--proportion_empty_images: {line}" for line in error.lines)) from None

    def load_encoder(self, device: torch.device) -> "KandinskyDecoderEncoder":
        movq = load_model(self.path / "movq", VQModel, self.config.variant, self.dtype)
        return KandinskyDecoderEncoder(self, movq.to(device).eval(), self._load_image_encoder().to(device))


class KandinskyDecoderEncoder(Encoder):
    def __init__(self, encoding: KandinskyDecoderEncoding, movq: Any, image_encoder: Any) -> None:
        self.encoding = encoding
        self.movq, self.image_encoder = movq, image_encoder

    @torch.inference_mode()
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """MoVQ's latents before quantisation, as they are, and CLIP's embedding of the image."""
        device = self.movq.device
        return {
            "latent": self.movq.encode(batch["pixels"].to(device, self.encoding.dtype)).latents,
            "image_embedding": self.image_encoder(batch["clip_pixels"].to(device, self.encoding.dtype)).image_embeds,
        }


class KandinskyDecoder(Family):
    encoding: KandinskyDecoderEncoding

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.draws_images:
            locate(config, PRIOR)  # the rest of it too, which draws the images
        scheduler = read_scheduler(self.encoding.path)
        self.schedule = DiscreteSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type, objective(config))

    def check_files(self) -> None:
        self.try_step(check_pipeline(self.encoding.path, KandinskyV22Pipeline, self.config.variant).unet)
        if self.config.proportion_empty_images:
            self.encoding.check_image_encoder()
        if self.config.draws_images:
            check_pipeline(locate(self.config, PRIOR), KandinskyV22PriorPipeline, self.config.variant)

    def published_model(self) -> UNet2DConditionModel:
        return load_model(self.encoding.path / "unet", UNet2DConditionModel, self.config.variant, torch.float32)

    @staticmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        """Noise in the first half of the channels; the learned variance in the second is not trained."""
        condition = {"image_embeds": record["image_embedding"]}
        return model(noisy, timesteps, None, added_cond_kwargs=condition, return_dict=False)[0]

    def pipeline(self, parts: dict[str, Any]) -> KandinskyV22Pipeline:
        return load_pipeline(self.encoding.path, KandinskyV22Pipeline, self.config.variant, **parts)

    def preview(self, parts: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        encoding, size = self.encoding, self.config.resolution
        variant, dtype = self.config.variant, encoding.dtype
        prior = load_pipeline(locate(self.config, PRIOR), KandinskyV22PriorPipeline, variant, dtype)
        decoder = load_pipeline(encoding.path, KandinskyV22Pipeline, variant, dtype, **parts)
        return combine(prior, decoder), {"num_inference_steps": PREVIEW_STEPS, "height": size, "width": size}
