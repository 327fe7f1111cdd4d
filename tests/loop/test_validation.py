"""Validation images are divided over processes, which shows in nothing but who draws."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from engine.loop.validation import DRAWING_LIMIT, LOADING_LIMIT, neighbour, seconds_at_most, who_draws
from tests.commands import start_two
from tests.loop import pictures
from tests.loop.runs import command, config

FAULTS = list(pictures.FAULTS)


def drawn(output: Path, fault: str) -> Path:
    return output / "samples" / f"step-{FAULTS.index(fault)}.png"


@pytest.mark.two_processes
@pytest.mark.parametrize(("world", "stage", "prompts", "each"), [(2, 1, 2, 2), (3, 3, 1, 2)], ids=["2", "3"])
def test_several_processes_draw_what_one_does(world, stage, prompts, each, model, images, tmp_path):
    outputs = {name: tmp_path / name for name in ("one", "several")}
    for output in outputs.values():
        output.mkdir()
    options = {"validation_prompts": ["a red square", "a blue square"][:prompts], "num_validation_images": each}
    launcher = [sys.executable, "-m", "tests.loop.pictures"]
    one, several = (
        command(config(model, images, tmp_path / "shards", output, zero_stage=number, **options), *launcher)
        for output, number in zip(outputs.values(), (0, stage), strict=True)
    )
    pictures.main(one[len(launcher) :])
    processes = start_two(several, world)
    assert [process.wait() for process in processes] == [0] * world, [process.errors for process in processes]
    assert len({drawn(outputs["one"], name).read_bytes() for name in FAULTS}) == 1
    for fault in ("drawn", "again"):
        assert drawn(outputs["several"], fault).read_bytes() == drawn(outputs["one"], fault).read_bytes()
    # Every fault is the second process's, whose share is missing then; without room to gather nothing is drawn.
    number = prompts * each
    share = f"{number // 2} of {number} are missing: process 1: MemoryError: of a picture; the training goes on"
    expected = dict.fromkeys(("drawing", "loading", "keeping"), share) | {"room": share.partition("missing: ")[2]}
    said = [line for line in processes[0].errors.splitlines() if line.startswith("warning: ")]
    assert sorted(said) == sorted(
        f"warning: validation images of step {FAULTS.index(name)}: {line}" for name, line in expected.items()
    )
    assert not any("warning: " in process.errors for process in processes[1:])
    assert not drawn(outputs["several"], "room").exists()
    assert Image.open(drawn(outputs["several"], "drawing")).width > 0
    opened = [int((outputs["several"] / f"opened-{rank}").read_text()) for rank in range(world)]
    assert opened == [len(FAULTS) - 1, len(FAULTS) - 3, *([0] * (world - 2))]


def test_one_process_of_each_node_draws_before_a_second_one():
    nodes_of_four = [0, 1, 2, 3] * 3
    assert who_draws(nodes_of_four, 4) == [0, 4, 8, 1]
    assert who_draws(list(range(8)) * 128, 4) == [0, 8, 16, 24]
    assert who_draws([0, 1], 5) == [0, 1]


def test_a_drawing_may_take_as_long_as_the_images_of_one_process():
    options = {"validation_prompts": ["a", "b"], "num_validation_images": 2}
    run = config(Path("model"), Path("images"), Path("shards"), Path("out"), **options)
    assert seconds_at_most(run, 1024) == LOADING_LIMIT + DRAWING_LIMIT
    assert seconds_at_most(run, 3) == LOADING_LIMIT + 2 * DRAWING_LIMIT


def test_processes_of_a_node_open_their_pipelines_one_after_another():
    nodes_of_two = [0, 1] * 2
    assert [neighbour(rank, nodes_of_two, who_draws(nodes_of_two, 4)) for rank in range(4)] == [None, 0, None, 2]
    assert neighbour(5, list(range(8)), [0, 1, 5]) == 1
    assert neighbour(8, list(range(8)) * 2, [0, 8, 1]) is None
