"""The trained side of a family: everything that tells the training of one from another, and nothing else."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from engine.catalogue import FAMILIES
from engine.config.options import TrainConfig
from engine.data.format.index import Field
from engine.diffusion.schedules import Schedule
from engine.errors import UserError, first_line
from engine.files import reading
from engine.models import float8
from engine.models.encoder import Encoding, open_encoding
from engine.models.inversion import add_vectors
from engine.models.lora import Layers, add_adapters, can_have_adapters, chosen_layers
from engine.models.parts import parts_of
from engine.models.quantized import quantize_base
from engine.models.trained_weights import check_patterns, freeze, learns_like
from engine.models.training_form import SHIPPED, Form, to_training_form

PREVIEW_STEPS = 20  # of the last stage's sampling in validation images, as in the scripts


class Family(ABC):
    """What is trained, and the pipeline that comes of it. Building it reads configurations only.

    encoding: the frozen side, which says what records hold.
    schedule: draws timesteps and turns them into the coefficients of the loss.
    part: what the pipeline calls the model that is trained, or the first of several.
    base_model: the trained checkpoint, as the user named it.
    result: the folder of the trained pipeline within the output directory.
    """

    encoding: Encoding
    schedule: Schedule
    initializer: int | None = None  # the token whose vector that of --placeholder_token begins with
    adapters: Layers | None = None  # that a checkpoint says, where its run began with those of a file; else the options do

    def __init__(self, config: TrainConfig) -> None:
        family = FAMILIES[config.family]
        self.config = config
        self.encoding = open_encoding(config)
        self.part = family.part
        self.base_model: str = getattr(config, family.pipeline)
        self.result = Path(family.result)

    @property
    def reads_tokens(self) -> bool:
        """Whether the frozen text encoder reads captions in the step."""
        return self.encoding.keeps_tokens and not self.config.joins_text_encoder

    @property
    def fields(self) -> dict[str, Field]:
        """What the trained module is given: a record's fields, and what the frozen text encoder makes of them in the step."""
        return self.encoding.record_spec | (self.encoding.text_fields if self.reads_tokens else {})

    @abstractmethod
    def check_files(self) -> None:
        """Opens everything that training, export and validation images will read, of weights the headers alone.

        Raises:
            UserError: something is missing, damaged, or does not fit its configuration, with the remedy.
        """

    @abstractmethod
    def published_model(self) -> Any:
        """The module that is trained, as diffusers loads it, in fp32 on the host."""

    @staticmethod
    @abstractmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        """The model's prediction for noisy samples [B, C, H, W] at timesteps [B]."""

    @abstractmethod
    def pipeline(self, parts: dict[str, Any]) -> Any:
        """The published diffusers pipeline with the trained parts in place, by their names in it, to be saved."""

    @abstractmethod
    def preview(self, parts: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A pipeline from text to images in the run's precision with the trained parts in place, and arguments to call it
        with beside the prompt."""

    @torch.no_grad()
    def try_step(self, model: Any) -> None:
        """Has a model whose weights hold nothing predict for one record, and looks for the weights that options name.

        Raises:
            UserError: what its configuration holds cannot be computed with, or it has none of the weights.
        """
        check_patterns((name for name, _ in model.named_parameters()), self.config)
        self._without_weights = model
        part = self.encoding.path / self.part / "config.json"
        with reading(part, "its model cannot compute with what it holds; download it again"):
            record = {
                name: torch.empty(
                    1, *field.shape, dtype=torch.float32 if field.dtype.is_floating_point else field.dtype, device="meta"
                )
                for name, field in self.fields.items()
            }
            noisy = record[self.encoding.mean]
            prediction = self.predict(model, noisy, torch.zeros(1, device="meta"), record)
            if prediction.shape[0] != 1 or prediction.shape[2:] != noisy.shape[2:]:
                raise ValueError(f"it makes {list(prediction.shape)} of {list(noisy.shape)}")

    def check_adapters(self) -> None:
        """Looks for the layers that are to have adapters in the model, whose files were checked.

        Raises:
            UserError: the model has none, or `--lora_weights` are not for it.
        """
        rank = self.config.lora_rank
        if rank and not self.adapters:
            chosen_layers(self._without_weights, self.part, self.config)
        if self.adapters and not can_have_adapters(self._without_weights, self.adapters, rank or 0):
            raise UserError("the checkpoint names layers with adapters that the model cannot have; give the model of its run")

    def lay_out(self, model: Any, form: Form | None = SHIPPED, seed: int = 0, adapters: Layers | None = None) -> None:
        """Gives a published model the parameters that are trained, as they lie in training, in place.

        Args:
            form: None leaves the modules as they are published.
            seed: of the first values of adapters.
            adapters: layers that have one; if none, those of the family.

        Raises:
            UserError: as `chosen_layers`.
        """
        freeze(model, self.config)
        if self.config.placeholder_token:
            encoding: Any = self.encoding
            model.requires_grad_(False)
            add_vectors(model.text_encoder, encoding.first_new_token, self.config.num_vectors, self.initializer)
        if self.config.lora_rank:
            add_adapters(model, self.part, self.config, seed, adapters or self.adapters)
        if form is not None:
            # Another library's attention does not know stacked projections.
            form = replace(form, projections=form.projections and not self.config.uses_xformers)
            to_training_form(model, form, partial(learns_like, config=self.config))

    def ready_to_train(self, model: Any, form: Form = SHIPPED, seed: int = 0) -> None:
        """Lays a published model out, and gives it the options that shape its training pass, in place.

        Raises:
            UserError: an option cannot be had here.
        """
        self.lay_out(model, form, seed)
        for part in parts_of(model, self.part).values():
            if self.config.gradient_checkpointing:
                _recompute(part)
            if self.config.uses_xformers and not isinstance(part, PreTrainedModel):
                _use_xformers(part)
        if self.config.base_precision not in (None, "bf16"):
            quantize_base(model, self.config)
        if self.config.matrix_precision == "fp8":
            float8.convert(model)

    def load_model(self, form: Form | None = SHIPPED, seed: int = 0) -> nn.Module:
        """The module that is trained, in fp32 on the host, in training mode.

        Args:
            form: None for the published one, without the options that shape its training pass.
            seed: of the first values of adapters.
        """
        model = self.published_model()
        if form is None:
            self.lay_out(model, None, seed)
        else:
            self.ready_to_train(model, form, seed)
        return model.train()


def _recompute(part: Any) -> None:
    """Has a model's activations recomputed in the backward pass."""
    kept = has_dropout(part)  # the state of the generator, needed for dropout alone, is kept by the host
    if isinstance(part, PreTrainedModel):
        part.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": kept})
    else:
        part.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=kept))


def _use_xformers(part: Any) -> None:
    try:
        part.enable_xformers_memory_efficient_attention()
    except Exception as error:  # not installed, or built for another torch or CUDA
        raise UserError(
            f"--attention xformers: {first_line(error)}; install the extra `xformers`, or leave the option out and use "
            "torch's attention"
        ) from None


def has_dropout(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def open_family(config: TrainConfig) -> Family:
    """The family that a configuration names.

    Raises:
        UserError: a pretrained model is missing, incomplete or does not fit the options.
    """
    family = FAMILIES[config.family]
    trained = getattr(importlib.import_module(f"engine.models.{family.module}"), family.trained)
    with reading(Path(getattr(config, family.pipeline)), "its configurations do not hold what they should; download it again"):
        return trained(config)
