"""The small example of each family, from photographs to an image; and the recipes for the published checkpoints."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from examples import local
from examples.local import RESOLUTION
from examples.photographs import CAPTIONS, photographs
from examples.tiny_models import TOKENS
from tests import in_process


@pytest.mark.parametrize("family", RESOLUTION)
def test_an_example_trains_and_draws(family, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["local", family, "--steps", "20", "--directory", str(tmp_path)])
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(run=in_process.run))
    local.main()
    grid = Image.open(tmp_path / "grid.png")
    assert len(grid.convert("L").getcolors(2**16)) > 20
    losses = [json.loads(line)["loss"] for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert (tmp_path / "trained" / "samples" / "step-20.png").exists()


def test_the_photographs_have_captions_that_fit_the_tiny_tokenizer():
    assert len(photographs()) == len(CAPTIONS) == 14
    assert all(len(caption.replace(" ", "")) <= TOKENS - 2 for caption in CAPTIONS.values())


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_parse(path):
    config = parse(TrainConfig, "engine.run", "", ["--config", str(path)])
    assert path.stem.startswith(config.family)
    assert config.max_train_steps == 15000
    assert config.resolution == (512 if config.family == "sd" else 768)
