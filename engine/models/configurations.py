"""Configurations and tokenizers of a pipeline's parts, judged before a library reads them and would run or follow something."""

import dataclasses
import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from engine.errors import UserError, blame_the_machine, first_line
from engine.files import reading
from engine.models.index import has_class, read_json, refuse_pointer, require_inside
from engine.models.weights import is_weights

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
_PREDICTED = ("epsilon", "v_prediction", "sample")
MOST_TIMESTEPS = 100_000
MOST_NUMBER = 100_000  # in a configuration of diffusers; published ones have up to 16,384
# Of which a prior makes a square mask; published ones have 77 and 4.
_MOST = {"num_embeddings": 4096, "additional_embeddings": 16}
LARGEST_SIDE = 4096  # pixels, and any other number, of an image processor
MOST_ENTRIES = 10_000  # of a list or an object in a configuration of diffusers
MOST_TOKENS = 2**20


def read_part(folder: Path, load: Any, within: Path | None = None) -> Any:
    """What `load` makes of the folder of one part of a pipeline, whose files run nothing and lead nowhere else.

    Args:
        within: the folder that all its files lie in; None for a model's own, which may be a link (`require_inside`).

    Raises:
        UserError: the part is missing or cannot be loaded.
    """
    if not has_files(folder):
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
        blame_the_machine(folder, error)
        raise UserError(f"{folder}: cannot be loaded: {first_line(error)}; download it again") from None


def last_token(tokenizer: Any) -> int:
    """The largest number of a tokenizer's tokens, up to which it counts when it is saved."""
    return max(tokenizer.get_vocab().values(), default=0)


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
            require_bounded(config, LARGEST_SIDE)
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{file.parent}: holds quantised weights, which cannot be trained or encoded with; give the model without"
        )
    steps = config.get("num_train_timesteps")
    if steps is not None and not (type(steps) is int and 0 < steps <= MOST_TIMESTEPS):
        raise UserError(f"{file}: its num_train_timesteps is {steps}, not 1 to {MOST_TIMESTEPS}; download it again")
    predicts = config.get("prediction_type")
    if predicts not in (None, *_PREDICTED):
        raise UserError(f"{file}: its prediction_type is {predicts}; what can be trained: {', '.join(_PREDICTED)}")


def require_bounded(config: Mapping[str, Any], most: int = MOST_NUMBER) -> None:
    """Raises `ValueError` where a number or a list in a model's configuration is larger than any that a model needs."""
    nested: list[tuple[str, Any]] = list(config.items())
    while nested:
        name, value = nested.pop()
        if isinstance(value, dict | list | tuple):
            if len(value) > MOST_ENTRIES:
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
    require_bounded(values, MOST_TOKENS)
    config = config_class(**values)
    if not isinstance(config.dtype, torch.dtype | None):
        raise ValueError(f"dtype {config.dtype}")
    return config


def has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
