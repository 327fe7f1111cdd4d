"""The table of docs/families.md that says which option each family has."""

import re
from pathlib import Path

import pytest

from engine.catalogue import FAMILIES
from engine.config.options import TrainConfig
from engine.config.schema import options_lacking

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


def rows() -> list[tuple[str, list[str]]]:
    """The options of each row, and what it says of the families, in their order."""
    section = DOCUMENT.read_text().split("## Options by family")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    names = [name.strip("`") for name in cells[0][1:-1]]
    assert names == list(FAMILIES)
    return [(row[0], row[1:-1]) for row in cells[2:]]


@pytest.mark.parametrize(("options", "said"), rows())
def test_the_table_says_what_each_family_has(options, said):
    for option in re.findall(r"--(\w+)", options) or ["data_sets"]:
        assert option in TrainConfig.model_fields
        for family, words in zip(FAMILIES, said, strict=True):
            assert words.startswith("refused") == (option in options_lacking(TrainConfig, family)), (option, family)
