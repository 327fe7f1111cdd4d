"""The frozen side of a family: from images and captions to the records of the shards, and back to pictures."""

import contextlib
import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.catalogue import FAMILIES
from engine.config.options import CacheConfig
from engine.data.format.index import Field
from engine.errors import UserError
from engine.files import reading
from engine.models.check import load_model
from engine.models.published import locate, tokenize
from engine.models.weights import NotFinite

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Encoder(ABC):
    """The loaded frozen models of a family, on one device in the precision of the run, all of them given when it is made.

    text_encoder: of families that are captioned.
    """

    encoding: "Encoding"
    text_encoder: Any = None

    @abstractmethod
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Record rows of stacked inputs of `Encoding.prepare`."""

    @torch.inference_mode()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Record rows of captions, and the rows of `text_fields` of those that stay tokens, which only show whether a run can
        train on them; only families that are captioned have any."""
        return self.encoding.rows_of_captions(self.text_encoder, captions)


class Encoding(ABC):
    """What a family's records hold and how they are made. Building it reads configurations only.

    captioned: whether records hold captions.
    keeps_tokens: whether they hold them as tokens, which the text encoder reads in the step.
    tokenizer, text_config: of families that are captioned.
    mean, std: the record's fields that x0 is drawn from; without `std` x0 is `mean`.
    path: the directory of the pipeline with the trained model in it.
    size: width and height in pixels that images are brought to.

    Raises:
        UserError: a pretrained model is missing, incomplete or does not fit the options.
    """

    mean: str
    std: str | None = None
    tokenizer: Any
    text_config: Any
    text_model: Any = None  # the class of the text encoder

    def __init__(self, config: CacheConfig) -> None:
        family = FAMILIES[config.family]
        self.config = config
        self.dtype = PRECISIONS[config.mixed_precision]
        self.captioned = family.captioned
        self.keeps_tokens = family.captioned and config.cache_text == "tokens"
        self.path = locate(config, family.pipeline)
        self._identity: dict[str, str] = {}  # of all copies
        self.size = config.resolution, config.resolution

    @property
    def record_spec(self) -> dict[str, Field]:
        """Names, shapes, dtypes and kinds of the tensors of a record."""
        return self.image_fields | self.mask_fields | (self.token_fields if self.keeps_tokens else self.text_fields)

    @property
    @abstractmethod
    def image_fields(self) -> dict[str, Field]:
        """Those of a record that belong to images."""

    @property
    def mask_fields(self) -> dict[str, Field]:
        """With --mask_column the weights of the positions of x0, 255 for one."""
        if not self.config.mask_column:
            return {}
        return {"mask": Field((1, *self.image_fields[self.mean].shape[1:]), torch.uint8, "image")}

    @property
    def text_fields(self) -> dict[str, Field]:
        """Those that belong to captions, as the trained model is given them."""
        return {}

    @property
    def token_fields(self) -> dict[str, Field]:
        """Those that belong to captions as tokens, of which `encode_tokens` makes `text_fields`."""
        return {"tokens": Field((self.tokenizer.model_max_length,), self._token_dtype, "caption")}

    @property
    def _token_dtype(self) -> torch.dtype:
        return torch.uint16 if self.text_config.vocab_size <= 2**16 else torch.int32

    @property
    def limits(self) -> dict[str, int]:
        """What the numbers of some fields of a record must stay below."""
        return {"tokens": self.text_config.vocab_size} if self.keeps_tokens else {}

    def tokens_of(self, captions: list[str]) -> dict[str, Tensor]:
        """Rows of `token_fields`, on the host."""
        tokens, mask = tokenize(self.tokenizer, captions)
        rows = {"tokens": tokens.to(self._token_dtype), "attention_mask": mask.bool()}
        return {name: rows[name] for name in self.token_fields}

    @staticmethod
    def encode_tokens(text_encoder: Any, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the text encoder makes of rows of `token_fields` on its device; the host reads nothing: it may be captured."""
        raise NotImplementedError

    def rows_of_captions(self, text_encoder: Any, captions: list[str]) -> dict[str, Tensor]:
        """What `Encoder.encode_captions` says."""
        tokens = self.tokens_of(captions)
        given = {name: rows.to(text_encoder.device) for name, rows in tokens.items()}
        if "attention_mask" in given and given["attention_mask"].all():
            del given["attention_mask"]  # it hides nothing, and without it attention takes a faster kernel
        states = self.encode_tokens(text_encoder, given)
        wanted = self.record_spec | self.text_fields
        return {name: rows for name, rows in (tokens | states).items() if name in wanted}

    @torch.inference_mode()
    def unconditional(self, device: torch.device) -> dict[str, Tensor]:
        """The condition of a sample that is trained without one: a row [*shape] of each of its fields, on the host.

        The empty caption's, as shards hold it, which is what the published pipelines guide against where no negative prompt is
        given: `StableDiffusionPipeline.encode_prompt` takes the last hidden state of "", padded to the tokenizer's length;
        `KandinskyV22PriorPipeline._encode_prompt` the projection, the last hidden state and the mask of "";
        `WuerstchenPriorPipeline.encode_prompt` the last hidden state of "" under its mask.

        Raises:
            UserError: the model that makes it is not there, or makes no numbers of it.
        """
        rows = self.tokens_of([""]) if self.keeps_tokens else self.rows_of_captions(self.load_text_encoder(device), [""])
        return {name: rows[name][0].cpu() for name, field in self.record_spec.items() if field.per == "caption"}

    def load_text_encoder(self, device: torch.device) -> Any:
        return load_model(self.path / "text_encoder", self.text_model, self.config.variant, self.dtype).to(device).eval()

    @property
    def size_identity(self) -> dict[str, Any]:
        """What an identity says of the size: one side of a square, else both."""
        width, height = self.size
        return {"resolution": width} if width == height else {"size": [width, height]}

    def of_size(self, width: int, height: int) -> Self:
        """The same for records of images of another size, which the family must be able to take."""
        other = copy.copy(self)
        other.size = width, height
        return other

    def of_data_set(self, config: CacheConfig) -> Self:
        """The same for a data set with options of its own."""
        other = copy.copy(self)
        other.config = config
        return other

    @abstractmethod
    def encoder_digests(self) -> dict[str, Callable[[], str]]:
        """What computes the digest of each frozen model's files, by name; it raises `UserError` where they are not whole."""

    def encoder_identity(self, at_hand: bool = False) -> dict[str, str]:
        """Digests of the frozen models' files by name, for the fingerprint of the shards; computed once for all copies.

        Args:
            at_hand: leaves out what is not whole here, which training from shards alone allows.
        """
        for name, digest in self.encoder_digests().items():
            if name not in self._identity:
                try:
                    self._identity[name] = digest()
                except UserError as error:
                    if not at_hand or isinstance(error, NotFinite):
                        raise
        return dict(self._identity)

    @abstractmethod
    def preprocessing_identity(self) -> dict[str, Any]:
        """The options that shape the encoder's inputs."""

    @abstractmethod
    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        """The encoder's inputs for every stored variant of an RGB image, called from several threads; `record` seeds crops."""

    def crops(self, image: Image.Image, record: int, resampling: Image.Resampling) -> list[Image.Image]:
        """What every stored variant shows of an image, in its own mode and the size of the encoding; of families with masks."""
        raise NotImplementedError

    def prepare_mask(self, mask: Image.Image, record: int) -> list[dict[str, Tensor]]:
        """Rows of `mask_fields` for every stored variant: of a grey mask of the image's size the same crops, each position of
        x0 with the average of its area. Called as `prepare`."""
        _, height, width = self.mask_fields["mask"].shape
        areas = (crop.resize((width, height), Image.Resampling.BOX) for crop in self.crops(mask, record, Image.Resampling.BOX))
        return [{"mask": torch.from_numpy(np.array(area))[None]} for area in areas]

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
        """Says that sides of images are multiples of `step`; refuses a resolution that is not."""
        self._step, self._why = step, why
        self.check_sides("--resolution", self.config.resolution)

    def check_sides(self, option: str, *sides: int) -> None:
        """Refuses what an option says of sides that the models cannot take, and names the nearest that they can."""
        if any(side % self._step for side in sides):
            nearest = (max(round(side / self._step), 1) * self._step for side in sides)
            given, other = ("x".join(map(str, values)) for values in (sides, nearest))
            raise UserError(f"{option} {given}: {self._why}; the nearest is {other}")


def open_encoding(config: CacheConfig) -> Encoding:
    """The frozen side of the family that a configuration names.

    Raises:
        UserError: a pretrained model is missing, incomplete or does not fit the options.
    """
    family = FAMILIES[config.family]
    frozen = getattr(importlib.import_module(f"engine.models.{family.module}"), family.frozen)
    with reading(Path(getattr(config, family.pipeline)), "its configurations do not hold what they should; download it again"):
        return frozen(config)
