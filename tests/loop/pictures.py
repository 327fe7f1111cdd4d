"""One of several processes that draw validation images, once for each fault."""

import sys
from pathlib import Path

from huggingface_hub import constants

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.loop import validation
from engine.loop.weights import open_partition
from engine.loop.weights.partition import Partition
from engine.models.family import open_family
from engine.models.stable_diffusion import StableDiffusion
from engine.processes import Processes


def fail(*arguments, **named):
    raise MemoryError("of a picture\nand more")


# What fails on the second process, by the step that is told.
FAULTS = {
    "drawn": None, "drawing": (validation, "draw"), "loading": (StableDiffusion, "preview"),
    "room": (Partition, "room_to_gather"), "keeping": (validation, "published_parts"), "again": None,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    config = parse(TrainConfig, "tests.loop.pictures", "", arguments)
    processes = Processes().connect()
    family = open_family(config)
    partition = open_partition(family.load_model(), config, processes, captured=False)
    for average in partition.exported:
        average.mul_(1.01)  # which the weights themselves do not follow
    opened, preview = [], StableDiffusion.preview

    def open_alone(*given):
        """Where no other process of the node does, and without the hub."""
        opened.append(given)
        assert constants.HF_HUB_OFFLINE
        (Path(config.output_dir) / "opening").touch(exist_ok=False)
        pipeline = preview(*given)
        (Path(config.output_dir) / "opening").unlink()
        return pipeline

    StableDiffusion.preview = open_alone
    for number, fault in enumerate(FAULTS.values()):
        kept = fault and getattr(*fault)
        if fault and processes.rank == 1:
            setattr(*fault, fail)
        validation.validate(config, family, partition, seed=3, step=number)
        if fault:
            setattr(*fault, kept)
    StableDiffusion.preview = preview
    (Path(config.output_dir) / f"opened-{processes.rank}").write_text(str(len(opened)))
    processes.close()


if __name__ == "__main__":
    main(sys.argv[1:])
