"""Data sets from strangers: what is no regular file is not opened, and nothing takes more memory or time than its size."""

import io
import os
import random
import resource
import struct
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from engine.data.sources import open_source, tables
from engine.data.sources.decode import decode
from engine.data.sources.files import Files
from engine.data.sources.interface import Refused, refusing
from engine.data.sources.room import room
from engine.data.sources.tables import read_table
from engine.errors import UserError
from tests.data.test_source import options, png


def opened(place) -> list:
    """Of each sample its captions, or why there is none."""
    source = open_source(options(train_data_dir=str(place)))
    found = []
    for number in range(len(source)):
        try:
            with refusing("unreadable"):
                found.append((source.captions(number), source.decode(source.content(number)).size))
        except Refused as why:
            found.append(str(why))
    return found


@pytest.mark.parametrize("name", ["metadata.jsonl", "0.txt", "0.png", "images.zip", "images.tar", "table.csv", "x.parquet"])
def test_a_pipe_in_the_place_of_any_file_is_not_waited_for(name, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png())
        (tmp_path / f"{number}.txt").write_text("a")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    try:
        found = opened(tmp_path)
    except UserError as error:
        assert "not a regular file" in str(error)  # noqa: PT017 (or it is refused)
    else:
        assert (["a"], (6, 4)) in found


def test_a_caption_behind_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "secret").write_text("a token")
    (tmp_path / "data").mkdir()
    for number in range(2):
        (tmp_path / "data" / f"{number}.png").write_bytes(png())
    (tmp_path / "data" / "0.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "1.txt").write_text("a")
    refused, whole = opened(tmp_path / "data")
    assert "--follow_links follows links" in refused
    assert whole[0] == ["a"]
    followed = open_source(options(train_data_dir=str(tmp_path / "data"), follow_links=True))
    assert followed.captions(0) == ["a token"]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_of_an_archive_gives_what_it_says_and_no_more(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("whole.png", content := png())
        archive.writestr("bomb.png", bytes(0x4123456))
    raw = bytearray((tmp_path / "x.zip").read_bytes())
    size = (0x4123456).to_bytes(4, "little")
    while (place := raw.find(size)) >= 0:  # in both headers
        raw[place : place + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(raw)
    files = Files(tmp_path / "x.zip")
    assert files.read("whole.png") == content
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(zipfile.BadZipFile):
        files.read("bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"file_name": "0.png", "text": ' + "9" * 10_000 + "}", "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"file_name": "0.png", "text": ' + '{"a":' * 5000, "nested too deeply"),
        ('{"file_name": "0.png", "text": "' + "a" * 1_100_000 + '"}', "caption longer than a million characters"),
        ('{"file_name": "\\u0000", "text": "a"}', "no such image"),
        ('{"file_name": ["a"], "text": "a"}', "has no file name"),
    ],
)
def test_a_line_of_metadata_costs_at_most_its_sample(text, said, tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text(text + '\n{"file_name": "1.png", "text": "b"}\n')
    found = opened(tmp_path)
    assert (["b"], (6, 4)) in found
    assert any(said in item for item in found if isinstance(item, str))


def test_what_is_no_json_at_all_ends_soon():
    with pytest.raises(ValueError, match="not JSON"):
        read_table("x.json", b"[\n" * 100_000, "utf-8", ["file_name"])


def test_cells_of_any_length_are_read(tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text(f"file_name,text,{'more' * 50_000}\n0.png,{'a' * 200_000},\n")
    assert opened(tmp_path) == [(["a" * 200_000], (6, 4))]


def archives() -> dict[str, bytes]:
    """Data sets of every form, small enough that most bytes matter."""
    rows = [{"file_name": f"{number}.png", "text": "a caption"} for number in range(3)]
    packed, tape, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive, tarfile.open(fileobj=tape, mode="w") as tar:
        for number in range(3):
            for suffix, content in (("png", png()), ("txt", b"a caption")):
                archive.writestr(f"{number}.{suffix}", content)
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    lines = "\n".join(f'{{"file_name": "{number}.png", "text": ["a", "caption"]}}' for number in range(3))
    cells = "file_name,text\n" + "".join(f'{number}.png,"a ""caption"""\n' for number in range(3))
    return {"x.zip": packed.getvalue(), "x.tar": tape.getvalue(), "metadata.jsonl": lines.encode(),
            "metadata.csv": cells.encode(), "metadata.parquet": table.getvalue()}  # fmt: skip


@pytest.mark.parametrize("name", archives())
def test_altered_files_of_a_data_set_are_read_or_named(name, tmp_path):
    draw, whole = random.Random(3), archives()[name]
    if "metadata" in name:
        for number in range(3):
            Image.new("RGB", (6, 4)).save(tmp_path / f"{number}.png")
    clean = 0
    for _ in range(60):
        altered = bytearray(whole)
        for _ in range(draw.choice([1, 3, 9])):
            altered[draw.randrange(len(altered))] = draw.choice([0, 255, 34, 10, draw.randrange(256)])
        (tmp_path / name).write_bytes(altered[: draw.choice([len(altered), draw.randrange(len(altered))])])
        try:
            if name.endswith("parquet"):
                read_table(name, (tmp_path / name).read_bytes(), "utf-8", ["file_name"])
            else:
                opened(tmp_path if "metadata" in name else tmp_path / name)
        except UserError as error:
            clean += len(error.lines) == 1
        else:
            clean += 1
    assert clean == 60


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "images.zip"])
def test_tables_and_archives_behind_links_are_read_when_that_is_asked_for(name, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "private").mkdir()
    rows = {"metadata.jsonl": '{"file_name": "0.png", "text": "secret"}\n', "captions.csv": "file_name,text\n0.png,secret\n"}
    if name == "images.zip":
        with zipfile.ZipFile(tmp_path / "private" / name, "w") as archive:
            archive.writestr("0.png", png())
            archive.writestr("0.txt", "secret")
    else:
        (tmp_path / "private" / name).write_text(rows[name])
        (tmp_path / "data" / "0.png").write_bytes(png())
    (tmp_path / "data" / name).symlink_to(tmp_path / "private" / name)
    with pytest.raises(UserError, match="--follow_links follows links|no metadata.jsonl"):
        opened(tmp_path / "data")
    followed = open_source(options(train_data_dir=str(tmp_path / "data"), follow_links=True))
    assert followed.captions(0) == ["secret"]
    if name != "images.zip":
        assert open_source(options(dataset_name=str(tmp_path / "data" / name))).captions(0) == ["secret"], "it is named"


def test_a_table_that_unpacks_without_bounds_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "_LEAST_BOUND", 2**20)
    buffer, values = io.BytesIO(), {"file_name": ["x" * 2**14] * 700, "text": ["a"] * 700}
    pyarrow.parquet.write_table(pyarrow.table(values), buffer)
    assert len(buffer.getvalue()) < 4000
    with pytest.raises(
        UserError, match="x.parquet: not a readable parquet file: its rows take many times the size of the file"
    ):
        read_table("x.parquet", buffer.getvalue(), "utf-8", ["file_name"])


def test_room_is_taken_for_a_member_before_it_is_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png() + bytes(2**20))
    source, events = open_source(options(train_data_dir=str(tmp_path / "x.zip")), captioned=False), []
    monkeypatch.setattr(room, "take", lambda size, take=room.take: (events.append(size), take(size)))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, open=zipfile.ZipFile.open: (events.append("open"), open(*a))[1])
    assert source.decode(source.content(0)).size == (6, 4)
    assert (events[0], events[1]) == (2 * (len(png()) + 2**20), "open")
    assert room.left == room.size


def header(kind: str, side: int) -> bytes:
    """An image of so many pixels a side that Pillow decodes in Python."""
    if kind == "DDS":
        masks = struct.pack("<8I", 32, 0x41, 0, 32, 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        return (
            b"DDS " + struct.pack("<7I", 124, 0x1007, side, side, 0, 0, 0) + bytes(44) + masks + bytes(20) + bytes(4 * side**2)
        )
    if kind == "QOI":
        return b"qoif" + struct.pack(">IIBB", side, side, 3, 0) + b"\xfd" * (side**2 // 62 + 1)
    if kind == "PPM":
        return b"P6 %d %d 100\n" % (side, side) + bytes(3 * side**2)
    if kind == "XPM":
        return (
            b'/* XPM */\nstatic char *x[] = {\n"%d %d 1 1",\n"a c #000000",\n' % (side, side)
            + b'"%b",\n' % (b"a" * side) * side
        )
    pixels = (b"\1\1" + b"\0\0") * side
    return (
        struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 1078, 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024) + pixels
    )


@pytest.mark.parametrize("kind", ["DDS", "QOI", "PPM", "XPM", "BMP"])
def test_images_that_are_decoded_in_python_are_small(kind):
    assert decode(io.BytesIO(header(kind, 50))).size == (50, 50)
    with pytest.raises(Refused, match=f"^image too large for its format, which decodes slowly; .*: {kind}, 1500 x 1500"):
        decode(io.BytesIO(header(kind, 1500)))


@pytest.mark.parametrize(("size", "rows"), [(2**10, 64), (2**24, 15), (2**25, 7)])
def test_fewer_rows_are_unpacked_at_once_where_a_value_is_large(size, rows):
    table = pyarrow.table({"file_name": ["x" * size] * 2, "image": [{"bytes": b"x", "path": None}] * 2})
    plain = {"compression": "zstd", "write_statistics": False, "use_dictionary": False}
    repeated = [
        {"use_dictionary": True, "dictionary_pagesize_limit": 2**30},
        {"column_encoding": {"file_name": "DELTA_BYTE_ARRAY"}},
    ]
    for how, expected in zip([*repeated, {}], [rows, rows, 64], strict=True):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer, **plain | how)
        assert tables.rows_at_once(buffer) == expected
