"""Adapters, LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353), around the layers of a frozen model.

PEFT makes them: which layers, names, first values. Then linear layers take the form that trains fastest, `AdaptedLinear`,
which the training form (training_form.py) also makes of projections that it stacks. Layers with dropout or DoRA, and
convolutions, stay PEFT's own, but for the arithmetic of DoRA.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from engine.config.options import TrainConfig
from engine.config.schema import default_of
from engine.errors import UserError
from engine.messages import warn
from engine.models.adapter import MAGNITUDE, Adapter, read_adapter
from engine.models.parts import parts_of, prefix_of
from engine.models.quantized import QuantizedLinear

NAME = "default"  # of the adapter, to PEFT
Layers = Mapping[str, tuple[int, float]]  # path in the model of a layer that has an adapter -> its rank and alpha
ALL_LINEAR, CONVOLUTIONS = "all-linear", "convolutions"  # what --lora_targets may name beside layers
# Of the text encoder, where --lora_targets names none of its layers, as in the script.
OF_TEXT_ENCODER = [f"text_encoder.*.{layer}" for layer in ("q_proj", "k_proj", "v_proj", "out_proj")]


class AdaptedLinear(nn.Module):
    """One linear layer, or several stacked ones of the same input, with their adapters: y + s B A x in three products.

    The A's are stacked; the B's lie on the diagonal of one matrix, so that each adapter moves its own layer alone.

    base_layer: the frozen layer, or all of them on top of each other.
    lora_A: [adapters * rank, in]; lora_B: [adapters, out of one layer, rank].
    adapted: which of the stacked layers the adapters are of, in order.
    """

    places: Tensor

    def __init__(self, base: nn.Module, layers: Sequence[Any]) -> None:
        """
        Args:
            layers: PEFT's, or plain ones that have no adapter, in the order in which they are stacked in `base`.
        """
        super().__init__()
        self.base_layer = base
        self.adapted = [number for number, layer in enumerate(layers) if has_adapter(layer)]
        adapters = [layers[number] for number in self.adapted]
        self.rank: int = adapters[0].r[NAME]
        self.scaling: float = adapters[0].scaling[NAME]
        self.alpha: float = adapters[0].lora_alpha[NAME]
        self.lora_A = nn.Parameter(torch.cat([layer.lora_A[NAME].weight.detach() for layer in adapters]))
        self.lora_B = nn.Parameter(torch.stack([layer.lora_B[NAME].weight.detach() for layer in adapters]))
        places = torch.zeros(len(layers), 1, len(adapters), 1)
        for column, row in enumerate(self.adapted):
            places[row, 0, column] = 1
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # In place: the product adds to what the base gave, which nothing else holds.
        result = self.base_layer(rows).addmm_(F.linear(rows, self.lora_A), self.diagonal().t(), alpha=self.scaling)
        return result.view(*x.shape[:-1], -1)

    def diagonal(self) -> Tensor:
        """The B's as one matrix [out, adapters * rank] of blocks, zero elsewhere."""
        if self.places.numel() == 1:
            return self.lora_B[0]
        places = self.places.to(self.lora_B.dtype)  # which ZeRO 3 leaves to buffers
        return (places * self.lora_B.transpose(0, 1)).flatten(2).flatten(0, 1)

    @property
    def weight(self) -> Tensor:
        """The base's, as those who ask a linear layer for its dtype find it."""
        return self.base_layer.weight  # type: ignore[return-value]


class Dora:
    """DoRA in a layer of PEFT's: what it computes (arXiv:2402.09353, section 4.3), in operations that compile into one graph.

    With W' = W + s B A, each output of W' x is multiplied by m / ||W'||, of which the norm gets no gradient.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **unused: Any) -> Tensor:
        """
        Args:
            module: PEFT's layer.
            result: what the frozen layer gave.
        """
        base, scaling = module.base_layer, module.scaling[active_adapter]
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, magnitude = module.lora_dropout[active_adapter], module.lora_magnitude_vector[active_adapter].weight
        per_output = (-1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)
        with torch.no_grad():
            weight = base.dequantized(x.dtype) if isinstance(base, QuantizedLinear) else base.weight
            change = (up.weight.flatten(1) @ down.weight.flatten(1)).view_as(weight)
            norm = (weight + scaling * change).flatten(1).norm(dim=1).to(weight.dtype)
        bias = 0 if base.bias is None else base.bias.view(per_output)
        plain = result - bias
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            plain = base(x) - bias
        factor = (magnitude.flatten() / norm).view(per_output)
        return result + (factor - 1) * plain + factor * up(down(x)) * scaling


def has_adapter(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def can_stack(layers: Sequence[nn.Module]) -> bool:
    """Whether linear layers can be one product with their adapters: of one rank and scale, without dropout and DoRA."""
    adapted: list[Any] = [layer for layer in layers if has_adapter(layer)]
    plain = all(isinstance(layer.lora_dropout[NAME], nn.Identity) and not layer.lora_variant for layer in adapted)
    return plain and len({(layer.r[NAME], layer.scaling[NAME]) for layer in adapted}) <= 1


def is_plain_linear(layer: Any) -> bool:
    """Whether a layer of PEFT's is a linear one that `AdaptedLinear` can be in the place of."""
    return (
        has_adapter(layer)
        and not isinstance(layer, AdaptedLinear)
        and isinstance(layer.base_layer, nn.Linear)
        and can_stack([layer])
    )


def add_adapters(model: Any, part: str, config: TrainConfig, seed: int, layers: Layers | None = None) -> None:
    """Freezes a published model, and adds adapters, in place.

    Args:
        part: as `parts_of` takes it.
        seed: of their first values, the same on all processes.
        layers: that have one; if none, those that the options say, with the values of `--lora_weights`.

    Raises:
        UserError: as `chosen_layers`.
    """
    start = _start(model, part, config) if config.lora_weights and not layers else None
    layers = _layers_of(start) if start else layers or chosen_layers(model, part, config)
    model.requires_grad_(False)
    options = LoraConfig(
        r=config.lora_rank or 0,
        target_modules="|".join(map(re.escape, layers)),
        rank_pattern={f"^{re.escape(name)}": rank for name, (rank, _) in layers.items()},
        alpha_pattern={f"^{re.escape(name)}": alpha for name, (_, alpha) in layers.items()},
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        init_lora_weights="gaussian" if config.lora_init == "gaussian" else True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(options, model, adapter_name=NAME)
    for layer in model.modules():
        if getattr(layer, "lora_variant", None):
            layer.lora_variant[NAME] = Dora()
    if start:
        set_peft_model_state_dict(model, {name: tensor.float() for name, tensor in start.tensors.items()}, NAME)


def chosen_layers(model: Any, part: str, config: TrainConfig) -> Layers:
    """The layers that the options ask adapters for; the model's weights may be on the meta device.

    Raises:
        UserError: they name no layer of the model, or it has none that `--lora_weights` are for.
    """
    assert config.lora_rank is not None
    if config.lora_weights:
        return _layers_of(_start(model, part, config))
    names = adapted_layers(model, config.lora_targets)
    if config.lora_targets != default_of(TrainConfig, "lora_targets", config.family, config.recipe):
        for target in config.lora_targets:
            if not any(_is_meant(target, name, model.get_submodule(name)) for name in names):
                warn(f"--lora_targets {target}: no linear layer or convolution of the model has such a name")
    if config.train_text_encoder and not any(name.startswith("text_encoder.") for name in names):
        names += adapted_layers(model, OF_TEXT_ENCODER)
    return dict.fromkeys(names, (config.lora_rank, config.lora_alpha or float(config.lora_rank)))


def can_have_adapters(model: nn.Module, layers: Layers, rank: int) -> bool:
    """Whether a model can have the adapters that a checkpoint says, of this rank at most."""
    found = dict(model.named_modules())
    return all(_can_have_adapter(found.get(name)) and of <= rank for name, (of, _) in layers.items())


def _layers_of(adapter: Adapter) -> Layers:
    return {name: (adapter.rank(name), alpha) for name, alpha in adapter.alphas.items()}


def _start(model: Any, part: str, config: TrainConfig) -> Adapter:
    """The adapter of `--lora_weights`, by the names of the model's own layers.

    Raises:
        UserError: it is none of the model, has another rank or kind than the options say, or could not learn.
    """
    path = f"--lora_weights {config.lora_weights}"
    adapter = read_adapter(Path(str(config.lora_weights)), parts_of(model, part))
    if still := next((name for name, alpha in adapter.alphas.items() if alpha <= 0), None):
        raise UserError(
            f"{path}: the alpha of {still} is {adapter.alphas[still]:g}, with which it learns nothing; give another"
        )
    if config.train_text_encoder and "text_encoder" not in adapter.parts:
        raise UserError(f"{path}: it has no layer of the text encoder; leave out --train_text_encoder")
    rank = max(map(adapter.rank, adapter.alphas))
    if rank != config.lora_rank:
        raise UserError(f"{path}: its rank is {rank}; give --lora_rank {rank}")
    lengths = [name for name in adapter.tensors if name.endswith(MAGNITUDE)]
    if bool(lengths) != config.use_dora:
        raise UserError(f"{path}: {'is DoRA; give' if lengths else 'is no DoRA; leave out'} --use_dora")
    within = prefix_of(model, part)
    tensors = {name.removeprefix(within): tensor for name, tensor in adapter.tensors.items()}
    return Adapter(tensors, {name.removeprefix(within): alpha for name, alpha in adapter.alphas.items()})


def adapted_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers that `--lora_targets` are of.

    Raises:
        UserError: one of them is of no layer that can have an adapter.
    """
    layers = {name: module for name, module in model.named_modules() if _can_have_adapter(module)}
    found = {target: [name for name, layer in layers.items() if _is_meant(target, name, layer)] for target in targets}
    if not any(found.values()):
        raise UserError(f"--lora_targets {' '.join(targets)}: no linear layer or convolution of the model has such a name")
    chosen = {name for names in found.values() for name in names}
    return [name for name in layers if name in chosen]


def _can_have_adapter(module: Any) -> bool:
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def _is_meant(target: str, name: str, layer: nn.Module) -> bool:
    if target in (ALL_LINEAR, CONVOLUTIONS):
        return isinstance(layer, nn.Linear if target == ALL_LINEAR else nn.Conv2d)
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")
