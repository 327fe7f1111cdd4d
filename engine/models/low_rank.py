"""Adapters baked into a pipeline's weights, and taken out of the difference between two pipelines; one layer at a time."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from engine.catalogue import FAMILIES, INDEX
from engine.errors import UserError
from engine.files import PARTIAL, discard, publish_directory, reading
from engine.messages import Progress, say
from engine.models.adapter import DOWN, MAGNITUDE, OF_INPUTS, UP, Adapter, adaptable, adaptable_layers
from engine.models.check import check_pipeline
from engine.models.index import classes_of, read_index, require_inside
from engine.models.parts import bare
from engine.models.weights import is_weights, present_variant, read_tensors, stored_tensors, weight_files
from engine.tensors import write_one_by_one

_KINDS = {entry.classes[entry.pipeline] for entry in FAMILIES.values()}
Scaled = Sequence[tuple[Adapter, float]]  # adapters that follow each other, each with its scale


def open_parts(pipeline: Path, variant: str | None = None) -> dict[str, nn.Module]:
    """The models of a pipeline's folder that have adapters, on the meta device, once all of the pipeline is known to be whole.

    Raises:
        UserError: it is none that is trained here, or damaged.
    """
    return adaptable(check_pipeline(pipeline, _kind(pipeline), variant))


def _kind(pipeline: Path) -> Any:
    found = read_index(pipeline)["_class_name"]
    if found not in _KINDS:
        raise UserError(f"{pipeline}: a {found}; what has adapters here: {', '.join(sorted(_KINDS))}")
    return getattr(diffusers, found)


def merged(weight: Tensor, layer: str, adapter: Adapter, scale: float) -> Tensor:
    """A layer's weight with its adapter baked in, in fp32: W + s B A, and with DoRA (arXiv:2402.09353, equation 5) at the
    lengths that were learned.

    Raises:
        UserError: the layer is a convolution of groups, as which it could not be computed any more.
    """
    down, up = (adapter.tensors[layer + suffix].float() for suffix in (DOWN, UP))
    if up.shape[1] != len(down):
        raise UserError(f"{layer} is a convolution of groups, into which no adapter can be merged; load it beside the model")
    change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    whole = weight.float() + scale * adapter.alphas[layer] / len(down) * change
    for suffix, axis in ((MAGNITUDE, 0), (OF_INPUTS, 1)):
        if (magnitude := adapter.tensors.get(layer + suffix)) is not None:
            lengths = whole.transpose(0, axis).flatten(1).norm(dim=1)
            shape = [-1 if dimension == axis else 1 for dimension in range(whole.dim())]
            whole = whole * (magnitude.float().flatten() / lengths).view(shape)
    return whole


def merge(pipeline: Path, adapters: Scaled, output: Path, variant: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Writes a pipeline with adapters baked in; whatever they do not change is copied.

    Args:
        dtype: of the weights of all models; None keeps that of every tensor.

    Raises:
        UserError: a layer cannot take its adapter.
    """
    open_parts(pipeline, variant)
    changed = {part for adapter, _ in adapters for part in adapter.parts}
    aside = output.with_name(output.name + PARTIAL)
    discard(aside)
    try:
        aside.mkdir(parents=True)
        shutil.copyfile(pipeline / INDEX, aside / INDEX)
        for part, model in classes_of(pipeline, _kind(pipeline)).items():
            if (pipeline / part).is_dir():
                rewritten = part in changed or (dtype is not None and issubclass(model, nn.Module))
                _copy(pipeline, part, aside / part, without_weights=rewritten)
                if rewritten:
                    _write_merged(pipeline / part, model, adapters, aside / part, variant, dtype)
        discard(output)  # an empty one
        publish_directory(aside, output)
    finally:
        discard(aside)


def _copy(pipeline: Path, part: str, target: Path, without_weights: bool) -> None:
    """Copies the files of a part's folder, and what links within the pipeline lead to."""
    target.mkdir()
    for file in sorted((pipeline / part).iterdir()):
        weights = is_weights(file) or ".index." in file.name
        if file.is_file() and not file.name.startswith(".") and not (weights and without_weights):
            require_inside(file, pipeline, weights=weights)
            shutil.copyfile(file, target / file.name)


def _write_merged(
    folder: Path, model: Any, adapters: Scaled, target: Path, variant: str | None, dtype: torch.dtype | None
) -> None:
    """Writes the weights of a part into one file, tensor by tensor."""
    variant = present_variant(folder, variant)
    files = weight_files(folder, model, variant)
    layout = {name: tensor for file in files for name, tensor in stored_tensors(file).items()}
    if dtype is not None:
        layout = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in layout.items()}
    first = "model" if issubclass(model, transformers.PreTrainedModel) else "diffusion_pytorch_model"
    file = target / ".".join([first, *([variant] if variant else []), "safetensors"])
    with reading(folder, "download it again"):
        write_one_by_one(file, layout, _merged_tensors(folder, files, layout, adapters), {"format": "pt"})


def _merged_tensors(
    folder: Path, files: Sequence[Path], layout: Mapping[str, Tensor], adapters: Scaled
) -> Iterator[tuple[str, Tensor]]:
    by_layer = [({bare(layer): layer for layer in adapter.alphas}, adapter, scale) for adapter, scale in adapters]
    layers = {name: _layer(folder.name, name) for name in layout}
    wanted = {layer for names, _, _ in by_layer for layer in names if layer.startswith(f"{folder.name}.")}
    if missing := wanted - set(layers.values()):
        raise UserError(f"{folder}: has {min(missing)} under another name; save the pipeline anew with this diffusers")
    for name, read in _readers(files).items():
        tensor = read()
        for names, adapter, scale in by_layer:
            if (layer := names.get(layers[name])) is not None:
                tensor = merged(tensor, layer, adapter, scale)
        tensor = tensor.to(layout[name].dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder}: {name} would hold what {tensor.dtype} cannot; give --dtype bf16, or a smaller --scale")
        yield name, tensor


def _readers(files: Sequence[Path]) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of files of weights from the disk, by name."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            opened = safe_open(file, "pt")
            readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
        else:
            readers |= {name: partial(torch.clone, tensor) for name, tensor in read_tensors(file).items()}  # mapped
    return readers


def _layer(part: str, name: str) -> str:
    """The path of the layer whose weight has this name in a file."""
    return bare(f"{part}.{name}").removesuffix(".weight")


def extract(tuned: Path, base: Path, rank: int, variant: str | None = None) -> Adapter:
    """The adapter of a rank that comes closest to the difference between two pipelines, in fp32.

    What norms, biases, embeddings and convolutions of groups hold of the difference is left out, and said.

    Raises:
        UserError: they are not of one architecture, or do not differ.
    """
    parts, others = open_parts(tuned, variant), open_parts(base, variant)
    layers = {bare(layer): layer for layer in adaptable_layers(parts, grouped=False)}
    tensors: dict[str, Tensor] = {}
    kept = left = elsewhere = 0.0
    for part in parts:
        if part not in others or _shapes(parts[part]) != _shapes(others[part]):
            raise UserError(f"--base {base}: its {part} is of another architecture; give the model that {tuned} was tuned from")
        there, before = (_weights(pipeline, part, variant) for pipeline in (tuned, base))
        with Progress(len(there), f"extracting {part}", "tensor") as progress:
            for name, read in there.items():
                difference = read().float() - before[name]().float() if name in before else torch.zeros(1)
                layer, square = layers.get(name), float(difference.square().sum())
                if not math.isfinite(square):
                    raise UserError(f"{tuned} or {base}: {name} holds values that are not finite; download it again")
                if layer and square and difference.dim() > 1:
                    tensors[layer + DOWN], tensors[layer + UP], remaining = closest(difference, rank)
                    kept, left = kept + square - remaining, left + remaining
                else:
                    elsewhere += square
                progress.update()
    if not tensors:
        raise UserError(f"{tuned} and {base}: no layer differs, so there is nothing to extract")
    total = kept + left + elsewhere
    say(f"Rank {rank} keeps {kept / total:.1%} of the squared difference; {elsewhere / total:.1%} is in norms, biases and such")
    return Adapter(
        tensors, {name.removesuffix(DOWN): float(len(tensor)) for name, tensor in tensors.items() if name.endswith(DOWN)}
    )


def closest(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The product B A of a rank that is closest to a difference of weights [out, in, ...].

    Returns:
        A [rank, in, ...], B [out, rank, 1...], each with the roots of the singular values, and the square of what they leave.
    """
    flat = difference.flatten(1).double()
    rank = min(rank, *flat.shape)
    wide = flat.shape[0] <= flat.shape[1]
    # The eigenvectors of the smaller square: of the larger side none but the first are ever made.
    values, vectors = torch.linalg.eigh(flat @ flat.T if wide else flat.T @ flat)
    first = vectors[:, -rank:].flip(1)
    other = first.T @ flat if wide else (flat @ first).T  # [rank, the other side], as long as the singular values
    roots = other.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    left, right = first * roots, other / roots[:, None]
    down, up = (right, left) if wide else (left.T, right.T)
    ones = (1,) * (difference.dim() - 2)
    remaining = float(values[:-rank].clamp_min(0).sum())
    return down.float().view(rank, *difference.shape[1:]), up.float().reshape(-1, rank, *ones), remaining


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _weights(pipeline: Path, part: str, variant: str | None) -> dict[str, Callable[[], Tensor]]:
    """What reads the tensors of a pipeline's part, weights by the paths of their layers."""
    folder = pipeline / part
    files = weight_files(folder, classes_of(pipeline, _kind(pipeline))[part], present_variant(folder, variant))
    return {_layer(part, name): read for name, read in _readers(files).items()}
