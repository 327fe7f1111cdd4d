"""The image encoder of Wuerstchen: EfficientNet-V2-S (arXiv:2104.00298) without its classifier, and a mapper to 16 channels.

Written here because Wuerstchen needs it where torchvision cannot be installed. Parameters have torchvision's names, so that
the published weights load strictly: `backbone.*` are torchvision's `efficientnet_v2_s().features`, `mapper.*` a convolution and
its normalisation. For encoding only: stochastic depth, which does nothing in evaluation, is left out.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from engine.errors import UserError, first_line
from engine.models.weights import read_tensors, require_finite

CHECKPOINT_FILE = "model_v2_stage_b.pt"
CHECKPOINT_ENTRY = "effnet_state_dict"
STRIDE = 32
MOST_CHANNELS = 1024  # of the latents; Wuerstchen has 16

# Kind, expansion, stride, input channels, output channels, layers: table 4 of the paper, with the 24, 48, ... of variant S.
_STAGES = (
    ("fused", 1, 1, 24, 24, 2),
    ("fused", 4, 2, 24, 48, 4),
    ("fused", 4, 2, 48, 64, 4),
    ("depthwise", 4, 2, 64, 128, 6),
    ("depthwise", 6, 1, 128, 160, 9),
    ("depthwise", 6, 2, 160, 256, 15),
)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution, normalisation and, unless it projects, SiLU."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, nn.SiLU(inplace=True)) if act else nn.Sequential(*layers)


class _SqueezeExcitation(nn.Module):
    """Scales channels by what two 1x1 convolutions make of their means (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * self.fc2(nn.functional.silu(self.fc1(means))).sigmoid()


class _Block(nn.Module):
    """An inverted bottleneck, with a depthwise convolution and squeeze-excitation, or with both fused into a 3x3 one."""

    def __init__(self, kind: str, expansion: int, stride: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers: list[nn.Module]
        if kind == "depthwise":
            layers = [
                _convolution(inputs, wide, 1),
                _convolution(wide, wide, 3, stride, groups=wide),
                _SqueezeExcitation(wide, inputs // 4),
                _convolution(wide, outputs, 1, act=False),
            ]
        elif expansion == 1:
            layers = [_convolution(inputs, outputs, 3, stride)]
        else:
            layers = [_convolution(inputs, wide, 3, stride), _convolution(wide, outputs, 1, act=False)]
        self.block = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.is_residual else self.block(x)


def _stage(kind: str, expansion: int, stride: int, inputs: int, outputs: int, layers: int) -> nn.Sequential:
    first = _Block(kind, expansion, stride, inputs, outputs)
    return nn.Sequential(first, *(_Block(kind, expansion, 1, outputs, outputs) for _ in range(layers - 1)))


class EfficientNetEncoder(nn.Module):
    """Images [B, 3, H, W], normalised with ImageNet's statistics, to latents [B, 16, H / 32, W / 32]."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        stages = [_stage(*stage) for stage in _STAGES]
        self.backbone = nn.Sequential(_convolution(3, 24, 3, stride=2), *stages, _convolution(256, 1280, 1))
        # The normalisation gives latents of mean 0 and deviation 1.
        self.mapper = nn.Sequential(nn.Conv2d(1280, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.mapper(self.backbone(pixels))


def read_weights(name: str, cache_dir: str | None) -> dict[str, Tensor]:
    """The encoder's state dict, from a .safetensors file, a stage-B checkpoint (.pt), or a hub repository that holds one.

    A checkpoint is a pickle, opened with `weights_only` and mapped, so that nothing else in it is run or read.

    Raises:
        UserError: no such file, or not a checkpoint of this encoder.
    """
    option = f"--pretrained_image_encoder_name_or_path {name}"
    path = Path(name)
    if not path.is_file():
        if path.suffix in (".pt", ".safetensors") or path.is_absolute() or path.exists():
            raise UserError(f"{option}: no such file; give a .pt or .safetensors file, or a repository on the hub")
        try:
            path = Path(hf_hub_download(name, CHECKPOINT_FILE, cache_dir=cache_dir))
        except Exception as error:  # a connection, a missing repository or file: the library raises many kinds
            raise UserError(f"{option}: neither a file nor on the hub: {first_line(error)}") from None
    weights: Any = read_tensors(path)
    if path.suffix != ".safetensors":
        weights = weights.get(CHECKPOINT_ENTRY)
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise UserError(f"{option}: holds no {CHECKPOINT_ENTRY}; give Wuerstchen's {CHECKPOINT_FILE}")
    _fitting(weights)
    require_finite(path, weights)
    return weights


def _fitting(weights: dict[str, Any]) -> EfficientNetEncoder:
    """The encoder that weights are for, on the meta device.

    Raises:
        UserError: names, shapes or kinds are not this encoder's.
    """
    mapper = weights.get("mapper.0.weight")
    channels = mapper.shape[0] if isinstance(mapper, Tensor) and mapper.dim() else 0
    with torch.device("meta"):
        encoder = EfficientNetEncoder(channels if 0 < channels <= MOST_CHANNELS else 16)
    wanted = encoder.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        found = weights.get(name)
        if name not in wanted or not isinstance(found, Tensor) or found.shape != wanted[name].shape:
            problem = f"not an EfficientNet-V2-S encoder: {name} is missing, not its own, or of another shape"
        elif not found.is_floating_point() and wanted[name].is_floating_point():
            problem = f"{name} holds {found.dtype}"
        else:
            continue
        raise UserError(f"--pretrained_image_encoder_name_or_path: {problem}")
    return encoder


def load_encoder(weights: dict[str, Tensor]) -> EfficientNetEncoder:
    """The encoder with these weights, in evaluation mode and fp32.

    Raises:
        UserError: names or shapes are not this encoder's.
    """
    encoder = _fitting(weights)
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder.eval().requires_grad_(False).float()
