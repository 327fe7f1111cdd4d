"""Kandinsky 2.2 decoder: a UNet denoises the latents of MoVQ under the CLIP embedding of the image itself. No captions.

Trained: the decoder's `unet`. Frozen, and needed only while shards are built: the decoder's `movq`; `image_encoder` and
`image_processor` of the prior.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline, KandinskyV22PriorPipeline, UNet2DConditionModel, VQModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from engine.config.options import CacheConfig
from engine.data import transforms
from engine.data.format.index import Field
from engine.diffusion import DiscreteSchedule
from engine.errors import UserError
from engine.models.family import PREVIEW_STEPS, Family
from engine.models.published import combine, digest_folder, locate, read_part, require_equal


class KandinskyDecoder(Family):
    captioned = False
    mean = "latent"

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.base_model = config.pretrained_decoder_model_name_or_path
        self.path = locate(config, "pretrained_decoder_model_name_or_path")
        # The rest of the prior draws validation images only.
        unused = () if self.draws else ("prior", "text_encoder", "tokenizer", "scheduler")
        self.prior_path = locate(config, "pretrained_prior_model_name_or_path", skip=unused)
        self.unet_config = read_part(self.path, "unet", UNet2DConditionModel.load_config)
        self.movq_config = read_part(self.path, "movq", VQModel.load_config)
        self.vision_config = read_part(self.prior_path, "image_encoder", CLIPVisionConfig.from_pretrained)
        # PIL's resampling on every machine: with torchvision installed, transformers' default would be another.
        self.image_processor = read_part(self.prior_path, "image_processor", CLIPImageProcessorPil.from_pretrained)
        self.latent_size = self._check()
        scheduler = read_part(self.path, "scheduler", DDPMScheduler.from_pretrained)
        self.schedule = DiscreteSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type, self.snr_gamma)

    def _check(self) -> int:
        """Refuses parts that do not fit each other or the options; returns the side of a latent."""
        require_equal(
            str(self.path),
            ("unet in_channels", self.unet_config["in_channels"]),
            ("movq latent_channels", self.movq_config["latent_channels"]),
        )
        require_equal(
            f"{self.path} and {self.prior_path}",
            ("the decoder's unet encoder_hid_dim", self.unet_config.get("encoder_hid_dim")),
            ("the prior's image_encoder projection_dim", self.vision_config.projection_dim),
        )
        factor = 2 ** (len(self.movq_config["block_out_channels"]) - 1)
        step, resolution = factor**2, self.config.resolution
        if resolution % step:
            raise UserError(
                f"--resolution {resolution}: the Kandinsky decoder draws images in steps of {step} px; the nearest is "
                f"{max(round(resolution / step), 1) * step}"
            )
        return resolution // factor

    @property
    def record_spec(self) -> dict[str, Field]:
        latent = (self.movq_config["latent_channels"], self.latent_size, self.latent_size)
        return {
            "latent": Field(latent, self.dtype, "image"),
            "image_embedding": Field((self.vision_config.projection_dim,), self.dtype, "image"),
        }

    def encoder_identity(self) -> dict[str, str]:
        return {"movq": digest_folder(self.path / "movq")} | {
            part: digest_folder(self.prior_path / part) for part in ("image_encoder", "image_processor")
        }

    def preprocessing_identity(self) -> dict[str, Any]:
        return {"resolution": self.config.resolution}

    def load_encoders(self, device: torch.device) -> None:
        folder = self.prior_path / "image_encoder"
        image_encoder: Any = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=self.dtype)
        movq = VQModel.from_pretrained(self.path / "movq", torch_dtype=self.dtype)
        self.image_encoder, self.movq = image_encoder.to(device).eval(), movq.to(device).eval()

    def free_encoders(self) -> None:
        del self.image_encoder, self.movq

    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        size = self.config.resolution
        square = transforms.crop_centre_square(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1)
        clip_pixels = self.image_processor(image, return_tensors="pt").pixel_values[0]
        return [{"pixels": transforms.to_tensor_by_half_range(square), "clip_pixels": clip_pixels}]

    @torch.inference_mode()
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """MoVQ's latents before quantisation, as they are, and CLIP's embedding of the image."""
        device = self.movq.device
        return {
            "latent": self.movq.encode(batch["pixels"].to(device, self.dtype)).latents,
            "image_embedding": self.image_encoder(batch["clip_pixels"].to(device, self.dtype)).image_embeds,
        }

    @torch.inference_mode()
    def decode(self, rows: Tensor) -> list[Image.Image]:
        movq = VQModel.from_pretrained(self.path / "movq", torch_dtype=torch.float32)
        return transforms.to_images(movq.decode(rows.float(), force_not_quantize=True).sample)

    def load_model(self) -> nn.Module:
        load = UNet2DConditionModel.from_pretrained
        return self.ready_to_train(read_part(self.path, "unet", lambda path: load(path, torch_dtype=torch.float32)))

    @staticmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        """Noise in the first half of the channels; the learned variance in the second is not trained."""
        condition = {"image_embeds": record["image_embedding"]}
        return model(noisy, timesteps, None, added_cond_kwargs=condition, return_dict=False)[0]

    def pipeline(self, model: nn.Module) -> KandinskyV22Pipeline:
        return KandinskyV22Pipeline.from_pretrained(self.path, unet=model)

    def preview(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        prior = KandinskyV22PriorPipeline.from_pretrained(self.prior_path, torch_dtype=self.dtype)
        decoder = KandinskyV22Pipeline.from_pretrained(self.path, unet=model, torch_dtype=self.dtype)
        size = self.config.resolution
        return combine(prior, decoder), {"num_inference_steps": PREVIEW_STEPS, "height": size, "width": size}
