"""Shards of version 1 become version 2: the same rows for the same records, and runs that go on with the same bits."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.tools.shards import write_version_1
from engine import shards as command
from engine.data.convert import convert
from engine.data.format.index import Index, shard_name
from engine.data.format.reader import Shards
from engine.data.format.shard import Shard
from engine.errors import UserError, exit_code
from engine.files import digest, parse_json
from engine.loop.trainer import train
from engine.tensors import read_header
from tests.altered import as_built_before, edit
from tests.data.test_shards import build, contents, gathered, write_captions
from tests.loop.runs import checkpoint_tensors, config

CAPTIONS = ["a", ["b", "a"], "", "c", "a", "b", ["c", "b", "d"], "d", "e", "a"]


@pytest.fixture(scope="module")
def built(model, tmp_path_factory) -> Path:
    """Shards of version 2 whose records have several captions, in common over shards; and one sample refused."""
    directory = tmp_path_factory.mktemp("built")
    build(model, write_captions(directory / "images", CAPTIONS), directory / "shards", "--random_flip", "--shard_records", "4")
    as_built_before(directory / "shards")
    return directory / "shards"


@pytest.fixture
def old(built, tmp_path) -> Path:
    write_version_1(built, tmp_path / "old")
    return tmp_path / "old"


def old_rows(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Every variant of every record with every caption, as version 1 was read."""
    index = parse_json((directory / "index.json").read_text())
    files = []
    for shard in index["shards"]:
        with safe_open(directory / shard["file"], "pt") as file:
            files.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    captions = torch.cat([file["encoder_hidden_states"] for file in files])
    rows = []
    for file in files:
        for record in range(len(file["source"])):
            first, last = file["caption_offsets"][record : record + 2]
            numbers = file["caption_numbers"][first:last]
            images = range(*file["image_offsets"][record : record + 2].tolist())
            rows += [
                {"latent_mean": file["latent_mean"][row], "latent_std": file["latent_std"][row],
                 "encoder_hidden_states": captions[number]} for row in images for number in numbers
            ]  # fmt: skip
    return rows


def rows_of(directory: Path) -> list[dict[str, torch.Tensor]]:
    """The same as version 2 is read."""
    reader = Shards(directory)
    places = reader.find(torch.arange(len(reader)))
    everything = [
        (record, variant, caption)
        for record in range(len(reader))
        for variant in range(places.image_counts[record])
        for caption in range(places.caption_counts[record])
    ]
    records, variants, captions = torch.tensor(everything).unbind(1)
    found = gathered(reader, reader.rows_of(reader.find(records), variants, captions))
    return [{name: rows[place] for name, rows in found.items()} for place in range(len(everything))]


def same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(left[name], right[name]) for left, right in zip(ours, theirs, strict=True) for name in left
    )


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    return exit_code("program", command.main)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_records_and_what_they_were_built_from_stay(elsewhere, old, built, tmp_path, monkeypatch, capsys):
    before, files = old_rows(old), contents(old, "*")
    output = tmp_path / "new" if elsewhere else old
    assert run(monkeypatch, "convert", old, *(["--output", output] if elsewhere else [])) == 0
    assert "records        9" in capsys.readouterr().out
    assert same(rows_of(output), before)
    index, expected = Index.read(output), Index.read(built)
    for name in ("family", "fingerprint", "identity", "config", "fields", "refused", "records"):
        assert getattr(index, name) == getattr(expected, name)
    assert index.shards["number"].tolist() == ([0, 1, 2] if elsewhere else [3, 4, 5])
    for name in ("records", "image_rows", "caption_rows", "variants", "captions", "first_sample", "samples"):
        assert index.shards[name].tolist() == expected.shards[name].tolist()
    assert run(monkeypatch, "verify", output) == 0
    assert run(monkeypatch, "info", output, "--refused") == 0
    assert "2.png: empty caption\n" in capsys.readouterr().out
    assert run(monkeypatch, "info", output, "--record", "5", "--train_data_dir", built.parent / "images") == 0
    said = capsys.readouterr().out
    assert f"file           6.png of {built.parent / 'images'}\n" in said
    assert said.endswith("caption        'c'\ncaption        'b'\ncaption        'd'\n")
    if elsewhere:
        assert contents(old, "*") == files
    else:
        assert len(list(old.iterdir())) == 5, "the old shards are gone"


def test_a_conversion_may_be_killed_at_any_file(old, tmp_path, monkeypatch):
    """What is there is version 1, or version 2, and the same rows; the same command ends it."""
    before, replace = old_rows(old), Path.replace
    for writes in range(6):
        directory = shutil.copytree(old, tmp_path / str(writes))
        renamed: list[Path] = []

        def killed(path: Path, target: Path, renamed=renamed, writes=writes) -> Path:
            if len(renamed) == writes:
                raise KeyboardInterrupt
            renamed.append(target)
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", killed)
        if writes < 5:  # three shards, the arrays and the index
            with pytest.raises(KeyboardInterrupt):
                convert(directory, directory)
            assert same(old_rows(directory), before)
        else:
            monkeypatch.setattr("engine.data.convert._remove_old", lambda *arguments: None)
            convert(directory, directory)
            assert same(rows_of(directory), before)
        monkeypatch.undo()
        kept = {path: path.stat().st_mtime_ns for path in renamed[:3]}
        for name in (shard_name(3), "index.json", "index-0123456789abcdef.safetensors"):
            (directory / f"{name}.0123abcd.partial").touch()
        (directory / "index-0123456789abcdef.safetensors").touch()  # which no index names
        convert(directory, directory)
        assert same(rows_of(directory), before)
        assert len(list(directory.iterdir())) == 5
        assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was converted is not written again"


def test_a_run_goes_on_with_converted_shards_bit_for_bit(built, old, model, tmp_path, capsys):
    whole = config(model, built, built, tmp_path / "whole", checkpointing_steps=4).model_copy(update={"train_data_dir": None})
    assert train(whole) == 0
    part = whole.model_copy(update={"output_dir": str(tmp_path / "part"), "max_train_steps": 4})
    assert train(part) == 0
    resumed = part.model_copy(update={"shards_dir": str(old), "max_train_steps": 8, "resume_from_checkpoint": "latest"})
    with pytest.raises(UserError, match=f"convert them with `python -m engine.shards convert {old}`"):
        train(resumed)
    convert(old, old)
    assert train(resumed) == 0
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        ours, theirs = (checkpoint_tensors(tmp_path / name / "checkpoint-8", kind) for name in ("part", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_old_shards_that_are_damaged_or_lie_are_not_converted(old, tmp_path):
    path = old / shard_name(1)
    content = path.read_bytes()
    with pytest.raises(UserError, match="shards are there already"):
        convert(old, shutil.copytree(old, tmp_path / "other"))
    convert(old, tmp_path / "new")
    edit(old, lambda index: index.update(family="other"))
    convert(old, tmp_path / "new")  # which came to its end
    edit(old, lambda index: index.update(family="sd"))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{shard_name(1)}: cannot be read: its digest does not match"):
        convert(old, old)
    for text, other in ((b'"records":4', b'"records":5'), (b'"records": 4', b'"records": 5'), (b'"image_rows', b'"imagf_rows')):
        path.write_bytes(content.replace(text, other))
        edit(old, lambda index: index["shards"][1].update(sha256=digest(path)))
        if path.read_bytes() != content:
            with pytest.raises(UserError, match=f"{shard_name(1)}: cannot be read: "):
                convert(old, old)
    path.write_bytes(content)
    edit(old, lambda index: index["shards"][1].update(sha256=digest(path), file="../x.safetensors"))
    with pytest.raises(UserError, match=r"index.json: cannot be read: shards.1.file"):
        convert(old, old)
    assert not list(old.glob(shard_name(5)))
    edit(old, lambda index: index["shards"][1].update(file=shard_name(1)))
    for change in ({"image_rows": 17}, {"refused_count": 0}, {"records": 8}, {"encode_seconds": -1.0}):
        whole = parse_json((old / "index.json").read_text())
        edit(old, lambda index, change=change: index.update(change))
        lying = (old / "index.json").read_bytes()
        with pytest.raises(UserError, match=r"index.json: cannot be read: "):
            convert(old, old)
        assert (old / "index.json").read_bytes() == lying
        edit(old, lambda index, whole=whole: index.update(whole))


def test_shards_that_others_left_are_not_taken_over(old, tmp_path, monkeypatch):
    """They have the fingerprint, the counts and checksums that match, and other rows."""
    before = old_rows(old)
    copy = shutil.copytree(old, tmp_path / "copy")
    convert(copy, copy)
    path = shutil.copy(copy / shard_name(4), old)
    tensors, (_, said, _) = load_file(path), read_header(path)
    for name in ("latent_mean", "checksums.latent_mean"):
        tensors[name] = tensors[name].flip(0)
    save_file(tensors, path, {"engine": json.dumps(said)})
    assert Shard(Path(path), Index.read(copy).fields, {}).damage() is None
    convert(old, old)
    assert same(rows_of(old), before)


def test_what_has_the_name_of_a_new_shard_and_is_none_is_kept(old, tmp_path):
    lying = old / shard_name(4)
    for make in (lambda: lying.write_bytes(b"precious"), lying.mkdir):
        make()
        with pytest.raises(UserError, match=f"{shard_name(4)}: is no shard of these"):
            convert(old, old)
        assert not (old / shard_name(3)).exists()
        assert lying.is_dir() or lying.read_bytes() == b"precious"
        lying.unlink() if lying.is_file() else lying.rmdir()
    copy = shutil.copytree(old, tmp_path / "copy", ignore=shutil.ignore_patterns("index.json"))
    before = contents(copy, "*")
    with pytest.raises(UserError, match=f"{shard_name(0)}: is no shard of these"):
        convert(old, copy)
    assert contents(copy, "*") == before


def test_captions_may_lie_in_more_shards_than_files_may_be_open(model, tmp_path):
    captions = [[f"{number}", *(f"{other}" for other in range(0, number, 5))] for number in range(30)]
    images = write_captions(tmp_path / "images", captions)
    build(model, images, tmp_path / "shards", "--shard_records", "1")
    write_version_1(tmp_path / "shards", tmp_path / "old")
    before = old_rows(tmp_path / "old")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 12, limits[1]))
    try:
        convert(tmp_path / "old", tmp_path / "old")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert same(rows_of(tmp_path / "old"), before)


def test_what_is_no_version_1_is_named(shards, tmp_path, capsys):
    with pytest.raises(UserError, match=f"{tmp_path}: no index.json there"):
        convert(tmp_path, tmp_path)
    copy = shutil.copytree(shards, tmp_path / "shards")
    before = contents(copy, "*")
    convert(copy, copy)
    assert contents(copy, "*") == before
    assert f"{copy}: the shards are of format version 2 already\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="of format version 2; there is nothing to convert"):
        convert(copy, tmp_path / "other")
    with pytest.raises(UserError, match=f"{tmp_path / 'typo'}: no index.json there"):
        convert(tmp_path / "typo", tmp_path / "typo")
    for value, named in (
        ([], "dict"),
        ({"format_version": 3}, "format version 3, where 2 is read; use the version of the engine"),
    ):
        (copy / "index.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match=named):
            convert(copy, copy)
    assert not (tmp_path / "typo").exists()
    assert not (tmp_path / "other").exists()
