"""Latent shards: their content, their format, and how they are built, resumed and verified."""

import errno
import io
import json
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from engine.data.format import index, reader
from engine.data.format.index import Index, add_refused, count_refused, shard_name, sweep
from engine.data.format.reader import Shards
from engine.data.format.verify import verify
from engine.data.samples.draw import draw_rows
from engine.data.samples.order import records_of
from engine.errors import UserError
from engine.models.stable_diffusion import StableDiffusionEncoder
from engine.shards import build_command
from engine.tensors import TensorFile, read_header
from tests import reference, tiny
from tests.commands import run_two


def arguments(model: Path, images: Path, shards: Path, *more: str) -> list[str]:
    return [
        "--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images),
        "--shards_dir", str(shards), "--resolution", "16", "--shard_records", "5", "--encode_batch_size", "4", *more,
    ]  # fmt: skip


def build(*inputs) -> Index:
    assert build_command(arguments(*inputs)) == 0
    return Index.read(inputs[2])


def contents(directory: Path, names: str = "shard-*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob(names))}


def write_captions(directory: Path, captions: list) -> Path:
    """Images of different colours with these captions."""
    directory.mkdir(parents=True)
    lines = []
    for number, caption in enumerate(captions):
        Image.new("RGB", (16, 16), (number * 20 % 256, 90, 200)).save(directory / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory


def test_rows_hold_what_diffusers_encodes(model, images, tmp_path):
    build(model, images, tmp_path / "shards")
    data = reference.PlainShards(tmp_path / "shards")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        pixels = np.asarray(Image.open(images / row["file_name"]), np.float32) / 127.5 - 1
        posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
        (stored,) = data.images[number]
        torch.testing.assert_close(stored["latent_mean"], posterior.mean[0] * vae.config.scaling_factor, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stored["latent_std"], posterior.std[0] * vae.config.scaling_factor, atol=1e-5, rtol=1e-4)
        tokens = tokenizer(row["text"], max_length=16, padding="max_length", truncation=True, return_tensors="pt").input_ids
        (caption,) = data.caption_numbers[number]
        torch.testing.assert_close(data.captions[caption], text_encoder(tokens)[0][0], atol=1e-5, rtol=1e-4)


def test_a_row_lies_where_its_header_says(shards):
    path = shards / shard_name(1)
    header, _, data_start = read_header(path)
    entry = header["latent_mean"]
    row_bytes = 4 * 8 * 8 * 4
    assert entry["shape"] == [10, 4, 8, 8]
    with path.open("rb") as file:
        file.seek(data_start + entry["data_offsets"][0] + 3 * row_bytes)
        row = np.frombuffer(file.read(row_bytes), np.float32).reshape(4, 8, 8)
    with safe_open(path, "np") as file:
        assert np.array_equal(file.get_tensor("latent_mean")[3], row)


def test_equal_captions_are_stored_once(model, tmp_path):
    captions = ["a", "b", "a", "a", "c", "b", "d", "a", "d", "c", "e", "a"]
    index = build(model, write_captions(tmp_path / "images", captions), tmp_path / "shards")
    assert index.shards["caption_rows"].tolist() == [3, 4, 2]
    data = reference.PlainShards(tmp_path / "shards")
    assert [numbers[0] for numbers in data.caption_numbers] == [0, 1, 0, 0, 2, 3, 4, 5, 4, 6, 7, 8]


def test_several_captions_crops_and_flips_are_variants(model, tmp_path):
    images = tiny.write_images(tmp_path / "wide", count=3, size=(40, 16))
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    lines[1]["text"] = ["first", "second", "a red square"]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    index = build(model, images, tmp_path / "shards", "--random_flip", "--random_crops", "3")
    assert index.shards["image_rows"].tolist() == [3 * 6]
    data = reference.PlainShards(tmp_path / "shards")
    assert data.caption_numbers == [[0], [1, 2, 0], [3]]
    mirrored = tiny.write_images(tmp_path / "square", count=2)
    assert build(model, mirrored, tmp_path / "other", "--random_flip").total("image_rows") == 4


def test_bad_samples_are_skipped_and_listed(model, tmp_path, capsys):
    images = write_captions(tmp_path / "images", ["a", "", "b", "c", "d", "e", "f"])
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:40])
    (images / "5.png").unlink()
    index = build(model, images, tmp_path / "shards")
    assert index.records == 4
    listed = {item["source"]: item["reason"] for refusals in index.refused.values() for item in refusals.first}
    assert listed["1.png"] == "empty caption"
    assert "unreadable" in listed["2.png"]
    assert listed["5.png"] == "no such image file"
    stored = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert stored["refused_count"] == 3
    assert "refused        3" in capsys.readouterr().out
    assert [t.tolist() for t in (read_sources(tmp_path / "shards", 0), read_sources(tmp_path / "shards", 1))] == [
        [0, 3, 4],
        [6],
    ]


def read_sources(directory: Path, number: int) -> torch.Tensor:
    with safe_open(directory / shard_name(number), "pt") as file:
        return file.get_tensor("source")


@pytest.mark.parametrize("damage", ["caption", "image"])
def test_strict_stops_at_a_bad_sample(damage, model, tmp_path):
    images = write_captions(tmp_path / "images", ["a", "" if damage == "caption" else "b", "c"])
    if damage == "image":
        (images / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="--strict: 1.png: (empty caption|unreadable image)"):
        build(model, images, tmp_path / "shards", "--strict")
    assert not (tmp_path / "shards" / "index.json").exists()


def test_nothing_usable_is_an_error(model, tmp_path):
    images = write_captions(tmp_path / "images", ["", ""])
    with pytest.raises(UserError, match=r"not one of 2 samples can be used: 2 empty caption \(0.png, 1.png\)"):
        build(model, images, tmp_path / "shards")
    assert not (tmp_path / "shards" / "index.json").exists()


def test_building_again_encodes_only_what_is_missing(model, images, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = build(model, images, whole)
    shutil.copytree(whole, parts)
    (parts / "index.json").unlink()
    (parts / shard_name(1)).unlink()
    (parts / (shard_name(2) + ".0.partial")).write_bytes(b"left by a crash")
    encoded = []
    encode = StableDiffusionEncoder.encode_images

    def counted(self, batch):
        encoded.append(len(batch["pixels"]))
        return encode(self, batch)

    monkeypatch.setattr(StableDiffusionEncoder, "encode_images", counted)
    index = build(model, images, parts)
    assert sum(encoded) == 5
    assert contents(parts) == contents(whole)
    assert index.shards.tobytes() == expected.shards.tobytes()
    assert index.fingerprint == expected.fingerprint
    build(model, images, parts)
    assert sum(encoded) == 5, "a complete directory is not encoded again"


def test_shards_of_something_else_are_replaced_or_refused(model, images, tmp_path):
    shards = tmp_path / "shards"
    build(model, images, shards, "--random_flip")
    (shards / "index.json").unlink()
    plain = build(model, images, shards)
    assert plain.total("image_rows") == 12
    with pytest.raises(
        UserError, match=r"built otherwise \(--random_flip False, now True\); give the same options, name another"
    ):
        build(model, images, shards, "--random_flip")
    with pytest.raises(UserError, match=r"\(--resolution 16, now 32; --mixed_precision no, now bf16\)"):
        build(model, images, shards, "--resolution", "32", "--mixed_precision", "bf16")
    with pytest.raises(UserError, match=r"\(--random_crops 4, now --center_crop\)"):
        build(model, images, shards, "--center_crop")
    with pytest.raises(UserError, match=r"\(--max_train_samples None, now 3; --subset_seed None, now 5\)"):
        build(model, images, shards, "--max_train_samples", "3", "--seed", "5")
    with pytest.raises(UserError, match=r"\(other files or rows of data\)"):
        build(model, write_captions(tmp_path / "others", ["x", "y"]), shards)
    with pytest.raises(UserError, match=r"\(another vae; another text_encoder\)"):
        build(tiny.write_pipeline(tmp_path / "model", seed=1), images, shards)


@pytest.mark.two_processes
def test_two_processes_write_the_bytes_of_one(model, images, tmp_path):
    command = [sys.executable, "-m", "engine.shards", "build"]
    run_two([*command, *arguments(model, images, tmp_path / "two", "--dataloader_num_workers", "2")])
    # With one computing thread, as each of the two has: their number can change the last bits of a convolution.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build(model, images, tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert contents(tmp_path / "two", "index-*") == contents(tmp_path / "one", "index-*")


def test_verification_names_every_kind_of_damage(shards, tmp_path):
    directory = tmp_path / "shards"
    shutil.copytree(shards, directory)
    index = Index.read(directory)
    assert verify(directory, index, range(3)) == {}
    altered = bytearray((directory / shard_name(0)).read_bytes())
    altered[-1] ^= 128
    (directory / shard_name(0)).write_bytes(altered)
    short = (directory / shard_name(1)).read_bytes()[:-8]
    (directory / shard_name(1)).write_bytes(short)
    (directory / shard_name(2)).unlink()
    problems = verify(directory, index, range(3))
    assert "altered" in problems[shard_name(0)]
    assert "truncated" in problems[shard_name(1)]
    assert problems[shard_name(2)] == "missing"
    with pytest.raises(ValueError, match="truncated"):
        read_header(directory / shard_name(1))


@pytest.mark.parametrize(("content", "named"), [("{", "cannot be read"), ('{"format_version": 99}', "format version 99")])
def test_an_index_that_cannot_be_read_is_named(content, named, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=named):
        Index.read(tmp_path)


def test_an_index_stays_small_whatever_samples_say_of_themselves():
    listed = [{"source": f"{n}.png", "reason": f"has no column {n}" + "x" * 5000, "detail": "y" * 5000} for n in range(999)]
    parts = [count_refused(listed[first : first + 100]) for first in range(0, 999, 100)]
    total = add_refused(parts)
    assert sum(refusals.count for refusals in total.values()) == 999
    assert total["other reasons"].count == 999 - 64
    assert len(total) == 65
    assert len(json.dumps([refusals.model_dump() for refusals in total.values()])) < 2**18


def test_an_index_that_is_replaced_while_it_is_read_is_read_again(shards, tmp_path, monkeypatch):
    directory = shutil.copytree(shards, tmp_path / "shards")
    whole, grown = Index.read(directory), replace(Index.read(directory), encode_seconds=5.0)
    grown.shards["bytes"][0] += 1
    read_table, calls = index._read_table, []

    def late(path: Path) -> np.ndarray:
        calls.append(path)
        if len(calls) == 1:
            grown.write(directory)
            sweep(directory)
        return read_table(path)

    monkeypatch.setattr(index, "_read_table", late)
    assert Index.read(directory).encode_seconds == 5.0
    assert len(list(directory.glob("index-*"))) == 1
    whole.write(directory)
    assert len(list(directory.glob("index-*"))) == 2, "another builder's, where nobody knows locks"


def gathered(reader: Shards, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {name: torch.empty(len(rows["record"]), *field.shape, dtype=field.dtype) for name, field in reader.fields.items()}
    for name, target in out.items():
        reader.gather(name, rows, target)
    return out


def test_gather_finds_every_row_of_every_field(shards):
    reader, data = Shards(shards), reference.PlainShards(shards)
    records = torch.randperm(24, generator=torch.Generator().manual_seed(0)) % 12
    for variant in range(2):
        found = gathered(reader, reader.rows_of(reader.find(records), variant))
        for place, record in enumerate(records.tolist()):
            (caption,) = data.caption_numbers[record]
            expected = data.images[record][variant] | {"encoder_hidden_states": data.captions[caption]}
            assert all(torch.equal(found[name][place], tensor) for name, tensor in expected.items())


def test_variants_and_captions_are_drawn_by_slot(model, tmp_path):
    images = write_captions(tmp_path / "images", [["a", "b", "c"], "d", ["e", "a"]])
    build(model, images, tmp_path / "shards", "--random_flip")
    reader, data = Shards(tmp_path / "shards"), reference.PlainShards(tmp_path / "shards")
    slots = torch.arange(60)
    records = records_of(4, slots, 3)
    rows = draw_rows(reader, 4, slots, records)
    found = gathered(reader, rows)
    for slot, record in enumerate(records.tolist()):
        assert int(rows["image"][slot]) == 2 * record + reference.choice(4, slot, 6, 2)
        captions = data.caption_numbers[record]
        caption = data.captions[captions[reference.choice(4, slot, 5, len(captions))]]
        assert torch.equal(found["encoder_hidden_states"][slot], caption)


def test_records_with_other_numbers_of_rows_are_found_by_offsets(model, tmp_path, monkeypatch):
    """Shards of every kind, more of them than may be open at a time."""
    captions = [["a", "b"], "c", "d", ["a"], "e", "f", "g", "g", "h", ["i", "j"], ["k", "i"], ["l", "j"]]
    images = write_captions(tmp_path / "images", captions)
    for number in (1, 4, 7):
        Image.new("RGB", (40, 16), (number, 9, 9)).save(images / f"{number}.png")
    build(model, images, tmp_path / "shards", "--random_crops", "3", "--shard_records", "3")
    reader, data = Shards(tmp_path / "shards"), reference.PlainShards(tmp_path / "shards")
    assert reader.index.shards["variants"].tolist() == [-1, -1, -1, 1]
    assert reader.index.shards["captions"].tolist() == [-1, -2, 1, 2]
    monkeypatch.setattr(reader, "_most_open", 2)
    everything = [
        (record, variant, caption) for record in range(12) for variant in range(len(data.images[record]))
        for caption in range(len(data.caption_numbers[record]))
    ] * 2  # fmt: skip
    records, variants, numbers = torch.tensor(everything).unbind(1)
    places = reader.find(records)
    assert places.image_counts.tolist() == [len(data.images[record]) for record in records]
    assert places.caption_counts.tolist() == [len(data.caption_numbers[record]) for record in records]
    found = gathered(reader, reader.rows_of(places, variants, numbers))
    for place, (record, variant, caption) in enumerate(everything):
        assert torch.equal(found["latent_mean"][place], data.images[record][variant]["latent_mean"])
        text = data.captions[data.caption_numbers[record][caption]]
        assert torch.equal(found["encoder_hidden_states"][place], text)
    assert (reader._files >= 0).sum() <= 2


def test_a_row_that_was_altered_is_named_when_it_is_read(shards, tmp_path):
    directory = shutil.copytree(shards, tmp_path / "shards")
    path = directory / shard_name(1)
    header, _, start = read_header(path)
    content = bytearray(path.read_bytes())
    content[start + header["latent_mean"]["data_offsets"][0] + 5 * 4 * 8 * 8 * 4] ^= 1
    path.write_bytes(content)
    reader = Shards(directory)
    others = [record for record in range(12) if record != 7]
    gathered(reader, reader.rows_of(reader.find(torch.tensor(others)), 1))
    gathered(reader, reader.rows_of(reader.find(torch.tensor([7])), 0))
    rows = reader.rows_of(reader.find(torch.tensor([3, 7])), 1)
    named = rf"{path}: altered: row 5 of latent_mean does not match its checksum \(record 7, sample 7 of the data set\)"
    with pytest.raises(UserError, match=named):
        gathered(reader, rows)
    gathered(Shards(directory, check_rows=False), rows)


def test_numbers_that_were_altered_since_a_shard_was_opened_are_named(model, tmp_path):
    """They lead to rows that match their checksums, of other records."""
    captions = ["a", ["b", "a"], "c", ["a", "c", "b"], "b"]
    build(model, write_captions(tmp_path / "images", captions), tmp_path / "shards")
    path = tmp_path / "shards" / shard_name(0)
    whole, (header, _, start) = path.read_bytes(), read_header(path)
    reader = Shards(tmp_path / "shards")
    places = reader.find(torch.arange(5))
    for name, number in (("caption_numbers", 1), ("caption_offsets", 2)):
        content = bytearray(whole)
        content[start + header[name]["data_offsets"][0] + 8 * number] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: altered: number 1 of {name} does not match its checksum"):
            reader.rows_of(reader.find(torch.arange(5)))
    path.write_bytes(whole)
    assert reader.rows_of(places)["caption"].tolist() == [0, 1, 2, 0, 1]


def test_another_file_in_the_place_of_a_shard_is_judged_again(shards, tmp_path):
    """Of files, some are closed for others and opened again."""
    directory = shutil.copytree(shards, tmp_path / "shards")
    reader = Shards(directory)
    rows = reader.rows_of(reader.find(torch.arange(10)))
    whole = gathered(reader, rows)
    shutil.copy(directory / shard_name(1), directory / "copy")
    (directory / "copy").replace(directory / shard_name(1))
    reader._close(np.arange(2))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in gathered(reader, rows).items())
    shutil.copy(directory / shard_name(0), directory / "copy")
    (directory / "copy").replace(directory / shard_name(1))
    reader._close(np.arange(2))
    with pytest.raises(UserError, match=f"{shard_name(1)}: first_sample is 0, and 5 in index.json"):
        gathered(reader, rows)


def test_more_shards_than_may_be_open_are_read_in_turn(shards, monkeypatch):
    reader = Shards(shards)
    monkeypatch.setattr(reader, "_most_open", 2)
    records = torch.tensor([0, 5, 11, 6, 1, 10, 11])
    found = gathered(reader, reader.rows_of(reader.find(records), 1))
    assert (reader._files >= 0).sum() <= 2
    monkeypatch.undo()
    expected = gathered(reader, reader.rows_of(reader.find(records), 1))
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_no_more_is_looked_up_than_stays_open_until_it_is_read(model, shards, tmp_path, monkeypatch):
    """Where each record's rows must be looked up in its shard, and there are more shards than may be open."""
    build(model, write_captions(tmp_path / "images", ["a", ["b", "c"]] * 5), tmp_path / "varying", "--shard_records", "2")
    varying, arithmetic = Shards(tmp_path / "varying"), Shards(shards)
    assert varying.found_together > 2**60, "all may be open"
    for opened in (varying, arithmetic):
        monkeypatch.setattr(opened, "_most_open", 4)
    assert varying.found_together == 2
    assert Shards(shards).found_together > 2**60


def test_a_disk_that_fails_while_shards_are_verified_is_one_line(shards, monkeypatch):
    read, failing = TensorFile.read, []

    def fails(file: TensorFile, name: str, first: int, target: torch.Tensor) -> None:
        if name == "latent_std" and not failing:
            failing.append(file.path)
            raise OSError(errno.EIO, "Input/output error")
        read(file, name, first, target)

    monkeypatch.setattr(TensorFile, "read", fails)
    problems = verify(shards, Index.read(shards), range(3), contents=False, rows=True, threads=1)
    assert problems.keys() == {shard_name(0)}
    assert problems[shard_name(0)].startswith("cannot be read: Input/output error; mend what is wrong with that place")


def test_opening_touches_no_shard(shards, tmp_path, monkeypatch):
    directory = shutil.copytree(shards, tmp_path / "shards")
    for path in directory.glob("shard-*"):
        path.write_bytes(b"")
    assert len(Shards(directory)) == 12
    (directory / shard_name(1)).unlink()
    with pytest.raises(UserError, match=f"{shard_name(1)}: missing, and named in index.json"):
        Shards(directory)


def test_a_shard_that_shrinks_under_a_run_is_named(shards, tmp_path):
    directory = tmp_path / "shards"
    shutil.copytree(shards, directory)
    reader = Shards(directory)
    rows = reader.rows_of(reader.find(torch.tensor([0, 11])))
    reader.gather("latent_mean", rows, torch.empty(2, 4, 8, 8))
    with (directory / shard_name(2)).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="shard-00002.safetensors: cannot be read any more"):
        reader.gather("latent_mean", rows, torch.empty(2, 4, 8, 8))


def test_low_precision_shards_hold_the_rounded_rows(model, images, tmp_path):
    build(model, images, tmp_path / "full")
    build(model, images, tmp_path / "half", "--mixed_precision", "bf16")
    full, half = reference.PlainShards(tmp_path / "full"), reference.PlainShards(tmp_path / "half")
    assert half.images[0][0]["latent_mean"].dtype == torch.bfloat16
    for left, right in zip(full.images, half.images, strict=True):
        torch.testing.assert_close(right[0]["latent_mean"].float(), left[0]["latent_mean"], atol=0.02, rtol=0.05)


def test_jpegs_and_greyscale_images_are_encoded_too(model, tmp_path):
    images = write_captions(tmp_path / "images", ["a", "b"])
    buffer = io.BytesIO()
    Image.effect_noise((30, 20), 40).save(buffer, "JPEG")
    (images / "1.png").write_bytes(buffer.getvalue())
    assert build(model, images, tmp_path / "shards", "--center_crop").records == 2


def test_as_many_shards_stay_open_as_the_limit_of_open_files_lets(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
        assert reader._allowed_open(1500, 1) == reader.OPEN_SHARDS, "all may be open, whatever is read at a time"
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1500 + reader.OTHERS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    monkeypatch.setattr(reader, "allow_open_files", lambda wanted: 4096)
    assert 2500 < reader._allowed_open(100_000, 1) < 4096 - 1024
    monkeypatch.setattr(reader, "allow_open_files", lambda wanted: wanted)
    assert reader._allowed_open(100_000, 1) == reader.OPEN_SHARDS
