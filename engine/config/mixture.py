"""The data sets of a run: one, as the usual options name it; several, each by a `[[data]]` table of the TOML file; or the
images of an instance and of its class, as DreamBooth's options name them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from engine.config.options import CAPTIONED, CacheConfig, options_of
from engine.storage import below, shown

SOURCE = ("train_data_dir", "dataset_name", "dataset_config_name")
# What a table may hold: options, which are then those of its data set alone, and what it is called and how much of it is seen.
OPTIONS = (
    *SOURCE, "prompt", "image_column", "mask_column", "caption_column", "keep_empty_captions", "caption_prefix",
    "caption_template", "shuffle_tags", "keep_tokens", "caption_variants", "max_train_samples", "subset_seed",
    "center_crop", "random_flip", "random_crops", "image_interpolation_mode", "image_mode", "background", "max_upscale",
    "metadata_encoding", "follow_links", "shards_dir",
)  # fmt: skip
KEYS = ("name", "weight", "repeats", "loss_weight")
INSTANCE, CLASS = "instance", "class"  # the data sets of DreamBooth
# What tells DreamBooth's data sets; in the configuration of one of these alone it is left out.
_OF_DREAMBOOTH = ("instance_data_dir", "instance_prompt", "with_prior_preservation", "class_data_dir", "class_prompt")
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
_RESERVED = re.compile(r"validation|\d+x\d+")  # folders beside those of data sets


@dataclass(frozen=True)
class DataSet:
    """One data set of a run.

    name: "" where there is one, without a table.
    config: the run's, with the options of this data set; `shards_dir` is where its shards lie.
    weight: how often its samples come, relative to the other data sets'; None where `repeats` says it.
    repeats: how often each of its records comes in an epoch.
    loss_weight: what its loss counts.
    prior: it is the images of the class, whose loss is a term of its own.
    title: what messages about its options begin with.
    """

    name: str
    config: CacheConfig
    weight: Fraction | None = None
    repeats: Fraction = Fraction(1)
    loss_weight: float = 1.0
    prior: bool = False
    title: str = ""


def data_sets_of(config: CacheConfig) -> list[DataSet]:
    """The data sets of a configuration, in order."""
    if config.is_dreambooth:
        return _of_dreambooth(config)
    if config.data_sets is None:
        return [DataSet("", config)]
    return [_data_set(config, name, table) for name, table in zip(names_of(config.data_sets), config.data_sets, strict=True)]


def _of_dreambooth(config: CacheConfig) -> list[DataSet]:
    """The images of the instance, and those of the class."""
    named = {"prompt": config.instance_prompt} if config.instance_prompt is not None else {}
    tables: dict[str, dict[str, Any]] = {INSTANCE: {"train_data_dir": config.instance_data_dir, **named}}
    if config.with_prior_preservation:
        tables[CLASS] = {
            "train_data_dir": config.class_data_dir,
            "max_train_samples": min(config.num_class_images, config.max_train_samples or config.num_class_images),
            "loss_weight": getattr(config, "prior_loss_weight", 1.0),
            **({"prompt": config.class_prompt} if config.family in CAPTIONED else {}),
        }
    config = config.model_copy(update=dict.fromkeys(_OF_DREAMBOOTH) | {"with_prior_preservation": False})
    data_sets = [
        replace(_data_set(config, name, table), prior=name == CLASS, title=f"--{name}_data_dir: ")
        for name, table in tables.items()
    ]
    for data_set in data_sets:
        data_set.config._masks_may_lack = data_set.prior
    return data_sets


def _data_set(config: CacheConfig, name: str, table: Mapping[str, Any]) -> DataSet:
    values = options_of(config) | {"data_sets": None} | merged(config.model_dump(include={*SOURCE}), table)
    if "shards_dir" not in table:
        values["shards_dir"] = below(config.shards_dir or str(config.shards_path), name)
    return DataSet(
        name,
        type(config).model_validate(values),
        _fraction(table["weight"]) if "weight" in table else None,
        _fraction(table.get("repeats", 1)),
        float(table.get("loss_weight", 1)),
        title=f"[[data]] {name}: ",
    )


def merged(given: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Options and those of a table, which win; one that names data or shards of its own takes no source from outside."""
    options = {name: value for name, value in table.items() if name not in KEYS}
    own = {*SOURCE, "shards_dir"} & options.keys() - {"dataset_config_name"}
    return dict(given) | (dict.fromkeys(SOURCE) if own else {}) | options


def is_inherited(tables: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a table reads the data that the options outside name."""
    return any(not {*SOURCE, "shards_dir"} & table.keys() - {"dataset_config_name"} for table in tables)


def names_of(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the data sets are called: as they say, else by what they are made of, numbered where that is another's already."""
    taken = [table["name"] for table in tables if "name" in table]
    names = []
    for table in tables:
        name = table.get("name")
        if name is None:
            place = next((table[key] for key in (*SOURCE[:2], "shards_dir") if key in table), "data")
            base = re.sub(r"[^\w.-]", "_", Path(shown(place)).absolute().name, flags=re.ASCII).lstrip(".-")[:90] or "data"
            free = (found for number in range(1, len(tables) + 2) if (found := base + f"_{number}" * (number > 1)) not in taken)
            name = next(found for found in free if not _RESERVED.fullmatch(found))
            taken.append(name)
        names.append(name)
    return names


def mistakes_of(tables: Any) -> list[str]:
    """What is wrong with the tables as such, whatever their options hold."""
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        return ["[data]: write a table [[data]] for each data set"]
    mistakes = [f"{title_of(number, table)}: {said}" for number, table in enumerate(tables, 1) for said in _mistakes(table)]
    names = [table.get("name") for table in tables]
    mistakes += [
        f"[[data]]: {names.count(name)} tables have the name {name!r}; give each its own"
        for name in dict.fromkeys(names)
        if name is not None and names.count(name) > 1
    ]
    weighted = ["weight" in table for table in tables]
    if any(weighted) and not all(weighted):
        other = title_of(weighted.index(False) + 1, tables[weighted.index(False)])
        mistakes.append(f"{other}: has no weight, and others have; give every table a weight, or none (repeats)")
    return mistakes


def title_of(number: int, table: Mapping[str, Any]) -> str:
    """How messages call a table."""
    name = table.get("name")
    return f"[[data]] {name}" if isinstance(name, str) and _NAME.fullmatch(name) else f"[[data]] number {number}"


def _mistakes(table: Mapping[str, Any]) -> list[str]:
    said = []
    name = table.get("name", "data")
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        said.append(f"name {name!r}: give letters, digits, _, - and . alone, which also name its folder of shards")
    elif _RESERVED.fullmatch(name):
        said.append(f"name {name!r}: is taken for other shards; give another")
    if "weight" in table and "repeats" in table:
        said.append("has both weight and repeats; give one of them")
    for key in ("weight", "repeats"):
        value = table.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 <= value <= 1e9:
            said.append(f"{key} {value!r}: give a number above 0, from 1e-9 to 1e9")
    value = table.get("loss_weight", 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        said.append(f"loss_weight {value!r}: give a number from 0 to 1e9")
    return said


def _fraction(value: int | float) -> Fraction:
    """A number as it is written, so that 0.1 is a tenth."""
    return Fraction(str(value))
