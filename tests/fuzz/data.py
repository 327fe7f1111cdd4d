"""Data as strangers send it: images, captions in tables and beside images, archives, and shards."""

import contextlib
import csv
import functools
import io
import json
import shutil
import tarfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import Image

from benchmarks.tools.shards import write_version_1
from engine import shards
from engine.config.options import CacheConfig
from engine.data.convert import convert
from engine.data.format.reader import Shards
from engine.data.format.remote import RangedShards
from engine.data.sources import open_source
from engine.data.sources.decode import decode
from engine.data.sources.interface import Refused, refusing
from engine.data.sources.kinds import image_suffixes
from engine.errors import UserError
from engine.files import digest
from engine.storage import Storage
from tests.altered import edit_table, index_shard, name_table, say_of
from tests.fuzz.judge import Broken, Kind, Place
from tests.fuzz.mutations import (
    mutate_content,
    mutate_file,
    mutate_folder,
    mutated_bytes,
    mutated_json,
    mutated_value,
    rewrite,
    text_of,
)
from tests.reference import PlainShards
from tests.tiny import write_images, write_pipeline

ODD_NAMES = (
    "../../outside/x.png",
    "/x.png",
    "a/../b.png",
    "\x1b[31m.png",
    "x" * 300 + ".png",
    "\u202e.png",
    "000.png/",
    "b//c.png",
)
MOST_ROWS = 10_000  # of the tiny shards, however their numbers are altered


def make_images(whole: Path) -> None:
    """One image in every format, and every mode of it, that Pillow writes and the engine opens."""
    suffixes = {suffix for suffix in image_suffixes() if Image.registered_extensions()[suffix] in Image.SAVE}
    kinds = {Image.registered_extensions()[suffix]: suffix for suffix in sorted(suffixes)}
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    for kind, suffix in kinds.items():
        for mode in ("RGB", "RGBA", "P", "L", "1", "I;16", "CMYK"):
            image = Image.fromarray(noise).convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(noise)
            target = whole / f"{kind.lower()}-{mode.replace(';', '')}{suffix}"
            try:
                image.save(target, kind, **({"exif": Image.Exif()} if kind in ("JPEG", "PNG", "WEBP") else {}))
                decode(target)
            except Exception:  # a mode that the format does not have
                target.unlink(missing_ok=True)


def read_image(place: Place) -> Any:
    image = decode(place.given)
    if image.mode != "RGB" or min(image.size) < 1:
        raise Broken(f"an image of mode {image.mode}, {image.size}")
    return image.size


CAPTIONS = {f"{number}.png": f"a caption, number {number}" for number in range(3)}


def make_tables(whole: Path) -> None:
    """The same three images with their captions in each kind of file."""
    rows = [{"file_name": name, "text": text, "width": 16} for name, text in CAPTIONS.items()]
    for kind in ("jsonl", "csv", "tsv", "json", "txt", "beside"):
        folder = whole / kind
        write_images(folder, 0)
        (folder / "metadata.jsonl").unlink()
        for name in CAPTIONS:
            Image.new("RGB", (16, 16), (200, 40, 10)).save(folder / name)
            if kind in ("txt", "beside"):
                text = CAPTIONS[name] if kind == "txt" else json.dumps({"text": CAPTIONS[name]})
                (folder / name).with_suffix(".txt" if kind == "txt" else ".json").write_text(text)
        if kind == "jsonl":
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "json":
            (folder / "captions.json").write_text(json.dumps(rows))
        elif kind in ("csv", "tsv"):
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
            (folder / ("metadata.csv" if kind == "csv" else "captions.tsv")).write_text(text.getvalue())


def mutate_table(folder: Path, random: Random) -> str:
    if random.random() < 0.15:
        return mutate_folder(folder, random)
    path = random.choice(sorted(path for path in folder.iterdir() if path.suffix != ".png"))
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        altered = mutated_value(lines, random)
        lines = altered if isinstance(altered, list) else [altered]
        rewrite(path, b"\n".join(text_of(line, json.dumps, random) for line in lines))
    else:
        rewrite(path, (mutated_json if path.suffix == ".json" else mutated_bytes)(path.read_bytes(), random))
    return f"{path.name} altered"


def make_archives(whole: Path) -> None:
    write_images(whole.parent / "images", 3)
    members = {path.name: path.read_bytes() for path in sorted((whole.parent / "images").iterdir())}
    for name in ("data.zip", "data.tar"):
        write_archive(whole / name, members)


def write_archive(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    """links: names -> targets, in tar alone."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            described = tarfile.TarInfo(name)
            described.size = len(content)
            tar.addfile(described, io.BytesIO(content))
        for name, target in (links or {}).items():
            described = tarfile.TarInfo(name)
            described.type, described.linkname = tarfile.SYMTYPE, target
            tar.addfile(described)


def mutate_archive(archive: Path, random: Random) -> str:
    """Alters the bytes of an archive, or packs other members: of strange names, links out of it, altered ones."""
    if random.random() < 0.5:
        return mutate_content(archive, random)
    members = {path.name: path.read_bytes() for path in sorted((archive.parents[2] / "archives" / "images").iterdir())}
    name = random.choice(list(members))
    if random.random() < 0.5:
        members[random.choice(ODD_NAMES)] = members.pop(name)
    else:
        members[name] = mutated_bytes(members[name], random)
    archive.unlink()
    links = {random.choice(("link.png", "000.txt")): "../outside/canary.txt"} if random.random() < 0.3 else {}
    with warnings.catch_warnings(action="ignore"):
        write_archive(archive, members, links)
    return "members altered"


def _data_set(whole: Path) -> Any:
    import datasets

    write_images(whole.parent / "images", 3)
    rows = {"image": [str(path) for path in sorted((whole.parent / "images").glob("*.png"))], "text": ["one", "two", "three"]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def make_parquet(whole: Path) -> None:
    _data_set(whole).to_parquet(whole / "train.parquet")


def make_saved(whole: Path) -> None:
    """As `datasets` saves a data set: arrow, and what JSON says of it."""
    _data_set(whole).save_to_disk(whole / "saved")


def mutate_saved(folder: Path, random: Random) -> str:
    if random.random() < 0.2:
        return mutate_folder(folder, random)
    return mutate_file(random.choice(sorted(path for path in folder.iterdir() if path.is_file())), random)


def read_source(place: Place) -> Any:
    """Everything that a build of shards asks a source for."""
    config = CacheConfig(
        family="sd", pretrained_model_name_or_path="unused", train_data_dir=str(place.given), output_dir=str(place.output),
        cache_dir=str(place.output), resolution=16,
    )  # fmt: skip
    source = open_source(config)
    source.identity()
    return [
        (
            source.name(sample),
            _attempt(source.captions, sample),
            _attempt(lambda number: decode(source.content(number)), sample),
        )
        for sample in range(len(source))
    ]


def _attempt(read: Any, sample: int) -> Any:
    """What a source gives, or how it refuses; the size of an image."""
    try:
        with refusing("unreadable"):  # as a build does
            value = read(sample)
    except Refused as why:
        UserError(str(why))  # as it is said of the shards
        return why.reason
    return getattr(value, "size", value)


def make_shards(whole: Path) -> None:
    write_images(whole.parent / "images", 5)
    write_pipeline(whole.parent / "model")
    assert build(whole.parent, whole / "shards") == 0
    index = json.loads((whole / "shards" / "index.json").read_text()) | {"encode_seconds": 0.5}
    (whole / "shards" / "index.json").write_text(json.dumps(index))


def build(support: Path, directory: Path) -> int:
    return shards.build_command([
        "--family", "sd", "--pretrained_model_name_or_path", str(support / "model" / "pipeline"), "--resolution", "16",
        "--train_data_dir", str(support / "images"), "--random_flip", "--shard_records", "3", "--shards_dir", str(directory),
        "--output_dir", str(directory.parent), "--dataloader_num_workers", "0",
    ])  # fmt: skip


def make_version_1(whole: Path) -> None:
    make_shards(whole.parent)
    write_version_1(whole.parent / "shards", whole / "old")


def mutate_version_1(folder: Path, random: Random) -> str:
    """Alters shards of version 1 or their index, which mostly says that all is well."""
    path = random.choice(sorted(folder.iterdir()))
    what = mutate_file(path, random)
    if path.suffix == ".safetensors" and random.random() < 0.8:
        value = json.loads((folder / "index.json").read_text())
        entry = next(entry for entry in value["shards"] if entry["file"] == path.name)
        entry |= {"sha256": digest(path), "bytes": path.stat().st_size}
        rewrite(folder / "index.json", json.dumps(value).encode())
    return what


def read_version_1(place: Place) -> Any:
    """Converts shards, and reads what becomes of them."""
    convert(place.given, place.output / "shards")
    return read_shards(replace(place, given=place.output / "shards"))


def mutate_shard(folder: Path, random: Random) -> str:
    """Alters a shard, and not the index with its digest."""
    if random.random() < 0.2:
        return mutate_folder(folder, random)
    return mutate_file(random.choice(sorted(folder.glob("*.safetensors"))), random)


def mutate_index(folder: Path, random: Random) -> str:
    return mutate_file(folder / "index.json", random)


def mutate_shard_and_index(folder: Path, random: Random) -> str:
    """Alters shards or the arrays over them, and has all sizes, digests and mostly checksums say that all is well."""
    path = random.choice(sorted(folder.glob("*.safetensors")))
    what = mutate_file(path, random)
    if path.name.startswith("index-"):
        name_table(folder, path)
        return what
    place = int(path.stem.removeprefix("shard-"))
    index_shard(folder, place, path)
    if random.random() < 0.8:
        with contextlib.suppress(Exception):  # of a header that no library opens any more
            say_of(folder, place)
    if random.random() < 0.3:
        name = random.choice(("records", "image_rows", "caption_rows", "samples", "variants", "captions"))
        change = random.choice((1, -1, 2, 10**6))
        edit_table(folder, lambda table: table[name][place].add_(change))
        what += f", {name} of {path.name} too"
    return what


def mutate_any(folder: Path, random: Random) -> str:
    """Alters shards or their index, told of it or not."""
    return random.choice((mutate_shard, mutate_index, mutate_shard_and_index))(folder, random)


def mutate_unfinished(folder: Path, random: Random) -> str:
    """Alters a shard that a build left before there was an index."""
    (folder / "index.json").unlink()
    return mutate_file(random.choice(sorted(folder.glob("*.safetensors"))), random)


def read_unfinished(place: Place) -> Any:
    """Goes on with a build, and reads what it makes of the shards that were there."""
    directory = place.output / "shards"
    shutil.copytree(place.given, directory)
    build(place.support, directory)
    return read_shards(replace(place, given=directory))


def read_shards(place: Place) -> Any:
    """Verifies shards, describes them, and draws from them."""
    directory = place.given
    if shards.verify_command([str(directory)]):
        raise UserError(f"{directory}: not whole")
    shards.info_command([str(directory), "--records", "0"])
    opened = Shards(directory)
    shards.info_command([str(directory), "--record", str(len(opened) - 1)])
    return read_rows(opened, directory)


def read_remote(place: Place) -> Any:
    """The same rows, from storage that holds what lies in a directory."""
    storage = fsspec.filesystem("memory")
    for path in place.given.iterdir():
        if path.is_file():
            storage.pipe_file(str(path), path.read_bytes())
    try:
        return read_rows(RangedShards(Storage(f"memory://{place.given}")), place.given)
    finally:
        storage.rm(str(place.given), recursive=True)


def read_rows(opened: Shards, directory: Path) -> Any:
    """Draws every variant of every record with every caption, and compares them with those of a directory."""
    places = opened.find(torch.arange(len(opened)))
    drawn = [(record, variant, caption) for record in range(len(opened)) for variant in _numbers(places.image_counts, record)
             for caption in _numbers(places.caption_counts, record)]  # fmt: skip
    records, variants, captions = torch.tensor(drawn, dtype=torch.int64).reshape(-1, 3).unbind(1)
    rows = opened.rows_of(opened.find(records), variants, captions)
    found = {name: torch.empty(len(drawn), *field.shape, dtype=field.dtype) for name, field in opened.fields.items()}
    for name, out in found.items():
        opened.gather(name, rows, out)
    expected = _reference(directory, drawn)
    for name, out in found.items():
        if not torch.equal(out.view(torch.uint8), expected[name].view(torch.uint8)):
            raise Broken(f"rows of {name} are not those that the shards describe")
    return {name: hash(tensor.numpy().tobytes()) for name, tensor in expected.items()}


def _numbers(counts: np.ndarray, record: int) -> range:
    count = int(counts[record])
    if not 0 < count < MOST_ROWS:
        raise Broken(f"record {record} has {count} variants or captions")
    return range(count)


def _reference(directory: Path, drawn: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """The rows of records by docs/shards.md, read by another library."""
    data = PlainShards(directory)
    found = [
        data.images[record][variant] | {"encoder_hidden_states": data.captions[data.caption_numbers[record][caption]]}
        for record, variant, caption in drawn
    ]
    return {name: torch.stack([record[name] for record in found]) for name in found[0]}


shard_kind = functools.partial(Kind, "shards", make_shards, read=read_shards)
KINDS = {
    "images": Kind("images", make_images, mutate_content, read_image),
    "tables": Kind("tables", make_tables, mutate_table, read_source),
    "archives": Kind("archives", make_archives, mutate_archive, read_source),
    "parquet": Kind("parquet", make_parquet, mutate_content, read_source),
    "saved": Kind("saved", make_saved, mutate_saved, read_source),
    "shards": shard_kind(mutate=mutate_shard, guarded=True),
    "shards-index": shard_kind(mutate=mutate_index),
    "shards-consistent": shard_kind(mutate=mutate_shard_and_index),
    "shards-version-1": Kind("shards-version-1", make_version_1, mutate_version_1, read_version_1),
    "shards-remote": shard_kind(mutate=mutate_any, read=read_remote),
    "shards-unfinished": Kind("shards", make_shards, mutate_unfinished, read_unfinished),
}
