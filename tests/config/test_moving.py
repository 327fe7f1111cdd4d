"""The table for moving over from other trainers says what the command line answers."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from engine.config.elsewhere import ELSEWHERE
from engine.config.options import TrainConfig
from engine.config.schema import options_lacking

ROWS = [line.split("|")[1:-1] for line in Path("docs/moving.md").read_text().splitlines() if line.startswith("| ")][1:]
IN_TABLES = {"path", "rank", "lr", "type", "dtype"}  # names within diffusion-pipe's tables
OURS = TrainConfig.model_fields.keys() - set(options_lacking(TrainConfig, "sd"))


def answer(name: str) -> str | None:
    """What the command line says of a name; None where it is one of ours."""
    if name in TrainConfig.model_fields:
        return None
    return next(here for names, here in ELSEWHERE.items() if any(fnmatchcase(name, known) for known in names.split()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip().replace(" ", "_"))
def test_an_option_elsewhere_is_answered_by_one_of_its_row(row):
    names = {name.split()[-1] for field in row[1:5] for name in re.findall(r"`([^`]+)`", field)}
    ours = set(re.findall(r"--(\w+)|\[(\[data\])\]", row[5]))
    for name in names - IN_TABLES:
        said = answer(name)
        assert said is None or ours & set(re.findall(r"--(\w+)|\[(\[data\])\]", said)) or "always" in row[5], (name, said)


def test_every_option_here_is_one():
    named = {name for row in ROWS for name in re.findall(r"--(\w[\w-]*)", row[5])}
    assert named <= OURS | {"config", "nproc-per-node"}
    assert all("--" in row[5] or "always" in row[5] for row in ROWS)
