"""PEFT's adapters in the independent loops that runs are compared with."""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from engine.config.options import TrainConfig


def trained_parameters(model: Any, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The parameters of a published model that a run trains: all, or those of adapters, which are added as by the scripts."""
    if not config.lora_rank:
        return dict(model.named_parameters())
    model.requires_grad_(False)
    kinds = {"all-linear": nn.Linear, "convolutions": nn.Conv2d}
    targets = [name for target in config.lora_targets if target in kinds for name, layer in model.named_modules()
               if isinstance(layer, kinds[target]) and getattr(layer, "groups", 1) == 1]  # fmt: skip
    options = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha or config.lora_rank, lora_dropout=config.lora_dropout,
        target_modules=targets or config.lora_targets, use_dora=config.use_dora,
        init_lora_weights="gaussian" if config.family != "wuerstchen" else True,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    inject_adapter_in_model(options, model)
    torch.manual_seed(config.seed)  # as the run has drawn nothing but those, which dropout does
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
