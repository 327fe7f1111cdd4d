"""Files of adapters (LoRA and DoRA), in the forms that diffusers, kohya's scripts and PEFT give them.

arXiv:2106.09685 adds to a layer's weight a product of two small ones, (alpha / rank) B A; arXiv:2402.09353 (DoRA) then gives
every output its own length. Files differ in how they name the layers and where they keep alpha.
"""

import contextlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from engine.catalogue import LORA_WEIGHTS, PARTS, PEFT_CONFIG, PEFT_WEIGHTS
from engine.errors import UserError
from engine.files import parse_json, reading, write_atomically, write_json
from engine.messages import say
from engine.models.index import read_json, require_inside
from engine.models.original_layout import unet_name
from engine.models.parts import portable
from engine.models.weights import read_tensors, require_finite, stored_tensors
from engine.tensors import write_one_by_one

FORMATS = ("diffusers", "kohya", "peft")
DOWN, UP, MAGNITUDE, OF_INPUTS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight", ".dora_scale"
_IN_FOLDERS = (LORA_WEIGHTS, PEFT_WEIGHTS, "pytorch_lora_weights.bin", "adapter_model.bin")
_DESCRIBED = "lora_adapter_metadata"  # where in a file's metadata diffusers keeps PEFT's configuration
# Parts as files call them, in underscores; the first is kohya's, and what is written.
_PART_NAMES = {
    "unet": ("lora_unet", "unet"),
    "prior": ("lora_unet", "lora_prior_unet", "lora_prior", "prior_prior", "prior"),
    "text_encoder": (
        "lora_te", "lora_te1", "lora_prior_te", "text_encoders_clip_l_transformer", "text_encoders_clip_h_transformer",
        "text_encoder",
    ),
}  # fmt: skip
# What programs put before a layer's path.
_BEFORE = ("base_model_model_", "diffusion_model_", "lycoris_", "transformer_", "model_")
_TENSOR = re.compile(
    r"(.+?)(?:[._]lora(?:_linear_layer)?[._](A|B|down|up|mid)(?:\.default\w*)?\.weight|\.(?:lora_)?(alpha)|\.(dora_scale)"
    r"|\.(?:lora_)?(magnitude)(?:_vector(?:\.default\w*)?(?:\.weight)?)?)"
)
_ROLES = {"A": "down", "B": "up", "dora_scale": "magnitude"}
_TEXT_WIDTHS = {768: 1, 1024: 2}  # what Stable Diffusion's attention reads -> its version
_INPUTS_ALONE = (
    "DoRA is of inputs, which PEFT does not know; `python -m engine.export --merge` bakes it in, or train it anew on the "
    "output axis"
)
_EMBEDDINGS = "bundle_emb."  # textual inversions that OneTrainer puts beside an adapter
_OTHER_KINDS = {
    r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.b?oft_": "OFT", r"\.on_input": "IA3", r"\.diff(_b)?$": "whole differences",
    r"string_to_param|emb_params": "a textual inversion", r"ip_adapter|^image_proj": "an IP-Adapter",
}  # fmt: skip
_OTHER_MODELS = {
    r"lora_te2|text_encoder_2|label_emb|add_embedding": "Stable Diffusion XL", r"double_blocks|single_transformer": "FLUX",
    r"joint_blocks|context_embedder": "Stable Diffusion 3",
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """Changes of low rank to layers of a pipeline's models.

    tensors: by PEFT's names within the pipeline: `unet.mid_block...to_q.lora_A.weight` [rank, in], of a convolution [rank, in,
        height, width]; `.lora_B.weight` [out, rank] or [out, rank, 1, 1]; with DoRA `.lora_magnitude_vector.weight` [out] or
        [1, out, 1, 1], or, as OneTrainer has it unless told otherwise, of the inputs: `.dora_scale` [1, in] or [1, in, 1, 1].
        Modules have the names that the installed libraries give them.
    alphas: path of the layer, `unet.mid_block...to_q` -> its alpha; the product counts alpha / rank times.
    """

    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, float]

    def to(self, dtype: torch.dtype | None) -> "Adapter":
        """The same in another precision; None leaves it."""
        return Adapter({name: tensor.to(dtype) for name, tensor in self.tensors.items()}, self.alphas) if dtype else self

    def rank(self, layer: str) -> int:
        return len(self.tensors[layer + DOWN])

    @property
    def parts(self) -> list[str]:
        return [part for part in PARTS if any(layer.startswith(f"{part}.") for layer in self.alphas)]


def adaptable(pipeline: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that adapters are made for, by the names that files have for them."""
    components = pipeline.components
    of_prior = {name.removeprefix("prior_"): part for name, part in components.items() if name.startswith("prior_")}
    found = components | of_prior  # of a combined pipeline, which may have two text encoders: adapters are of the prior's
    return {name: found[name] for name in PARTS if isinstance(found.get(name), nn.Module)}


def read_adapter(path: Path, parts: Mapping[str, nn.Module], of_inputs: bool = False) -> Adapter:
    """The adapter of a file or a folder in any of the known forms; its values as they are stored, on the host.

    Args:
        parts: models by their names in the pipeline. Only names and shapes of their layers are looked at, so they may be on the
            meta device. A name without a part belongs to the first model that has such a layer.
        of_inputs: takes DoRA of inputs too, which PEFT does not know.

    Raises:
        UserError: it is no LoRA, is damaged, or does not fit the models.
    """
    layers = adaptable_layers(parts)
    spelled = _spelled(layers, parts)
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for file, part in _files(path):
        with reading(file, "give a file of LoRA weights, .safetensors"):
            shapes = {name: tensor for name, tensor in stored_tensors(file).items() if not name.startswith(_EMBEDDINGS)}
            named = _by_layer(file, shapes, spelled, part)
            for layer, names in named.items():
                _check(file, layer, {role: shapes[name] for role, name in names.items()}, layers[layer])
            values = read_tensors(file)
            require_finite(file, values)
            if len(values) > len(shapes):
                say(f"{file}: the embeddings beside the adapter ({_EMBEDDINGS}*) are left out")
            configured = _configurations(file)
            for layer, names in named.items():
                found = {role: _fractions(file, name, values[name]) for role, name in names.items()}
                rank = len(found["down"])
                alphas[layer] = float(found["alpha"]) if "alpha" in found else _alpha(file, configured, layer, rank)
                plain = _plain(found, layers[layer], names.get("magnitude", ""))
                if OF_INPUTS in plain and not of_inputs:
                    raise UserError(f"{file}: its {_INPUTS_ALONE}")
                tensors |= {layer + suffix: tensor for suffix, tensor in plain.items()}
    return Adapter(tensors, alphas)


def adaptable_layers(parts: Mapping[str, nn.Module], grouped: bool = True) -> dict[str, nn.Module]:
    """The layers of models that may have an adapter, linear ones and convolutions, by their paths within the pipeline.

    Args:
        grouped: also convolutions of groups, which have them in files of others alone.
    """
    return {
        f"{part}.{path.removesuffix('.base_layer')}": layer
        for part, model in parts.items()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in path and (grouped or getattr(layer, "groups", 1) == 1)
    }


def _spelled(layers: Mapping[str, nn.Module], parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """What files call each layer, in underscores -> its path."""
    spelled: dict[str, str] = {}
    for layer in layers:
        part, path = layer.split(".", 1)
        paths = {path, path.removesuffix(".0") if path.endswith("to_out.0") else path}
        if part == "text_encoder":
            bare = path.removeprefix("text_model.")
            old = re.sub(r"(self_attn)\.(q|k|v|out)_proj$", r"\1.to_\2", bare)
            paths = {f"{model}{name}" for model in ("", "text_model.") for name in (bare, old)}
        for name in (*paths, *_original(parts[part], path)):
            for prefix in (*_PART_NAMES[part], ""):
                spelled.setdefault(f"{prefix}.{name}".replace(".", "_").removeprefix("_"), layer)
    return spelled


def _original(model: Any, path: str) -> list[str]:
    """What the original Stable Diffusion calls a layer of its UNet."""
    published = ("CrossAttnUpBlock2D", "UpBlock2D")
    if not isinstance(model, UNet2DConditionModel):
        return []
    config: Any = model.config  # type: ignore[attr-defined]
    if not set(config.up_block_types) <= set(published):
        return []
    layers = config.layers_per_block
    attends = [kind == published[0] for kind in config.up_block_types]
    with contextlib.suppress(UserError):  # which has a place there in none that was published
        return [unet_name(path, layers, attends)] if isinstance(layers, int) else []
    return []


def _files(path: Path) -> list[tuple[Path, str | None]]:
    """The files of an adapter, each with the part that its folder is named by."""
    if path.is_file():
        return [(path, None)]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a file of LoRA weights, or the folder of one")
    whole = [(path / name, None) for name in _IN_FOLDERS if (path / name).is_file()][:1]
    by_part = [(path / part / name, part) for part in PARTS for name in _IN_FOLDERS if (path / part / name).is_file()]
    named = [(file, None) for file in sorted(path.glob("*.safetensors")) if file.is_file()]
    files: list[tuple[Path, str | None]] = [*(whole or by_part or named)]
    if not files:
        raise UserError(f"{path}: no LoRA weights there, neither {LORA_WEIGHTS} nor {PEFT_WEIGHTS}")
    if len(named) > 1 and not whole and not by_part:
        raise UserError(f"{path}: holds {named[0][0].name} and {len(named) - 1} more; name the file")
    for file, _ in files:
        require_inside(file, path, weights=True)
    return files


def _by_layer(file: Path, stored: Mapping[str, Any], spelled: Mapping[str, str], part: str | None) -> dict[str, dict[str, str]]:
    """By the path of the layer and by role, the names of a file's tensors."""
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for name, tensor in stored.items():
        match = _TENSOR.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor):
            kind = next((kind for names, kind in _OTHER_KINDS.items() if re.search(names, name)), "something else")
            raise UserError(f"{file}: holds {name}, {kind} and no LoRA; give a file of LoRA weights alone")
        layer = _resolve(match[1], spelled, part)
        role = next(filter(None, match.groups()[1:]))
        role = _ROLES.get(role, role)
        if layer is None:
            unknown.append(match[1])
        elif found.setdefault(layer, {}).setdefault(role, name) != name:
            raise UserError(f"{file}: holds {name} twice, also as {found[layer][role]}; give a file of one adapter")
    if unknown and found and all(re.match(r"lora_te_|lora_te1_|text_encoder(s\.clip_[lh])?\.", name) for name in unknown):
        raise UserError(
            f"{file}: adapts the text encoder too, which has no adapter here; give --train_text_encoder in a training, or an "
            "adapter without it"
        )
    if unknown:
        model = next((model for names, model in _OTHER_MODELS.items() if any(re.search(names, name) for name in stored)), None)
        others = f" and {count - 1} more" if (count := len(set(unknown))) > 1 else ""
        raise UserError(
            f"{file}: the model has no layer {unknown[0]}{others}; this is an adapter of "
            f"{model or 'another model'}, give one that was trained for this one"
        )
    if not found:
        raise UserError(f"{file}: holds no tensors; give a file of LoRA weights")
    return found


def _resolve(name: str, spelled: Mapping[str, str], part: str | None) -> str | None:
    """The path of the layer that a file names."""
    name = name.replace(".processor.", ".").replace(".", "_")
    for _ in range(len(_BEFORE) + 1):
        if (layer := spelled.get(f"{part}_{name}" if part else name) or spelled.get(name)) is not None:
            return layer
        name = next((name.removeprefix(before) for before in _BEFORE if name.startswith(before)), name)
    return None


def _check(file: Path, layer: str, found: Mapping[str, Tensor], module: nn.Module) -> None:
    """Compares the tensors of a layer, of which only shapes and dtypes are looked at, with the model's."""
    if missing := {"down", "up"} - found.keys():
        raise UserError(f"{file}: {layer} has no lora_{min(missing)}; the file is incomplete, download it again")
    rank = found["down"].shape[0] if found["down"].dim() else 0
    into, out, kernel, groups = _sizes(module)
    if rank % groups:
        raise UserError(f"{file}: {layer}: rank {rank} is not divisible by the groups of the layer, {groups}")
    wanted: dict[str, list[tuple[int, ...]]] = {
        "down": [(rank, into, *(() if "mid" in found else kernel))],
        "up": [(out, rank // groups)], "mid": [(rank, rank, *kernel)],
        "magnitude": [(out,), (out, 1), (1, out), (1, into)], "alpha": [(), (1,)],
    }  # fmt: skip
    for role, tensor in found.items():
        shape = _significant(tuple(tensor.shape))
        if not rank or shape not in map(_significant, wanted[role]):
            takes = ["rank", *wanted[role][0][1:]] if role == "down" else [*wanted[role][0]]
            raise UserError(
                f"{file}: {layer}: its {role} is {list(tensor.shape)}, and this model's takes {takes}; give an adapter that "
                "was trained for this model"
            )


def _fractions(file: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor in a precision that can be computed with: of 8 bits, 16 hold the same value."""
    if not tensor.is_floating_point() and tensor.numel() > 1:
        raise UserError(f"{file}: {name} is of {tensor.dtype}, no weights of LoRA; download it again")
    return tensor.half() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without what tells a linear layer from a convolution of one position."""
    return shape if len(shape) < 2 or any(size != 1 for size in shape[2:]) else shape[:2]


def _sizes(module: Any) -> tuple[int, int, tuple[int, ...], int]:
    """Inputs, outputs, kernel and groups of a layer; also of one whose weight is quantized."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, (), 1
    return module.in_channels, module.out_channels, tuple(module.kernel_size), module.groups


def _plain(found: Mapping[str, Tensor], module: nn.Module, scales: str) -> dict[str, Tensor]:
    """The tensors of a layer by the suffixes, and in the shapes, of an `Adapter`.

    Args:
        scales: the name of what holds the magnitudes in the file: a `dora_scale` with one row is of the inputs.
    """
    into, out, kernel, groups = _sizes(module)
    down, up, rank = found["down"], found["up"], len(found["down"])
    if "mid" in found:  # Tucker's decomposition, multiplied out
        down = torch.einsum("abhw,bc->achw", found["mid"].float(), down.flatten(1).float()).to(down.dtype)
    ones = (1,) * len(kernel)
    plain = {DOWN: down.reshape(rank, into, *kernel), UP: up.reshape(out, rank // groups, *ones)}
    if (magnitude := found.get("magnitude")) is not None:
        if scales.endswith(OF_INPUTS) and magnitude.dim() > 1 and magnitude.shape[0] == 1 < out:
            plain[OF_INPUTS] = magnitude.reshape(1, into, *ones)
        else:
            plain[MAGNITUDE] = magnitude.reshape((1, out, *ones) if kernel else (out,))
    return plain


def _configurations(file: Path) -> dict[str, Any]:
    """What PEFT's configuration beside or in a file says; of several parts under their names."""
    if (beside := file.with_name(PEFT_CONFIG)).is_file() and file.name.startswith("adapter_model"):
        require_inside(beside, file.parent)
        configured = read_json(beside)
        if (kind := configured.get("peft_type", "LORA")) != "LORA":
            raise UserError(f"{beside}: of {kind} and no LoRA; give an adapter of LoRA")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            configured = parse_json((opened.metadata() or {}).get(_DESCRIBED, "{}"))
    else:
        configured = {}
    if not isinstance(configured, dict):
        raise ValueError(f"its {_DESCRIBED} is no JSON object")
    return configured


def _alpha(file: Path, configured: Mapping[str, Any], layer: str, rank: int) -> float:
    """The alpha that a configuration gives a layer; its rank where nothing is said."""
    part, path = layer.split(".", 1)

    def said(name: str, default: Any) -> Any:
        value = configured.get(f"{part}.{name}", configured.get(name, default))
        return default if value is None else value

    if isinstance(start := said("init_lora_weights", True), str) and re.match("pissa|olora|corda|loftq", start.lower()):
        raise UserError(f"{file}: begins from other weights than the model's ({start}); export it as a plain LoRA first")
    alpha, patterns = said("lora_alpha", rank), said("alpha_pattern", {})
    for pattern, value in patterns.items():
        name = pattern.replace("\\", "").removeprefix("^")
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(f"{file}: its alpha_pattern {pattern} is no path of a layer; write paths there")
        if path == name or (path.endswith(f".{name}") and not pattern.startswith("^")):
            alpha = value
            break
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{file}: the alpha of {layer} is {alpha}; download it again")
    return alpha * math.sqrt(rank) if said("use_rslora", False) is True else float(alpha)


def peft_configuration(adapter: Adapter, part: str) -> dict[str, Any]:
    """PEFT's configuration of a part's adapter, as arguments of `LoraConfig`.

    Raises:
        UserError: its DoRA is of inputs, or not of all layers, which PEFT does not know.
    """
    layers = [layer for layer in adapter.alphas if layer.startswith(f"{part}.")]
    ranks = {layer.removeprefix(f"{part}."): adapter.rank(layer) for layer in layers}
    alphas = {layer.removeprefix(f"{part}."): adapter.alphas[layer] for layer in layers}
    if any(layer + OF_INPUTS in adapter.tensors for layer in layers):
        raise UserError(f"{part}: its {_INPUTS_ALONE}")
    lengths = sum(layer + MAGNITUDE in adapter.tensors for layer in layers)
    if lengths not in (0, len(layers)):
        raise UserError(f"{lengths} of {len(layers)} layers of {part} have DoRA, which only kohya's form can say")
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": rank, "lora_alpha": alpha, "use_dora": lengths > 0, "target_modules": sorted(ranks),
        "rank_pattern": {f"^{path}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{path}": value for path, value in alphas.items() if value != alpha},
    }  # fmt: skip


def write_adapter(path: Path, adapter: Adapter, form: str = "diffusers", about: Mapping[str, str] | None = None) -> None:
    """Writes an adapter, aside and then renamed.

    Args:
        path: the file; in the form of PEFT a folder, with a folder for each part where there are several.
        form: one of `FORMATS`.
        about: what else is said of it in the metadata.

    Raises:
        UserError: the form does not know what the adapter has.
    """
    if form == "peft":
        for part in adapter.parts:
            _write_peft(path / part if len(adapter.parts) > 1 else path, adapter, part)
        return
    tensors, metadata = (_kohya if form == "kohya" else _diffusers)(adapter)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **metadata, **(about or {})}
    write_atomically(path, lambda file: write_one_by_one(file, tensors, tensors.items(), metadata))


def _diffusers(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    described = {f"{part}.{key}": value for part in adapter.parts for key, value in peft_configuration(adapter, part).items()}
    return {portable(name): tensor for name, tensor in adapter.tensors.items()}, {_DESCRIBED: json.dumps(described)}


def _kohya(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    for layer, alpha in adapter.alphas.items():
        part, path = portable(layer).split(".", 1)
        name = f"{_PART_NAMES[part][0]}.{path}".replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = adapter.tensors[layer + DOWN]
        tensors[f"{name}.lora_up.weight"] = up = adapter.tensors[layer + UP]
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        if (magnitude := adapter.tensors.get(layer + MAGNITUDE)) is not None:
            tensors[f"{name}.dora_scale"] = magnitude.reshape(len(up), *(1,) * (up.dim() - 1))
        if (magnitude := adapter.tensors.get(layer + OF_INPUTS)) is not None:
            tensors[f"{name}.dora_scale"] = magnitude
    rank = _commonest(adapter.rank(layer) for layer in adapter.alphas)
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank),
        "ss_network_alpha": str(_commonest(adapter.alphas.values())),
    }  # fmt: skip
    widths = {
        adapter.tensors[layer + DOWN].shape[1] for layer in adapter.alphas if layer.endswith(("attn2.to_k", "attn2.to_v"))
    }
    if len(widths) == 1 and (version := _TEXT_WIDTHS.get(widths.pop())):
        metadata |= {"ss_base_model_version": f"sd_v{version}", "ss_v2": str(version == 2)}
        metadata |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-v{version}/lora"}
    return tensors, metadata


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _write_peft(folder: Path, adapter: Adapter, part: str) -> None:
    configured = peft_configuration(adapter, part)
    tensors = {  # PEFT itself saves magnitudes without their last word
        f"base_model.model.{name.removeprefix(f'{part}.').replace('_vector.weight', '_vector')}": tensor
        for name, tensor in adapter.tensors.items()
        if name.startswith(f"{part}.")
    }
    described = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", "lora_dropout": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PEFT_CONFIG, described | configured)
    file = folder / PEFT_WEIGHTS
    write_atomically(file, lambda path: write_one_by_one(path, tensors, tensors.items(), {"format": "pt"}))


def load_into(pipeline: Any, adapter: Adapter, scale: float = 1.0, name: str = "default") -> None:
    """Puts an adapter beside the layers of a pipeline's models, whose own weights stay as they are.

    Args:
        scale: how much of it; several adapters, each under a name of its own, add up.

    Raises:
        UserError: PEFT does not know such an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    models = adaptable(pipeline)
    for part in adapter.parts:
        model = models[part]
        state = {key.removeprefix(f"{part}."): value for key, value in adapter.tensors.items() if key.startswith(f"{part}.")}
        with warnings.catch_warnings(action="ignore"):  # of several adapters
            inject_adapter_in_model(LoraConfig(**peft_configuration(adapter, part)), model, name)
        set_peft_model_state_dict(model, state, name)
        layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        for layer in layers:
            if name in layer.scaling:
                layer.set_scale(name, scale)
            layer.set_adapter(list(layer.scaling), inference_mode=True)
