"""The interface of a model family: everything that tells one family from another, and nothing else."""

import hashlib
import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from engine.config import CacheConfig
from engine.data.shards import Field
from engine.diffusion import DiscreteSchedule
from engine.errors import UserError
from engine.files import digest

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_FAMILIES = {"sd": ("engine.models.stable_diffusion", "StableDiffusion")}


class Family(ABC):
    """A family reads one published pipeline layout. Building it reads configurations only; weights are loaded when asked for.

    Records: `record_spec` names the tensors that a sample's shard record holds. `prepare` turns an image into the encoder's
    inputs (one dictionary per stored variant, called from several threads); `encode_images` and `encode_captions` turn
    batches of those into record rows.

    Training: `load_model` gives the trained module in fp32; `predict` is the model call and nothing else; `mean`, and `std`
    if there is one, name the record's fields that x0 is drawn from.
    """

    captioned: bool  # whether records hold captions
    mean: str
    std: str | None
    schedule: DiscreteSchedule

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.dtype = PRECISIONS[config.mixed_precision]

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

    @abstractmethod
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Record rows of captions."""

    @abstractmethod
    def decode(self, rows: Tensor) -> list[Image.Image]:
        """Pictures of rows of the field `mean`, for looking at shards."""

    @abstractmethod
    def load_model(self) -> nn.Module:
        """The module that is trained, in fp32 on the host, in training mode."""

    @abstractmethod
    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        """The model's prediction for noisy samples [B, C, H, W] at timesteps [B]."""

    @abstractmethod
    def pipeline(self, model: nn.Module, preview: bool) -> Any:
        """A diffusers pipeline with the trained module in place: in the run's precision and without a safety checker for a
        preview, else as it is published."""


def open_family(config: CacheConfig) -> Family:
    """The family that a configuration names.

    Raises:
        UserError: the pretrained model is missing, incomplete or does not fit the options.
    """
    module, name = _FAMILIES[config.family]
    return getattr(importlib.import_module(module), name)(config)


def digest_folder(folder: Path) -> str:
    """One digest over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(folder).as_posix()}\0{digest(path)}\0".encode())
    return total.hexdigest()


def require(path: Path, model: str) -> Path:
    """`path`, or a `UserError` that names the part of `model` that is missing."""
    if not path.exists():
        raise UserError(f"{model}: no {path.name} there; give a complete diffusers pipeline")
    return path
