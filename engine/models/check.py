"""What can be known of a pipeline's folder before it is loaded: its parts by its index, its weights by their headers."""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from safetensors import safe_open
from torch import Tensor

from engine.errors import UserError, first_line
from engine.messages import say
from engine.tensors import DTYPES

INDEX = "model_index.json"
_POINTER = b"version https://git-lfs"
_VARIANT = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
# By the class that reads them, the first names of files with weights.
_NAMES = {
    diffusers.ModelMixin: {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    transformers.PreTrainedModel: {"safetensors": "model", "bin": "pytorch_model"},
}


def read_index(pipeline: Path) -> dict[str, Any]:
    """A pipeline's model_index.json.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return _read_json(pipeline / INDEX)


def parts_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that an index lists, with library and class; those that are null in it are none."""
    return {
        name: (str(value[0]), str(value[1]))
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }


def check_pipeline(pipeline: Path, expected: Any, variant: str | None = None) -> None:
    """Opens the parts that a pipeline of the class `expected` is loaded from, without their weights.

    Raises:
        UserError: a part that is missing, damaged, or does not fit its configuration, with the remedy.
    """
    listed = parts_of(read_index(pipeline))
    absent = absent_parts(pipeline, expected)
    names, _ = expected._get_signature_keys(expected)
    if missing := sorted(name for name in names if name not in listed and name not in expected._optional_components):
        raise UserError(f"{pipeline / INDEX}: lists no {', '.join(missing)}; give a complete diffusers pipeline")
    for name in sorted(listed.keys() & set(names) - absent.keys()):
        check_part(pipeline, name, variant)
    if absent:
        say(f"{pipeline}: {INDEX} lists {' and '.join(sorted(absent))}, not there: left out")


def absent_parts(pipeline: Path, expected: Any) -> dict[str, None]:
    """What an index lists, is not there, and can be done without: arguments that have it loaded as None."""
    listed = parts_of(read_index(pipeline)).keys() & set(expected._optional_components)
    absent = {name for name in listed if not _has_files(pipeline / name)}
    if "feature_extractor" in absent:
        absent |= listed & {"safety_checker"}  # which cannot work alone
    return dict.fromkeys(absent)


def check_part(pipeline: Path, name: str, variant: str | None = None) -> None:
    """Opens a part that the index lists, a model without its weights.

    Raises:
        UserError: it is missing, damaged, or does not fit its configuration, with the remedy.
    """
    part, folder = _class_of(pipeline, name), pipeline / name
    if issubclass(part, torch.nn.Module):
        check_weights(folder, part, present_variant(folder, variant))
    else:
        read_part(pipeline, name, part.from_pretrained)


def read_part(pipeline: Path, part: str, load: Any) -> Any:
    """What `load` makes of one part of a pipeline's directory.

    Raises:
        UserError: the part is missing or cannot be loaded.
    """
    folder = pipeline / part
    if not _has_files(folder):
        raise UserError(f"{pipeline}: no {part} there; give a complete diffusers pipeline")
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt"):
            refuse_pointer(file)
    try:
        return load(str(folder))
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds
        raise UserError(f"{folder}: cannot be loaded: {first_line(error)}") from None


def read_config(pipeline: Path, part: str, model: Any) -> dict[str, Any]:
    """The configuration of a part that diffusers loads as `model`, with the defaults of what it leaves out.

    Raises:
        UserError: the part is missing, or is another model.
    """
    config = read_part(pipeline, part, model.load_config)
    found = config.get("_class_name", model.__name__)
    if found != model.__name__:
        raise UserError(f"{pipeline / part / 'config.json'}: of a {found}, not of a {model.__name__}; take the whole pipeline")
    return {name: parameter.default for name, parameter in signature(model.__init__).parameters.items()} | config


def present_variant(folder: Path, variant: str | None) -> str | None:
    """The variant to read a part with, as diffusers chooses in a folder where not every part has it."""
    return variant if variant in variants(folder) else None


def variants(folder: Path) -> list[str]:
    """The variants of a part's weights, such as fp16."""
    return sorted({match[1] for file in folder.glob("*") if (match := _VARIANT.fullmatch(file.name))})


def load_model(folder: Path, model: Any, variant: str | None, dtype: torch.dtype) -> Any:
    """A part with its weights, on the host."""
    option = "dtype" if issubclass(model, transformers.PreTrainedModel) else "torch_dtype"
    return model.from_pretrained(folder, variant=present_variant(folder, variant), **{option: dtype})


def check_weights(folder: Path, model: Any, variant: str | None = None) -> None:
    """Compares a part's weights with its configuration, by names and shapes.

    Raises:
        UserError: they are not there, unreadable, or do not fit.
    """
    config = read_part(folder.parent, folder.name, lambda path: _read_json(Path(path) / "config.json"))
    if config.get("quantization_config"):
        raise UserError(f"{folder}: holds quantised weights, which cannot be trained or encoded with; give the model without")
    files = weight_files(folder, model, variant)
    if not files:
        there = variants(folder)
        remedy = f"only of variant {' and '.join(there)}: give --variant {there[0]}" if there else "the download is incomplete"
        raise UserError(f"{folder}: no weights there, {remedy}")
    stored = {name: tensor for file in files for name, tensor in stored_tensors(file).items()}
    compare = _transformers_differences if issubclass(model, transformers.PreTrainedModel) else _diffusers_differences
    try:
        differences = compare(folder, model, stored)
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: no {model.__name__} can be made of it: {first_line(error)}") from None
    if differences:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise UserError(
            f"{folder}: the weights do not fit config.json: {differences[0]}{more}; take both from one model, or "
            "download it again"
        )


def weight_files(folder: Path, model: Any, variant: str | None) -> list[Path]:
    """The files that a part's weights are read from, all pieces of divided ones; none where there are none.

    Raises:
        UserError: a piece is missing.
    """
    first_names = next(names for base, names in _NAMES.items() if issubclass(model, base))
    middle = f".{variant}" if variant else ""
    for kind, first in first_names.items():
        for index in (f"{first}.{kind}.index{middle}.json", f"{first}{middle}.{kind}.index.json"):
            if (folder / index).is_file():
                pieces = sorted({folder / piece for piece in _read_json(folder / index).get("weight_map", {}).values()})
                if missing := [piece.name for piece in pieces if not piece.is_file()]:
                    raise UserError(f"{folder / index}: names {', '.join(missing)}, not there; the download is incomplete")
                return pieces
        if (file := folder / f"{first}{middle}.{kind}").is_file():
            return [file]
    return []


def stored_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, on the meta device.

    Raises:
        UserError: it is not the weights, or not all of them.
    """
    refuse_pointer(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {
                    name: torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype()), device="meta")
                    for name, part in slices.items()
                }
        mapped = zipfile.is_zipfile(file)  # what torch wrote before 1.6 is not
        stored = torch.load(file, map_location="meta", weights_only=True, mmap=mapped)
        if not isinstance(stored, dict):
            raise ValueError(f"a {type(stored).__name__}, no tensors by name")
        return stored
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise UserError(f"{file}: truncated or damaged, download it again: {first_line(error)}") from None
        raise UserError(f"{file}: holds programs beside tensors, and is not run; give it as .safetensors") from None
    except Exception as error:  # whatever a damaged file makes the two readers raise
        raise UserError(f"{file}: truncated or damaged, download it again: {first_line(error)}") from None


def _diffusers_differences(folder: Path, model: Any, stored: dict[str, Tensor]) -> list[str]:
    with torch.device("meta"):
        empty = model.from_config(model.load_config(folder))
    stored = OrderedDict(stored)
    empty._fix_state_dict_keys_on_load(stored)
    parameters = dict(empty.named_parameters())
    missing = [name for name in parameters if name not in stored]
    wanted = {name: tensor.shape for name, tensor in empty.state_dict().items() if name in stored}
    return _described(missing, {name: (stored[name].shape, shape) for name, shape in wanted.items()})


def _transformers_differences(folder: Path, model: Any, stored: dict[str, Tensor]) -> list[str]:
    """The library renames on the way, so it is asked, with tensors that hold nothing."""
    config = model.config_class.from_pretrained(folder)
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    _, found = model.from_pretrained(None, config=config, state_dict=stored, **options)
    return _described(found["missing_keys"], {name: (left, right) for name, left, right in found["mismatched_keys"]})


def _described(missing: Any, shapes: dict[str, tuple[Any, Any]]) -> list[str]:
    """In words, tensors that are missing, and those with a shape (stored, by the configuration) that differs."""
    other = [
        f"{name} is {list(left)}, by the configuration {list(right)}" for name, (left, right) in shapes.items() if left != right
    ]
    return other + [f"{name} is missing" for name in sorted(missing)]


def _class_of(pipeline: Path, part: str) -> Any:
    library, name = parts_of(read_index(pipeline))[part]
    try:
        return simple_get_class_obj(library, name)
    except (AttributeError, ImportError):
        raise UserError(
            f"{pipeline / INDEX}: {part} is a {library}.{name}, which the installed libraries do not have"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    refuse_pointer(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}; download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object; download it again")
    return value


def refuse_pointer(file: Path) -> None:
    """Raises `UserError` for what Git LFS leaves in the place of a file that was not downloaded."""
    if not file.is_file():
        return
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if start == _POINTER:
        raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
