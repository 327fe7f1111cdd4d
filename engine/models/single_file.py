"""Stable Diffusion in a single file, as web interfaces keep it: recognised, and opened as a diffusers pipeline offline.

The file's parts are written once, as a pipeline's folder, where downloads are kept; whatever reads pipelines reads those.
"""

import contextlib
import itertools
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.catalogue import INDEX
from engine.config.options import CacheConfig, TrainConfig
from engine.diffusion.schedules import ZERO_TERMINAL
from engine.errors import UserError, disk_problem, first_line, out_of_memory
from engine.files import (
    PARTIAL,
    digest_of,
    discard,
    held,
    parse_json,
    publish_directory,
    read_text,
    reading,
    write_json,
)
from engine.messages import busy, say
from engine.models.check import bounded, empty_model
from engine.models.configurations import TOKENIZER_FILES, configured, read_part
from engine.models.index import has_class
from engine.models.kinds import kind_of_tensors, trained
from engine.models.weights import read_tensors, stored_tensors

TOKENIZER = "openai/clip-vit-large-patch14"
CONFIGURATIONS = "diffusers"  # where in the metadata of files that the engine wrote the configurations of the parts are
UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.model.",
)
_FORMAT = 1  # of the folders that are kept
_PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


@dataclass(frozen=True)
class Configurations:
    """What a file's parts are made with, as the configurations of diffusers and transformers.

    prediction: None where nothing tells.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    prediction: str | None
    pad_token: str


def open_single_file(file: Path, config: CacheConfig) -> Path:
    """The folder of a pipeline that holds what a file does.

    Raises:
        UserError: the file is damaged or something else, or what it does not hold (the tokenizer, sometimes what the model
            predicts) is nowhere.
    """
    with reading(file, "give --original_config with the YAML that it was trained with"):
        shapes = _unwrap(stored_tensors(file))
        _require_stable_diffusion(file, shapes)
        configurations = _configure(file, shapes, config.original_config)
        positions = int(configurations.text_encoder["max_position_embeddings"])
        if not has_class(diffusers, configurations.scheduler["_class_name"]):
            raise ValueError(f"its scheduler is a {configurations.scheduler['_class_name']}, which diffusers does not have")
    if configurations.prediction is None and isinstance(config, TrainConfig) and config.prediction_type is None:
        raise UserError(
            f"{file}: a Stable Diffusion 2.x that does not say what it predicts; give --prediction_type v_prediction (trained "
            "at 768 px) or epsilon (the base, 512 px)"
        )
    tokenizer = _read_tokenizer(file, config)
    described = file.stat()
    with reading(file, "give --original_config with the YAML that it was trained with"):
        tokenizer.pad_token = configurations.pad_token
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        content = [str(file.resolve()), described.st_size, described.st_mtime_ns, vars(configurations), tokenizer.get_vocab()]
        key = digest_of([_FORMAT, tokenizer.model_max_length, *content])
    kept = Path(config.cache_dir or HF_HUB_CACHE) / "single-files"
    folder = kept / f"{file.stem[:100]}-{key[:16]}"
    with _held(kept), busy(f"opening {file}"):
        if not folder.is_dir():
            _write_parts(file, configurations, tokenizer, folder)
    version = "2.x" if _is_second(shapes) else "1.x"
    predicts = getattr(config, "prediction_type", None) or configurations.prediction or "prediction unknown"
    say(f"{file}: opened as Stable Diffusion {version}, {predicts}; its parts are in {folder}")
    return folder


def _unwrap(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors, out of what a training program kept them in, by the names of the original one."""
    while isinstance(inner := tensors.get("state_dict"), Mapping):
        tensors = inner
    old = re.compile(r"cond_stage_model\.transformer\.(?=embeddings|encoder|final_layer_norm)")
    return {old.sub(CLIP, name): tensor for name, tensor in tensors.items()}


def _require_stable_diffusion(file: Path, shapes: dict[str, Any]) -> None:
    kind = kind_of_tensors(shapes)
    if kind:
        raise UserError(f"{file}: this is {kind}; what can be trained: {trained()}")
    for prefix, part in ((UNET, "UNet"), (VAE, "VAE"), ("cond_stage_model.", "text encoder")):
        if not any(name.startswith(prefix) for name in shapes):
            raise UserError(f"{file}: holds no {part} ({prefix}*); give a file with UNet, VAE and text encoder")


def _is_second(shapes: dict[str, Any]) -> bool:
    return any(name.startswith(OPEN_CLIP) for name in shapes)


def _configure(file: Path, shapes: dict[str, Any], original_config: str | None) -> Configurations:
    metadata = _metadata(file)
    if CONFIGURATIONS in metadata and original_config is None:
        return Configurations(**parse_json(metadata[CONFIGURATIONS]))
    recognised = _recognise(shapes, metadata)
    return recognised if original_config is None else _follow(recognised, shapes, Path(original_config))


def _metadata(file: Path) -> dict[str, str]:
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _recognise(shapes: dict[str, Any], metadata: dict[str, str]) -> Configurations:
    """What shapes tell, and for the rest what SD 1.x and 2.x were published with."""
    second = _is_second(shapes)
    prediction = _prediction(shapes, metadata, second)
    side = 768 if prediction == "v_prediction" else 512
    vae = _vae_config(shapes) | {"sample_size": side}
    unet = _unet_config(shapes, second) | {"sample_size": side // 2 ** (len(vae["block_out_channels"]) - 1)}
    zero_terminal = ZERO_TERMINAL if "ztsnr" in shapes else {}
    scheduler = {
        "_class_name": "DDIMScheduler" if second or zero_terminal else "PNDMScheduler",
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
        "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "prediction_type": prediction or "v_prediction", **zero_terminal,
    }  # fmt: skip
    return Configurations(unet, vae, _text_config(shapes, second), scheduler, prediction, "!" if second else "<|endoftext|>")


def _prediction(shapes: dict[str, Any], metadata: dict[str, str], second: bool) -> str | None:
    named = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
    if (said := metadata.get("modelspec.prediction_type", "").lower()) in named:
        return named[said]
    if "v_pred" in shapes:
        return "v_prediction"
    if not second:
        return "epsilon"
    # As diffusers knows SD 2 base from the others.
    return None if "global_step" not in shapes else "epsilon" if shapes["global_step"] == 875000 else "v_prediction"


def _unet_config(shapes: dict[str, Any], second: bool) -> dict[str, Any]:
    widths: list[int] = []
    attends: list[bool] = []
    layers, new_level = 0, True
    for number in itertools.count(1):
        block = f"{UNET}input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            new_level = True
        elif f"{block}.0.out_layers.3.weight" not in shapes:
            break
        elif new_level:
            widths.append(shapes[f"{block}.0.out_layers.3.weight"].shape[0])
            attends.append(f"{block}.1.proj_in.weight" in shapes)
            new_level = False
        layers += len(widths) == 1 and not new_level
    attention = f"{UNET}middle_block.1."
    blocks = [name for name in shapes if name.startswith(attention) and name.endswith("attn2.to_k.weight")]
    return {
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"].shape[1],
        "out_channels": shapes[f"{UNET}out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attending else "DownBlock2D" for attending in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attending else "UpBlock2D" for attending in reversed(attends)],
        "cross_attention_dim": shapes[blocks[0]].shape[1],
        "transformer_layers_per_block": len(blocks),
        "use_linear_projection": len(shapes[f"{attention}proj_in.weight"].shape) == 2,
        "attention_head_dim": [width // 64 for width in widths] if second else 8,
        "upcast_attention": second,
    }


def _vae_config(shapes: dict[str, Any]) -> dict[str, Any]:
    levels = [name for number in range(99) if (name := f"{VAE}encoder.down.{number}.block.0.conv1.weight") in shapes]
    layers = sum(f"{VAE}encoder.down.0.block.{number}.conv1.weight" in shapes for number in range(99))
    return {
        "block_out_channels": [shapes[name].shape[0] for name in levels],
        "layers_per_block": layers,
        "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"].shape[1],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "scaling_factor": 0.18215,
    }


def _text_config(shapes: dict[str, Any], second: bool) -> dict[str, Any]:
    if second:
        prefix, positions, tokens = OPEN_CLIP, "positional_embedding", "token_embedding.weight"
        layer, inner = "transformer.resblocks.{}.", "mlp.c_fc.weight"
    else:
        prefix, positions, tokens = CLIP, "embeddings.position_embedding.weight", "embeddings.token_embedding.weight"
        layer, inner = "encoder.layers.{}.", "mlp.fc1.weight"
    layers = sum(f"{prefix}{layer.format(number)}{inner}" in shapes for number in range(99))
    width = shapes[prefix + tokens].shape[1]
    return {
        "vocab_size": shapes[prefix + tokens].shape[0],
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}{layer.format(0)}{inner}"].shape[0],
        # The condition of SD 2 is what comes before the last of OpenCLIP's 24 layers, and diffusers leaves that out.
        "num_hidden_layers": min(layers, 23) if second else layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes[prefix + positions].shape[0],
        "hidden_act": "gelu" if second else "quick_gelu",
        "projection_dim": 512 if second else 768,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def _follow(recognised: Configurations, shapes: dict[str, Any], file: Path) -> Configurations:
    """The configurations with what a YAML file of the original training says, read as diffusers reads it."""
    try:
        original = yaml.safe_load(read_text(file))
        unet = single_file_utils.create_unet_diffusers_config_from_ldm(original, shapes)
        vae = single_file_utils.create_vae_diffusers_config_from_ldm(original, shapes)
        given = original["model"]["params"]
        betas = {"beta_start": "linear_start", "beta_end": "linear_end", "num_train_timesteps": "timesteps"}
        prediction = "v_prediction" if given.get("parameterization") == "v" else "epsilon"
    except Exception as error:  # whatever stands there
        raise UserError(
            f"--original_config {file}: not the YAML of a Stable Diffusion: {type(error).__name__} {first_line(error)}"
        ) from None
    scheduler = recognised.scheduler | {name: given[key] for name, key in betas.items() if key in given}
    scheduler["prediction_type"] = prediction
    return replace(recognised, unet=unet, vae=vae, scheduler=scheduler, prediction=prediction)


def _read_tokenizer(file: Path, config: CacheConfig) -> Any:
    """The tokenizer, which no single file holds."""
    name = config.tokenizer_name or TOKENIZER
    try:
        path = Path(name) / "tokenizer" if (Path(name) / "tokenizer").is_dir() else Path(name)
        if not path.is_dir():
            path = Path(snapshot_download(name, cache_dir=config.cache_dir, allow_patterns=list(TOKENIZER_FILES)))
        tokenizer = read_part(path, CLIPTokenizer.from_pretrained)
        if len(tokenizer) < 100:
            raise ValueError("no vocabulary there")  # the library makes one of two tokens
    except Exception as error:  # a connection, a missing or damaged file: the library raises many kinds
        given = f"--tokenizer_name {name}: {first_line(error)}" if config.tokenizer_name else f"{name} cannot be downloaded"
        raise UserError(
            f"{file}: a single file holds no tokenizer, and {given}; give --tokenizer_name DIR, the folder `tokenizer` of any "
            "Stable Diffusion pipeline"
        ) from None
    return tokenizer


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Has the processes of a machine go on one by one."""
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(directory, wait=partial(time.sleep, 0.5)))
        except OSError as error:
            wrong = f"--cache_dir: {directory} cannot be written: {error.strerror}; give another directory"
            raise UserError(wrong, passing=True) from None
        yield


def _write_parts(file: Path, configurations: Configurations, tokenizer: Any, folder: Path) -> None:
    aside = folder.with_name(folder.name + PARTIAL)
    discard(aside)
    tensors = _unwrap(read_tensors(file))
    try:
        for part, model, convert in (
            ("unet", UNet2DConditionModel, single_file_utils.convert_ldm_unet_checkpoint),
            ("vae", AutoencoderKL, single_file_utils.convert_ldm_vae_checkpoint),
        ):
            opened: Any = empty_model(getattr(configurations, part), model)
            state = convert(dict(tensors), opened.config)
            _require_whole(file, part, [name for name in opened.state_dict() if name not in state])
            opened.load_state_dict(state, assign=True)
            opened.save_pretrained(aside / part)
        _write_text_encoder(file, configurations.text_encoder, tensors, aside / "text_encoder")
        tokenizer.save_pretrained(aside / "tokenizer")
        (aside / "scheduler").mkdir()
        write_json(aside / "scheduler" / "scheduler_config.json", configurations.scheduler)
        write_json(aside / INDEX, _PIPELINE | {"scheduler": ["diffusers", configurations.scheduler["_class_name"]]})
    except Exception as error:  # whatever its values lead to
        discard(aside)
        if isinstance(error, UserError) or out_of_memory(error) or disk_problem(error):
            raise
        why = f"{file}: its tensors do not fit its configuration: {first_line(error)}"
        raise UserError(f"{why}; give --original_config with the YAML that it was trained with") from None
    publish_directory(aside, folder)


def _write_text_encoder(file: Path, given: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    config = configured(CLIPTextConfig, given)
    if any(name.startswith(OPEN_CLIP) for name in tensors):
        state = single_file_utils.convert_open_clip_checkpoint(SimpleNamespace(config=config), tensors)
    else:
        state = single_file_utils.convert_ldm_clip_checkpoint(tensors)
    options: dict[str, Any] = {"state_dict": state, "output_loading_info": True, "dtype": "auto"}
    with bounded():
        loaded: Any = CLIPTextModel.from_pretrained(None, config=config, **options)
    text_encoder, found = loaded
    _require_whole(file, "text_encoder", list(found["missing_keys"]))
    text_encoder.save_pretrained(folder)


def _require_whole(file: Path, part: str, missing: list[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{file}: incomplete, its {part} lacks {min(missing)}{more}; download it again")
