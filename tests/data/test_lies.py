"""Shards with consistent digests that say what is not so: whoever writes them writes the index too."""

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine import shards as command
from engine.data.format.index import CONTENT, INDEX, Index, shard_name
from engine.data.format.reader import Shards
from engine.data.format.shard import Shard, open_shard
from engine.errors import UserError, exit_code
from engine.files import digest_of
from engine.tensors import read_header
from tests.altered import edit, edit_table, say_of
from tests.data.test_reader import SIDES
from tests.data.test_shards import build, write_captions


def rows_of(directory: Path) -> list[torch.Tensor]:
    """What records hold, in order, every variant of them."""
    reader = Shards(directory)
    places = reader.find(torch.arange(len(reader)))
    rows = [reader.rows_of(places, variants=variant) for variant in range(2)]
    gathered = []
    for numbers in rows:
        for name, field in reader.fields.items():
            gathered.append(torch.empty(len(reader), *field.shape, dtype=field.dtype))
            reader.gather(name, numbers, gathered[-1])
    return gathered


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return shutil.copytree(shards, tmp_path / "shards")


def refused(directory: Path, monkeypatch, capsys) -> str:
    """The one line that opening the second shard, reading and verifying give."""
    with pytest.raises(UserError) as error:
        open_shard(directory, Shards(directory).index, 1)
    with pytest.raises(UserError, match=re.escape(str(error.value))):
        rows_of(directory)
    assert len(error.value.lines) == 1
    monkeypatch.setattr(sys, "argv", ["program", "verify", str(directory)])
    assert exit_code("program", command.main) == 2
    assert capsys.readouterr().err == f"program: error: {error.value}\n"
    return str(error.value)


FARTHEST = [2**63 - 1, -(2**63)]


@pytest.fixture(scope="module")
def whole_varied(model, tmp_path_factory) -> Path:
    """Shards of which records have different numbers of variants and captions."""
    captions = ["a", "b", "c", ["d", "e"], "f", "d", "e", ["f", "d", "d"]]
    tmp_path = tmp_path_factory.mktemp("varied")
    images = write_captions(tmp_path / "images", captions)
    for number in (1, 6):
        Image.new("RGB", (40, 16), (number, 9, 9)).save(images / f"{number}.png")
    build(model, images, tmp_path / "varied", "--random_crops", "2", "--shard_records", "4")
    return tmp_path / "varied"


@pytest.fixture
def varied(whole_varied, tmp_path) -> Path:
    return shutil.copytree(whole_varied, tmp_path / "varied")


def as_bytes(content: bytes) -> torch.Tensor:
    return torch.tensor([*content], dtype=torch.uint8)


def contents(count: int, *absent: int) -> torch.Tensor:
    """Of so many samples, of which some are no longer there."""
    found = torch.full([count, CONTENT], 7, dtype=torch.uint8)
    found[[*absent]] = 0
    return found


@pytest.mark.parametrize(
    ("name", "place", "values", "named"),
    [
        ("image_offsets", 0, [1, -1, *FARTHEST], "image_offsets does not lead from 0 to 5"),
        ("image_offsets", 2, [1, 6, *FARTHEST], "image_offsets does not lead"),
        ("image_offsets", -1, [4, 6, *FARTHEST], "image_offsets does not lead from 0 to 5"),
        ("caption_offsets", 3, [2, 6, -1, *FARTHEST], "caption_offsets does not lead from 0 to 6"),
        ("caption_offsets", -1, [5, 7, *FARTHEST], "caption_offsets does not lead from 0 to 6"),
        ("caption_numbers", 1, [-1, 3, *FARTHEST], "caption_numbers points beyond the 3 that there are"),
        ("source", 3, [6, 8, *FARTHEST], "source (does not increase|points beyond the 4)"),
        ("source", 0, [3, -1], "source points beyond the 4"),
    ],
)
def test_what_a_record_points_to_is_there(name, place, values, named, varied, monkeypatch, capsys):
    whole = load_file(varied / shard_name(1))[name]
    for value in values:
        tensor = whole.clone()
        tensor[place] = value
        say_of(varied, 1, {name: tensor})
        with pytest.raises(UserError, match=f"{shard_name(1)}: .*{named}"):
            open_shard(varied, Index.read(varied), 1)
    assert shard_name(1) in refused(varied, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        ({"source": torch.arange(5, 10, dtype=torch.int32)}, {}, "source is I32"),
        ({"source": torch.arange(5, 9)}, {}, r"source is I64 \[4\], not torch.int64 \[5\]"),
        ({"caption_numbers": torch.zeros(5, 1, dtype=torch.int64)}, {}, r"caption_numbers is I64 \[5, 1\]"),
        ({"caption_numbers": torch.zeros(4, dtype=torch.int64)}, {}, r"caption_numbers is I64 \[4\]"),
        ({"latent_mean": torch.zeros(9, 4, 8, 8)}, {}, r"latent_mean is F32 \[9, 4, 8, 8\]"),
        ({"latent_std": torch.zeros(10, 4, 8, 8, dtype=torch.float16)}, {}, "latent_std is F16"),
        ({"checksums.latent_std": torch.zeros(9, dtype=torch.int64)}, {}, r"checksums.latent_std is I64 \[9\]"),
        ({"other": torch.zeros(1)}, {}, "other is no tensor of these shards"),
        ({"names": None}, {}, "names is missing"),
        ({}, {"records": 4}, r"not torch.int64 \[[45]\]"),
        ({}, {"image_rows": True}, "image_rows: Input should be a valid integer"),
        ({}, {"fingerprint": "0" * 64}, "fingerprint is 000"),
        ({}, {"checksum": "0" * 16}, "altered: what ties its rows to records"),
        ({}, {"variants": 1}, "variants is 1, and 2 in index.json"),
        ({}, {"variants": 2**40}, "variants: Input should be less than or equal"),
        ({}, {"captions": -2}, "caption_numbers is no tensor of these shards"),
        ({}, {"first_sample": 6}, "first_sample is 6, and 5 in index.json"),
        ({}, {"samples": 6}, r"contents is U8 \[5, 16\]"),
        ({"contents": contents(6)}, {"samples": 6}, "samples is 6, and 5 in index.json"),
        ({"contents": contents(5, 2)}, {}, "a record is of a sample without a content"),
        ({"contents": contents(5)}, {}, "contents is [0-9a-f]*, and [0-9a-f]* in index.json"),
        ({}, {"more": 6}, "more: Extra inputs"),
        (
            {"refused": as_bytes(b'{"source": "a", "reason": "b"}'), "contents": contents(6)},
            {"first_sample": 4, "samples": 6},
            "first_sample is 4, and 5",
        ),
    ],
)
def test_a_shard_holds_what_its_header_and_the_index_say(tensors, metadata, named, copy, monkeypatch, capsys):
    say_of(copy, 1, tensors, metadata)
    line = refused(copy, monkeypatch, capsys)
    assert shard_name(1) in line
    assert re.search(named, line)


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        ({"caption_texts_offsets": torch.tensor([0, 99])}, {}, r"caption_texts_offsets does not lead from 0 to \d+"),
        ({"caption_texts_offsets": torch.tensor([0, -1])}, {}, "caption_texts_offsets does not lead"),
        ({"names_offsets": torch.tensor([0, FARTHEST[0]])}, {}, "names_offsets does not lead from 0 to 35"),
        ({"refused": as_bytes(b'{"source": "a", "reason": "b"}')}, {}, "1 refused and 5 records of 5 samples"),
        ({"refused": as_bytes(b'{"source": "a"}')}, {}, "a refused sample has a source and a reason"),
        ({"refused": as_bytes(b"\0" * 99)}, {}, "refused|Expecting value"),
        ({}, {"texts_checksum": "0" * 16}, "altered: its texts do not match the checksum"),
    ],
)
def test_texts_are_judged_when_they_are_asked_for(tensors, metadata, named, copy, monkeypatch, capsys):
    whole = load_file(copy / shard_name(1))
    for name, values in tensors.items():
        if name.endswith("_offsets"):  # the second and the last
            tensors = {name: whole[name].clone()}
            tensors[name][[1, -1]] = values
    say_of(copy, 1, tensors, metadata)
    rows_of(copy)  # a training reads none
    with pytest.raises(UserError, match=f"{shard_name(1)}: .*({named})"):
        _ = open_shard(copy, Index.read(copy), 1).refused
    assert info(copy, monkeypatch, "--refused") == 2
    assert shard_name(1) in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["program", "verify", str(copy)])
    assert exit_code("program", command.main) == 1
    said = capsys.readouterr().out
    assert re.search(f"{shard_name(1)}: .*({named})", said)
    assert said.splitlines()[-1].startswith("2 of 3 shards are whole; delete what is damaged")


def test_what_is_larger_than_any_is_not_read(copy):
    """A file may say that it has gigabytes, and take no room."""
    path = copy / shard_name(1)
    header, metadata, start = read_header(path)
    first = header["refused"]["data_offsets"][0]
    header["refused"] = {"dtype": "U8", "shape": [2**29], "data_offsets": [first, first + 2**29]}
    said = json.dumps(header | {"__metadata__": {"engine": json.dumps(metadata)}}).encode()
    content = path.read_bytes()[start:]
    for begin, size, named in (
        (len(said).to_bytes(8, "little") + said + content, 8 + len(said) + first + 2**29, "refused is larger than that of any"),
        ((2**30).to_bytes(8, "little"), 2**31, "its header is larger than 1048576 bytes"),
    ):
        path.write_bytes(begin)
        os.truncate(path, size)
        with pytest.raises(UserError, match=named):
            Shard(path, Index.read(copy).fields, {})


def test_an_image_has_as_many_rows_as_the_options_give_it(copy):
    edit(copy, lambda index: index["identity"]["preprocessing"].update(random_flip=False))
    edit(copy, lambda index: index.update(fingerprint=digest_of(index["identity"])))
    for place in range(3):
        say_of(copy, place, metadata={"fingerprint": Index.read(copy).fingerprint})
    with pytest.raises(UserError, match="an image has not 1 or 4 rows"):
        rows_of(copy)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("number", -1, "number of shard 1 is -1"),
        ("number", 0, "the number 0 stands there twice"),
        ("first_sample", 4, "shard 1 does not go on from the samples of the shard before it"),
        ("first_sample", 2**62, "first_sample of shard 1"),
        ("samples", 3, "12 records and 0 refused samples, of 10"),
        ("records", -1, "records of shard 1 is -1"),
        ("records", 4, "records is 12, those of the shards are 11"),
        ("records", 2**62, "records of shard 1"),
        ("image_rows", 11, "image_rows is 24, those of the shards are 25"),
        ("variants", 0, "shard 1 has records without images"),
        ("variants", 3, "shard 1 has not as many image rows as its records"),
        ("variants", 2**20, "variants of shard 1"),
        ("captions", 0, "shard 1 has captions that have no field"),
        ("captions", -2, "shard 1 has not a caption for every record"),
        ("bytes", -1, "bytes of shard 1"),
        ("bytes", 0, "shard 1 is no file of a shard"),
    ],
)
def test_the_index_is_checked_before_any_shard_is_opened(key, value, named, copy):
    edit_table(copy, lambda table: table[key].__setitem__(1, value))
    for path in copy.glob("shard-*"):
        path.unlink()
    with pytest.raises(UserError, match=named) as error:
        Shards(copy)
    assert "\n" not in str(error.value)


def test_arrays_that_are_not_those_of_the_index_are_named(copy):
    (path,) = copy.glob("index-*")
    for content, named in ((b"", "its digest does not match"), (None, "No such file")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name}: cannot be read: .*{named}"):
            Shards(copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda table: table.pop("sha256"), "sha256"),
        (lambda table: table.update(more=torch.zeros(1)), "more"),
        (lambda table: table.update(sha256=table["sha256"][:2]), "sha256"),
        (lambda table: table.update(records=table["records"].float()), "records"),
        (lambda table: table.update(number=table["number"][:2]), "is int64"),
        (lambda table: table.update(number=torch.tensor(3)), "number"),
    ],
)
def test_arrays_are_those_of_an_index(change, named, copy):
    edit_table(copy, change)
    with pytest.raises(UserError, match=f"index-[0-9a-f]*.safetensors: .*{named}"):
        Shards(copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fields": {}}, "no field belongs to images"),
        ({"refused_count": 1}, "refused_count is 1, those by reason are 0"),
        ({"encode_seconds": -1.0}, "encode_seconds"),
        ({"family": ["sd"]}, "family"),
        ({"identity": {"models": 3}}, "identity: source, models and preprocessing are objects"),
        ({"identity": {}}, "the fingerprint is not that of the identity"),
        ({"fields": {"x": {"shape": [2**40, 2**40], "dtype": "float32", "per": "image"}}}, "larger than any"),
        ({"fields": {"x": {"shape": [1], "dtype": "load", "per": "image"}}}, "no dtype of shards: load"),
        ({"fields": {"source": {"shape": [1], "dtype": "int64", "per": "image"}}}, "the name of another tensor"),
        ({"fields": {"checksums.x": {"shape": [1], "dtype": "int64", "per": "image"}}}, "the name of another tensor"),
        ({"shards": "../" + "0" * 61}, "shards: String should match"),
        ({"format_version": True}, "format_version"),
        ({"format_version": 1}, "format version 1, where 2 is read; convert them with `python -m engine.shards convert "),
    ],
)
def test_an_index_agrees_with_itself(change, named, copy):
    edit(copy, lambda index: index.update(change))
    with pytest.raises(UserError, match=named):
        Shards(copy)


def test_bytes_changed_anywhere_are_one_line_or_change_nothing(shards, copy):
    """Of the index, its arrays, and shards."""
    draw, whole, lines = random.Random(5), rows_of(shards), []
    names = [INDEX, *(path.name for path in copy.glob("*.safetensors"))]
    for _ in range(200):
        name = draw.choice(names)
        before = (copy / name).read_bytes()
        altered = bytearray(before)
        altered[draw.randrange(len(before) if draw.random() < 0.5 else 2000) % len(before)] ^= draw.randrange(1, 256)
        (copy / name).write_bytes(altered)
        try:
            assert all(map(torch.equal, rows_of(copy), whole))
        except UserError as error:
            lines.append(error.lines)
        (copy / name).write_bytes(before)
    assert len(lines) > 150
    assert {len(said) for said in lines} == {1}


@pytest.mark.parametrize("gather", SIDES)
@pytest.mark.parametrize("offset", [-1, *FARTHEST])
def test_the_readers_refuse_an_offset_that_no_file_has(gather, offset, shards):
    with (shards / shard_name(0)).open("rb") as file:
        files = torch.tensor([file.fileno()] * 2, dtype=torch.int32).numpy()
        with pytest.raises(OSError, match=r".") as error:
            gather(files, torch.tensor([0, offset]).numpy(), 8, torch.empty(2, 8, dtype=torch.uint8))
    assert error.value.filename == 1


def test_a_shard_that_a_stranger_left_is_built_again(shards, copy, model, images):
    """Its fingerprint is right, and nothing else."""
    say_of(copy, 1, metadata={"records": "5", "captions": 3})
    (copy / INDEX).unlink()
    arguments = [
        "--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images),
        "--resolution", "16", "--random_flip", "--shard_records", "5", "--shards_dir", str(copy),
    ]  # fmt: skip
    assert command.build_command(arguments) == 0
    assert all((copy / shard_name(n)).read_bytes() == (shards / shard_name(n)).read_bytes() for n in range(3))


def info(directory: Path, monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["program", "info", str(directory), *options])
    return exit_code("program", command.main)


def test_info_opens_no_model_that_an_index_names(copy, tmp_path, monkeypatch, capsys):
    named = {"pretrained_model_name_or_path": "/evil", "original_config": "/evil.yaml", "cache_dir": "/evil", "variant": "evil"}
    edit(copy, lambda index: index["config"].update(named))
    monkeypatch.setattr("engine.models.encoder.open_encoding", lambda config: pytest.fail("opened"))
    assert info(copy, monkeypatch) == 0
    assert "contact sheet  give the models to draw it with: --pretrained_model_name_or_path" in capsys.readouterr().out
    given = []
    monkeypatch.setattr("engine.models.encoder.open_encoding", lambda config: given.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        info(copy, monkeypatch, "--pretrained_model_name_or_path", str(tmp_path))
    (config,) = given
    assert config.pretrained_model_name_or_path == str(tmp_path)
    assert (config.original_config, config.cache_dir, config.variant) == (None, None, None)
    assert config.resolution == 16


def test_models_that_did_not_build_the_shards_draw_none(copy, model, tmp_path, monkeypatch, capsys):
    edit(copy, lambda index: index["config"].update(mixed_precision="bf16"))
    assert info(copy, monkeypatch, "--pretrained_model_name_or_path", str(model)) == 2
    assert "the shards hold other records than these models make" in capsys.readouterr().err


def test_info_prints_no_escapes(copy, monkeypatch, capsys):
    text = "\x1b[2Jred\u202e\n"
    content = text.encode()
    texts = {"caption_texts": as_bytes(4 * content)}
    say_of(copy, 0, texts | {"caption_texts_offsets": torch.arange(5) * len(content)})
    edit(copy, lambda index: index.update(refused={text: {"count": 0, "first": [{"source": text, "reason": text}]}}))
    edit(copy, lambda index: index["config"].update(train_data_dir=text))
    for options in (), ("--record", "1"):
        assert info(copy, monkeypatch, *options) == 0
        output = capsys.readouterr().out
        assert "\\x1b[2Jred\\u202e\\n" in output
        assert "\x1b" not in output
        assert "\u202e" not in output


@pytest.mark.parametrize("named", [{"train_data_dir": "/"}, {"train_data_dir": None, "dataset_name": "nobody/nothing"}])
def test_info_opens_no_data_set_that_an_index_names(named, copy, images, monkeypatch, capsys):
    edit(copy, lambda index: index["config"].update(named, cache_dir="/evil"))
    monkeypatch.setattr("engine.data.describe.open_source", lambda *arguments: pytest.fail("opened"))
    nameless = {"names": torch.empty(0, dtype=torch.uint8), "names_offsets": torch.zeros(6, dtype=torch.int64)}
    for said in ("001.png", "give the data set to name it: --train_data_dir or --dataset_name"):
        for options in (), ("--cache_dir", "/tmp"), ("--dataset_config_name", "x"):
            assert info(copy, monkeypatch, "--record", "1", *options) == 0
            output = capsys.readouterr().out
            assert "sample         1 of the data set\n" in output
            assert f"file           {said}\n" in output
        say_of(copy, 0, nameless)  # as converted ones are
    monkeypatch.undo()
    for option in ("--dataset_name", "--train_data_dir"):
        assert info(copy, monkeypatch, "--record", "1", option, str(images)) == 0
        assert f"file           001.png of {images}\n" in capsys.readouterr().out
