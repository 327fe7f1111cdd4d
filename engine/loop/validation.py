"""Validation images, divided over the processes."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.config.options import TrainConfig
from engine.errors import first_line
from engine.loop.weights.partition import Partition
from engine.loop.weights.whole import adapter_of, gather_state, published_parts
from engine.messages import warn
from engine.models.adapter import load_into
from engine.models.drawing import draw
from engine.models.family import Family
from engine.models.inversion import VECTORS
from engine.models.parts import parts_of
from engine.offline import offline
from engine.picture import labelled_grid, save_png
from engine.processes import Processes
from engine.prompts import Wanted

LOADING_LIMIT, DRAWING_LIMIT = 900.0, 600.0  # seconds for the parts of a pipeline from a cold shared disk, and for an image

Drawn = tuple[dict[int, np.ndarray], str | None]  # a process's images, uint8 [H, W, 3], by their number; what went wrong


def seconds_at_most(config: TrainConfig, world: int) -> float:
    """After which time a drawing that has not ended is given up for hung."""
    images = len(config.validation_prompts or []) * config.num_validation_images
    return LOADING_LIMIT + DRAWING_LIMIT * -(-images // min(images, world))


def validate(config: TrainConfig, family: Family, partition: Partition, seed: int, step: int) -> Image.Image | None:
    """Draws the validation images into samples/step-N.png, and returns them, on the first process; all must call it.

    Every image is drawn by itself, the n-th of a prompt from seed + n, so that the number of processes does not show. At
    most as many processes as there are images open a pipeline and keep the whole model, those of a node one after another; all
    others only pass their part of the weights on.

    Pictures never cost a training: what keeps any process from drawing is one warning by the first, beside the images of the
    others. Nothing can fail alone while others wait for it in a collective: what these need is allocated before, and agreed on.
    """
    processes, prompts, each = partition.processes, config.validation_prompts or [], config.num_validation_images
    wanted = [(prompt, seed + number) for prompt in prompts for number in range(each)]
    room, failure = None, None
    try:
        room = partition.room_to_gather()
    except Exception as error:  # of memory
        failure = _described(error)
    told = processes.gather_objects((processes.local_rank, failure))
    drawers = who_draws([local for local, _ in told], len(wanted))
    if any(failure for _, failure in told):
        drawn: dict[int, Drawn] = {rank: ({}, failure) for rank, (_, failure) in enumerate(told)}
    else:
        own = list(enumerate(wanted))[drawers.index(processes.rank) :: len(drawers)] if processes.rank in drawers else []
        state = gather_state(partition, family.encoding.dtype, bool(own), room)  # a collective, whose failure ends the run
        del room  # pictures may need it
        turn = _in_turn(processes, neighbour(processes.rank, [local for local, _ in told], drawers), step)
        result = _draw_own(family, partition, state, own, turn)
        processes.wait_for_all()
        drawn = processes.gather_to_first(result, drawers)
    if not processes.is_first:
        return None
    return _show(prompts, each, drawn, Path(config.output_dir) / "samples" / f"step-{step}.png", step)


def who_draws(local_ranks: list[int], images: int) -> list[int]:
    """The processes that draw so many images: one of every node, then a second one of each, and so on.

    So the frozen parts lie in the memory of as many hosts as possible, and a node's network and memory carry no more of them
    than they must. What is read again on another node is small: of at most so many pipelines as there are images.

    Args:
        local_ranks: of all processes, by rank.
    """
    return sorted(range(len(local_ranks)), key=lambda rank: (local_ranks[rank], rank))[:images]


def neighbour(rank: int, local_ranks: list[int], drawers: list[int]) -> int | None:
    """The one that draws on the same node and comes before this one, if any."""
    node = rank - local_ranks[rank]
    return max((other for other in drawers if other < rank and other - local_ranks[other] == node), default=None)


@contextlib.contextmanager
def _in_turn(processes: Processes, before: int | None, step: int) -> Iterator[None]:
    """Opens a pipeline after the neighbour has, or could not, so that a node's memory holds the parts of one at a time."""
    try:
        if before is not None:
            processes.wait(f"opened/{step}/{before}")
        with offline():  # all of it was downloaded before the training
            yield
    finally:
        if processes.store is not None:
            processes.store.set(f"opened/{step}/{processes.rank}", "")


def _draw_own(
    family: Family,
    partition: Partition,
    state: dict[str, Tensor] | Exception,
    own: list[tuple[int, tuple[str, int]]],
    turn: contextlib.AbstractContextManager[None],
) -> Drawn:
    """This process's images, as far as they could be drawn.

    Args:
        own: number, prompt and seed of each.
        turn: to open the pipeline in.
    """
    images: dict[int, np.ndarray] = {}
    try:
        if own:
            with turn:
                if isinstance(state, Exception):
                    raise state
                pipeline, arguments = _pipeline(family, partition, state)
                pipeline = pipeline.to(partition.processes.device)
            for number, image in _draw(pipeline, arguments, own):
                images[number] = np.asarray(image.convert("RGB"))
        elif isinstance(state, Exception):
            raise state
    except Exception as error:  # of diffusers, of the disk, of memory: any
        return images, _described(error)
    return images, None


def _pipeline(family: Family, partition: Partition, state: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """What draws with the exported weights: published models of them, or those of the base and what was trained beside."""
    module, dtype = partition.module, family.encoding.dtype
    if not family.config.trains_beside:
        return family.preview(published_parts(module, family.part, state))
    pipeline, arguments = family.preview(parts_of(family.published_model().to(dtype).eval(), family.part))
    if token := family.config.placeholder_token:
        pipeline.load_textual_inversion({token: state[VECTORS]})
        return pipeline, arguments
    load_into(pipeline, adapter_of(module, family.part, state.items(), dtype))
    return pipeline, arguments


@torch.no_grad()
def _draw(
    pipeline: Any, arguments: dict[str, Any], own: list[tuple[int, tuple[str, int]]]
) -> Iterator[tuple[int, Image.Image]]:
    pipeline.set_progress_bar_config(disable=True)
    for place, image in draw(pipeline, [Wanted(prompt, seed) for _, (prompt, seed) in own], **arguments):
        yield own[place][0], image


def _show(prompts: list[str], each: int, drawn: dict[int, Drawn], path: Path, step: int) -> Image.Image | None:
    """The grid of what was drawn of so many images of each prompt, saved; a warning of what was not."""
    images = {number: image for of_one, _ in drawn.values() for number, image in of_one.items()}
    failures = [f"process {rank}: {failure}" if len(drawn) > 1 else failure for rank, (_, failure) in drawn.items() if failure]
    grid = None
    try:
        if images:
            numbers = itertools.groupby(sorted(images), key=lambda number: number // each)
            rows = [(prompts[row], [Image.fromarray(images[number]) for number in some]) for row, some in numbers]
            grid = labelled_grid(rows)
            save_png(grid, path)
    except Exception as error:  # of the disk
        failures.append(_described(error))
    if failures:
        number = each * len(prompts)
        missing = f"{number - len(images)} of {number} are missing: " if 0 < len(images) < number else ""
        warn(f"validation images of step {step}: {missing}{failures[0]}; the training goes on")
    return grid


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
