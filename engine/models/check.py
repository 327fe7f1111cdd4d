"""What can be known of a pipeline's folder before it is loaded: its parts by its index, its weights by their headers."""

import contextlib
import dataclasses
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from diffusers.models.modeling_utils import no_init_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from engine.errors import UserError, first_line, out_of_memory
from engine.files import lies_inside, open_regular, reading
from engine.messages import say
from engine.models.index import (
    INDEX,
    classes_of,
    has_class,
    parts_of,
    read_index,
    read_json,
    refuse_pointer,
    require_inside,
)
from engine.tensors import DTYPES

_VARIANT = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
# By the class that reads them, the first names of files with weights.
_NAMES = {
    diffusers.ModelMixin: {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    transformers.PreTrainedModel: {"safetensors": "model", "bin": "pytorch_model"},
}
# What the libraries read of a part beside its weights: configurations, and the rest of a tokenizer.
_CONFIGURATIONS = (
    "config.json", "scheduler_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_READ = re.compile(
    "|".join(map(re.escape, (*_CONFIGURATIONS, *TOKENIZER_FILES))) + r"|.*\.jinja|chat_template.json|additional_chat_templates"
    r"|tekken\.json|(tokenizer|tiktoken)\.model.*"
)
_JUDGED = (*_CONFIGURATIONS, "special_tokens_map.json")
# Entries by which a library would run, fetch or read something else, wherever they stand in a configuration.
_PROGRAMS = ("auto_map", "custom_pipeline", "custom_pipelines", "gguf_file", "tokenizer_object", "transformers_weights")
_ATTENTION = (None, "eager", "sdpa")  # others may be kernels that are downloaded
# Entries by which a tokenizer would read other files than the known ones; published ones have the last, which is not read.
_FILES = re.compile(r"fast_tokenizer_files|vocab|merges|init_inputs|(?!special_tokens_map_file)\w+_file")
_SPECIAL_TOKENS = re.compile(r"\w+_tokens?")
_PIECE = re.compile(r"[\w.-]{1,200}\.(?:safetensors|bin)")
# What pickles of tensors are made with, as module and name.
_TENSORS = re.compile(
    r"collections OrderedDict|_codecs encode|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
    r"|torch (Size|device|(B?Float|Half|Double|Byte|Char|Short|Int|Long|Bool)\w*Storage)"
    r"|torch (b?float\w*|u?int\d+|bool|half|double|long)|torch\.serialization _get_layout"
)
_LEGACY_PICKLES = 5  # one after another: what wrote it, three of them, the tensors, and the keys of their values
_LEVELS = 3  # within each other, that training programs keep tensors in
MOST_LAYERS = 10_000  # of a model; the largest of the published ones have some 3,000 layers and weights
MOST_TIMESTEPS = 100_000
MOST_NUMBER = 100_000  # in a configuration of diffusers; published ones have up to 16,384
# Of which a prior makes a square mask; published ones have 77 and 4.
_MOST = {"num_embeddings": 4096, "additional_embeddings": 16}
LARGEST_SIDE = 4096  # pixels, and any other number, of an image processor
_SCALES = ("resolution_multiple", "latent_dim_scale")  # of Wuerstchen's pipelines, between the sizes of their stages
MOST_TOKENS = 2**20


class NotFinite(UserError):
    """A model is there, and holds values that are no numbers."""


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
    absent = {name for name in listed if not _has_files(pipeline / name)}
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


def read_part(folder: Path, load: Any, within: Path | None = None) -> Any:
    """What `load` makes of the folder of one part of a pipeline, whose files run nothing and lead nowhere else.

    Args:
        within: the folder that all its files lie in; None for a model's own, which may be a link (`require_inside`).

    Raises:
        UserError: the part is missing or cannot be loaded.
    """
    if not _has_files(folder):
        raise UserError(f"{folder.parent}: no {folder.name} there; give a complete diffusers pipeline")
    for file in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
        if is_weights(file):
            require_inside(file, folder, weights=True)
        elif _READ.fullmatch(file.name):
            require_inside(file, within or folder)
            refuse_pointer(file)
        if file.name in _JUDGED and file.exists():
            _judge(file, read_json(file))
    try:
        loaded = load(str(folder))
        if isinstance(loaded, transformers.PreTrainedTokenizerBase) and (last := last_token(loaded)) > MOST_TOKENS:
            raise ValueError(f"it gives a token the number {last}")
        return loaded
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise many kinds, and what is written in Rust one that is no Exception
        raise UserError(f"{folder}: cannot be loaded: {first_line(error)}; download it again") from None


def last_token(tokenizer: Any) -> int:
    """The largest number of a tokenizer's tokens, up to which it counts when it is saved."""
    return max(tokenizer.get_vocab().values(), default=0)


def is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pt", ".ckpt")


def _judge(file: Path, config: dict[str, Any]) -> None:
    """Refuses a configuration that names programs or files of its own, or classes that the libraries do not have."""
    if file.name in ("tokenizer_config.json", "special_tokens_map.json"):
        for name, value in config.items():
            if value and (_FILES.fullmatch(name) or not (file.name.startswith("t") or _SPECIAL_TOKENS.fullmatch(name))):
                raise UserError(
                    f"{file}: its {name} is {value}; a tokenizer is read from its own files alone: leave the entry out"
                )
    nested: list[Any] = [config]
    while nested:
        value = nested.pop()
        nested += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        for name in _PROGRAMS if isinstance(value, dict) else ():
            if value.get(name):
                raise UserError(
                    f"{file}: its {name} is {value[name]}; nothing of a model's folder is run: give the model without"
                )
        for name in ("attn_implementation", "_attn_implementation") if isinstance(value, dict) else ():
            if value.get(name) not in _ATTENTION:
                raise UserError(f"{file}: its {name} is {value[name]}, which may be downloaded and run; leave the entry out")
    for key, libraries in (("_class_name", (diffusers, diffusers.pipelines.wuerstchen)), ("tokenizer_class", (transformers,))):
        found = config.get(key)
        if found is not None and not any(has_class(library, found) for library in libraries):
            raise UserError(f"{file}: its {key} is {found}, which the installed libraries do not have")
    if file.name in ("preprocessor_config.json", "processor_config.json"):
        with reading(file, "download it again"):
            _require_bounded(config, LARGEST_SIDE)
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{file.parent}: holds quantised weights, which cannot be trained or encoded with; give the model without"
        )
    steps = config.get("num_train_timesteps")
    if steps is not None and not (type(steps) is int and 0 < steps <= MOST_TIMESTEPS):
        raise UserError(f"{file}: its num_train_timesteps is {steps}, not 1 to {MOST_TIMESTEPS}; download it again")


def _require_bounded(config: Mapping[str, Any], most: int = MOST_NUMBER) -> None:
    """Raises `ValueError` where a number or a list in a model's configuration is larger than any that a model needs."""
    nested: list[tuple[str, Any]] = list(config.items())
    while nested:
        name, value = nested.pop()
        if isinstance(value, dict | list | tuple):
            if len(value) > MOST_LAYERS:
                raise ValueError(f"its {name} has {len(value)} entries")
            nested += value.items() if isinstance(value, dict) else [(name, one) for one in value]
        elif isinstance(value, int | float) and abs(value) > _MOST.get(name, most):
            raise ValueError(f"its {name} is {value}, more than any model has")


def read_config(pipeline: Path, part: str, model: Any) -> dict[str, Any]:
    """The configuration of a part that diffusers loads as `model`, with the defaults of what it leaves out.

    Raises:
        UserError: the part is missing, or is another model.
    """
    config = read_part(pipeline / part, model.load_config)
    found = config.get("_class_name", model.__name__)
    if found != model.__name__:
        raise UserError(f"{pipeline / part / 'config.json'}: of a {found}, not of a {model.__name__}; take the whole pipeline")
    return {name: parameter.default for name, parameter in signature(model.__init__).parameters.items()} | config


def transformers_config(folder: Path, config_class: Any) -> Any:
    """The configuration of a part as transformers describes it: of the file's entries those that the class declares.

    Raises:
        UserError: it is missing or damaged.
    """

    def read(folder: str) -> Any:
        given = read_json(Path(folder) / "config.json")
        inner = given.get(config_class.base_config_key)
        return configured(config_class, inner if isinstance(inner, dict) else given)

    return read_part(folder, read)


def configured(config_class: Any, given: dict[str, Any]) -> Any:
    """What transformers makes of the declared entries of a configuration."""
    known = {field.name for field in dataclasses.fields(config_class)} | {"torch_dtype"}
    values = {name: value for name, value in given.items() if name in known}
    for name, inner in config_class.sub_configs.items():
        for key in (name, f"{name}_dict"):  # as older releases wrote it too
            if isinstance(given.get(key), dict):
                values[key] = configured(inner, given[key]).to_dict()
    _require_bounded(values, MOST_TOKENS)
    config = config_class(**values)
    if not isinstance(config.dtype, torch.dtype | None):
        raise ValueError(f"dtype {config.dtype}")
    return config


def present_variant(folder: Path, variant: str | None) -> str | None:
    """The variant to read a part with, as diffusers chooses in a folder where not every part has it."""
    return variant if variant in variants(folder) else None


def variants(folder: Path) -> list[str]:
    """The variants of a part's weights, such as fp16."""
    return sorted({match[1] for file in folder.glob("*") if (match := _VARIANT.fullmatch(file.name))})


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
        if out_of_memory(error):
            raise
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
    _require_bounded(config)
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


def require_finite(where: Path, tensors: Mapping[str, Any]) -> None:
    """Looks at every value of a model, in some 0.1 s per GB.

    Raises:
        NotFinite: of which tensor one is no number.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            least, most = torch.aminmax(tensor.detach().float() if tensor.itemsize == 1 else tensor.detach())
            if not (math.isfinite(least) and math.isfinite(most)):
                raise NotFinite(f"{where}: {name} holds values that are not finite; download it again")


def check_weights(folder: Path, model: Any, variant: str | None = None) -> Any:
    """Compares a part's weights with its configuration, by names and shapes; returns the model, on the meta device.

    Raises:
        UserError: they are not there, unreadable, or do not fit.
    """
    read_part(folder, lambda path: read_json(Path(path) / "config.json"))
    if (folder / "adapter_config.json").exists() and issubclass(model, transformers.PreTrainedModel):
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
        with bounded():
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


def weight_files(folder: Path, model: Any, variant: str | None) -> list[Path]:
    """The files that a part's weights are read from, all pieces of divided ones; none where there are none.

    Raises:
        UserError: a piece is missing.
    """
    first_names = next(names for base, names in _NAMES.items() if issubclass(model, base))
    middle = f".{variant}" if variant else ""
    for kind, first in first_names.items():
        for index in (f"{first}.{kind}.index{middle}.json", f"{first}.{kind}{middle}.index.json"):
            if (folder / index).is_file():
                require_inside(folder / index, folder)
                pieces = _pieces(folder / index)
                if missing := [piece.name for piece in pieces if not piece.is_file()]:
                    raise UserError(f"{folder / index}: names {', '.join(missing)}, not there; the download is incomplete")
                return pieces
        if (file := folder / f"{first}{middle}.{kind}").is_file():
            return [file]
    return []


def _pieces(index: Path) -> list[Path]:
    """The files that an index of divided weights names, all beside it."""
    pieces = read_json(index).get("weight_map")
    named = set(map(str, pieces.values())) if isinstance(pieces, dict) else set()
    if other := sorted(name for name in named if not _PIECE.fullmatch(name)) or ([] if named else ["nothing"]):
        raise UserError(f"{index}: its weight_map names {other[0]}, not a file of weights beside it; download it again")
    return sorted(index.parent / name for name in named)


def stored_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, on the meta device.

    Raises:
        UserError: it is not the weights, or not all of them.
    """
    if file.suffix != ".safetensors":
        return read_tensors(file, "meta")
    with _opened(file), safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype()), device="meta")
            for name, part in slices.items()
        }


def read_tensors(file: Path, device: str = "cpu") -> dict[str, Any]:
    """The tensors of a file of weights by name; of a pickle nothing is run, and it may hold others by name, and numbers.

    Raises:
        UserError: it is not the weights, or not all of them.
    """
    with _opened(file):
        if file.suffix == ".safetensors":
            return load_file(file, device)
        mapped = _require_tensors(file)
        stored = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
        _require_named(stored, file.stat().st_size)
        return stored


def _require_tensors(file: Path) -> bool:
    """Refuses pickles that make anything but tensors, of what torch allows them: memory by any number, for a start.

    Returns:
        whether they are in an archive, as torch writes them since 1.6.
    """
    with open_regular(file) as opened:
        archive = opened.read(4) == b"PK\3\4"  # torch's own look
        opened.seek(0)
        if archive:
            with zipfile.ZipFile(file) as zipped:
                if any(entry.file_size > entry.compress_size for entry in zipped.infolist()):
                    raise ValueError("it is compressed")
            pickles: Any = io.BytesIO(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl"))
        else:
            pickles = opened
        for _ in range(1 if archive else _LEGACY_PICKLES):
            for code, argument, _ in pickletools.genops(pickles):
                if code.name == "GLOBAL" and not _TENSORS.fullmatch(str(argument)):
                    raise pickle.UnpicklingError(f"Weights only load failed: {argument}")
    return archive


def _require_named(stored: Any, size: int) -> None:
    """Refuses what is no tensors by name, and tensors that are larger than the file of `size` bytes that they come from."""
    levels = 0
    while isinstance(stored, Mapping):
        if not all(isinstance(name, str) for name in stored):
            raise ValueError("no tensors by name")
        if any(isinstance(value, Tensor) and value.numel() * value.itemsize > size for value in stored.values()):
            raise ValueError("a tensor is larger than the file")
        if not isinstance(inner := stored.get("state_dict"), Mapping):
            return
        stored, levels = inner, levels + 1
        if levels > _LEVELS:
            raise ValueError("nested too deeply")
    raise ValueError(f"a {type(stored).__name__}, no tensors by name")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[None]:
    """The boundary around the reading of a file of weights."""
    refuse_pointer(file)
    try:
        yield
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error) or "Unsupported operand" in str(error):
            raise UserError(f"{file}: truncated or damaged, download it again: {first_line(error)}") from None
        raise UserError(f"{file}: holds programs beside tensors, and is not run; give it as .safetensors") from None
    except Exception as error:  # whatever a damaged file makes the two readers raise
        raise UserError(f"{file}: truncated or damaged, download it again: {first_line(error)}") from None


def empty_model(config: Mapping[str, Any], model: Any) -> Any:
    """The model of diffusers that a configuration describes, on the meta device, where drawing its first weights is idle.

    Wuerstchen's decoder draws all of them again for each of its modules: 12 s.
    """
    _require_bounded(config)
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
    empty, found = model.from_pretrained(None, config=config, state_dict=stored, **options)
    return empty, _described(found["missing_keys"], {name: (left, right) for name, left, right in found["mismatched_keys"]})


def _described(missing: Any, shapes: dict[str, tuple[Any, Any]]) -> list[str]:
    """In words, tensors that are missing, and those with a shape (stored, by the configuration) that differs."""
    other = [
        f"{name} is {list(left)}, by the configuration {list(right)}" for name, (left, right) in shapes.items() if left != right
    ]
    return other + [f"{name} is missing" for name in sorted(missing)]


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
