"""Data sets in the library's forms: nothing is decoded by it, and no file out of their folder is read."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from engine.data.sources import local
from engine.data.sources.library import LibraryDataset
from engine.errors import UserError
from tests.data.test_field import encoded, opened, write

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PAGE = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "path": None}
IMAGE, TEXT = {"_type": "Image"}, {"_type": "Value", "dtype": "string"}


def rows(number: int = 0) -> pa.Table:
    images = [{"bytes": encoded(number), "path": None}] * 2
    return pa.table({"image": pa.array(images, STRUCT), "text": [f"{number}", "b"]})


def packed(file: Path, table: pa.Table | None = None, features: dict | None = None) -> Path:
    """A parquet or arrow file, which may say of what kind its columns are."""
    table = rows() if table is None else table
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return file


def saved(folder: Path) -> Path:
    datasets.Dataset(rows()).save_to_disk(folder)
    return folder


@pytest.fixture
def cache(tmp_path) -> dict[str, str]:
    return {"cache_dir": str(tmp_path / "cache")}


@pytest.mark.parametrize(
    ("column", "values", "feature"),
    [
        ("text", pa.array([PAGE] * 2, STRUCT), IMAGE),
        ("text", pa.array([{"bytes": None, "path": "pipe"}] * 2, STRUCT), IMAGE),
        ("text", pa.array([[PAGE]] * 2, pa.list_(STRUCT)), {"_type": "List", "feature": IMAGE}),
        ("text", pa.array([PAGE] * 2, STRUCT), {"_type": "Audio"}),
        ("text", pa.array([PAGE] * 2, STRUCT), {"_type": "Pdf"}),
        ("text", pa.array([0, 1]), {"_type": "ClassLabel", "names": ["a", "b"]}),
        ("image", pa.array([[PAGE]] * 2, pa.list_(STRUCT)), {"_type": "List", "feature": IMAGE}),
        ("image", pa.array([{"bytes": PAGE}] * 2, pa.struct([("bytes", STRUCT)])), {"bytes": IMAGE}),
        ("image", pa.array([PAGE] * 2, STRUCT), {"_type": "Video"}),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_the_library_decodes_are_refused(kind, column, values, feature, tmp_path, cache, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *arguments, **keywords: pytest.fail("decoded"))
    table = rows().set_column(rows().column_names.index(column), column, values)
    packed(tmp_path / "data" / f"train.{kind}", table, {"image": IMAGE, "text": TEXT} | {column: feature})
    option = "caption_column" if column == "text" else "image_column"
    with pytest.raises(UserError, match=f"^--{option} {column}: ") as error:
        opened(tmp_path / "data", **cache)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize("text", [pa.large_string(), pa.list_(pa.string()), pa.large_list(pa.string()), pa.null()])
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), STRUCT])
def test_columns_of_texts_and_bytes_are_read(text, image, tmp_path, cache):
    said = None if text == pa.null() else ["a"] if "list" in str(text) else "a"
    value = {"bytes": encoded(7), "path": None} if image == STRUCT else encoded(7)
    packed(tmp_path / "data" / "train.parquet", pa.table({"image": pa.array([value], image), "text": pa.array([said], text)}))
    source = opened(tmp_path / "data", **cache)
    assert source.decode(source.content(0)).getpixel((0, 0))[0] == 7
    assert said is None or source.captions(0) == ["a"]


CARD = "---\nconfigs:\n- config_name: {}\n  data_files: {}\n{}---\n"


@pytest.mark.parametrize(
    ("card", "named"),
    [
        (CARD.format("default", '"../private/*.parquet"', ""), "'../private/\\*.parquet' leads out of the data set"),
        (CARD.format("default", '"a/../../private/train.parquet"', ""), "leads out of the data set"),
        (CARD.format("default", '"http://127.0.0.1:1/x.parquet"', ""), "leads out of the data set"),
        (CARD.format("default", '"zip://x.parquet::train.parquet"', ""), "leads out of the data set"),
        (CARD.format("default", '[{split: train, path: ["train.parquet", "/etc/*"]}]', ""), "leads out of the data set"),
        (CARD.format("default", '"*.parquet"', "  data_dir: ../private\n"), "leads out of the data set"),
        (CARD.format("default", '"*.parquet"', "  version: ../../../x\n"), "not a name and a version"),
        (CARD.format("..", '"*.parquet"', ""), "not a name and a version"),
        (CARD.format("default", f'"{"*a" * 50}"', ""), "too many"),
        ("---\nconfigs: [\n---\n", "cannot be loaded"),
    ],
)
def test_what_a_readme_names_stays_in_the_folder(card, named, tmp_path, cache):
    packed(tmp_path / "private" / "train.parquet")
    packed(tmp_path / "data" / "train.parquet")
    (tmp_path / "data" / "README.md").write_text(card)
    with pytest.raises(UserError, match=named) as error:
        opened(tmp_path / "data", **cache)
    assert len(error.value.lines) == 1
    assert not (tmp_path / "x").exists()


def test_other_readers_than_those_of_parquet_and_arrow_are_not_chosen(tmp_path, cache):
    packed(tmp_path / "data" / "train.parquet")
    write(tmp_path / "data", {f"train-{number}.{kind}": b"x" for number in range(3) for kind in ("xml", "h5", "lance", "tar")})
    assert opened(tmp_path / "data", **cache).captions(0) == ["0"]


@pytest.mark.parametrize("name", ["train.parquet", "data", "README.md"])
def test_links_out_of_a_packed_folder_are_followed_when_that_is_asked_for(name, tmp_path, cache):
    packed(tmp_path / "private" / "train.parquet")
    write(tmp_path / "private", {"README.md": "---\nlicense: mit\n---\n"})
    packed(tmp_path / "data" / "test.parquet")
    target = tmp_path / "private" if name == "data" else tmp_path / "private" / name
    (tmp_path / "data" / name).symlink_to(target)
    if name == "README.md":
        packed(tmp_path / "data" / "train.parquet")
    with pytest.raises(UserError, match="--follow_links follows links|no split `train`"):
        opened(tmp_path / "data", **cache)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    if name != "data":
        assert opened(tmp_path / "data", follow_links=True, **cache).captions(0) == ["0"]


@pytest.mark.parametrize("place", ["saved", "splits"])
@pytest.mark.parametrize(
    "name", ["../private/data-00000-of-00001.arrow", "/etc/passwd", "..", "", "link.arrow", "pipe.arrow", 3]
)
def test_a_saved_data_set_names_files_of_its_folder(name, place, tmp_path):
    saved(tmp_path / "private")
    folder = tmp_path / "saved"
    if place == "splits":
        datasets.DatasetDict({"train": datasets.Dataset(rows())}).save_to_disk(folder)
    saved(folder / "train" if place == "splits" else folder)
    inside = folder / "train" if place == "splits" else folder
    (inside / "link.arrow").symlink_to(tmp_path / "private" / "data-00000-of-00001.arrow")
    if name == "pipe.arrow":
        os.mkfifo(inside / name)
    state = json.loads((inside / "state.json").read_text())
    assert opened(folder).captions(0) == ["0"] if name != "pipe.arrow" else True
    (inside / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError):
        opened(folder)
    if name == "link.arrow":
        assert opened(folder, follow_links=True).captions(0) == ["0"]


def test_a_saved_split_lies_in_its_folder(tmp_path):
    saved(tmp_path / "private")
    datasets.DatasetDict({"train": datasets.Dataset(rows())}).save_to_disk(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "train")
    (tmp_path / "saved" / "train").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="out of the data set; --follow_links follows links"):
        opened(tmp_path / "saved")


LAYOUTS: dict[str, tuple[list[str], str | None]] = {
    "one": (["train.parquet"], None),
    "splits": (["train-0.parquet", "train-1.parquet", "test-0.parquet", "x.json"], None),
    "numbered": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], None),
    "folders": (["train/a.parquet", "test/b.parquet", "train/deep/train.parquet"], None),
    "Unnamed": (["AbC.parquet", ".hidden/x.parquet", "notes.txt"], None),
    "stream": (["data-0.arrow"], None),
    "card": (["data/train-0.parquet", "other.parquet"], CARD.format("default", '[{split: train, path: "data/train-*"}]', "")),
    "subsets": (["a/x.parquet", "b/y.parquet"], CARD.format("a", "a/*", "- config_name: b\n  data_dir: b\n  default: true\n")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_the_data_set_that_the_library_makes_of_it(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files, card = LAYOUTS[layout]
    folder = tmp_path / layout
    for number, file in enumerate(files):
        packed(folder / file, rows(number)) if file.endswith(local.PACKED) else write(folder, {file: b"{}"})
    if card:
        write(folder, {"README.md": card})
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "theirs"))["train"]
    ours = LibraryDataset(str(folder), "image", "text", cache_dir=str(tmp_path / "ours"))
    assert ours.identity()["fingerprint"] == theirs._fingerprint
    assert [ours.captions(index)[0] for index in range(len(ours))] == theirs["text"][:]
    if layout == "subsets":
        assert LibraryDataset(str(folder), "image", "text", "a", str(tmp_path / "ours")).captions(0) == ["0"]


def test_rows_that_unpack_without_bounds_are_read_some_at_a_time(tmp_path, cache):
    table = pa.table({"image": [b"x" * 2**18] * 700, "text": ["a"] * 700})
    packed(tmp_path / "train.parquet", table)
    assert (tmp_path / "train.parquet").stat().st_size < 2**18
    source, before = opened(tmp_path / "train.parquet", **cache), pa.total_allocated_bytes()
    assert [len(source.content(row)) for row in (0, 500, 699)] == [2**18] * 3
    assert pa.total_allocated_bytes() - before < 2**26, "of 175 MiB"
    assert not list((tmp_path / "cache").rglob("*.arrow")), "nothing is unpacked into the library's cache"


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("kind", ["zstd", "lz4", None])
def test_arrow_files_say_what_they_unpack_to(kind, new, tmp_path, cache, monkeypatch):
    table, options = pa.table({"image": [b"x" * 2**14] * 700, "text": ["a"] * 700}), pa.ipc.IpcWriteOptions(compression=kind)
    with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink, new(sink, table.schema, options=options) as stream:
        stream.write_table(table, 300)
    shutil.copytree(saved(tmp_path / "saved"), tmp_path / "small")
    shutil.copy(tmp_path / "train.arrow", tmp_path / "saved" / "data-00000-of-00001.arrow")
    assert table.nbytes <= sum(map(local._unpacked_size, messages(tmp_path / "train.arrow"))) < table.nbytes + 2000
    assert len(opened(tmp_path / "train.arrow", **cache)) == 700
    monkeypatch.setattr(local, "_LEAST_BOUND", 2**20)
    monkeypatch.setattr(local, "_bounded", lambda *arguments: pytest.fail("read"))
    if kind:
        for place in ("train.arrow", "saved"):
            with pytest.raises(UserError, match="its rows take many times its size"):
                opened(tmp_path / place, **cache)
    assert opened(tmp_path / "small").captions(0) == ["0"]


def messages(file: Path) -> list:
    content = file.read_bytes()
    return list(pa.ipc.MessageReader.open_stream(content[8:] if content.startswith(b"ARROW1") else content))
