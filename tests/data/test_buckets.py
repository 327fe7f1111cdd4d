"""Buckets: which size each image is brought to, and directories of shards that are built, grow and go on for each size."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from engine.config.options import CacheConfig
from engine.data import encode_buckets, image_sizes
from engine.data.format.buckets import Buckets, size_named
from engine.data.format.index import BUCKETS, INDEX, SIZES, Index
from engine.data.format.verify import verify
from engine.data.image_sizes import remembered
from engine.data.parts import build_parts, find_parts
from engine.data.sizes import cropped_away, made, nearest, sizes_of
from engine.data.sources.decode import decode, size_of
from engine.data.sources.image_folder import ImageFolder
from engine.data.sources.interface import Refused
from engine.errors import UserError
from engine.models.encoder import Encoder, open_encoding
from engine.models.stable_diffusion import StableDiffusionEncoder, StableDiffusionEncoding
from engine.processes import Processes
from tests.commands import start_two
from tests.storage_server import serving
from tests.test_processes import codes

SQUARE, WIDE, HIGH = (20, 20), (30, 20), (16, 25)
SHAPES = [SQUARE, WIDE, HIGH, WIDE, SQUARE, HIGH, WIDE]


def write(directory: Path, shapes: list[tuple[int, int]], first: int = 0) -> None:
    """Images of these sizes, each with a caption of its own beside it."""
    directory.mkdir(exist_ok=True)
    for number, size in enumerate(shapes, first):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{number:02d}.png")
        (directory / f"{number:02d}.txt").write_text(f"of {number}")


@pytest.fixture
def data(tmp_path) -> Path:
    write(tmp_path / "data", SHAPES)
    return tmp_path / "data"


def config_of(model: Path, data: Path | None, directory: Path, **options) -> CacheConfig:
    values = {"family": "sd", "pretrained_model_name_or_path": str(model), "shards_dir": str(directory), "resolution": 16,
              "buckets": True, "bucket_step": 4, "shard_records": 2} | options  # fmt: skip
    return CacheConfig.model_validate(values | ({"train_data_dir": str(data)} if data else {}))


def build(model: Path, data: Path, directory: Path, **options) -> dict[str | None, Index]:
    config = config_of(model, data, directory, **options)
    parts = build_parts(config, open_encoding(config), Processes())
    for part in parts:
        assert part.index.fields == part.encoding.record_spec
        assert verify(part.config.shards_path, part.index, range(len(part.index.shards)), rows=True) == {}
    return {part.bucket: part.index for part in parts}


def records(indexes: dict[str | None, Index]) -> dict[str | None, int]:
    return {bucket: index.records for bucket, index in indexes.items()}


def contents(directory: Path) -> dict[str, bytes | dict]:
    """All files below a directory, but for where and how long they were built."""
    found: dict[str, bytes | dict] = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.*")
                                      if path.is_file()}  # fmt: skip
    for name in [name for name in found if name.endswith(INDEX)]:
        index = json.loads(found[name]) | {"encode_seconds": 0}
        index["config"].pop("shards_dir")
        found[name] = index
    return found


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """What the models did: their loading, and the sizes of batches."""
    said: list[str] = []
    load, encode = StableDiffusionEncoding.load_encoder, StableDiffusionEncoder.encode_images

    def encode_images(self: Encoder, batch):
        said.append("{1}x{0}".format(*batch["pixels"].shape[-2:]))
        return encode(self, batch)

    monkeypatch.setattr(StableDiffusionEncoding, "load_encoder", lambda *given: (said.append("load"), load(*given))[1])
    monkeypatch.setattr(StableDiffusionEncoder, "encode_images", encode_images)
    return said


@pytest.mark.parametrize(
    ("step", "area", "ratio"), [(64, 512**2, 4.0), (64, 768**2, 2.0), (128, 768**2, 4.0), (8, 100**2, 1.0)]
)
def test_sizes_that_are_made(step, area, ratio):
    sizes = made(step, area, ratio)
    square = int(area**0.5) // step * step
    assert (square, square) in sizes
    assert {(height, width) for width, height in sizes} == sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= area
        assert max(width, height) <= ratio * min(width, height)
        assert width == height or max(width, height) * (min(width, height) + step) > area  # none with more pixels
    assert len(sizes) == 1 or ratio > 1


def test_an_image_goes_where_least_of_it_is_cropped_away():
    sizes = sorted(made(64, 512**2, 4.0), key=lambda size: size[0] / size[1])
    images = np.random.default_rng(0).integers(1, 4000, (2000, 2))
    places = nearest(sizes, images)
    cropped = np.stack([cropped_away(size, images) for size in sizes], 1)
    assert np.allclose(cropped[np.arange(len(images)), places], cropped.min(1))
    turned = nearest(sizes, images[:, ::-1])
    assert [sizes[place] for place in turned] == [sizes[place][::-1] for place in places]
    assert nearest(sizes, np.array([(512, 512), (9, 9), (0, 0)])).tolist() == [sizes.index((512, 512))] * 3


def test_exactly_between_two_an_image_goes_to_the_one_nearer_to_a_square():
    sizes = [(16, 64), (32, 32), (64, 16)]  # of ratios 1/4, 1 and 4
    assert nearest(sizes, np.array([(10, 20), (20, 10), (10, 21), (21, 10)])).tolist() == [1, 1, 0, 2]


def test_of_sizes_of_one_ratio_an_image_goes_to_the_largest_that_it_fills():
    sizes = [(32, 64), (32, 32), (64, 64), (128, 128)]
    assert nearest(sizes, np.array([(10, 10), (63, 64), (64, 64), (500, 500), (127, 130)])).tolist() == [1, 1, 2, 3, 2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_header_says_what_decoding_gives(kind):
    for turned in range(9):
        exif, written = Image.Exif(), io.BytesIO()
        exif[274] = turned
        Image.new("RGB", (6, 4)).save(written, kind, exif=exif)
        assert size_of(written.getvalue()) == decode(written.getvalue()).size
        if kind == "PNG":  # as some programs write it, behind the pixels
            content = written.getvalue()
            begin = content.index(b"eXIf") - 4
            end = begin + int.from_bytes(content[begin : begin + 4]) + 12
            late = content[:begin] + content[end:-12] + content[begin:end] + content[-12:]
            assert size_of(late) == decode(late).size


def test_each_size_has_its_directory_and_the_models_are_loaded_once(model, data, tmp_path, loaded):
    indexes = build(model, data, tmp_path / "shards")
    assert records(indexes) == {"12x20": 2, "16x16": 2, "20x12": 3}
    assert loaded.count("load") == 1
    assert {*loaded} - {"load"} == {*indexes}
    stored = Buckets.read(tmp_path / "shards" / BUCKETS)
    assert [(bucket.name, bucket.images, bucket.refused) for bucket in stored.buckets] == [
        ("12x20", 2, 0), ("16x16", 2, 0), ("20x12", 3, 0),
    ]  # fmt: skip
    assert [bucket.cropped for bucket in stored.buckets] == pytest.approx([1 - 0.6 / 0.64, 0, 1 - 1.5 / (5 / 3)], abs=1e-6)
    before = contents(tmp_path / "shards")
    assert build(model, data, tmp_path / "shards").keys() == indexes.keys()
    assert contents(tmp_path / "shards") == before
    assert loaded.count("load") == 1
    alone = config_of(model, None, tmp_path / "shards", buckets=False)
    found = find_parts(alone, open_encoding(alone), Processes())
    assert {part.bucket: part.index.fingerprint for part in found} == {
        bucket: index.fingerprint for bucket, index in indexes.items()
    }


@pytest.mark.parametrize("crops", [{}, {"center_crop": True, "random_flip": True}], ids=["random", "centre"])
def test_squares_are_the_same_shards_as_without_buckets(crops, model, tmp_path):
    write(tmp_path / "data", [SQUARE, (20, 21), SQUARE])
    [(bucket, index)] = build(model, tmp_path / "data", tmp_path / "buckets", **crops).items()
    plain = build(model, tmp_path / "data", tmp_path / "plain", buckets=False, bucket_step=64, **crops)[None]
    assert (bucket, index.fingerprint) == ("16x16", plain.fingerprint)
    ours, theirs = contents(tmp_path / "buckets" / "16x16"), contents(tmp_path / "plain")
    for name in ours.keys() - {INDEX}:
        assert ours[name] == theirs[name]


def test_what_is_new_is_read_and_encoded_alone_and_a_bucket_may_come_and_go(model, data, tmp_path, monkeypatch, loaded):
    build(model, data, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    sizes: list[int] = []
    size = ImageFolder.size
    monkeypatch.setattr(ImageFolder, "size", lambda self, index: (sizes.append(index), size(self, index))[1])
    write(data, [WIDE, (32, 8)], first=7)
    for gone in ("02", "05"):  # all that are high
        (data / f"{gone}.png").unlink()
        (data / f"{gone}.txt").unlink()
    loaded.clear()
    indexes = build(model, data, tmp_path / "shards")
    assert records(indexes) == {"16x16": 2, "20x12": 4, "32x8": 1}
    assert (len(sizes), loaded) == (2, ["load", "20x12", "32x8"])
    after = contents(tmp_path / "shards")
    kept = [name for name in before if name.startswith(("16x16", "12x20", "20x12/shard-0000"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    write(data, [HIGH], first=9)
    assert records(build(model, data, tmp_path / "shards")) == {"12x20": 1, "16x16": 2, "20x12": 4, "32x8": 1}
    assert len(sizes) == 3
    (data / "09.png").unlink()
    build(model, data, tmp_path / "shards")
    assert (tmp_path / "shards" / "12x20").exists()  # for trainings that read it
    write(data, [SQUARE], first=10)
    build(model, data, tmp_path / "shards")
    assert not (tmp_path / "shards" / "12x20").exists()
    fresh = build(model, data, tmp_path / "fresh")
    assert records(fresh) == {"16x16": 3, "20x12": 4, "32x8": 1}
    (tmp_path / "shards" / SIZES).unlink()
    sizes.clear()
    build(model, data, tmp_path / "shards")
    assert len(sizes) == 8


def test_a_copy_of_the_data_set_is_known_and_another_one_refused(model, data, tmp_path, loaded):
    build(model, data, tmp_path / "shards")
    shutil.copytree(data, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        path.touch()
    loaded.clear()
    build(model, tmp_path / "copy", tmp_path / "shards")
    assert loaded == []
    write(tmp_path / "other", [SQUARE, WIDE], first=50)
    with pytest.raises(UserError, match="the shards there were built otherwise .other files or rows of data."):
        build(model, tmp_path / "other", tmp_path / "shards")
    assert records(build(model, data, tmp_path / "shards")) == {"12x20": 2, "16x16": 2, "20x12": 3}


def test_shards_that_may_only_be_read_take_a_copy_of_the_data_set(model, data, tmp_path, monkeypatch):
    build(model, data, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    shutil.copytree(data, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        path.touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert records(build(model, tmp_path / "copy", tmp_path / "shards")) == {"12x20": 2, "16x16": 2, "20x12": 3}
    assert contents(tmp_path / "shards") == before
    write(tmp_path / "copy", [(32, 8)], first=7)
    with pytest.raises(
        UserError, match="has changed: of 32x8 there were, or are, no images; the shards there cannot be written"
    ):
        build(model, tmp_path / "copy", tmp_path / "shards")
    assert contents(tmp_path / "shards") == before


def test_an_image_whose_size_cannot_be_read_now_is_in_no_bucket_until_it_can(model, data, tmp_path, monkeypatch, capsys):
    size = ImageFolder.size

    def fails(self, index):
        if index == 1:
            raise Refused("unreadable image", "OSError: [Errno 116] Stale file handle", passing=True)
        return size(self, index)

    monkeypatch.setattr(ImageFolder, "size", fails)
    for _ in range(2):
        assert records(build(model, data, tmp_path / "shards")) == {"12x20": 2, "16x16": 2, "20x12": 2}
    assert "refused 1 of 7 samples: 1 unreadable image" in capsys.readouterr().err
    monkeypatch.undo()
    assert records(build(model, data, tmp_path / "shards")) == {"12x20": 2, "16x16": 2, "20x12": 3}


def test_sizes_are_remembered_in_the_end_and_not_after_each_few(model, data, tmp_path, monkeypatch):
    written: list[int] = []
    monkeypatch.setattr(image_sizes, "_AT_ONCE", 2)
    monkeypatch.setattr(
        encode_buckets, "remember", lambda directory, stamps, sizes: written.append(int((sizes[:, 0] > 0).sum()))
    )
    build(model, data, tmp_path / "shards")
    assert written == [7]
    monkeypatch.setattr(encode_buckets, "_PAUSE", -1)
    build(model, data, tmp_path / "others")
    assert written == [7, 2, 4, 6, 7, 7]


def test_a_build_that_was_stopped_goes_on(model, data, tmp_path, monkeypatch):
    build(model, data, tmp_path / "whole")
    encode, left = StableDiffusionEncoder.encode_images, 2

    def stops(self, batch):
        nonlocal left
        if (left := left - 1) < 0:
            raise KeyboardInterrupt
        return encode(self, batch)

    for count in (0, 1, 1, 1, 1):  # batches before the next end
        left = count
        monkeypatch.setattr(StableDiffusionEncoder, "encode_images", stops)
        with pytest.raises(KeyboardInterrupt):
            build(model, data, tmp_path / "shards", encode_batch_size=2)
        assert not (tmp_path / "shards" / BUCKETS).exists()
        monkeypatch.undo()
    build(model, data, tmp_path / "shards")
    ours, whole = contents(tmp_path / "shards"), contents(tmp_path / "whole")
    for found in (ours, whole):
        for name in [name for name in found if name.endswith(INDEX)]:
            found[name]["config"].pop("encode_batch_size")  # type: ignore[union-attr]
    assert ours == whole


def test_what_cannot_be_used_is_refused_and_counted_over_all(model, data, tmp_path, capsys):
    (data / "01.png").write_bytes(b"no image")
    write(data, [(1, 2)], first=7)
    indexes = build(model, data, tmp_path / "shards", max_upscale=10)
    assert records(indexes) == {"12x20": 2, "16x16": 2, "20x12": 2}
    said = capsys.readouterr().err
    assert said.count("refused 2 of") == 1
    assert "refused 2 of 8 samples: 1 image too small (--max_upscale)" in said
    assert "1 unreadable image (01.png" in said
    with pytest.raises(UserError, match=r"--strict: .*01.png"):
        build(model, data, tmp_path / "strict", strict=True)
    for path in data.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="not one of 8 samples can be used: 8 unreadable image"):
        build(model, data, tmp_path / "none")
    assert not (tmp_path / "none" / BUCKETS).exists()
    assert not [*(tmp_path / "none").glob("*x*")]


def test_a_bucket_whose_images_are_all_refused_costs_no_other(model, tmp_path):
    write(tmp_path / "data", [WIDE, WIDE])
    (tmp_path / "data" / "03.png").write_bytes(b"no image")
    (tmp_path / "data" / "03.txt").write_text("x")
    for _ in range(2):
        assert records(build(model, tmp_path / "data", tmp_path / "shards")) == {"20x12": 2}
    stored = Buckets.read(tmp_path / "shards" / BUCKETS)
    assert [(bucket.name, bucket.images, bucket.refused) for bucket in stored.buckets] == [("16x16", 0, 1), ("20x12", 2, 0)]


@pytest.mark.parametrize(
    ("built", "asked", "said"),
    [
        ({}, {"buckets": False, "bucket_step": 64}, "the shards there were built with --buckets; give that too"),
        ({"buckets": False, "bucket_step": 64}, {}, "the shards there were built without --buckets; leave that out"),
        ({}, {"bucket_step": 8}, r"built otherwise \(--bucket_step 4, now 8\); give the same options"),
        ({}, {"buckets": ["16x16"], "bucket_step": 64}, r"built otherwise \(--buckets True, now \['16x16'\]"),
        ({}, {"bucket_step": 3}, "--bucket_step 3: the VAE needs a multiple of 2; the nearest is 4"),
        ({}, {"buckets": ["16x16", "15x33"], "bucket_step": 64}, "--buckets 15x33: the VAE needs a multiple of 2; the"),
    ],
    ids=str,
)  # fmt: skip
def test_other_options_are_refused_by_name(built, asked, said, model, data, tmp_path):
    build(model, data, tmp_path / "shards", **built)
    with pytest.raises(UserError, match=said):
        build(model, data, tmp_path / "shards", **asked)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(format_version=2),
        lambda value: value.update(buckets=[]),
        lambda value: value["buckets"][0].update(width=-16),
        lambda value: value["buckets"][0].update(width="../x"),
        lambda value: value["buckets"].append(value["buckets"][0]),
        lambda value: value.pop("options"),
    ],
)
def test_a_file_that_lies_is_refused_by_name(change, model, data, tmp_path):
    build(model, data, tmp_path / "shards")
    value = json.loads((tmp_path / "shards" / BUCKETS).read_text())
    change(value)
    (tmp_path / "shards" / BUCKETS).write_text(json.dumps(value))
    config = config_of(model, None, tmp_path / "shards", buckets=False)
    with pytest.raises(UserError, match=f"{BUCKETS}: cannot be read: .*; delete it and build again") as error:
        find_parts(config, open_encoding(config), Processes())
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("missing", [404, 403], ids=["listed", "not to be listed"])
def test_the_first_process_finds_buckets_on_storage(missing, model, data, tmp_path):
    indexes = build(model, data, tmp_path / "shards")
    with serving(tmp_path / "shards", missing=missing) as server:
        config = config_of(model, None, Path(), buckets=False).model_copy(update={"shards_dir": server.address})
        encoding, told = open_encoding(config), []
        first = SimpleNamespace(computed_by_first=lambda work: told.append(work()) or told[0])
        found = find_parts(config, encoding, first)
        asked = len(server.asked)
        others = find_parts(config, encoding, SimpleNamespace(computed_by_first=lambda work: told[0]))
        assert len(server.asked) == asked
        assert [part.config.shards_dir for part in found] == [f"{server.address}/{name}" for name in indexes]
    for parts in (found, others):
        assert {part.bucket: part.index.fingerprint for part in parts} == {
            bucket: index.fingerprint for bucket, index in indexes.items()
        }
    with serving(tmp_path, missing=missing) as server, pytest.raises(UserError, match=f"{INDEX}: {missing}"):
        find_parts(config.model_copy(update={"shards_dir": server.address}), encoding, Processes())


@pytest.mark.two_processes
def test_two_processes_build_the_same_as_one(model, data, tmp_path):
    build(model, data, tmp_path / "alone")
    config = config_of(model, data, tmp_path / "shards")
    arguments = [f"--{name}={getattr(config, name)}" for name in ("family", "pretrained_model_name_or_path", "train_data_dir",
                 "shards_dir", "resolution", "bucket_step", "shard_records")]  # fmt: skip
    program = [sys.executable, "-m", "engine.shards", "build", *arguments, "--buckets"]
    both = start_two(program)
    assert codes(both) == [0, 0], [process.errors for process in both]
    assert contents(tmp_path / "shards") == contents(tmp_path / "alone")


def test_sizes_may_be_listed_and_damage_to_what_is_remembered_only_costs_time(model, data, tmp_path):
    config = config_of(model, data, tmp_path / "shards", buckets=["24x16", "16x16", "32x32"], bucket_step=64)
    assert sizes_of(config, open_encoding(config)) == [(16, 16), (32, 32), (24, 16)]
    indexes = build(model, data, tmp_path / "shards", buckets=["24x16", "16x16", "32x32"], bucket_step=64)
    assert records(indexes) == {"16x16": 4, "24x16": 3}
    path = tmp_path / "shards" / SIZES
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    assert not remembered(tmp_path / "shards", np.arange(3, dtype=np.uint64)).any()
    build(model, data, tmp_path / "shards", buckets=["24x16", "16x16", "32x32"], bucket_step=64)
    assert size_named("24x16") == (24, 16)
    assert encode_buckets.in_bucket(config_of(model, None, Path("s3://a/b")).model_copy(update={"shards_dir": "https://h/x?k=1"}),
                              "24x16").shards_dir == "https://h/x/24x16?k=1"  # fmt: skip
