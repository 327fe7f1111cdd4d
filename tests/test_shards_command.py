"""python -m engine.shards: shards verified and shown, and its former name."""

import gc
import json
import runpy
import shutil
import sys
import weakref

import numpy as np
import pytest
from PIL import Image

from engine import shards as command
from engine.data import describe
from engine.data.format.index import shard_name
from engine.errors import exit_code


def main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    return exit_code("program", command.main)


def test_verify_finds_whole_shards_whole(shards, capsys, monkeypatch):
    assert main(monkeypatch, "verify", str(shards)) == 0
    assert "3 of 3 shards are whole" in capsys.readouterr().out


def test_verify_names_a_damaged_shard_and_leaves_with_1(shards, tmp_path, capsys, monkeypatch):
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / shard_name(1)).write_bytes(b"short")
    assert main(monkeypatch, "verify", str(tmp_path / "shards")) == 1
    output = capsys.readouterr().out
    assert f"{shard_name(1)}: 5 bytes instead of" in output
    assert "2 of 3 shards are whole" in output


def test_info_describes_and_draws(shards, model, tmp_path, capsys, monkeypatch):
    sheet = tmp_path / "sheet.png"
    options = ["--output", str(sheet), "--records", "6", "--pretrained_model_name_or_path", str(model)]
    assert main(monkeypatch, "info", str(shards), *options) == 0
    output = capsys.readouterr().out
    for line in ("records        12", "image rows     24", "captions       10", "refused        0", f"{sheet}"):
        assert line in output
    assert np.asarray(Image.open(sheet)).std() > 10


def test_a_contact_sheet_opens_one_shard_at_a_time_and_reaches_the_last_record(shards, model, tmp_path, monkeypatch):
    opened, asked = [], []
    find, open_shard = describe.Shards.find, describe.open_shard

    def counted(*arguments):
        gc.collect()
        assert not [shard for shard in opened[:-1] if shard() is not None]
        opened.append(weakref.ref(found := open_shard(*arguments)))
        return found

    class Larger(describe.Shards):
        """Far more records than single precision counts."""

        def __len__(self):
            return 2**40 + 12

        def find(self, records):
            asked.append(records)
            return find(self, records >> 37)

    monkeypatch.setattr(describe, "open_shard", counted)
    monkeypatch.setattr(describe, "Shards", Larger)
    options = ["--output", str(tmp_path / "sheet.png"), "--records", "3", "--pretrained_model_name_or_path", str(model)]
    assert main(monkeypatch, "info", str(shards), *options) == 0
    assert asked[0].tolist() == [0, 2**39 + 6, 2**40 + 11]
    assert len(opened) > 1


def test_info_maps_a_record_to_its_file(shards, images, capsys, monkeypatch):
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for record in (0, 4, 5, 11):
        assert main(monkeypatch, "info", str(shards), "--record", str(record), "--train_data_dir", str(images)) == 0
        output = capsys.readouterr().out
        assert f"file           {rows[record]['file_name']} of {images}\n" in output
        assert output.endswith(f"caption        {rows[record]['text']!r}\n")
    assert main(monkeypatch, "info", str(shards), "--record", "12") == 2
    assert "no record 12; the last is 11" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["mend"], "unknown command 'mend'"),
        (["verify", "/nowhere"], "/nowhere: no index.json there; give the directory of shards"),
        (["info", "/nowhere", "--records", "-1"], "--records: must be at least 0"),
        (["info"], "the following arguments are required: directory"),
        (["build", "--family", "sd"], "--pretrained_model_name_or_path is required"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, named, capsys, monkeypatch):
    assert main(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_without_a_command_the_usage_is_printed(capsys, monkeypatch):
    assert main(monkeypatch) == 0
    assert "build|verify|convert|info" in capsys.readouterr().out


def test_the_former_name_of_the_command_still_answers(shards, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["engine.cache", "verify", str(shards)])
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("engine.cache", run_name="__main__")
    assert leave.value.code == 0
    assert "3 of 3 shards are whole" in capsys.readouterr().out


def test_buckets_are_verified_described_and_drawn(model, images, tmp_path, capsys, monkeypatch):
    data, shards = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    for number, size in enumerate([(16, 16), (24, 16), (24, 16)]):
        Image.new("RGB", size, (90 * number, 9, 9)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"of {number}")
    (data / "3.png").write_bytes(b"no image")
    (data / "3.txt").write_text("of 3")
    models = ["--pretrained_model_name_or_path", str(model)]
    options = ["--family", "sd", *models, "--train_data_dir", str(data), "--resolution", "16", "--shards_dir", str(shards)]
    assert main(monkeypatch, "build", *options, "--buckets", "16x16", "24x16") == 0
    said = capsys.readouterr()
    assert f"`python -m engine.shards info {shards} --refused` lists them" in said.err
    assert "24x16         2 images  66.67%   0.00% cropped away" in said.out
    assert main(monkeypatch, "info", str(shards), *models, "--output", str(tmp_path / "sheet.png")) == 0
    output = capsys.readouterr().out
    for line in (
        "records        3",
        "refused        1",
        "latent_mean: 4 x 8 x * float32 per image",
        "buckets.png",
        "sheet.png",
    ):
        assert line in output
    for name in ("buckets.png", "sheet.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("RGB")).std() > 5
    assert main(monkeypatch, "info", str(shards), "--refused") == 0
    assert capsys.readouterr().out.startswith("3.png: unreadable image")
    assert main(monkeypatch, "info", str(shards), "--record", "2") == 0
    assert "'of 2'" in capsys.readouterr().out
    assert main(monkeypatch, "info", str(shards), "--record", "3") == 2
    assert "no record 3; the last is 2" in capsys.readouterr().err
    assert main(monkeypatch, "convert", str(shards)) == 0
    (shards / "24x16" / shard_name(0)).write_bytes(b"short")
    capsys.readouterr()
    assert main(monkeypatch, "verify", str(shards)) == 1
    assert f"24x16/{shard_name(0)}: 5 bytes instead of" in capsys.readouterr().out


def test_the_data_sets_of_a_directory_are_described_and_verified_each(shards, tmp_path, capsys, monkeypatch):
    both = tmp_path / "shards"
    for name in ("cats", "dogs"):
        shutil.copytree(shards, both / name)
    (both / "reports").mkdir()
    assert main(monkeypatch, "info", str(both)) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("shards  ")] == [
        str(both / "cats"),
        str(both / "dogs"),
    ]
    assert main(monkeypatch, "info", str(both), "--refused") == 0
    assert main(monkeypatch, "verify", str(both)) == 0
    assert "6 of 6 shards are whole" in capsys.readouterr().out
    assert main(monkeypatch, "info", str(both), "--record", "7") == 2
    assert f"--record is of one data set; give its directory: {both}/cats or {both}/dogs" in capsys.readouterr().err
    (both / "dogs" / shard_name(0)).write_bytes(b"short")
    assert main(monkeypatch, "verify", str(both)) == 1
    assert f"{both}/dogs/{shard_name(0)}: 5 bytes instead of" in capsys.readouterr().out
    assert main(monkeypatch, "info", str(both / "reports")) == 2
    assert "reports: no index.json there; give the directory of shards" in capsys.readouterr().err
