"""Floating point operations: what a sample needs of them, and how many this device does in a second."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.data.samples.streams import Shape, Streams
from engine.models.encoder import Encoding
from engine.models.family import Family
from engine.models.parts import empty_copy
from engine.models.training_form import adapters_of, form_of


@dataclass(frozen=True)
class Flops:
    """What model FLOP utilisation is the ratio of.

    step: operations of a step for one sample: three times those of a forward pass, where adapters are trained as many as they
        are, and the text encoder's where captions are tokens. Where samples are of several shapes, the mean by their shares.
    per_second: what a large matrix product reaches on this device.
    """

    step: float
    per_second: float


def count_flops(family: Family, model: torch.nn.Module, device: torch.device, streams: Streams) -> Flops | None:
    """Counted and measured on a GPU; None on a CPU, where nobody asks for its utilisation."""
    if device.type != "cuda":
        return None
    peak = matrix_flops_per_second(device, family.encoding.dtype, warm_up=0.1)  # short: a run should begin
    text = text_flops(family.encoding) if family.reads_tokens else 0.0
    return Flops(mean_step_flops(family, model, streams.shapes) + text, peak)


def mean_step_flops(family: Family, model: torch.nn.Module, shapes: Mapping[Shape, Fraction]) -> float:
    """Operations of one sample's forward and backward pass, in the mean over shapes by their shares."""
    return sum(float(share) * step_flops(family, model, shape) for shape, share in shapes.items())


def step_flops(family: Family, model: torch.nn.Module, shape: Shape = ()) -> float:
    """Operations of one sample's forward and backward pass; of a frozen base the second ends at the first adapter."""
    if not family.config.trains_beside:
        return 3 * forward_flops(family, model, shape)
    with FlopCounterMode(display=False) as counter:
        prediction, parameters = forward_on_meta(family, model, shape=shape)
        torch.autograd.grad(prediction, parameters, torch.empty_like(prediction), materialize_grads=True)
    return float(counter.get_total_flops())


def forward_on_meta(
    family: Family, model: Any, batch: int = 1, training_form: bool = False, shape: Shape = ()
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A forward pass that computes nothing, of the published model or of the form it trains in, for modes that look on.

    Args:
        shape: of the records, where they have another than the encoding's.

    Returns:
        The prediction, and the parameters that are trained.
    """
    timesteps = family.schedule.draw(torch.tensor([0]), torch.arange(batch), batch).to("meta")
    with torch.device("meta"):
        shadow = empty_copy(model)
        family.lay_out(shadow, form_of(model) if training_form else None, adapters=adapters_of(model))
        shapes = dict(shape)
        record = {
            name: torch.empty(
                batch, *shapes.get(name, field.shape), dtype=None if field.dtype.is_floating_point else field.dtype
            )
            for name, field in family.fields.items()
        }
        prediction = family.predict(shadow, record[family.encoding.mean], timesteps, record)
    return prediction, [parameter for parameter in shadow.parameters() if parameter.requires_grad]


def forward_flops(family: Family, model: torch.nn.Module, shape: Shape = ()) -> float:
    """Operations of one forward pass for one sample, attention included."""
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(family, model, shape=shape)
    return float(counter.get_total_flops())


def text_flops(encoding: Encoding) -> float:
    """Operations of the text encoder for one caption."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        rows = {name: torch.zeros(1, *field.shape, dtype=field.dtype) for name, field in encoding.token_fields.items()}
        encoding.encode_tokens(encoding.text_model(encoding.text_config).eval(), rows)
    return float(counter.get_total_flops())


def matrix_flops_per_second(device: torch.device, dtype: torch.dtype, warm_up: float = 0.5) -> float:
    """What a large matrix product reaches on this device: the measure that model FLOP utilisation is relative to.

    The median of five windows, after `warm_up` seconds of work in which the clocks settle.
    """
    gpu = device.type == "cuda"
    size, products = 8192 if gpu else 1024, 5
    left, right = torch.randn(2, size, size, device=device).to(dtype)

    def window() -> float:
        started = time.perf_counter()
        for _ in range(products):
            left @ right
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    warm = window()
    while warm < warm_up:
        warm += window()
    return 2 * size**3 * products / statistics.median(window() for _ in range(5))
