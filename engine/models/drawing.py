"""Images out of whole pipelines: in batches that do not show in them, compiled, and with less memory where it is short."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import WuerstchenDecoderPipeline
from torch.utils._pytree import tree_map_only

from engine.backends import inductor_options
from engine.errors import out_of_memory
from engine.messages import say
from engine.models.training_form import SHIPPED, let_be_short, to_training_form
from engine.prompts import Wanted

DENOISERS = ("unet", "prior_prior", "decoder")  # the parts of pipelines that are called once or twice per sampling step
DECODERS = ("vae", "movq", "vqgan")  # those that turn latents into pixels, once per image


class _DecoderOfSeveral(WuerstchenDecoderPipeline):
    """Wuerstchen's decoder for a prompt per image; as it is, it repeats each of several prompts for every image."""

    def encode_prompt(self, prompt: Any, device: Any, num_images_per_prompt: int, *others: Any) -> Any:
        encode: Any = super().encode_prompt  # type: ignore[misc]
        return encode(prompt, device, num_images_per_prompt // len(prompt), *others)


def draw(
    pipeline: Any, wanted: Sequence[Wanted], batch_size: int = 1, fill: bool = False, **arguments: Any
) -> Iterator[tuple[int, Any]]:
    """Each image with its number in `wanted`, as they are drawn: in order, but that those of one shape come together.

    Every image has a generator of its own from its seed, for its first noise and for all that schedulers draw, in both stages
    of two. So how many are drawn at a time changes them by rounding at the most.

    Where memory is short, less of it is asked for, which is said.

    Args:
        batch_size: how many at a time, at the most.
        fill: repeat the last image of a batch that is not full, and drop it: compiled programs are for one size each.
        arguments: as the pipeline takes them, for what is None in `wanted`.
    """
    if isinstance(getattr(pipeline, "decoder_pipe", None), WuerstchenDecoderPipeline):
        pipeline.decoder_pipe.__class__ = _DecoderOfSeveral
    left = dict(enumerate(wanted))
    full = {shape: sum(_shape(one) == shape for one in wanted) for shape in map(_shape, wanted)} if fill else {}
    while left:
        shape = _shape(next(iter(left.values())))
        numbers = [number for number, one in left.items() if _shape(one) == shape][:batch_size]
        missing = min(full.get(shape, 0), batch_size) - len(numbers)
        batch = [left[number] for number in numbers + numbers[-1:] * missing]
        if (images := _draw_batch(pipeline, batch, arguments)) is None:
            batch_size = _spare_memory(pipeline, len(batch))
            continue
        yield from zip(numbers, images, strict=False)
        for number in numbers:
            del left[number]


def speed_up(pipeline: Any) -> None:
    """Gives the models that draw the form in which they train fastest, in place; images change by rounding at the most.

    Args:
        pipeline: on the device where it will draw, which decides on its kernels.
    """
    for name in (*DENOISERS, *DECODERS):
        if name in pipeline.components:
            to_training_form(pipeline.components[name], SHIPPED)
            let_be_short(pipeline.components[name], pipeline.device)


def compile_models(pipeline: Any, shapes: int) -> None:
    """Has torch compile what a pipeline calls in every sampling step, and what makes pixels, each in one graph, in place.

    On a GPU calls are replayed from CUDA graphs, so that a call costs one launch.

    Args:
        shapes: in how many sizes of images and batches it will draw. There is one program for each, which knows its sizes:
            one for any would be slower, and CUDA graphs are of one size each.
    """
    on_gpu = pipeline.device.type == "cuda"
    inductor = inductor_options("reduce-overhead" if on_gpu else "default", on_gpu)
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": inductor}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 3 * shapes)
    for name in (*DENOISERS, *DECODERS):
        model = pipeline.components.get(name)
        if hasattr(model, "decoder"):  # of an autoencoder: what is beside it, and arguments that are no tensors, stay outside
            model = model.decoder
        if name == "vqgan" and model is not None:  # which has no part that decodes
            model.decode = _kept(torch.compile(model.decode, **options))
        elif model is not None:
            model.forward = _kept(torch.compile(model.forward, **options))


def _kept(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose results stay what they are: CUDA graphs write those of the next call in the same place, and
    schedulers of several steps, and decoding in pieces, go back to earlier ones."""

    def call(*arguments: Any, **named: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.clone, compiled(*arguments, **named))

    return call


def _shape(one: Wanted) -> tuple[Any, ...]:
    """What the images of a batch have in common."""
    return one.width, one.height, one.steps, one.guidance_scale, one.negative_prompt is None


def _draw_batch(pipeline: Any, batch: list[Wanted], arguments: dict[str, Any]) -> list[Any] | None:
    """The images of a batch; None where memory ran out, and less can be done with."""
    first = batch[0]
    generators = [torch.Generator(pipeline.device).manual_seed(one.seed) for one in batch]
    settings: dict[str, Any] = {
        "width": first.width,
        "height": first.height,
        "num_inference_steps": first.steps,
        # Wuerstchen is guided in its prior alone.
        "prior_guidance_scale" if "vqgan" in pipeline.components else "guidance_scale": first.guidance_scale,
    }
    if first.negative_prompt is not None:
        settings["negative_prompt"] = [one.negative_prompt for one in batch]
        if "movq" in pipeline.components:
            generators *= 2  # its prior draws an embedding of each negative prompt, too, behind those of the prompts
    given = arguments | {name: value for name, value in settings.items() if value is not None}
    try:
        return list(pipeline([one.prompt for one in batch], generator=generators, **given).images)
    except Exception as error:
        if not out_of_memory(error) or (len(batch) == 1 and not _can(pipeline, "tiling")):
            raise
    return None  # outside of the handler, so that nothing holds what the failed batch had allocated


def _can(pipeline: Any, kind: str) -> bool:
    """Whether the decoder can still be told to work in pieces."""
    return getattr(pipeline.components.get("vae"), f"use_{kind}", True) is False


def _spare_memory(pipeline: Any, batch: int) -> int:
    """Takes the next step towards less memory, after a batch of so many images had too little; returns how many to try."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if batch > 1 and _can(pipeline, "slicing"):
        pipeline.vae.enable_slicing()
        say("Out of memory: from now on images are decoded one by one")
    elif batch > 1:
        batch //= 2
        say(f"Out of memory: from now on {batch} at a time are drawn")
    else:
        pipeline.vae.enable_tiling()
        say("Out of memory: from now on images are decoded in tiles, whose seams may show")
    return batch
