"""Images of DreamBooth's class: those that are missing are drawn with the pipeline as it was published, before anything is
encoded.

An image is a function of its number, the seed, and how many are drawn at a time: any number of processes draws the same, and
what was interrupted goes on.
"""

import contextlib
import gc
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from engine.catalogue import FAMILIES, PRIOR
from engine.config.checks import check_writable, holds_shards
from engine.config.mixture import CLASS, DataSet, data_sets_of
from engine.config.options import CAPTIONED, CacheConfig
from engine.data.sources import holds_data, open_source
from engine.errors import UserError, out_of_memory
from engine.files import PARTIAL, held, seen
from engine.messages import Progress, busy
from engine.models.drawing import draw
from engine.models.encoder import PRECISIONS, Encoding
from engine.models.pipelines import combine, open_to_draw
from engine.models.published import locate
from engine.picture import save_png
from engine.processes import Processes
from engine.prompts import Wanted

_DRAWN = re.compile(r"drawn-(\d{5,9})\.png")


def draw_class_images(config: CacheConfig, encoding: Encoding, processes: Processes, checkpoint: Path | None = None) -> None:
    """Draws what is missing of `--num_class_images` into `--class_data_dir`; every process must call it.

    Of several runs that share the folder one draws, and the others wait for its images.

    Args:
        checkpoint: that from which a run goes on, on the same samples.

    Raises:
        UserError: the folder holds what is no data set or cannot be written, or the pipeline cannot be opened, or not draw; or
            a checkpoint was trained on images that are gone, whose shards are there.
    """
    if not (config.with_prior_preservation and config.class_data_dir):
        return
    with contextlib.ExitStack() as stack:
        _draw_missing(config, encoding, processes, lambda: _missing_once_held(config, stack, checkpoint))
    if torch.cuda.is_initialized():  # what drawing took is not held beside the training, nor counted as its own
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _draw_missing(config: CacheConfig, encoding: Encoding, processes: Processes, look: Callable[[], list[int]]) -> None:
    folder, size = Path(config.class_data_dir or ""), config.sample_batch_size
    missing = processes.computed_by_first(look)
    if not missing:
        return
    # What a batch holds does not depend on what is there already: the last bits of an image may depend on its batch.
    batches = [range(first, first + size) for first in range(0, max(missing) + 1, size)]
    own = [batch for batch in batches if not set(missing).isdisjoint(batch)][processes.rank :: processes.world]
    with busy("Opening the pipeline that draws the images of the class, downloads included"):
        # The first one downloads, whether it draws or not.
        pipeline = processes.first_before_others(
            lambda: _open(config, encoding, processes.device) if own or processes.is_first else None
        )
    processes.all_or_none(lambda: _draw(config, pipeline, own, missing, processes))
    processes.computed_by_first(lambda: _require(folder, missing))


def _missing_once_held(config: CacheConfig, stack: contextlib.ExitStack, checkpoint: Path | None) -> list[int]:
    """The numbers of the images that are to be drawn; the folder is then held until the stack is closed."""
    folder, data_set = Path(config.class_data_dir or ""), next(each for each in data_sets_of(config) if each.name == CLASS)
    if not (missing := _missing(config, data_set)):
        return []
    of_all = f"--class_data_dir {folder}: {len(missing)} of --num_class_images {config.num_class_images} are missing"
    if checkpoint and not getattr(config, "continue_on_grown_data", False) and holds_shards(data_set.config.shards_path):
        raise UserError(
            f"{checkpoint}: was trained on other samples. {of_all}: give --shards_dir {data_set.config.shards_path.parent} in "
            "place of the folders and their prompts to go on, or --continue_on_grown_data to draw more"
        )
    if config.class_prompt is None:
        raise UserError(f"{of_all}; give --class_prompt, of which they are drawn")
    check_writable("--class_data_dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    with busy(f"Waiting for another run to draw into {folder}"):
        stack.enter_context(held(folder, wait=partial(time.sleep, 0.5)))
    for left in folder.glob(f"drawn-*.png.*{PARTIAL}"):  # by one that was killed
        left.unlink(missing_ok=True)
    return _missing(config, data_set)


def _missing(config: CacheConfig, data_set: DataSet) -> list[int]:
    """The numbers of the images that lack, beside those that others put there."""
    folder = Path(config.class_data_dir or "")
    if folder.exists() and not folder.is_dir():
        return []  # an archive or a table
    there = 0
    if holds_data(folder):
        there = len(open_source(data_set.config.model_copy(update={"max_train_samples": None}), config.family in CAPTIONED))
    drawn = {int(found[1]) for path in folder.glob("drawn-*.png") if (found := _DRAWN.fullmatch(path.name))}
    wanted = data_set.config.max_train_samples or config.num_class_images
    return [number for number in range(wanted - (there - len(drawn))) if number not in drawn]


def _open(config: CacheConfig, encoding: Encoding, device: torch.device) -> Any:
    """The published pipeline from text to images, on the device."""
    usual = "fp16" if device.type == "cuda" else "fp32"
    named = config.prior_generation_precision
    dtype = (PRECISIONS | {"fp32": torch.float32})[usual if named in (None, "no") else named]
    entry = FAMILIES[config.family]
    other: Any = getattr(encoding, "locate_decoder", partial(locate, config, PRIOR))  # which says what does not fit
    halves = [
        open_to_draw(encoding.path if option == entry.pipeline else other(), getattr(diffusers, name), config.variant, dtype)
        for option, name in entry.classes.items()
    ]
    pipeline = combine(*halves) if len(halves) > 1 else halves[0]
    if "safety_checker" in pipeline.components:  # which would leave black images in place of those that it suspects
        pipeline.register_modules(safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def _draw(config: CacheConfig, pipeline: Any, own: list[range], missing: list[int], processes: Processes) -> None:
    """Draws the missing images of some batches."""
    folder = Path(config.class_data_dir or "")
    side = None if config.family == "sd" else config.resolution  # whose pipeline knows it
    lacking = {number: folder / _name_of(number) for number in missing}
    with Progress(len(missing), "Drawing images of the class", "image") as progress:
        for batch in own:
            wanted = [
                Wanted(config.class_prompt or "", (config.seed or 0) + number, width=side, height=side) for number in batch
            ]
            try:
                images = dict(draw(pipeline, wanted, len(batch)))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise UserError("not enough memory to draw images of the class; draw them elsewhere", alone=True) from None
            for place, number in enumerate(batch):
                if number in lacking:
                    told = {"prompt": wanted[place].prompt, "seed": str(wanted[place].seed)}
                    save_png(images[place].convert("RGB"), lacking[number], told)
            done = sum(path.exists() for path in lacking.values()) if processes.is_first else 0
            progress.update(done - progress.done)


def _name_of(number: int) -> str:
    return f"drawn-{number:05}.png"


def _require(folder: Path, numbers: list[int]) -> None:
    """Raises `UserError` where the first process does not see what others drew."""
    for number in numbers:
        if not seen(folder / _name_of(number)):
            raise UserError(f"--class_data_dir {folder}: not all see what was drawn there; name a folder that all nodes share")
