"""The interface of a model family: everything that tells one family from another, and nothing else."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config.options import CacheConfig, TrainConfig
from engine.data.format.index import Field
from engine.diffusion import Schedule
from engine.errors import UserError, first_line
from engine.models import float8
from engine.models.training_form import to_training_form

PREVIEW_STEPS = 20  # of the last stage's sampling in validation images, as in the scripts

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_FAMILIES = {
    "sd": ("engine.models.stable_diffusion", "StableDiffusion"),
    "kandinsky-prior": ("engine.models.kandinsky_prior", "KandinskyPrior"),
    "kandinsky-decoder": ("engine.models.kandinsky_decoder", "KandinskyDecoder"),
    "wuerstchen": ("engine.models.wuerstchen", "Wuerstchen"),
}


class Family(ABC):
    """A family reads one published pipeline layout. Building it reads configurations only; weights are loaded when asked for.

    Records: `record_spec` names the tensors that a sample's shard record holds. `prepare` turns an image into the encoder's
    inputs (one dictionary per stored variant, called from several threads); `encode_images` and `encode_captions` turn
    batches of those into record rows.

    Training: `load_model` gives the trained module in fp32; `predict` is the model call and nothing else; `mean`, and `std`
    if there is one, name the record's fields that x0 is drawn from; `schedule` draws timesteps.

    Result: `pipeline` is what is saved, into `result` within the output directory; `preview` draws validation images.
    """

    captioned: bool  # whether records hold captions
    mean: str
    std: str | None = None
    schedule: Schedule
    result = Path()
    base_model: str  # the trained checkpoint, as the user named it
    path: Path  # the directory of its pipeline

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.dtype = PRECISIONS[config.mixed_precision]
        self.training = config if isinstance(config, TrainConfig) else None

    @property
    @abstractmethod
    def record_spec(self) -> dict[str, Field]:
        """Names, shapes, dtypes and kinds of the tensors of a record."""

    @abstractmethod
    def encoder_identity(self) -> dict[str, str]:
        """Digests of the frozen models' files by name, for the fingerprint of the shards."""

    @abstractmethod
    def preprocessing_identity(self) -> dict[str, Any]:
        """The options that shape the encoder's inputs."""

    @abstractmethod
    def load_encoders(self, device: torch.device) -> None:
        """Loads the frozen encoders in the precision of the run."""

    @abstractmethod
    def free_encoders(self) -> None:
        """Gives the encoders' memory back."""

    @abstractmethod
    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        """The encoder's inputs for every stored variant of an RGB image; `record` seeds random crops."""

    @abstractmethod
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Record rows of stacked inputs of `prepare`."""

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Record rows of captions; only families that are `captioned` have any."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, rows: Tensor) -> list[Image.Image]:
        """Pictures of rows of the field `mean`, for looking at shards."""

    @abstractmethod
    def load_model(self) -> nn.Module:
        """The module that is trained, in fp32 on the host, in training mode."""

    @staticmethod
    @abstractmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        """The model's prediction for noisy samples [B, C, H, W] at timesteps [B]."""

    @abstractmethod
    def pipeline(self, model: nn.Module) -> Any:
        """The published diffusers pipeline with the trained module in place, to be saved."""

    @abstractmethod
    def preview(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """A pipeline from text to images in the run's precision with the trained module in place, and arguments to call it
        with beside the prompt."""

    @property
    def snr_gamma(self) -> float | None:
        return self.training.snr_gamma if self.training else None

    @property
    def draws(self) -> bool:
        """Whether this run draws validation images."""
        return bool(self.training and self.training.validation_prompts)

    def ready_to_train(self, model: Any) -> nn.Module:
        """A freshly loaded diffusers model with the options that shape its training pass, in training mode."""
        assert self.training is not None
        if self.training.gradient_checkpointing:
            # The state of the generator, needed for dropout alone, is kept by the host.
            kept = has_dropout(model)
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=kept))
        if self.training.uses_xformers:
            try:
                model.enable_xformers_memory_efficient_attention()
            except Exception as error:  # not installed, or built for another torch or CUDA
                raise UserError(
                    f"--attention xformers: {first_line(error)}; install the extra `xformers`, or leave the option out and use "
                    "torch's attention"
                ) from None
        to_training_form(model, fuse_projections=not self.training.uses_xformers)
        if self.training.matrix_precision == "fp8":
            float8.convert(model)
        return model.train()


def has_dropout(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def open_family(config: CacheConfig) -> Family:
    """The family that a configuration names.

    Raises:
        UserError: the pretrained model is missing, incomplete or does not fit the options.
    """
    module, name = _FAMILIES[config.family]
    return getattr(importlib.import_module(module), name)(config)
