"""Small training runs for the tests of the loop."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.config.options import TrainConfig
from tests.commands import ON_GPU

# To compare a run on a GPU with one on the CPU, or with one that divides the batch otherwise. Matrix products and convolutions
# choose the order of their sums by shape there, and AdamW magnifies what differs in gradients near zero.
SLACK = 10 if ON_GPU else 1


def config(model: Path, images: Path, shards: Path, output: Path, **options) -> TrainConfig:
    """A run over the shards of the `shards` fixture: global batch 4, 8 steps; on a GPU too it repeats bit for bit."""
    defaults = {
        "train_batch_size": 4, "max_train_steps": 8, "seed": 11, "learning_rate": 1e-3, "log_every": 1, "report_to": "none",
        "use_ema": True, "deterministic": ON_GPU,
    }  # fmt: skip
    return TrainConfig(
        family="sd", pretrained_model_name_or_path=str(model), train_data_dir=str(images), shards_dir=str(shards),
        output_dir=str(output), resolution=16, random_flip=True, shard_records=5, **(defaults | options),
    )  # fmt: skip


def command(config: TrainConfig, *launcher: str) -> list[str]:
    """The command line of a configuration."""
    arguments: list[str] = []
    for name, value in config.model_dump(exclude_unset=True).items():
        if isinstance(value, bool):
            arguments += [f"--{name}" if value else f"--no-{name}"]
        elif value is not None:
            arguments += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return [*(launcher or (sys.executable, "-m", "engine.run")), *arguments]


def checkpoint_tensors(checkpoint: Path, kind: str) -> dict[str, torch.Tensor]:
    """Whole parameters of one kind, put together from the slices of all files; flat, in the order in which they are stored."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in checkpoint.glob("rank-*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.startswith(f"{kind}/"):
                parameter, start = name.removeprefix(f"{kind}/").rsplit("@", 1)
                pieces.setdefault(parameter, {})[int(start)] = tensor
    assert pieces, f"{checkpoint} holds no {kind}"
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v"), "to_added_kv": ("add_k_proj", "add_v_proj")}


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def published_order(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint (convolutions channels last, projections fused) as the published model has them."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    result = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        path, _, layer = path.rpartition(".")
        if layer in FUSED:
            names = [f"{path}.{part}.{kind}" for part in FUSED[layer]]
            for part, piece in zip(names, tensor.split([shapes[part].numel() for part in names]), strict=True):
                result[part] = piece.view(shapes[part])
        elif name in turned:
            out, rest, height, width = shapes[name]
            result[name] = tensor.view(out, height, width, rest).permute(0, 3, 1, 2)
        else:
            result[name] = tensor.view(shapes[name])
    return result


def relative_distance(ours: dict, theirs: dict, start: dict) -> float:
    """The difference of two results, relative to how far training moved them: L2 over all parameters."""
    difference = moved = 0.0
    for name, value in theirs.items():
        value = value.detach().double().reshape(-1)
        difference += (ours[name].detach().double().reshape(-1) - value).square().sum().item()
        moved += (value - start[name].detach().double().reshape(-1)).square().sum().item()
    return (difference / moved) ** 0.5
