"""Stable Diffusion as its original program lays it out, which web interfaces read: a pipeline's parts in a single file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from engine.errors import UserError
from engine.files import reading, write_atomically
from engine.models.check import load_model
from engine.models.configurations import read_part
from engine.models.published import read_tokenizer
from engine.models.single_file import CLIP, CONFIGURATIONS, OPEN_CLIP, UNET, VAE
from engine.models.weights import stored_tensors, weight_files
from engine.tensors import write_one_by_one

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def write_single_file(pipeline: Path, file: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the UNet, VAE and text encoder of a pipeline's folder into one file, with their configurations in its metadata.

    Args:
        dtype: of the tensors; None keeps each part's.

    Raises:
        UserError: a part has no place in that layout.
    """
    with reading(pipeline, "only what Stable Diffusion 1.x and 2.x were published as has a place in a single file"):
        tensors, metadata = _laid_out(pipeline, file.stem, dtype)
    write_atomically(file, lambda path: write_one_by_one(path, tensors, tensors.items(), metadata))


def _laid_out(pipeline: Path, title: str, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a pipeline under their original names, and what is said of them."""
    unet, vae = (
        _load(pipeline / part, model, dtype) for part, model in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
    )
    text_encoder = _load(pipeline / "text_encoder", CLIPTextModel, dtype)
    tokenizer = read_tokenizer(pipeline)
    scheduler = read_part(pipeline / "scheduler", DDPMScheduler.load_config, pipeline)
    second = text_encoder.config.hidden_act != "quick_gelu"
    tensors = {UNET + name: tensor for name, tensor in _unet_tensors(unet)}
    tensors |= {VAE + name: tensor for name, tensor in _vae_tensors(vae)}
    encoded = _open_clip_tensors(text_encoder) if second else text_encoder.state_dict().items()
    tensors |= {(OPEN_CLIP if second else CLIP) + name.removeprefix("text_model."): tensor for name, tensor in encoded}
    prediction = scheduler.get("prediction_type", "epsilon")
    if scheduler.get("rescale_betas_zero_snr"):  # as web interfaces know it
        tensors |= {name: torch.empty(0) for name in ("ztsnr", *(["v_pred"] if prediction == "v_prediction" else []))}
    configurations = {
        "unet": _public(unet.config), "vae": _public(vae.config), "text_encoder": text_encoder.config.to_diff_dict(),
        "scheduler": scheduler, "prediction": prediction, "pad_token": tokenizer.pad_token,
    }  # fmt: skip
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{2 if second else 1}",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        CONFIGURATIONS: json.dumps(configurations),
    }
    return tensors, metadata


def _load(folder: Path, model: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        first = weight_files(folder, model, None)
        stored = next(iter(stored_tensors(first[0]).values())) if first else torch.empty(0)
        dtype = stored.dtype
    return load_model(folder, model, None, dtype)


def _public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _replaced(name: str, names: dict[str, str]) -> str:
    """The name with every part that `names` has a new one for."""
    for old, new in names.items():
        name = re.sub(rf"(?<![\w]){re.escape(old)}(?![\w])", new, name)
    return name


def _unet_tensors(unet: Any) -> Iterator[tuple[str, Tensor]]:
    layers = unet.config.layers_per_block
    attends = ["CrossAttn" in block for block in unet.config.up_block_types]
    for name, tensor in unet.state_dict().items():
        yield unet_name(name, layers, attends), tensor


def unet_name(name: str, layers: int, attends: list[bool]) -> str:
    """The original name of one of the UNet's tensors.

    Args:
        layers: residual blocks per level; on the way up there is one more.
        attends: whether the levels have attention, on the way up.
    """
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        way, level, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        place = level * (layers + 1) + number + (way == "down")
        block = f"{'input' if way == 'down' else 'output'}_blocks.{place}"
        return f"{block}.1.{rest}" if kind == "attentions" else f"{block}.0.{_replaced(rest, _RESNET)}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        if match[1] == "attentions":
            return f"middle_block.{2 * int(match[2]) + 1}.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_replaced(match[3], _RESNET)}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name):
        level = int(match[1])
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if attends[level] else 1}.{match[2]}"
    replaced = _replaced(name, _ENDS)
    if replaced == name:
        raise UserError(f"the UNet's {name} has no place in the layout of Stable Diffusion 1.x and 2.x")
    return replaced


def _vae_tensors(vae: Any) -> Iterator[tuple[str, Tensor]]:
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        original = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        original = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", original)
        original = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", original)
        original = original.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
        original = original.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        original = original.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if ".attn_1." in original:
            original = _replaced(original, _ATTENTION)
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor  # a convolution there
        yield original, tensor


def _open_clip_tensors(text_encoder: Any) -> Iterator[tuple[str, Tensor]]:
    """OpenCLIP has the projections to queries, keys and values in one."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    for name, tensor in state.items():
        if match := re.match(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            joined = torch.cat([state[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] for part in "qkv"])
            yield f"{_replaced(match[1], _OPEN_CLIP)}.attn.in_proj_{match[2]}", joined
        elif name == "embeddings.position_embedding.weight":
            yield "positional_embedding", tensor
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            yield _replaced(name, _OPEN_CLIP), tensor
