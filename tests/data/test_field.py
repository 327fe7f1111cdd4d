"""What people bring: folders, tables, archives and images as they are in the field, small ones made by the test."""

import csv
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from engine.config.command_line import load
from engine.config.options import CacheConfig
from engine.data.sources import open_source
from engine.data.sources.decode import Decoding, decode, refuse_extreme
from engine.data.sources.interface import Refused
from engine.errors import UserError


def encoded(number: int = 0, kind: str = "PNG", **options) -> bytes:
    """An image whose red tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 90, 200)).save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def opened(place: Path, by: str = "train_data_dir", captioned: bool = True, **options):
    values = {"family": "sd", "pretrained_model_name_or_path": "unused", by: str(place)} | options
    return open_source(load(CacheConfig, values), captioned)


def samples_of(source, captioned: bool = True) -> dict[str, tuple[int, list[str]] | str]:
    """Name -> the number that the image tells and its captions, or why the sample is refused."""
    found: dict[str, tuple[int, list[str]] | str] = {}
    for index in range(len(source)):
        try:
            captions = source.captions(index) if captioned else []
            found[source.name(index)] = (source.decode(source.content(index)).getpixel((0, 0))[0], captions)
        except Refused as why:
            found[source.name(index)] = str(why)
    return found


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(name: str, text="a") -> dict:
    return {"file_name": name, "text": text}


TWO = {"0.png": encoded(0), "1.png": encoded(1)}
BOTH = {"0.png": (0, ["a"]), "1.png": (1, ["b"])}


# 1. A folder is read alike by either option, whatever its files are called.


@pytest.mark.parametrize("by", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize(
    "names", [("train.png", "test.png"), ("test/cat.png", "train/cat.png"), ("a_test_1.png", "eval-2.png")]
)
def test_words_in_names_of_files_are_no_splits(names, by, tmp_path):
    write(tmp_path, {names[0]: encoded(0), names[1]: encoded(1), "metadata.jsonl": jsonl(row(names[0]), row(names[1], "b"))})
    assert samples_of(opened(tmp_path, by)) == {names[0]: (0, ["a"]), names[1]: (1, ["b"])}
    assert opened(tmp_path, by).identity() == opened(tmp_path).identity()


def test_folders_that_look_like_splits_are_said(tmp_path, capsys):
    write(tmp_path, {"train/0.png": encoded(), "test/0.png": encoded(), "train/0.txt": "a", "test/0.txt": "b"})
    assert len(opened(tmp_path)) == 2
    assert "test is trained on too; give the folder train to leave it out" in capsys.readouterr().err


def test_the_name_of_the_librarys_reader_means_the_folder(tmp_path):
    write(tmp_path, TWO | {"metadata.jsonl": jsonl(row("0.png"), row("1.png", "b"))})
    assert samples_of(opened(tmp_path, dataset_name="imagefolder")) == BOTH


# 2. Metadata that is not needed does not cost the image.


def png_with(*chunks: tuple[bytes, bytes], at_the_end: bool = False) -> bytes:
    data, place = encoded(7), -12 if at_the_end else 33
    packed = b"".join(struct.pack(">I", len(body)) + kind + body + b"\0\0\0\0" for kind, body in chunks)
    return data[:place] + packed + data[place:]


def jpeg_with(marker: int, body: bytes) -> bytes:
    data = encoded(7, "JPEG", quality=100, subsampling=0)
    return data[:2] + struct.pack(">BBH", 255, marker, len(body) + 2) + body + data[2:]


@pytest.mark.parametrize(
    "data",
    [
        png_with((b"zTXt", b"x\0\0" + zlib.compress(b"a" * 5_000_000))),
        png_with((b"iTXt", b"x\0\1\0\0\0" + zlib.compress(b"a" * 5_000_000)), at_the_end=True),
        png_with((b"iCCP", b"x\0\0" + zlib.compress(b"a" * 5_000_000))),
        png_with((b"tEXt", b"x\0" + b"a" * 1_000_000), *[(b"zTXt", b"x\0\0" + zlib.compress(b"b" * 900_000))] * 80),
        png_with((b"gAMA", b""), (b"pHYs", b"1"), (b"cHRM", b"123")),
        jpeg_with(0xE0, b"JFIF\0"),
        jpeg_with(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 90),
        jpeg_with(0xE2, b"ICC_PROFILE\0\x09\x01" + b"\0" * 40),
        jpeg_with(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0" + b"\xff" * 60),
        jpeg_with(0xED, b"Photoshop 3.0\x008BIM\x03\xed" + b"\xff" * 3),
    ],
)
def test_broken_metadata_do_not_cost_the_image(data):
    image = decode(io.BytesIO(data))
    assert image.size == (6, 4)
    assert np.abs(np.asarray(image).astype(int) - [7, 90, 200]).max() < 4


def tiff_with(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """A TIFF of 6 x 4 pixels that lies on its side, with one more tag."""
    fields = {
        256: (3, 1, b"\6\0\0\0"), 257: (3, 1, b"\4\0\0\0"), 258: (3, 3, struct.pack("<I", 8)), 262: (3, 1, b"\2\0\0\0"),
        273: (4, 1, struct.pack("<I", 14)), 274: (3, 1, b"\6\0\0\0"), 277: (3, 1, b"\3\0\0\0"), 278: (3, 1, b"\4\0\0\0"),
        279: (4, 1, struct.pack("<I", 72)), tag: (kind, count, value),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHI", name, *field[:2]) + field[2] for name, field in sorted(fields.items()))
    data = b"\x08\0" * 3 + bytes([7, 90, 200]) * 24
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(fields)) + entries + b"\0\0\0\0"


@pytest.mark.parametrize("tag", [270, 271, 282, 700, 34665, 34675])
@pytest.mark.parametrize(("kind", "count", "value"), [(3, 1, b"\3\0\0\0"), (9, 1, b"\xff" * 4), (2, 100_000, b"\x10\0\0\0")])
def test_tags_of_a_tiff_do_not_cost_it(tag, kind, count, value):
    image = decode(io.BytesIO(tiff_with(tag, kind, count, value)))
    assert (image.size, image.getpixel((0, 0))) == ((4, 6), (7, 90, 200))


@pytest.mark.parametrize("broken", [b"\xff\xff\xff\xff", b"\0\0\0\x7f"])
def test_a_broken_chunk_does_not_cost_a_webp(broken):
    data = encoded(7, "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", xmp=b"<x/>")
    place = data.index(b"EXIF") + 4
    assert decode(io.BytesIO(data[:place] + broken + data[place + 4 :])).getpixel((0, 0)) == (7, 90, 200)


@pytest.mark.parametrize("tag", [0x010E, 0x0131, 0x8769, 0x9286, 0xA005])
@pytest.mark.parametrize("value", [b"\3\0\1\0\0\0\7\0\0\0", b"\2\0\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0c\0\1\0\0\0\1\0\0\0"])
def test_tags_of_the_wrong_kind_leave_the_orientation(tag, value):
    tags = struct.pack("<HHHIHHHH", 2, 0x0112, 3, 1, 6, 0, tag, 0)[:-2] + value
    image = decode(io.BytesIO(jpeg_with(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + tags + b"\0\0\0\0")))
    assert image.size == (4, 6)


@pytest.mark.parametrize("kind", [b"\1\0\1\0\0\0", b"\3\0\1\0\0\0", b"\4\0\1\0\0\0", b"\2\0\2\0\0\0", b"\x0b\0\1\0\0\0"])
@pytest.mark.parametrize("value", [b"\6\0\0\0", b"6\0\0\0", b"up\0\0", b"\xff\xff\xff\xff"])
def test_an_orientation_of_any_kind_is_applied_or_left(kind, value):
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1" + kind + value + b"\0\0\0\0"
    turned = kind[0] in (3, 4) and value[0] == 6
    size = decode(io.BytesIO(jpeg_with(0xE1, exif))).size
    assert size == (4, 6) if turned else size in ((4, 6), (6, 4))


# 3. Sizes that cannot be brought to the resolution.


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 20_000), "too small"), ((20_000, 1), "too small"), ((1, 1), "too small"), ((7, 500), "too small"),
        ((16, 20_000), "too long"), ((40_000, 100), "too long"), ((8, 8), None), ((512, 100_000), None), ((3000, 9), None),
    ],
)  # fmt: skip
def test_what_would_be_scaled_beyond_reason_is_refused(size, reason):
    if reason is None:
        return refuse_extreme(size, (512, 512), 64)
    with pytest.raises(Refused, match=f"image {reason}.*{size[0]} x {size[1]}"):
        refuse_extreme(size, (512, 512), 64)
    return None


# 4. Which files are images.


def test_hidden_files_are_no_samples_and_whatever_pillow_opens_is(tmp_path):
    hidden = ["._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/._0.png", ".thumbnails/x.jpg", "@eaDir/0.png"]
    files = dict.fromkeys(hidden, encoded()) | {"Thumbs.db": b"x", ".DS_Store": b"x", "notes.docx": b"x"}
    kinds = {
        "a.avif": "AVIF",
        "b.jfif": "JPEG",
        "c.JPE": "JPEG",
        "d.tga": "TGA",
        "e.ico": "ICO",
        "f.apng": "PNG",
        "g.jp2": "JPEG2000",
    }
    sizes = {"ICO": {"sizes": [(6, 4)]}}  # before 13, Pillow writes none below 16 pixels by itself
    files |= {name: encoded(0, kind, **sizes.get(kind, {})) for name, kind in kinds.items()}
    found = samples_of(opened(write(tmp_path, files), captioned=False), captioned=False)
    assert set(found) == set(kinds)
    assert not {name: why for name, why in found.items() if isinstance(why, str)}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic" + b"\0" * 40, "unreadable image without pillow-heif; install the extra `images`"),
        ("a.jpg", b"\0\0\0\x18ftypmif1" + b"\0" * 40, "without pillow-heif"),
        ("a.jxl", b"\xff\x0a" + b"\0" * 40, "without pillow-jxl-plugin"),
        ("a.svg", b"<svg xmlns='x'/>", "a drawing"),
        ("a.jpg", b"<!DOCTYPE html><html>404</html>", "a web page"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.cr2", b"II*\0raw", "unreadable image"),
        ("a.webp", b"RIFF", "nothing that Pillow opens"),
        ("a.png", b"", "an empty file"),
    ],
)
def test_what_looks_like_an_image_and_is_none_is_listed(name, content, reason, tmp_path):
    found = samples_of(opened(write(tmp_path, {name: content, "z.png": encoded()}), captioned=False), captioned=False)
    assert reason in found[name]
    assert found["z.png"][0] == 0


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(write(tmp_path, {"0.png": encoded()}) / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    found = samples_of(opened(tmp_path, captioned=False), captioned=False)
    assert found["pipe.png"] == "not a regular file"
    assert isinstance(found["loop.png"], str)


# 5. Depth, transparency, frames.


def test_deep_greys_are_white_as_in_the_script_or_scaled(tmp_path):
    values = (np.arange(24, dtype=np.uint16) * 2700).reshape(4, 6)
    for kind, mode in (("a.png", np.uint16), ("b.tif", np.uint16), ("c.tif", np.float32), ("d.tif", np.int32)):
        Image.fromarray((values / 65535).astype(mode) if mode is np.float32 else values.astype(mode)).save(tmp_path / kind)
    for kind in ("a.png", "b.tif", "d.tif"):
        script, scaled = Decoding(), Decoding("scaled")
        assert np.asarray(decode(tmp_path / kind, script))[0, 1].tolist() == [255] * 3
        assert np.abs(np.asarray(decode(tmp_path / kind, scaled))[..., 0] - values / 257).max() <= 0.5
        assert [*script.noticed, *scaled.noticed] == [
            "more than 8 bits per pixel, white above 255 as in the scripts (--image_mode scaled scales them)",
            "more than 8 bits per pixel, scaled to 8",
        ]
    assert np.abs(np.asarray(decode(tmp_path / "c.tif", Decoding("scaled")))[..., 0] - values / 257).max() <= 0.51


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_hidden_colours_or_a_background(mode):
    image = Image.new("RGBA", (4, 4), (50, 50, 50, 0))
    image.putpixel((1, 0), (50, 50, 50, 255))
    buffer = io.BytesIO()
    (image.quantize(4, Image.Quantize.FASTOCTREE) if mode == "P" else image.convert(mode)).save(buffer, "PNG")
    hidden, laid = Decoding(), Decoding(background=(255, 0, 0))
    assert decode(buffer, hidden).getpixel((1, 0)) == (50, 50, 50)
    assert decode(buffer, laid).getpixel((0, 0)) == (255, 0, 0)
    assert abs(decode(buffer, laid).getpixel((1, 0))[0] - 50) < 3
    assert list(hidden.noticed) == [
        "transparent, with the colours hidden there showing as in the scripts (--background lays them on one)"
    ]
    assert laid.noticed["transparent, laid on --background"] == 2


def test_what_is_decided_is_noticed_and_what_is_plain_is_not(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("CMYK", (4, 4)).save(tmp_path / "c.jpg")
    Image.new("RGBA", (4, 4), "red").save(tmp_path / "opaque.png")
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    source = opened(tmp_path, captioned=False)
    found = samples_of(source, captioned=False)
    assert [found[f"a.{kind}"][0] for kind in ("gif", "webp", "png", "tif")] == [255] * 4
    assert source.noticed == {
        "several frames or pages, of which the first is taken": 4, "CMYK, converted without a colour profile": 1
    }  # fmt: skip


@pytest.mark.parametrize("value", ["red", "1,2", "1,2,256", "1,2,x", ""])
def test_backgrounds_that_mean_nothing_are_named(value, tmp_path):
    with pytest.raises(UserError, match="--background .*give none, white, black or R,G,B"):
        opened(tmp_path, background=value)


# 6. Tables as people write them.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text\n0.png,a\n1.png,b\n"),
        ("metadata.csv", "\ufefffile_name,text\r\n0.png,a\r\n\r\n1.png,b\r\n"),
        ("metadata.csv", "file_name;text\n0.png;a\n1.png;b\n"),
        ("metadata.csv", "sep=;\nfile_name;text\n0.png;a\n1.png;b\n"),
        ("metadata.csv", "file_name\ttext\n0.png\ta\n1.png\tb\n"),
        ("metadata.csv", 'file_name, text\n0.png, "a"\n1.png, b\n'),
        ("metadata.csv", '"file_name" , "text"\n"0.png" ,a\n1.png ,b\n'),
        ("metadata.csv", "id,text,file_name\n7,a,0.png\n8,b,1.png,,\n"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n\n{"file_name": "1.png", "text": "b"}'),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a"},\n{"file_name": "1.png", "text": "b"},\n'),
        ("metadata.jsonl", '[{"file_name": "0.png", "text": "a"},\n{"file_name": "1.png", "text": "b"}]'),
        ("metadata.jsonl", '{\n "file_name": "0.png",\n "text": "a"\n}\n{"file_name": "1.png", "text": ["b"]}'),
        ("captions.json", '{"0.png": {"text": "a"}, "1.png": {"text": "b"}}'),
        ("train.tsv", "file_name\ttext\n0.png\ta\n1.png\tb\n"),
        ("list.csv", "image,text\n0.png,a\n./1.png,b\n"),
    ],
)
def test_tables_are_read_as_people_write_them(name, text, tmp_path):
    assert samples_of(opened(write(tmp_path, TWO | {name: text}))) == BOTH
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / name).write_bytes(text.removeprefix("\ufeff").encode(encoding))
        assert samples_of(opened(tmp_path)) == BOTH


@pytest.mark.parametrize(
    ("kind", "text", "named", "reason"),
    [
        ("csv", b"file_name,text\n0.png,a\n1.png,caf\xe9\n", "1.png", "metadata.csv line 3: byte 0xe9, number 4"),
        ("csv", b"file_name,text\n0.png,a\n1.png,\xff\xfex\n", "1.png", "--metadata_encoding cp1252"),
        ("csv", b'file_name,text\n1.png,"open\n0.png,a\n', "line 2", "has an open quote"),
        ("csv", b'file_name,text\n1.png,"open\n0.png,"a"\n', "line 2", "has an open quote"),
        ("csv", b"file_name,text\n,x\n0.png,a\n", "line 2", "has no file name"),
        ("csv", b"file_name,text\n1.png\n0.png,a\n", "1.png", "no caption"),
        ("jsonl", b'{"file_name": "1.png", "text": "x"\n{"file_name": "0.png", "text": "a"}', "line 1", "not valid JSON"),
        ("jsonl", b"{'file_name': '1.png'}\n{\"file_name\": \"0.png\", \"text\": \"a\"}", "line 1", "not valid JSON"),
        ("jsonl", b'{"file_name": "1.png", "text": "\xe9"}\n{"file_name": "0.png", "text": "a"}', "1.png", "line 1: byte 0xe9"),
        ("jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "\\ud83d"}', "1.png", "broken char"),
        ("jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name": 5}\n{"file_name": {}}\n', "5", "has no column 'text'"),
        ("jsonl", b'{"file_name": "0.png", "text": "a"}\n7\n', "line 2", "not a JSON object"),
        ("jsonl", b'{"file_name": "0.png", "text": "a"}\n{"text": "b"}\n', "line 2", "has no file_name"),
        ("jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"}\n', "1.png", "has no column 'text'"),
        ("jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": NaN}\n', "1.png", "neither text"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_refusal(kind, text, named, reason, tmp_path):
    found = samples_of(opened(write(tmp_path, TWO | {f"metadata.{kind}": text})))
    assert found["0.png"] == (0, ["a"])
    assert reason in found[f"metadata.{kind} {named}" if named.startswith("line") else named]


def test_other_encodings_are_read_when_they_are_named(tmp_path):
    write(tmp_path, TWO | {"metadata.csv": "file_name,text\n0.png,café\n1.png,“b”\n".encode("cp1252")})
    assert samples_of(opened(tmp_path, metadata_encoding="cp1252")) == {"0.png": (0, ["café"]), "1.png": (1, ["“b”"])}
    (tmp_path / "metadata.csv").write_bytes("file_name,text\n0.png,café\n1.png,“b”\n".encode("utf-16-le"))
    assert samples_of(opened(tmp_path, metadata_encoding="utf-16-le"))["0.png"] == (0, ["café"])
    with pytest.raises(UserError, match="metadata.csv: not utf-8 text; give --metadata_encoding utf-16-le"):
        opened(tmp_path)
    with pytest.raises(UserError, match="--metadata_encoding klingon: unknown"):
        opened(tmp_path, metadata_encoding="klingon")


def test_long_fields_and_lines_within_quotes_are_whole(tmp_path):
    captions = ["x" * 300_000, 'two\nlines, a "quote"']
    with (write(tmp_path, TWO) / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["0.png", captions[0]], ["1.png", captions[1]]])
    assert [captions for _, captions in samples_of(opened(tmp_path)).values()] == [[caption] for caption in captions]


def test_what_is_dropped_or_read_twice_is_said(tmp_path, capsys):
    write(tmp_path, TWO | {"metadata.csv": "file_name,text\n0.png,a cat, sitting\n", "metadata.jsonl": jsonl(row("0.png"))})
    assert len(opened(tmp_path)) == 3
    said = capsys.readouterr().err
    assert "metadata.csv: 1 rows have more cells than the header, and lose what is in them (first: line 2)" in said
    assert "1 rows name an image that another row names too (metadata.csv, metadata.jsonl)" in said


# 7. Paths.


@pytest.mark.parametrize("by", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("file", ["train.jsonl", "lists/train.csv"])
def test_paths_in_a_table_are_relative_to_it(file, by, tmp_path, monkeypatch):
    folder = Path(file).parent
    text = jsonl({"image": "images/0.png", "text": "a"}, {"image": "images/1.png", "text": "b"})
    if file.endswith("csv"):
        text = "image,text\nimages/0.png,a\nimages/1.png,b\n"
    write(tmp_path / "data", {file: text, f"{folder}/images/0.png": encoded(0), f"{folder}/images/1.png": encoded(1)})
    monkeypatch.chdir(tmp_path)
    assert list(samples_of(opened(tmp_path / "data" / file, by)).values()) == list(BOTH.values())
    assert list(samples_of(opened(Path("data") / folder, by)).values()) == list(BOTH.values())


@pytest.mark.parametrize("address", ["https://x.org/a.png", "s3://bucket/a.png", "data:image/png;base64,AAAA"])
def test_addresses_are_refused_as_such(address, tmp_path):
    table = [{"image": address, "text": "a"}, {"image": "0.png", "text": "a"}]
    write(tmp_path, TWO | {"train.jsonl": jsonl(*table)})
    assert samples_of(opened(tmp_path / "train.jsonl", "dataset_name"))[address].startswith("an address, not a file")
    pyarrow.parquet.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    rows = samples_of(opened(tmp_path / "p.parquet", "dataset_name", cache_dir=str(tmp_path / "cache")))
    assert rows["row 0"].startswith("an address, not a file")
    assert rows["row 1"] == (0, ["a"])


def test_names_written_elsewhere_are_found_or_their_like_is_named(tmp_path):
    files = {"images/é.png": encoded(3), "images/b c.png": encoded(4), "images/D.PNG": encoded(5), "x/e.jpg": encoded(6)}
    written = ["images\\é.png", "images/e\u0301.png", "images/b%20c.png", "images/d.png", "images/e.jpg", "x/e.png", "no.png"]
    write(tmp_path, files | {"metadata.jsonl": jsonl(*map(row, written))})
    source = opened(tmp_path)
    reasons = [samples_of(source)[source.name(index)] for index in range(7)]
    assert reasons[:2] == [(3, ["a"])] * 2
    close = ["images/b c.png", "images/D.PNG", "x/e.jpg", "x/e.jpg"]
    for reason, wanted, match in zip(reasons[2:], written[2:], [*close, None], strict=True):
        assert reason == f"no such image file: {wanted!r} was looked for" + (f"; {match!r} is there" if match else "")


def test_what_is_missing_is_known_without_reading(tmp_path):
    write(tmp_path / "other", TWO)
    rows = [row("img/0.png"), row("link/1.png"), row("https://x/1.png"), row("0.png"), row("x" * 5000)]
    write(tmp_path / "data", {"metadata.jsonl": jsonl(*rows), "0.png": encoded()})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "other")
    source = opened(tmp_path / "data")
    known = [str(source.refusal(index)) for index in range(len(source))]
    for said, expected in zip(known, ["no such image", "path leaves", "an address", "None", "not a path"], strict=True):
        assert said.startswith(expected)


def test_names_that_are_no_text_are_listed(tmp_path):
    (tmp_path / "data").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/caf\xe9.png")).write_bytes(b"x")
    assert "unreadable" in samples_of(opened(tmp_path / "data", captioned=False), captioned=False)["caf\udce9.png"]


def test_links_are_followed_when_that_is_asked_for(tmp_path, capsys):
    write(tmp_path / "other", {"0.png": encoded(0), "deep/1.png": encoded(1)})
    write(tmp_path / "data", {"metadata.jsonl": jsonl(row("0.png"), row("deep/1.png", "b"), row("../other/0.png"))})
    (tmp_path / "data" / "0.png").symlink_to(tmp_path / "other" / "0.png")
    (tmp_path / "data" / "deep").symlink_to(tmp_path / "other" / "deep")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    found = samples_of(opened(tmp_path / "data"))
    assert "--follow_links follows links" in found["0.png"]
    assert "links to folders are not followed without --follow_links: " in capsys.readouterr().err
    followed = samples_of(opened(tmp_path / "data", follow_links=True))
    assert (followed["0.png"], followed["deep/1.png"]) == ((0, ["a"]), (1, ["b"]))
    assert followed["../other/0.png"].startswith("path leaves the folder")
    assert len(followed) == 3


# 8. Archives and other forms.


def tar(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("by", ["train_data_dir", "dataset_name"])
def test_archives_are_read_in_place(by, tmp_path):
    beside = {"0.png": encoded(0), "0.txt": "a", "1.webp": encoded(1, "WEBP", lossless=True), "1.txt": "b", "1.json": "{}"}
    expected = [(0, ["a"]), (1, ["b"])]
    assert list(samples_of(opened(tar(tmp_path / "x.tar", beside), by)).values()) == expected
    assert list(samples_of(opened(zipped(tmp_path / "x.zip", beside), by)).values()) == expected
    tar(tmp_path / "tars" / "00000.tar", {"0.png": encoded(0), "0.json": '{"text": "a"}'})
    tar(tmp_path / "tars" / "00001.tar", {"0.png": encoded(1), "0.json": '{"caption": "b"}'})
    assert samples_of(opened(tmp_path / "tars", by)) == {"00000.tar/0.png": (0, ["a"]), "00001.tar/0.png": (1, ["b"])}
    with_table = {
        "img/0.png": encoded(0),
        "img/1.png": encoded(1),
        "img/metadata.jsonl": jsonl(row("0.png"), row("1.png", "b")),
    }
    assert list(samples_of(opened(zipped(tmp_path / "t.zip", with_table), by)).values()) == expected


@pytest.mark.parametrize("named", ["{}.png", "images/{}.png"])
@pytest.mark.parametrize("inside", ["{}.png", "images/{}.png"])
def test_a_zip_beside_the_metadata_holds_its_images(named, inside, tmp_path):
    zipped(tmp_path / "images.zip", {inside.format(number): encoded(number) for number in (0, 1)})
    write(tmp_path, {"metadata.jsonl": jsonl(row(named.format(0)), row(named.format(1), "b"))})
    assert list(samples_of(opened(tmp_path)).values()) == list(BOTH.values())


def test_an_archive_that_is_not_needed_changes_nothing(tmp_path, capsys):
    write(tmp_path, TWO | {"metadata.jsonl": jsonl(row("0.png"), row("1.png", "b"), row("2.png"))})
    before = opened(tmp_path).identity()
    zipped(tmp_path / "copy.zip", {f"x/{name}": content for name, content in TWO.items()})
    write(tmp_path, {"broken.zip": b"PK"})
    assert opened(tmp_path).identity() == before
    assert list(samples_of(opened(tmp_path))) == ["0.png", "1.png", "2.png"]
    assert "left out: " in capsys.readouterr().err


def test_broken_archives_are_read_as_far_as_they_go_or_named(tmp_path, capsys):
    whole = tar(
        tmp_path / "x.tar", {f"{n}.{kind}": encoded(n) if kind == "png" else "a" for n in range(9) for kind in ("png", "txt")}
    )
    whole.write_bytes(whole.read_bytes()[:5000])
    assert len(opened(whole)) >= 2
    assert "ends early" in capsys.readouterr().err
    write(tmp_path, {"bad.zip": b"PK\3\4 not", "x.tar.gz": b"\x1f\x8b", "empty/notes.md": b""})
    for name, said in (("bad.zip", "not a readable archive"), ("x.tar.gz", "unpack them"), ("empty", "no images, no tables")):
        with pytest.raises(UserError, match=said):
            opened(tmp_path / name, "dataset_name")


def test_text_files_beside_images_are_their_captions(tmp_path, capsys):
    files = {
        "0.png": encoded(0),
        "0.txt": "\ufeffa\n",
        "10_cat/1.webp": encoded(1, "WEBP", lossless=True),
        "10_cat/1.txt": "b\n\nc\n",
    }
    files |= {"2.png": encoded(2), "3.png": encoded(3), "3.txt": " \n", "4.png": encoded(4), "4.txt": b"\xe9"}
    files |= {"5.png": encoded(5), "5.txt": "é\r\n".encode("utf-16")}
    files |= {"6.png": encoded(6), "6.png.txt": "six", "7.txt": "alone"}
    found = samples_of(opened(write(tmp_path, files)))
    assert {name: found[name] for name in ("0.png", "10_cat/1.webp")} == {"0.png": (0, ["a"]), "10_cat/1.webp": (1, ["b", "c"])}
    assert (found["5.png"], found["6.png"]) == ((5, ["é"]), (6, ["six"]))
    assert (found["2.png"], found["3.png"]) == ("no caption", "empty caption")
    assert "caption file is not utf-8 text: 4.txt: byte 0xe9" in found["4.png"]
    said = capsys.readouterr().err
    assert "1 caption files have several lines" in said
    assert "caption files without an image are left out: 7.txt" in said
    assert "numbers of repeats in names of folders are not applied (10_cat, ...); give each" in said
    assert "a [[data]] table with `repeats`" in said
    before = opened(tmp_path).identity()
    (tmp_path / "0.txt").write_text("other")
    assert opened(tmp_path).identity() != before


@pytest.mark.parametrize("by", ["train_data_dir", "dataset_name"])
def test_forms_of_the_library_open_by_either_option(by, tmp_path):
    images = [{"bytes": encoded(0), "path": None}, {"bytes": encoded(1), "path": None}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": images, "text": ["a", "b"]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    plain = {"bytes": [image["bytes"] for image in images], "structs": images, "paths": ["images/0.png", "images/1.png"]}
    for name, values in plain.items():
        write(tmp_path / name, {f"images/{number}.png": encoded(number) for number in (0, 1)} if name == "paths" else {})
        (tmp_path / name).mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pa.table({"image": values, "text": ["a", "b"]}), tmp_path / name / "train.parquet")
    for name in ("saved", "splits", *plain, "paths/train.parquet"):
        source = opened(tmp_path / name, by, cache_dir=str(tmp_path / "cache"))
        assert samples_of(source) == {"row 0": (0, ["a"]), "row 1": (1, ["b"])}, name


def test_several_tables_are_not_guessed_among(tmp_path):
    write(tmp_path, TWO | {"a.csv": "file_name,text\n0.png,a\n", "b.csv": "file_name,text\n0.png,a\n"})
    with pytest.raises(UserError, match=r"several tables there \(a.csv, b.csv\); name one"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/data.csv", "a/b/c"])
def test_paths_that_are_not_there_are_no_names_on_the_hub(name, tmp_path):
    from engine.config.checks import check_machine

    config = load(CacheConfig, {"family": "sd", "pretrained_model_name_or_path": str(tmp_path), "dataset_name": name})
    with pytest.raises(UserError, match=f"--dataset_name {name}: no such directory or file"):
        check_machine(config)
