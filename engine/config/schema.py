"""How options are declared: with what `--help` says of them, and which families have them."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, Field

from engine.catalogue import FAMILIES

REQUIRED = ...
RECIPES = ("lora", "dreambooth", "dreambooth_lora")  # scripts whose defaults differ from those of text to image
SECRETS = {"hub_token"}  # never logged or stored
UNSTORED = SECRETS | {"overwrite"}  # not in a run's config.toml: the same again must not remove the run's results
# Options that name a place on this machine: directories, and what may also be a name on the hub or within another directory.
DIRECTORIES = {"output_dir", "class_data_dir", "shards_dir", "shards_cache", "cache_dir", "compile_cache_dir", "nvme_path"}
PLACES = DIRECTORIES | {
    "pretrained_model_name_or_path", "pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path",
    "pretrained_image_encoder_name_or_path", "original_config", "tokenizer_name", "dataset_name", "train_data_dir",
    "validation_data_dir", "deepspeed_config", "lora_weights", "instance_data_dir",
}  # fmt: skip


def option(
    default: Any,
    help: str,
    group: str | None,
    recipes: Mapping[str, Any] = MappingProxyType({}),
    aliases: Sequence[str] = (),
    **constraints: Any,
) -> Any:
    """A field of the configuration, with what `--help` needs to describe it; without a group it stands in files alone.

    A default that is a dictionary gives the defaults by family, `REQUIRED` where there is none. Families that are not in it do
    not have the option, and what the field then holds means nothing.

    Args:
        recipes: the defaults of other scripts (`RECIPES`), where they differ; a dictionary again by family, and families that
            are not in it keep the usual one.
        aliases: other names of the option, on the command line and in files.
    """
    by_family = default if isinstance(default, dict) else None
    if by_family:
        default = next(iter(by_family.values()))
        default = None if default is REQUIRED else default
    extra: dict[str, Any] = {"group": group, "by_family": by_family, "recipes": dict(recipes), "aliases": list(aliases)}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def only(families: Iterable[str], default: Any) -> dict[str, Any]:
    """The default of an option that only these families have."""
    return dict.fromkeys(families, default)


def sd_differs(sd: Any, others: Any) -> dict[str, Any]:
    """The defaults of an option where `sd` has another than the other families."""
    return only(FAMILIES, others) | {"sd": sd}


def published(name: str) -> dict[str, Any]:
    """The defaults of an option that names a model: where each family's was published."""
    repositories = {family: entry.published[name] for family, entry in FAMILIES.items() if name in entry.published}
    return {family: REQUIRED if repository is None else repository for family, repository in repositories.items()}


def _declared(model: type[BaseModel], word: str) -> dict[str, Any]:
    """Name -> what was declared under a word, for the options that have it."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {name: extra[word] for name, extra in extras.items() if isinstance(extra, dict) and extra[word]}


def options_by_family(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Name -> defaults by family, for the options that not every family has, or has with one default."""
    return _declared(model, "by_family")


def options_under(model: type[BaseModel], heading: str) -> list[str]:
    """Names of the options under a heading of the help."""
    return [name for name, group in _declared(model, "group").items() if group == heading]


def options_by_alias(model: type[BaseModel]) -> dict[str, str]:
    """Another name of an option -> its name."""
    return {alias: name for name, aliases in _declared(model, "aliases").items() for alias in aliases}


def defaults_of(model: type[BaseModel], family: str, recipe: str) -> dict[str, Any]:
    """The defaults that a family and a recipe have, of the options where these say something."""
    defaults = {name: of[family] for name, of in options_by_family(model).items() if family in of}
    for name, by_recipe in _declared(model, "recipes").items():
        of = by_recipe.get(recipe, {})
        if not isinstance(of, dict):
            defaults[name] = of
        elif family in of:
            defaults[name] = of[family]
    return defaults


def default_of(model: type[BaseModel], name: str, family: str, recipe: str = "") -> Any:
    """The default of an option that a family has."""
    return defaults_of(model, family, recipe).get(name, model.model_fields[name].default)


def options_lacking(model: type[BaseModel], family: str) -> list[str]:
    """Names of the options that a family does not have."""
    return [name for name, by_family in options_by_family(model).items() if family not in by_family]
