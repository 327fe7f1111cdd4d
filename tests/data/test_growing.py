"""A data set that gained, lost or changed samples: only those are encoded, and other shards stay the files that they are."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from benchmarks.tools.shards import write_version_1
from engine.data.convert import convert
from engine.data.describe import describe_record
from engine.data.format.buckets import read_indexes
from engine.data.format.index import INDEX, SAMPLES, Index, shard_name
from engine.data.format.reader import Shards
from engine.data.format.shard import Shard
from engine.data.format.verify import verify
from engine.data.sources.image_folder import ImageFolder
from engine.errors import UserError
from engine.models.stable_diffusion import StableDiffusionEncoder
from tests import reference
from tests.altered import as_built_before
from tests.data import test_refusals
from tests.data.test_refusals import Chain, values_of
from tests.data.test_refusals import build as build_chain
from tests.data.test_shards import build, contents, write_captions


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images every batch had that was encoded."""
    counts: list[int] = []
    encode = StableDiffusionEncoder.encode_images

    def counted(self, batch):
        counts.append(len(batch["pixels"]))
        return encode(self, batch)

    monkeypatch.setattr(StableDiffusionEncoder, "encode_images", counted)
    return counts


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The places of the images that were read."""
    places: list[int] = []
    content = ImageFolder.content
    monkeypatch.setattr(ImageFolder, "content", lambda self, index: (places.append(index), content(self, index))[1])
    return places


@pytest.fixture
def images(tmp_path) -> Path:
    return write_captions(tmp_path / "images", list("abcdefghijkl"))


@pytest.fixture
def shards(model, images, tmp_path) -> Path:
    build(model, images, tmp_path / "shards")
    return tmp_path / "shards"


def captions_of(images: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    return {row["file_name"]: row["text"] for row in rows}


def describe(images: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (images / "metadata.jsonl").write_text("\n".join(lines))


def add(images: Path, name: str, color: tuple[int, int, int] = (1, 2, 3), place: int | None = None) -> None:
    """An image whose caption is its name, at the end of the table or at a place of it."""
    Image.new("RGB", (16, 16), color).save(images / name)
    rows = list((captions_of(images) | {name: name}).items())
    rows.insert(len(rows) if place is None else place, rows.pop())
    describe(images, dict(rows))


def remove(images: Path, *names: str) -> None:
    describe(images, {name: text for name, text in captions_of(images).items() if name not in names})
    for name in names:
        (images / name).unlink()


def texts_of(directory: Path) -> list[str]:
    """The captions of the records, in order."""
    index = Index.read(directory)
    assert verify(directory, index, range(len(index.shards)), rows=True) == {}
    found = []
    for number in index.shards["number"].tolist():
        shard = Shard(directory / shard_name(number), index.fields, index.identity)
        found += [shard.text("caption_texts", shard.caption_rows(record)[0]) for record in range(shard.said.records)]
    return found


@pytest.mark.parametrize("place", [None, 3], ids=["at the end", "in the middle"])
def test_an_image_more_is_encoded_alone(place, model, images, shards, encoded, read):
    before, index = contents(shards), Index.read(shards)
    add(images, "new.png", place=place)
    grown = build(model, images, shards)
    assert (encoded, read) == ([1], [12 if place is None else place])
    after = contents(shards)
    assert {name: after.pop(name) for name in before} == before
    assert [*after] == [shard_name(3)]
    assert texts_of(shards) == [*"abcdefghijkl", "new.png"]
    assert grown.fingerprint != index.fingerprint
    assert build(model, images, shards).fingerprint == grown.fingerprint
    assert (len(encoded), len(read)) == (1, 1), "nothing is read again"


def test_images_that_are_gone_leave_the_index_and_nothing_is_encoded(model, images, shards, encoded, read, capsys):
    rows = {record: reference.PlainShards(shards).images[record] for record in range(12)}
    before = contents(shards)
    remove(images, "6.png", "8.png")
    build(model, images, shards)
    assert (encoded, read) == ([], [])
    assert texts_of(shards) == list("abcdefhjkl")
    after = contents(shards)
    assert {*after} == {*before, shard_name(3)}, "the shard is another file"
    assert {name: after[name] for name in before} == before, "and whoever reads the old one goes on"
    kept = reference.PlainShards(shards)
    for record, old in enumerate([0, 1, 2, 3, 4, 5, 7, 9, 10, 11]):
        assert all(torch.equal(kept.images[record][0][name], rows[old][0][name]) for name in rows[old][0])
    build(model, images, shards)
    assert contents(shards) == after
    assert "0 samples are new, 2 of 12 are gone; only the shards that this changes" in capsys.readouterr().err
    remove(images, "5.png", "7.png", "9.png")
    assert build(model, images, shards).shards["number"].tolist() == [0, 2], "a shard of which nothing is left is gone"
    assert {*contents(shards)} == {shard_name(number) for number in (0, 2, 3)}, "and so is what the build before replaced"
    remove(images, *(f"{number}.png" for number in (0, 1, 2, 3, 10, 11)))
    build(model, images, shards)
    assert "warning: " in capsys.readouterr().err, "most are gone, as where a disk is not mounted"
    assert texts_of(shards) == ["e"]


@pytest.mark.parametrize("what", ["image", "caption"])
def test_what_changed_is_encoded_anew(what, model, images, shards, encoded):
    if what == "image":
        Image.new("RGB", (16, 16), (9, 9, 9)).save(images / "6.png")
    else:
        describe(images, captions_of(images) | {"6.png": "G"})
    build(model, images, shards)
    assert encoded == [1]
    assert texts_of(shards) == [*"abcdefhijkl", "g" if what == "image" else "G"]


def test_a_copy_is_the_same_data_set(model, images, shards, encoded, read, tmp_path):
    before = contents(shards, "[!s]*") | contents(shards)
    for name in ("copy", "again"):
        shutil.copytree(images, tmp_path / name, copy_function=shutil.copyfile)
        for place, file in enumerate(sorted((tmp_path / name).iterdir())):
            os.utime(file, ns=(0, 10**9 * (len(name) + place)))
        build(model, tmp_path / name, shards)
        assert sorted(read) == [*range(12)], "it is read once"
        read.clear()
        build(model, tmp_path / name, shards)
        assert (encoded, read) == ([], [])
    assert contents(shards, "[!s]*") | contents(shards) == before
    (images / "6.png").rename(images / "other.png")
    captions = captions_of(images)
    describe(images, {("other.png" if name == "6.png" else name): text for name, text in captions.items()})
    given = {"train_data_dir": str(images)}
    assert "file           6.png when it was encoded\n" in describe_record(shards, read_indexes(shards), 6, given)
    build(model, images, shards)
    assert encoded == [], "nor is another name another sample"
    assert f"file           other.png of {images}\n" in describe_record(shards, read_indexes(shards), 6, given)
    assert contents(shards, "[!s]*") | contents(shards) == before


def test_what_was_refused_and_is_mended_is_encoded(model, images, shards, encoded):
    good = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(good[:40])
    index = build(model, images, shards)
    assert (index.records, index.refused_count, encoded) == (11, 1, [])
    assert build(model, images, shards).fingerprint == index.fingerprint
    (images / "3.png").write_bytes(good)
    index = build(model, images, shards)
    assert (index.records, index.refused_count, encoded) == (12, 0, [1])


def test_another_data_set_is_not_what_became_of_this_one(model, shards, encoded, tmp_path):
    before = contents(shards, "*")
    with pytest.raises(UserError, match=r"were built otherwise \(other files or rows of data\)"):
        build(model, write_captions(tmp_path / "others", ["x", "y"]), shards)
    assert contents(shards, "*") == before | {SAMPLES: (shards / SAMPLES).read_bytes()}
    assert encoded == []


def test_fewer_samples_by_option_are_no_loss(model, images, shards):
    with pytest.raises(UserError, match=r"--max_train_samples None, now 3"):
        build(model, images, shards, "--max_train_samples", "3")
    index = build(model, images, shards.parent / "three", "--max_train_samples", "3")
    add(images, "new.png")
    grown = build(model, images, shards.parent / "three", "--max_train_samples", "3")
    assert (index.records, grown.records) == (3, 3)
    with pytest.raises(UserError, match=r"--subset_seed 0, now 4"):
        build(model, images, shards.parent / "three", "--max_train_samples", "3", "--subset_seed", "4")


def write_rows(path: Path, numbers: range) -> None:
    values = []
    for number in numbers:
        Image.new("RGB", (16, 16), (number, 0, 9)).save(path.with_suffix(".png"))
        values.append({"bytes": path.with_suffix(".png").read_bytes(), "path": None})
    path.with_suffix(".png").unlink()
    pyarrow.parquet.write_table(pa.table({"image": values, "text": [str(number) for number in numbers]}), path)


def test_a_table_grows_by_files_and_by_rows(model, tmp_path, encoded):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train-1.parquet", range(7))
    build(model, data, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    write_rows(data / "train-0.parquet", range(7, 10))
    encoded.clear()
    build(model, data, tmp_path / "shards")
    assert encoded == [3]
    assert texts_of(tmp_path / "shards") == list("0123456789")
    after = contents(tmp_path / "shards")
    assert {name: after[name] for name in before} == before
    write_rows(data / "train-1.parquet", range(1, 8))  # one row is gone, and one new that is a copy of another
    encoded.clear()
    build(model, data, tmp_path / "shards")
    assert encoded == [1]
    assert texts_of(tmp_path / "shards") == [*"1234567897"]
    encoded.clear()
    build(model, data, tmp_path / "shards")
    assert encoded == []


class Counted(Chain):
    """Counts the bytes of the rows that it encodes."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples=samples)
        self.bytes = 0

    def load_encoder(self, device):
        return self

    def encoder(self, device):
        return contextlib.nullcontext(self)

    def encode_images(self, batch):
        self.bytes += batch["value"].nbytes
        return super().encode_images(batch)


def test_one_image_more_than_ten_thousand_costs_one_shard_at_most(tmp_path):
    whole, more = Counted(10_000), Counted(10_001)
    build_chain(whole, tmp_path, shard_records=1024, encode_batch_size=512)
    before = contents(tmp_path)
    build_chain(more, tmp_path, shard_records=1024, encode_batch_size=512)
    assert more.bytes == whole.bytes // 10_000 <= 1024 * whole.bytes // 10_000
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert [value for value, _ in values_of(tmp_path)] == [*range(10_001)]


def test_shards_that_were_converted_grow(model, images, shards, encoded, tmp_path):
    as_built_before(shards)
    write_version_1(shards, tmp_path / "old")
    index = convert(tmp_path / "old", tmp_path / "old")
    assert build(model, images, tmp_path / "old").fingerprint == index.fingerprint
    before = contents(tmp_path / "old")
    add(images, "new.png")
    grown = build(model, images, tmp_path / "old")
    assert encoded == [1]
    after = contents(tmp_path / "old")
    assert {name: after[name] for name in before} == before
    assert texts_of(tmp_path / "old") == [*"abcdefghijkl", "new.png"]
    assert grown.shards["number"].tolist() == [3, 4, 5, 6]
    remove(images, "0.png")
    build(model, images, tmp_path / "old")
    assert encoded == [1]
    assert texts_of(tmp_path / "old") == [*"bcdefghijkl", "new.png"]


def test_shards_that_were_converted_with_their_data_set_are_as_any_others(model, images, encoded, tmp_path, capsys):
    (images / "3.png").write_bytes(b"no image")
    built, old, copy = (tmp_path / name for name in ("built", "old", "copy"))
    build(model, images, built)
    as_built_before(built)
    write_version_1(built, old)
    shutil.copytree(images, copy, copy_function=shutil.copyfile)
    with pytest.raises(UserError, match=f"{copy}: is not, or no longer, what the shards of"):
        convert(old, old, {"train_data_dir": str(copy)})
    index = convert(old, old, {"train_data_dir": str(images)})
    assert index.fingerprint == Index.read(built).fingerprint
    for name, other in zip(sorted(contents(old)), sorted(contents(built)), strict=True):
        ours, theirs = (Shard(path, index.fields, index.identity) for path in (old / name, built / other))
        assert torch.equal(ours.numbers["contents"], theirs.numbers["contents"])
    convert(old, old, {"train_data_dir": str(images)})
    assert "what they know of the data set stays" in capsys.readouterr().err
    add(copy, "new.png")
    encoded.clear()
    build(model, copy, old)
    assert encoded == [1]
    assert texts_of(old) == [*"abcefghijkl", "new.png"]


@pytest.mark.parametrize("crops", ["--random_crops=2", "--center_crop"])
def test_other_crops_are_another_fingerprint(crops, model, images, tmp_path):
    few = write_captions(tmp_path / "few", list("cde"))
    fresh = build(model, few, tmp_path / "fresh", crops)
    add(few, "new.png", place=0)
    build(model, few, tmp_path / "shrunk", crops)
    remove(few, "new.png")
    shrunk = build(model, few, tmp_path / "shrunk", crops)
    assert texts_of(tmp_path / "shrunk") == list("cde")
    assert (shrunk.fingerprint == fresh.fingerprint) == (crops == "--center_crop")


def test_what_was_converted_is_told_from_other_data_when_it_has_grown(model, tmp_path):
    fingerprints = set()
    for name, captions in (("one", "abc"), ("other", "xyz")):
        images = write_captions(tmp_path / name / "images", list(captions))
        build(model, images, tmp_path / name / "new", "--center_crop")
        as_built_before(tmp_path / name / "new")
        write_version_1(tmp_path / name / "new", tmp_path / name / "old")
        convert(tmp_path / name / "old", tmp_path / name / "old")
        add(images, "new.png")
        with pytest.raises(UserError, match="only what a first build on the data set as it was wrote down"):
            build(model, images, tmp_path / name / "old", "--center_crop")
        remove(images, "new.png")
        build(model, images, tmp_path / name / "old", "--center_crop")
        add(images, "new.png")
        fingerprints.add(build(model, images, tmp_path / name / "old", "--center_crop").fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("known", [True, False], ids=["with its samples", "without"])
@pytest.mark.parametrize("converted", [True, False])
def test_what_is_damaged_is_built_again_alone(known, converted, model, images, shards, encoded, tmp_path):
    if converted:
        as_built_before(shards)
        write_version_1(shards, tmp_path / "old")
        convert(tmp_path / "old", tmp_path / "old")
        shards = tmp_path / "old"
    index = build(model, images, shards)
    numbers = index.shards["number"].tolist()
    before = contents(shards, "shard-*")
    (shards / shard_name(numbers[1])).unlink()
    (shards / INDEX).unlink()
    if not known:
        (shards / SAMPLES).unlink()
    (shards / shard_name(77)).write_bytes(before[shard_name(numbers[0])][:500])
    again = build(model, images, shards)
    assert sum(encoded) == 5
    if known or converted:  # else the samples of that shard are as good as new ones
        assert again.fingerprint == index.fingerprint
        assert again.shards["number"].tolist() == numbers
        assert again.shards["records"].tolist() == index.shards["records"].tolist()
    else:
        assert sorted(texts_of(shards)) == list("abcdefghijkl")
    after = contents(shards)
    assert len(after) == 3, "what the index does not name is gone"
    assert all(after[name] == before[name] for name in (shard_name(numbers[0]), shard_name(numbers[2])))


def test_a_build_that_was_interrupted_goes_on_with_what_there_is_now(tmp_path, monkeypatch):
    class Stopped(Chain):
        def load_encoder(self, device):
            return Stopped("encode_images", KeyboardInterrupt())

    class Later(Chain):
        """Without sample 1, and with two more."""

        numbers = (0, *range(2, 13))

        def captions(self, index):
            return super().captions(self.numbers[index])

        def content(self, index):
            return super().content(self.numbers[index])

        def prepare(self, image, record):
            encoded.append(record)
            return super().prepare(image, record)

        def stamps(self):
            return np.array(self.numbers, np.uint64), np.ones(12, np.int64)

    encoded: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(test_refusals, "BAD", 9)
        with pytest.raises(KeyboardInterrupt):
            build_chain(Stopped(samples=11), tmp_path)  # shards 0 to 3 and 4 to 7 are there
    assert sorted(contents(tmp_path)) == [shard_name(0), shard_name(1)]
    build_chain(Later(samples=12), tmp_path)
    assert sorted(encoded) == [8, 9, 10, 11, 12], "and one of those that were encoded is gone"
    assert [value for value, _ in values_of(tmp_path)] == [0, *range(2, 13)]
    assert len(Shards(tmp_path)) == 12


def test_shards_that_may_only_be_read_serve_a_copy(model, images, shards, encoded, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    index = Index.read(shards)
    monkeypatch.setattr("engine.data.encode._may_write", lambda directory: False)
    before = contents(shards, "*")
    monkeypatch.setattr("engine.files.lock", lambda *arguments, **options: pytest.fail("locked"))
    assert build(model, tmp_path / "copy", shards).fingerprint == index.fingerprint
    assert (encoded, contents(shards, "*")) == ([], before)
