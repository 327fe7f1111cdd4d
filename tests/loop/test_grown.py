"""Going on with a run whose data set has changed since: only where that is asked for."""

import json
import os

import pytest
import torch
from PIL import Image

from engine.data.samples import loader
from engine.data.samples.order import records_of
from engine.errors import UserError
from engine.loop.trainer import train
from tests.data.test_shards import contents, write_captions
from tests.loop.runs import config


@pytest.fixture
def run(model, tmp_path):
    """A training of four steps, with a checkpoint, over a data set of its own."""
    images = write_captions(tmp_path / "images", list("abcdefg"))
    plain = config(model, images, tmp_path / "shards", tmp_path / "out", max_train_steps=4, checkpointing_steps=4, seed=3)
    assert train(plain) == 0
    goes_on = plain.model_copy(update={"resume_from_checkpoint": "latest", "max_train_steps": 8})
    return lambda **options: train(goes_on.model_copy(update=options))


def add(images) -> None:
    Image.new("RGB", (16, 16), (1, 2, 3)).save(images / "new.png")
    with (images / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "new.png", "text": "new"}))


def test_a_grown_data_set_is_refused_by_the_word_that_accepts_it(run, tmp_path, monkeypatch):
    before = contents(tmp_path / "shards")
    add(tmp_path / "images")
    with pytest.raises(UserError, match=r"checkpoint-4: was trained on other samples.* --continue_on_grown_data") as error:
        run()
    assert len(error.value.lines) == 1
    assert contents(tmp_path / "shards") == before, "and nothing is built"
    drawn: dict[int, int] = {}
    draw = loader.draw_rows

    def noting(shards, seed, slots, records):
        drawn.update(zip(slots.tolist(), records.tolist(), strict=True))
        return draw(shards, seed, slots, records)

    monkeypatch.setattr(loader, "draw_rows", noting)
    assert run(continue_on_grown_data=True) == 0
    assert [*drawn] == [*range(16, 32)], "slots go on"
    assert [*drawn.values()] == records_of(3, torch.arange(16, 32), 8).tolist(), "among the records that there are now"
    assert run(max_train_steps=9) == 0, "the new checkpoint is of the grown data set"
    with pytest.raises(UserError, match="--continue_on_grown_data"):
        run(resume_from_checkpoint="checkpoint-4")


def test_without_the_data_set_too(run, tmp_path):
    add(tmp_path / "images")
    assert run(continue_on_grown_data=True) == 0
    with pytest.raises(UserError, match="--continue_on_grown_data"):
        run(train_data_dir=None, resume_from_checkpoint="checkpoint-4")
    assert run(train_data_dir=None, resume_from_checkpoint="checkpoint-4", continue_on_grown_data=True) == 0


def test_that_what_is_held_out_may_have_been_trained_on_is_said(run, tmp_path, capsys):
    fresh = {"output_dir": str(tmp_path / "held"), "validation_fraction": 0.3, "validation_timesteps": 1}
    assert run(resume_from_checkpoint=None, max_train_steps=1, **fresh) == 0
    lines = (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines[1:]))
    assert run(max_train_steps=2, continue_on_grown_data=True, **fresh) == 0
    assert "hold out other records than before, some of which were trained on" in capsys.readouterr().err


def test_files_that_were_touched_are_the_same(run, tmp_path):
    for file in (tmp_path / "images").iterdir():
        os.utime(file, ns=(0, 0))
    assert run() == 0


def test_other_options_are_refused_all_the_same(run, tmp_path):
    add(tmp_path / "images")
    with pytest.raises(UserError, match=r"was trained on other shards \(--random_flip True, now False\)"):
        run(random_flip=False, shards_dir=str(tmp_path / "others"), continue_on_grown_data=True)
    assert not (tmp_path / "others").exists()
