"""The frozen side of a family: from images and captions to the records of the shards, and back to pictures."""

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.catalogue import FAMILIES
from engine.config.options import CacheConfig
from engine.data.format.index import Field
from engine.errors import UserError
from engine.files import reading
from engine.models.published import locate

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Encoder(ABC):
    """The loaded frozen models of a family, on one device in the precision of the run, all of them given when it is made."""

    @abstractmethod
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Record rows of stacked inputs of `Encoding.prepare`."""

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Record rows of captions; only families that are captioned have any."""
        raise NotImplementedError


class Encoding(ABC):
    """What a family's records hold and how they are made. Building it reads configurations only.

    captioned: whether records hold captions.
    mean, std: the record's fields that x0 is drawn from; without `std` x0 is `mean`.
    path: the directory of the pipeline with the trained model in it.

    Raises:
        UserError: a pretrained model is missing, incomplete or does not fit the options.
    """

    mean: str
    std: str | None = None

    def __init__(self, config: CacheConfig) -> None:
        family = FAMILIES[config.family]
        self.config = config
        self.dtype = PRECISIONS[config.mixed_precision]
        self.captioned = family.captioned
        self.path = locate(config, family.pipeline)

    @property
    @abstractmethod
    def record_spec(self) -> dict[str, Field]:
        """Names, shapes, dtypes and kinds of the tensors of a record."""

    @property
    def image_side(self) -> int:
        """To how many pixels the shorter side of an image is brought."""
        return self.config.resolution

    @abstractmethod
    def encoder_digests(self) -> dict[str, Callable[[], str]]:
        """What computes the digest of each frozen model's files, by name; it raises `UserError` where they are not whole."""

    def encoder_identity(self) -> dict[str, str]:
        """Digests of the frozen models' files by name, for the fingerprint of the shards."""
        return {name: digest() for name, digest in self.encoder_digests().items()}

    @abstractmethod
    def preprocessing_identity(self) -> dict[str, Any]:
        """The options that shape the encoder's inputs."""

    @abstractmethod
    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        """The encoder's inputs for every stored variant of an RGB image, called from several threads; `record` seeds crops."""

    @abstractmethod
    def decode(self, rows: Tensor) -> list[Image.Image]:
        """Pictures of rows of the field `mean`, for looking at shards."""

    @abstractmethod
    def load_encoder(self, device: torch.device) -> Encoder:
        """The frozen models, loaded."""

    @contextlib.contextmanager
    def encoder(self, device: torch.device) -> Iterator[Encoder]:
        """The frozen models, loaded; at the end their memory is given back."""
        encoder = self.load_encoder(device)
        try:
            yield encoder
        finally:
            vars(encoder).clear()  # whoever still has a name for it

    def _require_steps(self, step: int, why: str) -> None:
        """Refuses a resolution that is no multiple of `step`; names the nearest that is."""
        resolution = self.config.resolution
        if resolution % step:
            nearest = max(round(resolution / step), 1) * step
            raise UserError(f"--resolution {resolution}: {why}; the nearest is {nearest}")


def open_encoding(config: CacheConfig) -> Encoding:
    """The frozen side of the family that a configuration names.

    Raises:
        UserError: a pretrained model is missing, incomplete or does not fit the options.
    """
    family = FAMILIES[config.family]
    frozen = getattr(importlib.import_module(f"engine.models.{family.module}"), family.frozen)
    with reading(Path(getattr(config, family.pipeline)), "its configurations do not hold what they should; download it again"):
        return frozen(config)
