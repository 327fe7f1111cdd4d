"""Sources: image folders and data sets, and a reason for every sample that cannot be used."""

import io
import json
import struct
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from engine.config.options import CacheConfig
from engine.data.identity import recipe_of
from engine.data.sources import open_source
from engine.data.sources.decode import clean_captions
from engine.data.sources.image_folder import ImageFolder
from engine.data.sources.interface import Refused
from engine.data.sources.subset import Subset
from engine.errors import UserError
from engine.files import digest, digest_of


def png(color=(10, 200, 30), size=(6, 4), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """The header of a PNG of 400 megapixels, without the pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


def folder(directory, rows, files, name="metadata.jsonl"):
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(content)
    if name.endswith("jsonl"):
        (directory / name).write_text("\n".join(json.dumps(row) for row in rows))
    else:
        columns = list(rows[0])
        lines = [",".join(columns), *(",".join(str(row[column]) for column in columns) for row in rows)]
        (directory / name).write_text("\n".join(lines))
    return directory


def reason(source, index: int) -> str:
    try:
        source.captions(index)
        source.decode(source.content(index))
    except Refused as refused:
        return str(refused)
    pytest.fail(f"{source.name(index)} was not refused")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_gives_images_and_captions(name, tmp_path):
    rows = [{"file_name": "a.png", "text": "an apple"}, {"file_name": "deep/b.png", "text": "a bear"}]
    source = ImageFolder(folder(tmp_path, rows, {"a.png": png(), "deep/b.png": png((1, 2, 3))}, name), "image", "text")
    assert [source.captions(i) for i in range(2)] == [["an apple"], ["a bear"]]
    assert source.decode(source.content(1)).getpixel((0, 0)) == (1, 2, 3)
    assert [source.name(i) for i in range(2)] == ["a.png", "deep/b.png"]


def test_metadata_in_subfolders_is_relative_to_itself(tmp_path):
    folder(tmp_path / "one", [{"file_name": "x.png", "text": "one"}], {"x.png": png()})
    folder(tmp_path / "two", [{"file_name": "x.png", "text": "two"}], {"x.png": png()})
    source = ImageFolder(tmp_path, "image", "text")
    assert [(source.name(i), source.captions(i)) for i in range(2)] == [("one/x.png", ["one"]), ("two/x.png", ["two"])]


def test_captions_may_be_lists_and_their_empty_ones_are_left_out(tmp_path):
    rows = [{"file_name": "a.png", "caption": ["one", " ", "two"]}]
    assert ImageFolder(folder(tmp_path, rows, {"a.png": png()}), "image", "caption").captions(0) == ["one", "two"]


def test_every_bad_sample_has_its_reason(tmp_path):
    whole = png(size=(64, 64))
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    outside = tmp_path / "outside.png"
    outside.write_bytes(whole)
    cases = {
        "broken.png": (b"not an image", "a", "unreadable image"),
        "short.png": (whole[: len(whole) // 2], "a", "unreadable image"),
        "short.jpg": (jpeg.getvalue()[:-300], "a", "unreadable image"),
        "zero.png": (b"", "a", "unreadable image"),
        "bomb.png": (bomb(), "a", "too large to decode safely"),
        "missing.png": (None, "a", "no such image file"),
        "empty.png": (whole, "  ", "empty caption"),
        "none.png": (whole, None, "no caption"),
        "number.png": (whole, 7, "neither text nor a list"),
        "mixed.png": (whole, ["a", 7], "neither text nor a list"),
        "../outside.png": (None, "a", "leaves the folder"),
        "link.png": (None, "a", "leaves the folder"),
    }
    rows = [{"file_name": name, "text": caption} for name, (_, caption, _) in cases.items()]
    files = {name: content for name, (content, _, _) in cases.items() if content is not None}
    directory = folder(tmp_path / "train", rows, files | {"unlisted.png": whole})
    (directory / "link.png").symlink_to(outside)
    source = ImageFolder(directory, "image", "text")
    assert len(source) == len(cases) + 1
    for index, (_, _, expected) in enumerate(cases.values()):
        assert expected in reason(source, index)
    assert source.name(len(cases)) == "unlisted.png"
    assert reason(source, len(cases)) == "no caption"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"text": "a"}', r"metadata.jsonl: line 1 has no file_name"),
        ('{"file_name": "a.png", "caption": "a"}', r"metadata.jsonl: line 1 has no column 'text' \(others: caption\)"),
        ('{"file_name": "a.png", ', r"metadata.jsonl: line 1 is not valid JSON"),
        ("[1]", r"metadata.jsonl: line 1 is not a JSON object"),
    ],
)
def test_mistakes_in_the_metadata_are_named(line, named, tmp_path):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match=named):
        ImageFolder(tmp_path, "image", "text")


def test_a_folder_without_metadata_says_how_to_write_it(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(UserError, match="no metadata.jsonl or metadata.csv there; write one"):
        ImageFolder(tmp_path, "image", "text")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    name = "a.jpg" if mode == "CMYK" else "a.png"
    source = ImageFolder(folder(tmp_path, [{"file_name": name, "text": "a"}], {}), "image", "text")
    assert source.decode(source.content(0)).mode == "RGB"
    assert source.decode(source.content(0)).getpixel((0, 0)) == (255, 255, 255)


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    buffer = io.BytesIO()
    Image.new("RGB", (8, 2)).save(buffer, "JPEG", exif=exif)
    source = ImageFolder(folder(tmp_path, [{"file_name": "a.jpg", "text": "a"}], {"a.jpg": buffer.getvalue()}), "image", "text")
    assert source.decode(source.content(0)).size == (2, 8)


def test_the_identity_follows_the_content(tmp_path):
    directory = folder(tmp_path, [{"file_name": "a.png", "text": "a"}], {"a.png": png()})
    before = ImageFolder(directory, "image", "text").identity()
    assert ImageFolder(directory, "image", "text").identity() == before
    (directory / "a.png").write_bytes(png((0, 0, 0), size=(9, 9)))
    assert ImageFolder(directory, "image", "text").identity() != before


def test_shards_of_a_folder_built_before_are_those_of_it_now(tmp_path):
    rows = [{"file_name": name, "text": "a"} for name in ("a-b/x.png", "a/y.png", "gone.png")]
    directory = folder(
        tmp_path / "f", rows, {name: png() for name in ("a/y.png", "a-b/x.png", "a/z.png", "a-b/w.jpg", "b.gif")}
    )
    names = ["a-b/x.png", "a/y.png", "gone.png", "a/z.png", "a-b/w.jpg", "b.gif"]
    stats = [(directory / name).stat() if name != "gone.png" else None for name in names]
    files = [[name, stat and stat.st_size, stat and stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]
    identity = {"kind": "image folder", "metadata": {"metadata.jsonl": digest(directory / "metadata.jsonl")}}
    assert ImageFolder(directory, "image", "text").identity() == identity | {"files": digest_of(files)}
    config = options(train_data_dir=str(directory))
    assert set(recipe_of(config, encoding_of_nothing())) == {
        "family", "models", "preprocessing", "precision", "caption_column", "shard_records"
    }  # fmt: skip
    changed = options(train_data_dir=str(directory), background="white", max_upscale=2)
    assert recipe_of(changed, encoding_of_nothing())["background"] == "white"


def encoding_of_nothing() -> SimpleNamespace:
    return SimpleNamespace(encoder_identity=dict, preprocessing_identity=dict, captioned=True)


def options(**values) -> CacheConfig:
    return CacheConfig(family="sd", pretrained_model_name_or_path="unused", **values)


def write_parquet(path, struct_images: bool) -> None:
    """Two good rows and one broken one, with the library's image type or as plain structs."""
    images = [{"bytes": png((9, 9, 9)), "path": None}, {"bytes": png(), "path": None}, {"bytes": b"broken", "path": None}]
    texts = ["a", "b", "c"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if struct_images:
        pyarrow.parquet.write_table(pa.table({"image": images, "text": texts}), path)
    else:
        features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
        rows = datasets.Dataset.from_dict({"image": images, "text": texts}, features=features)
        rows.cast_column("image", datasets.Image()).to_parquet(str(path))


@pytest.mark.parametrize("struct_images", [True, False], ids=["structs", "images"])
@pytest.mark.parametrize("single_file", [True, False], ids=["file", "folder"])
def test_local_parquet_opens(struct_images, single_file, tmp_path):
    file = tmp_path / "data" / "train.parquet"
    write_parquet(file, struct_images)
    name = str(file if single_file else file.parent)
    source = open_source(options(dataset_name=name, cache_dir=str(tmp_path / "cache")))
    assert len(source) == 3
    assert source.captions(1) == ["b"]
    assert source.decode(source.content(0)).getpixel((0, 0)) == (9, 9, 9)
    assert "unreadable image" in reason(source, 2)
    assert source.identity()["rows"] == 3


def test_a_path_out_of_the_data_set_is_refused(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    pyarrow.parquet.write_table(pa.table({"image": [{"bytes": None, "path": str(secret)}], "text": ["a"]}), file)
    source = open_source(options(dataset_name=str(file.parent), cache_dir=str(tmp_path / "cache")))
    assert reason(source, 0) == "path leaves the data set"


@pytest.mark.parametrize(("flag", "column"), [("image_column", "picture"), ("caption_column", "caption")])
def test_a_wrong_column_is_named_with_those_that_exist(flag, column, tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", True)
    with pytest.raises(UserError, match=f"--{flag} {column}: not a column.*it has image, text"):
        open_source(options(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), **{flag: column}))


def test_a_data_set_without_training_rows_is_refused(tmp_path):
    write_parquet(tmp_path / "data" / "test.parquet", True)
    with pytest.raises(UserError, match="has no split `train`"):
        open_source(options(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")))


def test_max_train_samples_takes_the_samples_that_the_script_takes(tmp_path):
    rows = [{"file_name": f"{number}.png", "text": f"caption {number}"} for number in range(10)]
    directory = folder(tmp_path / "train", rows, {f"{number}.png": png() for number in range(10)})
    source = open_source(options(train_data_dir=str(directory), max_train_samples=4, seed=3))
    assert isinstance(source, Subset)
    plain = datasets.Dataset.from_dict({"text": [row["text"] for row in rows]}).shuffle(seed=3).select(range(4))
    assert [source.captions(index)[0] for index in range(4)] == plain["text"]


def test_arrays_of_captions_count_as_lists():
    assert clean_captions(np.array(["a", "b"])) == ["a", "b"]


def test_without_captions_every_image_counts(tmp_path):
    (folder(tmp_path / "plain", [], {"b.png": png(), "a/c.png": png(), "notes.txt": b"x"}) / "metadata.jsonl").unlink()
    config = CacheConfig(family="kandinsky-decoder", train_data_dir=str(tmp_path / "plain"))
    source = open_source(config, captioned=False)
    assert [source.name(index) for index in range(len(source))] == ["a/c.png", "b.png"]
    assert source.decode(source.content(1)).size == (6, 4)
    with pytest.raises(UserError, match="no metadata.jsonl or metadata.csv"):
        open_source(config, captioned=True)


def test_metadata_without_captions_serve_a_family_without_captions(tmp_path):
    folder(tmp_path / "named", [{"file_name": "b.png", "other": "x"}], {"a.png": png(), "b.png": png()})
    config = CacheConfig(family="kandinsky-decoder", train_data_dir=str(tmp_path / "named"))
    assert len(open_source(config, captioned=False)) == 2
    with pytest.raises(UserError, match="has no column 'text'"):
        open_source(config, captioned=True)


def test_a_data_set_without_captions_serves_a_family_without_captions(tmp_path):
    table = pa.table({"image": [{"bytes": png(), "path": None}]})
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    config = CacheConfig(
        family="kandinsky-decoder", dataset_name=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "c")
    )
    source = open_source(config, captioned=False)
    assert len(source) == 1
    assert source.decode(source.content(0)).size == (6, 4)
