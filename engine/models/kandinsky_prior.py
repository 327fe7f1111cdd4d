"""Kandinsky 2.2 prior: a transformer denoises the CLIP embedding of an image under the CLIP encoding of its caption.

Trained: `prior`, but for its `clip_mean` and `clip_std`, which normalise embeddings. Frozen, and needed only while shards are
built: `image_encoder`, `image_processor`, `tokenizer`, and `text_encoder` unless it reads tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from engine.catalogue import DECODER
from engine.config.options import CacheConfig, TrainConfig
from engine.data.format.index import Field
from engine.diffusion.schedules import DiscreteSchedule, objective
from engine.files import reading
from engine.models.check import check_pipeline, check_weights, load_model
from engine.models.configurations import read_config
from engine.models.encoder import Encoder, Encoding
from engine.models.family import PREVIEW_STEPS, Family
from engine.models.pipelines import combine, load_pipeline, open_to_draw
from engine.models.published import (
    digest_parts,
    digest_tensors,
    locate,
    read_image_parts,
    read_text_parts,
    require_equal,
)
from engine.models.weights import present_variant, require_finite


class KandinskyPriorEncoding(Encoding):
    mean = "image_embedding"
    text_model = CLIPTextModelWithProjection

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.prior_config = read_config(self.path, "prior", PriorTransformer)
        self.vision_config, self.image_processor = read_image_parts(self.path)
        self.size = (dict(self.image_processor.size).get("shortest_edge") or self.vision_config.image_size,) * 2
        self.text_config, self.tokenizer = read_text_parts(self.path)
        self._check()

    def _check(self) -> None:
        """Refuses parts that do not fit each other."""
        where, prior, text = str(self.path), self.prior_config, self.text_config
        width = prior["embedding_dim"]
        image_width = ("image_encoder projection_dim", self.vision_config.projection_dim)
        require_equal(where, ("prior embedding_dim", width), image_width)
        require_equal(where, ("prior clip_embed_dim", prior.get("clip_embed_dim") or width), image_width)
        require_equal(where, ("prior embedding_dim", width), ("text_encoder hidden_size", text.hidden_size))
        require_equal(
            where,
            ("prior embedding_proj_dim", prior.get("embedding_proj_dim") or width),
            ("text_encoder projection_dim", text.projection_dim),
        )
        require_equal(
            where,
            ("prior num_embeddings", prior["num_embeddings"]),
            ("tokenizer model_max_length", self.tokenizer.model_max_length),
        )

    def locate_decoder(self) -> Path:
        """The decoder's directory, once its UNet is known to take this prior's embeddings."""
        decoder = locate(self.config, DECODER)
        unet_config = read_config(decoder, "unet", UNet2DConditionModel)
        require_equal(
            f"{self.path} and {decoder}",
            ("the prior's embedding_dim", self.prior_config["embedding_dim"]),
            ("the decoder's encoder_hid_dim", unet_config.get("encoder_hid_dim")),
        )
        return decoder

    @property
    def image_fields(self) -> dict[str, Field]:
        return {"image_embedding": Field((self.vision_config.projection_dim,), self.dtype, "image")}

    @property
    def text_fields(self) -> dict[str, Field]:
        length = self.tokenizer.model_max_length
        return {
            "text_embedding": Field((self.text_config.projection_dim,), self.dtype, "caption"),
            "encoder_hidden_states": Field((length, self.text_config.hidden_size), self.dtype, "caption"),
            "attention_mask": Field((length,), torch.bool, "caption"),
        }

    @property
    def token_fields(self) -> dict[str, Field]:
        return super().token_fields | {"attention_mask": self.text_fields["attention_mask"]}

    @staticmethod
    def encode_tokens(text_encoder: Any, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """The projection and the last hidden state; the mask is for the prior, the encoder runs without one."""
        output = text_encoder(tokens["tokens"].long())
        return {"text_embedding": output.text_embeds, "encoder_hidden_states": output.last_hidden_state}

    def encoder_digests(self) -> dict[str, Callable[[], str]]:
        models = {
            "image_encoder": CLIPVisionModelWithProjection,
            "image_processor": None,
            "text_encoder": CLIPTextModelWithProjection,
            "tokenizer": None,
        }
        variant = self.config.variant
        parts = digest_parts(self.path, models, variant)

        def digest_statistics() -> str:
            check_weights(self.path / "prior", PriorTransformer, present_variant(self.path / "prior", variant))
            return digest_tensors(self.clip_statistics())

        return parts | {"clip_statistics": digest_statistics}

    def clip_statistics(self) -> dict[str, Tensor]:
        """The prior's `clip_mean` and `clip_std`, fp32 [1, width], without loading the rest of it where that is possible."""
        names = ("clip_mean", "clip_std")
        found: dict[str, Tensor] = {}
        for file in sorted((self.path / "prior").glob("diffusion_pytorch_model*.safetensors")):
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name).float() for name in names if name in tensors.keys()}  # noqa: SIM118
            if len(found) == len(names):
                with reading(file, "download it again"):
                    if any(tensor.shape != (1, self.prior_config["embedding_dim"]) for tensor in found.values()):
                        raise ValueError(f"its {' and '.join(names)} are not of the prior's width")
                require_finite(file, found)
                return found
        prior = load_model(self.path / "prior", PriorTransformer, self.config.variant, torch.float32)
        return {name: getattr(prior, name).detach() for name in names}

    def preprocessing_identity(self) -> dict[str, Any]:
        return {}  # the image processor's own configuration is one of the encoder's files

    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        return [{"pixels": self.image_processor(image, return_tensors="pt").pixel_values[0]}]

    @torch.inference_mode()
    def decode(self, rows: Tensor) -> list[Image.Image]:
        """What the decoder draws from the embeddings."""
        pipeline = open_to_draw(self.locate_decoder(), KandinskyV22Pipeline, self.config.variant)
        pipeline.set_progress_bar_config(disable=True)
        statistics = self.clip_statistics()
        embeddings = rows.float() * statistics["clip_std"] + statistics["clip_mean"]
        size = self.config.resolution
        return pipeline(
            image_embeds=embeddings,
            negative_image_embeds=torch.zeros_like(embeddings),
            num_inference_steps=PREVIEW_STEPS,
            height=size,
            width=size,
        ).images

    def load_encoder(self, device: torch.device) -> "KandinskyPriorEncoder":
        variant, dtype = self.config.variant, self.dtype
        image_encoder = load_model(self.path / "image_encoder", CLIPVisionModelWithProjection, variant, dtype)
        statistics = {name: tensor.to(device) for name, tensor in self.clip_statistics().items()}
        return KandinskyPriorEncoder(self, image_encoder.to(device).eval(), self.load_text_encoder(device), statistics)


class KandinskyPriorEncoder(Encoder):
    def __init__(
        self, encoding: KandinskyPriorEncoding, image_encoder: Any, text_encoder: Any, clip_statistics: dict[str, Tensor]
    ) -> None:
        self.encoding, self.image_encoder = encoding, image_encoder
        self.text_encoder, self.clip_statistics = text_encoder, clip_statistics

    @torch.inference_mode()
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """CLIP embeddings, normalised in fp32 by the prior's statistics."""
        pixels = batch["pixels"].to(self.image_encoder.device, self.encoding.dtype)
        embedding = self.image_encoder(pixels).image_embeds.float()
        normalised = (embedding - self.clip_statistics["clip_mean"]) / self.clip_statistics["clip_std"]
        return {"image_embedding": normalised.to(self.encoding.dtype)}


class KandinskyPrior(Family):
    encoding: KandinskyPriorEncoding

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.draws_images:
            self.encoding.locate_decoder()
        scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
        self.schedule = DiscreteSchedule(scheduler.alphas_cumprod, "sample", objective(config))

    def check_files(self) -> None:
        self.try_step(check_pipeline(self.encoding.path, KandinskyV22PriorPipeline, self.config.variant).prior)
        if self.config.draws_images:
            check_pipeline(self.encoding.locate_decoder(), KandinskyV22Pipeline, self.config.variant)

    def published_model(self) -> PriorTransformer:
        prior = load_model(self.encoding.path / "prior", PriorTransformer, self.config.variant, torch.float32)
        prior.clip_mean.requires_grad_(False)
        prior.clip_std.requires_grad_(False)
        return prior

    @staticmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        return model(
            noisy,
            timesteps,
            record["text_embedding"],
            record["encoder_hidden_states"],
            record["attention_mask"],
            return_dict=False,
        )[0]

    def pipeline(self, parts: dict[str, Any]) -> KandinskyV22PriorPipeline:
        return load_pipeline(self.encoding.path, KandinskyV22PriorPipeline, self.config.variant, **parts)

    def preview(self, parts: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        encoding, size = self.encoding, self.config.resolution
        variant, dtype = self.config.variant, encoding.dtype
        prior = load_pipeline(encoding.path, KandinskyV22PriorPipeline, variant, dtype, **parts)
        decoder = load_pipeline(encoding.locate_decoder(), KandinskyV22Pipeline, variant, dtype)
        return combine(prior, decoder), {"num_inference_steps": PREVIEW_STEPS, "height": size, "width": size}
