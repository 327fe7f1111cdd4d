"""What can be known of a pipeline's folder before it is loaded: its parts by its index, its weights by their headers."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from engine.catalogue import INDEX, PEFT_CONFIG
from engine.errors import UserError, blame_the_machine, first_line
from engine.files import lies_inside, reading
from engine.messages import say
from engine.models.configurations import has_files, read_config, read_part, require_bounded, transformers_config
from engine.models.index import classes_of, parts_of, read_index, read_json
from engine.models.weights import present_variant, read_tensors, require_finite, stored_tensors, variants, weight_files

MOST_LAYERS = 10_000  # of a model; the largest of the published ones have some 3,000 layers and weights
_SCALES = ("resolution_multiple", "latent_dim_scale")  # of Wuerstchen's pipelines, between the sizes of their stages


def check_pipeline(pipeline: Path, expected: Any, variant: str | None = None) -> Any:
    """Opens the parts that a pipeline of the class `expected` is loaded from, and joins them; the weights hold nothing.

    Raises:
        UserError: a part that is missing, damaged, or does not fit its configuration, with the remedy.
    """
    classes = classes_of(pipeline, expected)
    absent = absent_parts(pipeline, expected)
    names, _ = expected._get_signature_keys(expected)
    if missing := sorted(name for name in names if name not in classes and name not in expected._optional_components):
        raise UserError(f"{pipeline / INDEX}: lists no {', '.join(missing)}; give a complete diffusers pipeline")
    there = {name: part for name, part in classes.items() if name not in absent}
    joined = join_parts(pipeline, expected, {name: check_part(pipeline / name, part, variant) for name, part in there.items()})
    if absent:
        say(f"{pipeline}: {INDEX} lists {' and '.join(sorted(absent))}, not there: left out")
    return joined


def absent_parts(pipeline: Path, expected: Any) -> dict[str, None]:
    """What an index lists, is not there, and can be done without: arguments that have it loaded as None."""
    listed = parts_of(read_index(pipeline)).keys() & set(expected._optional_components)
    absent = {name for name in listed if not has_files(pipeline / name)}
    if "feature_extractor" in absent:
        absent |= listed & {"safety_checker"}  # which cannot work alone
    return dict.fromkeys(absent)


def join_parts(pipeline: Path, expected: Any, parts: dict[str, Any]) -> Any:
    """The pipeline of the class `expected` that parts make, with the numbers and switches that the index gives it.

    Raises:
        UserError: they do not go together.
    """
    index, kinds = read_index(pipeline), expected._get_signature_types()
    names, options = expected._get_signature_keys(expected)
    given = {name: index[name] for name in options if index.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, (int, float) if float in kinds[name] else kinds[name]):
            raise UserError(f"{pipeline / INDEX}: {name} is {value}, not a {kinds[name][0].__name__}; download it again")
        usual = signature(expected.__init__).parameters[name].default
        if name in _SCALES and not usual / 4 <= value <= usual * 4:
            raise UserError(f"{pipeline / INDEX}: {name} is {value}, far from {usual}; download it again")
    with reading(pipeline, "give a pipeline whose parts belong together"):
        return expected(**(dict.fromkeys(names) | parts), **given)


def check_part(folder: Path, part: Any, variant: str | None = None) -> Any:
    """A part of the class `part`, a model with weights that hold nothing.

    Raises:
        UserError: it is missing, damaged, or does not fit its configuration, with the remedy.
    """
    if issubclass(part, torch.nn.Module):
        variant = present_variant(folder, variant)
        model = check_weights(folder, part, variant)
        for place in (folder, *weight_files(folder, part, variant)):
            if not lies_inside(place, folder.parent):
                say(f"{place}: a link, so its weights are taken from {place.resolve()}")
                break
        return model
    return read_part(folder, part.from_pretrained, folder.parent)


def load_part(folder: Path, part: Any, variant: str | None, dtype: torch.dtype | None) -> Any:
    """A part of the class `part`, on the host."""
    if issubclass(part, torch.nn.Module):
        return load_model(folder, part, variant, dtype)
    return read_part(folder, part.from_pretrained, folder.parent)


def load_model(folder: Path, model: Any, variant: str | None, dtype: torch.dtype | None) -> Any:
    """A part with its weights, on the host: of the very files that `check_weights` compares.

    Args:
        dtype: None as the library has it: for transformers' models the file's, else fp32.

    Raises:
        UserError: it cannot be loaded.
    """
    files = weight_files(folder, model, present_variant(folder, variant))
    load = _load_transformers if issubclass(model, transformers.PreTrainedModel) else _load_diffusers
    try:
        loaded = load(folder, model, files, dtype)
        require_finite(folder, loaded.state_dict())
        return loaded
    except UserError:
        raise
    except Exception as error:  # of damaged files any
        blame_the_machine(folder, error)
        raise UserError(f"{folder}: cannot be loaded: {first_line(error)}; download it again") from None


def _load_transformers(folder: Path, model: Any, files: list[Path], dtype: torch.dtype | None) -> Any:
    """Given configuration and tensors, transformers looks for nothing else in the folder: adapters, other names, programs."""
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    config = transformers_config(folder, model.config_class)
    options = {"dtype": dtype, "output_loading_info": True}
    loaded, found = model.from_pretrained(None, config=config, state_dict=tensors, **options)
    if found["missing_keys"]:  # which the library fills with random numbers
        raise ValueError(f"{min(found['missing_keys'])} is missing")
    return loaded


def _load_diffusers(folder: Path, model: Any, files: list[Path], dtype: torch.dtype | None) -> Any:
    """As diffusers' `from_pretrained`, which looks for other names of weights than those that were compared."""
    read_config(folder.parent, folder.name, model)
    config, usual = model.load_config(folder), torch.get_default_dtype()
    require_bounded(config)
    torch.set_default_dtype(dtype or usual)  # of what the model computes from its configuration
    try:
        with no_init_weights(), init_empty_weights(), bounded():
            loaded = model.from_config(config)
    finally:
        torch.set_default_dtype(usual)
    for file in files:
        stored = OrderedDict(read_tensors(file))
        loaded._fix_state_dict_keys_on_load(stored)
        load_model_dict_into_meta(loaded, stored, dtype=dtype)
    if missing := sorted(name for name, tensor in loaded.state_dict().items() if tensor.is_meta):
        raise ValueError(f"{missing[0]} is missing")
    loaded.register_to_config(_name_or_path=folder)
    return loaded.eval()


def check_weights(folder: Path, model: Any, variant: str | None = None) -> Any:
    """Compares a part's weights with its configuration, by names and shapes; returns the model, on the meta device.

    Raises:
        UserError: they are not there, unreadable, or do not fit.
    """
    read_part(folder, lambda path: read_json(Path(path) / "config.json"))
    if (folder / PEFT_CONFIG).exists() and issubclass(model, transformers.PreTrainedModel):
        raise UserError(
            f"{folder}: holds an adapter beside its weights, which would be left out; merge it, or remove its files"
        )
    files = weight_files(folder, model, variant)
    if not files:
        there = variants(folder)
        remedy = f"only of variant {' and '.join(there)}: give --variant {there[0]}" if there else "the download is incomplete"
        raise UserError(f"{folder}: no weights there, {remedy}")
    stored = {name: tensor for file in files for name, tensor in stored_tensors(file).items()}
    compare = _transformers_differences if issubclass(model, transformers.PreTrainedModel) else _diffusers_differences
    try:
        empty, differences = compare(folder, model, stored)
    except UserError:
        raise
    except Exception as error:  # whatever the values of a configuration lead to
        raise UserError(f"{folder / 'config.json'}: no {model.__name__} can be made of it: {first_line(error)}") from None
    if differences:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise UserError(
            f"{folder}: the weights do not fit config.json: {differences[0]}{more}; take both from one model, or "
            "download it again"
        )
    return empty


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Has models that are made meanwhile end at `MOST_LAYERS`: a number in a file could ask for any number of layers."""
    made: dict[int, Any] = {}  # one that is put into another list of layers is the same one

    def count(_: Any, __: str, layer: Any) -> None:
        made[id(layer)] = layer
        if len(made) > MOST_LAYERS:
            raise ValueError(f"it asks for more than {MOST_LAYERS} layers and weights")

    hooks = register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def empty_model(config: Mapping[str, Any], model: Any) -> Any:
    """The model of diffusers that a configuration describes, on the meta device, where drawing its first weights is idle.

    Wuerstchen's decoder draws all of them again for each of its modules: 12 s.
    """
    require_bounded(config)
    undrawn: Any = type(model.__name__, (model,), {"_init_weights": lambda *_: None})
    with torch.device("meta"), bounded():
        return undrawn.from_config(dict(config))


def _diffusers_differences(folder: Path, model: Any, stored: dict[str, Tensor]) -> tuple[Any, list[str]]:
    read_config(folder.parent, folder.name, model)
    empty = empty_model(model.load_config(folder), model)
    stored = OrderedDict(stored)
    empty._fix_state_dict_keys_on_load(stored)
    parameters = dict(empty.named_parameters())
    missing = [name for name in parameters if name not in stored]
    wanted = {name: tensor.shape for name, tensor in empty.state_dict().items() if name in stored}
    return empty, _described(missing, {name: (stored[name].shape, shape) for name, shape in wanted.items()})


def _transformers_differences(folder: Path, model: Any, stored: dict[str, Tensor]) -> tuple[Any, list[str]]:
    """The library renames on the way, so it is asked, with tensors that hold nothing."""
    config = transformers_config(folder, model.config_class)
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with bounded():
        empty, found = model.from_pretrained(None, config=config, state_dict=stored, **options)
    return empty, _described(found["missing_keys"], {name: (left, right) for name, left, right in found["mismatched_keys"]})


def _described(missing: Any, shapes: dict[str, tuple[Any, Any]]) -> list[str]:
    """In words, tensors that are missing, and those with a shape (stored, by the configuration) that differs."""
    other = [
        f"{name} is {list(left)}, by the configuration {list(right)}" for name, (left, right) in shapes.items() if left != right
    ]
    return other + [f"{name} is missing" for name in sorted(missing)]
