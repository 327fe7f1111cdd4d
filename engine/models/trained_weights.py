"""Which weights of a model are trained, and which of them learn alike, by patterns of their names.

Names are those of the published model (`down_blocks.0.attentions.0.proj_in.weight`), with or without the part of the pipeline
before them (`unet.down_blocks...`). In a pattern `*` stands for any letters; one that names a module stands for all in it.
"""

from collections.abc import Hashable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from engine.catalogue import FAMILIES, PARTS
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.models.inversion import VECTORS
from engine.models.training_form import published_names


def whole_name(name: str, config: TrainConfig) -> str:
    """A parameter's name with the part of the pipeline before it, which it has already where several parts are trained."""
    return name if name.split(".")[0] in PARTS else f"{FAMILIES[config.family].part}.{name}"


def selects(pattern: str, name: str, config: TrainConfig) -> bool:
    """Whether a pattern stands for a parameter, by its published name."""
    whole = whole_name(name, config)
    names = (whole, whole.partition(".")[2])
    return any(fnmatchcase(each, pattern) or fnmatchcase(each, f"{pattern}.*") for each in names)


def is_frozen(name: str, config: TrainConfig) -> bool:
    """Whether `--freeze` keeps a published parameter from being trained."""
    return any(selects(pattern, name, config) for pattern in config.freeze or ())


def rate_given(name: str, config: TrainConfig) -> tuple[str, float] | None:
    """The first pattern of `--lr_of` that stands for a parameter in training form, and its rate."""
    published = published_names(name)[0]  # of what is stacked all learn alike
    given = (each for each in config.rates_of_patterns if selects(each[0], published, config))
    return next(given, None)


def learns_like(name: str, config: TrainConfig) -> Hashable:
    """What tells a published parameter from those that learn otherwise, with which it cannot be stacked."""
    return is_frozen(name, config), rate_given(name, config)


def check_patterns(names: Iterable[str], config: TrainConfig) -> None:
    """Refuses patterns that stand for none of a model's published parameters, and those that leave none to train.

    Raises:
        UserError: which.
    """
    known = [VECTORS] if config.placeholder_token else list(names)
    if config.lora_rank:
        known += [f"{name.removesuffix('weight')}{kind}.weight" for kind in ("lora_A", "lora_B") for name in known]
    options = {"--freeze": config.freeze or [], "--lr_of": [pattern for pattern, _ in config.rates_of_patterns]}
    for option, patterns in options.items():
        for pattern in patterns:
            if not any(selects(pattern, name, config) for name in known):
                raise UserError(
                    f"{option} {pattern}: no weight of the model has such a name; they are named as {known[0]} and "
                    f"{known[-1]}, and * stands for any letters"
                )
    if all(is_frozen(name, config) for name in known):
        raise UserError("--freeze leaves no weight to train; give patterns of fewer")


def check_rates(names: Iterable[str], config: TrainConfig) -> None:
    """Refuses patterns of `--lr_of` that stand for weights which are not trained.

    Args:
        names: of all trained parameters, in training form.

    Raises:
        UserError: which; of all processes.
    """
    trained = [published for name in names for published in published_names(name)]
    for pattern, _ in config.rates_of_patterns[: len(config.lr_of or ())]:
        if not any(selects(pattern, name, config) for name in trained):
            raise UserError(
                f"--lr_of {pattern}: no weight of that name is trained; those that are have names as {trained[0]} and "
                f"{trained[-1]}",
                shared=True,
            )


def freeze(model: Any, config: TrainConfig) -> None:
    """Keeps the parameters of a published model that `--freeze` names from being trained."""
    for name, parameter in model.named_parameters():
        if is_frozen(name, config):
            parameter.requires_grad_(False)
