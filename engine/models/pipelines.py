"""Whole pipelines from text to images: opened from their halves, and saved under portable names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    StableDiffusionPipeline,
    WuerstchenCombinedPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
)

from engine.catalogue import DECODER, FAMILIES, PRIOR
from engine.errors import UserError, first_line
from engine.files import reading
from engine.models.adapter import adaptable, adaptable_layers, read_adapter
from engine.models.check import absent_parts, check_part, check_pipeline, join_parts, load_part
from engine.models.index import classes_of, read_index
from engine.models.low_rank import merged
from engine.models.published import download

LARGEST_SIDE = 2048  # pixels of an image that no one gave a size for

# Family of the prior -> prior, decoder, and the pipeline that joins them.
_HALVES: dict[str, tuple[Any, Any, Any]] = {
    "kandinsky-prior": (KandinskyV22PriorPipeline, KandinskyV22Pipeline, KandinskyV22CombinedPipeline),
    "wuerstchen": (WuerstchenPriorPipeline, WuerstchenDecoderPipeline, WuerstchenCombinedPipeline),
}
_DRAWN: tuple[Any, ...] = (StableDiffusionPipeline, *(kind for halves in _HALVES.values() for kind in halves))


def _published_half(pipeline: Any) -> str | None:
    """Where the other half of a prior or decoder pipeline was published; None for a whole one."""
    for family, (prior, decoder, _) in _HALVES.items():
        if type(pipeline) in (prior, decoder):
            return FAMILIES[family].published[DECODER if type(pipeline) is prior else PRIOR]
    return None


def combine(left: Any, right: Any) -> Any:
    """One pipeline from text to images out of a prior pipeline and its decoder pipeline, in either order.

    diffusers' own loading finds the prior of a decoder on the hub only, by a name in the decoder's model card; putting the
    halves together here works for directories too.

    Raises:
        UserError: the two are not halves of one pipeline.
    """
    for prior, decoder in ((left, right), (right, left)):
        for prior_class, decoder_class, combined in _HALVES.values():
            if isinstance(prior, prior_class) and isinstance(decoder, decoder_class):
                parts = {f"prior_{name}": part for name, part in prior.components.items()}
                return combined(**decoder.components, **parts)
    raise UserError(f"a {type(left).__name__} and a {type(right).__name__} are not the two halves of one pipeline")


def use_portable_names(pipeline: Any) -> None:
    """Names image processors in the pipeline's index by the class that every release of transformers knows.

    Where torchvision is missing, transformers 5 puts `CLIPImageProcessorPil` in place of `CLIPImageProcessor`; an index with
    that name would load nowhere else.
    """
    for part, value in dict(pipeline.config).items():
        if isinstance(value, (tuple, list)) and str(value[-1]).endswith("ImageProcessorPil"):
            pipeline.register_to_config(**{part: (value[0], value[-1].removesuffix("Pil"))})


def load_pipeline(path: Path, kind: Any, variant: str | None = None, dtype: torch.dtype | None = None, **given: Any) -> Any:
    """A pipeline of the class `kind` out of a folder, whose classes are judged first and whose programs are never run.

    Args:
        given: parts to take instead of the folder's, None to go without.

    Raises:
        UserError: a part is of another kind, missing, or damaged.
    """
    listed = classes_of(path, kind)
    parts = {name: load_part(path / name, part, variant, dtype) for name, part in listed.items() if name not in given}
    pipeline = join_parts(path, kind, parts | given)
    pipeline.register_to_config(_name_or_path=str(path))
    return pipeline


def open_pipeline(path: Path, other_half: str | None, dtype: torch.dtype, parts: Mapping[str, Path] | None = None) -> Any:
    """A pipeline from text to images: the one at `path`, joined with its other half (by default the published one) if it is a
    prior or a decoder.

    Args:
        parts: models of the pipeline that are loaded from other folders, as of a checkpoint.

    Raises:
        UserError: a part is missing or damaged, or the other half is not there, does not fit, or is not needed.
    """
    pipeline = _open(Path(path), dtype, parts or {})
    published = _published_half(pipeline)
    if published is None:
        if other_half:
            raise UserError(f"{path}: a {type(pipeline).__name__} has no other half; leave out --other_half")
        return pipeline
    name = other_half or published
    try:
        folder = Path(name) if Path(name).is_dir() else download(name)
    except UserError:
        raise
    except Exception as error:  # a connection, a missing repository, an incomplete directory: the library raises many kinds
        raise UserError(f"--other_half {name}: cannot be loaded: {first_line(error)}") from None
    other = _open(folder, dtype, {})
    with reading(folder, f"give the other half of {path}"):
        return combine(pipeline, other)


def _open(path: Path, dtype: torch.dtype, parts: Mapping[str, Path]) -> Any:
    name = read_index(path)["_class_name"]
    kind = next((kind for kind in _DRAWN if kind.__name__ == name), None)
    if kind is None:
        raise UserError(f"{path}: a {name}; what can be drawn with: {', '.join(kind.__name__ for kind in _DRAWN)}")
    classes = classes_of(path, kind)
    if strange := sorted(parts.keys() - classes.keys()):
        raise UserError(f"{parts[strange[0]]}: a {name} has no {strange[0]}; give the pipeline that it was trained from")
    for part, folder in parts.items():
        check_part(folder, classes[part])
    given = {part: load_part(folder, classes[part], None, dtype) for part, folder in parts.items()}
    return open_to_draw(path, kind, dtype=dtype, **given)


def open_to_draw(path: Path, kind: Any, variant: str | None = None, dtype: torch.dtype | None = None, **given: Any) -> Any:
    """A pipeline of the class `kind` out of a folder, once all of it is known to be whole.

    Args:
        given: parts to take instead of the folder's.

    Raises:
        UserError: a part is of another kind, missing, or damaged.
    """
    check_pipeline(path, kind, variant)
    return load_pipeline(path, kind, variant, dtype, **(absent_parts(path, kind) | given))


def bake_in(pipeline: Any, path: Path, scale: float) -> None:
    """Adds an adapter to the weights of a pipeline in fp32, so that it costs nothing to draw with.

    Raises:
        UserError: it is none, is damaged, or does not fit the pipeline's models.
    """
    parts = adaptable(pipeline)
    adapter = read_adapter(path, parts, of_inputs=True)
    layers: dict[str, Any] = adaptable_layers(parts)
    with reading(path, "give an adapter that was trained for this model"), torch.no_grad():
        for layer in adapter.alphas:
            layers[layer].weight.copy_(merged(layers[layer].weight, layer, adapter, scale))


def require_drawable(pipeline: Any, where: Path, remedy: str) -> None:
    """Refuses a Stable Diffusion whose images, where no size is given, would have more pixels than any is trained for.

    Raises:
        UserError: it would go on without end.
    """
    if {"vae", "unet"} <= pipeline.components.keys():
        size = pipeline.unet.config.sample_size
        sides = size if isinstance(size, list | tuple) else [size]
        most = max((side * pipeline.vae_scale_factor for side in sides if type(side) is int), default=0)
        if most > LARGEST_SIDE:
            raise UserError(f"{where}: by the sample_size of its unet it draws images of {most} px; {remedy}")
