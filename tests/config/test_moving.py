"""The table for moving over from other trainers says what the command line answers."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from engine.config.elsewhere import ELSEWHERE
from engine.config.options import TrainConfig
from engine.config.schema import options_lacking

ROWS = [line.split("|")[1:-1] for line in Path("docs/moving.md").read_text().splitlines() if line.startswith("| ")][1:]
NAMES = [name for names in ELSEWHERE for name in names.split()]
OURS = TrainConfig.model_fields.keys() - set(options_lacking(TrainConfig, "sd"))


def test_every_option_elsewhere_is_answered_or_has_its_name_here():
    given = {name.split()[-1] for row in ROWS for field in row[1:5] for name in re.findall(r"`([^`]+)`", field)}
    in_tables = {"path", "rank", "lr", "type", "dtype"}  # of diffusion-pipe's file
    unknown = [
        name
        for name in given - in_tables
        if name not in TrainConfig.model_fields and not any(fnmatchcase(name, known) for known in NAMES)
    ]
    assert not unknown


def test_every_option_here_is_one():
    named = {name for row in ROWS for name in re.findall(r"--(\w[\w-]*)", row[5])}
    assert named <= OURS | {"config", "nproc-per-node"}
    assert all("--" in row[5] or "always" in row[5] for row in ROWS)
