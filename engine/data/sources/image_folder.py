"""Images in a folder or an archive, with captions in tables or in a text file beside each image."""

import concurrent.futures
import hashlib
import io
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from engine.data.sources.decode import Decoding, clean_captions, content_of, decode, size_of
from engine.data.sources.files import Files, check_size, some
from engine.data.sources.interface import Refused, Source, is_address, stamp_of, told_apart
from engine.data.sources.kinds import looks_like_image
from engine.data.sources.packed import Sample, Samples
from engine.data.sources.room import room
from engine.data.sources.tables import TABLES, Row, decode_text, read_table, undecoded
from engine.errors import UserError, first_line
from engine.files import digest_of, read_bytes, reading
from engine.messages import say

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_LONGEST = 4096  # characters of a path
_ASKING, _AT_ONCE = 8, 1024  # threads that ask a file system, which may be a network's, for so many files at a time
_MASK_SUFFIXES = (".jpg", ".jpeg", ".webp")
_CAPTION_SUFFIXES = (".txt", ".TXT", ".caption", ".json")


class ImageFolder(Source):
    """Images below a folder, or in archives (zip, and tar as WebDataset lays it out).

    Captions stand in `metadata.jsonl` or `metadata.csv`, in the folder itself or in subfolders: each row names its image,
    relative to the file, in `file_name` (or `<image column>_file_name`, or the image column). Where there is none, they stand
    in a `.txt` file beside each image, a caption on every line, or in the one other table of the folder. Images without a
    caption are listed as refused. Without a caption column every image counts.

    Args:
        folder: of the images, or an archive, or a table: then its rows are all samples.
        encoding: of text.
        keep_empty: takes empty captions, and rows that hold none, for captions.
        mask_column: of tables, which name masks as they name images; elsewhere masks lie beside the images, as IMAGE-mask.png.

    Raises:
        UserError: no captions, or none that can be read.
    """

    portable = True

    def __init__(
        self,
        folder: Path,
        image_column: str,
        caption_column: str | None,
        *,
        encoding: str = "utf-8",
        follow_links: bool = False,
        decoding: Decoding | None = None,
        keep_empty: bool = False,
        mask_column: str | None = None,
        masks_may_lack: bool = False,
    ) -> None:
        self.keep_empty = keep_empty
        self.place, self.encoding = folder, encoding
        self.image_column, self.caption_column, self.mask_column = image_column, caption_column, mask_column
        self.decoding = decoding or Decoding()
        self.noticed = self.decoding.noticed
        self.named = table = folder.name if folder.suffix.lower() in TABLES and folder.is_file() else None
        self.files = Files(folder.parent if table else folder, follow_links)
        self.digests: dict[str, str] = {}  # of tables
        self.tables = [table] if table else self._metadata()
        self.beside = caption_column is not None and not self.tables
        samples = [sample for name in self.tables for sample in self._samples_of(name)]
        if not table:
            samples += [self._beside(name) if self.beside else Sample(name) for name in self._unnamed(samples)]
        if mask_column:
            samples = self._masked(samples, masks_may_lack)
        self._note(samples)
        self.samples = Samples(samples)
        self.files.forget_names()
        for remark in self.files.remarks:
            say(f"{folder}: {remark}")

    def _metadata(self) -> list[str]:
        """The tables of captions."""
        named = [name for name in self.files.names if name.rpartition("/")[2] in METADATA_NAMES]
        if named or self.caption_column is None:
            return named
        if not any(looks_like_image(name) for name in self.files.names):
            self.files.look_into_archives()
        if self._captions_beside():
            return []
        others = [name for name in self.files.names if name.lower().endswith(TABLES) and name.count("/") == 0]
        others = [name for name in others if "train" in name.lower()] or others
        if len(others) > 1:
            raise UserError(f"{self.place}: several tables there ({', '.join(others[:5])}); name one with --dataset_name FILE")
        if not others:
            raise UserError(
                f"{self.place}: no metadata.jsonl or metadata.csv there; "
                'write one with a line {"file_name": "image.png", "text": "a caption"} per image, '
                "or a .txt file of the same name beside each image"
            )
        say(f"{self.place}: images and captions are those of {others[0]}")
        return others

    def _samples_of(self, table: str) -> list[Sample]:
        """The images that a table names, and their captions as they stand there."""
        plain = ["file_name"] if self.image_column == "image" else [f"{self.image_column}_file_name", "file_name"]
        columns = [*plain, self.image_column]
        where = (self.files.root if self.files.root.is_file() else self.files.folder) / table  # which may be in an archive
        with reading(where, "mend it, or take it away"):
            # What a person names may be a link; what a folder holds may lead where that person would not.
            content = read_bytes(where, check_size) if table == self.named else self.files.read(table)
            self.digests[table] = hashlib.sha256(content).hexdigest()
            rows, remarks = read_table(str(where), content, self.encoding, columns)
        self.files.remarks += [f"{table}: {remark}" for remark in remarks]
        for row in rows:
            row.problem = row.problem or self._problem(row, columns)
        problems = [row for row in rows if row.problem]
        if problems and len(problems) == len(rows):
            row = problems[0]
            raise UserError(f"{where}: line {row.line} {row.problem}")
        return [self._sample(table, row, columns) for row in rows]

    def _problem(self, row: Row, columns: list[str]) -> Refused | None:
        column = next((column for column in columns if column in row.values), None)
        if column is None:
            found = ", ".join(map(str, row.values))[:_LONGEST] or "none"
            return Refused(f"has no {columns[0]} (columns: {found}); name the image in that column")
        written = row.values[column]
        if isinstance(written, dict):  # as `datasets` keeps images
            written = written.get("path")
        row.values[column] = str(written) if isinstance(written, (str, int)) else ""
        if self.caption_column and self.caption_column not in row.values:
            found = ", ".join(sorted(map(str, set(row.values) - {column})))[:_LONGEST] or "none"
            return Refused(f"has no column {self.caption_column!r} (others: {found}); set --caption_column")
        if not row.values[column].strip():
            return Refused("has no file name")
        return undecoded(written, self.encoding) or undecoded(row.values.get(self.caption_column or ""), self.encoding)

    def _sample(self, table: str, row: Row, columns: list[str]) -> Sample:
        written = next((row.values[column] for column in columns if column in row.values), "")
        if row.problem and (not written or undecoded(written, self.encoding)):
            return Sample(f"{table} line {row.line}", refused=Refused(f"row {row.problem.reason}", row.problem.detail))
        if len(written) > _LONGEST:
            return Sample(f"{table} line {row.line}", refused=Refused("not a path: too long", f"{written[:40]}..."))
        caption = row.values.get(self.caption_column) if self.caption_column else None
        caption = "" if caption is None and self.keep_empty else caption
        if is_address(written):
            return Sample(written[:80], caption, Refused("an address, not a file; download the images first"))
        name, found = self._find(table, written)
        if row.problem:
            where = f"{table} line {row.line}" + (f": {row.problem.detail}" if row.problem.detail else "")
            return Sample(found or name, refused=Refused(f"row {row.problem.reason}", where))
        if not found:
            return Sample(name, caption, self._missing(name, "image"))
        mask, refused = self._mask_of(table, row)
        return Sample(found, caption, self.files.is_elsewhere(found) or refused, mask)

    def _find(self, table: str, written: str) -> tuple[str, str | None]:
        """What a table calls a file, by its path in the folder, and the name under which it is there."""
        name = os.path.relpath(os.path.join(self.files.folder, os.path.dirname(table), written), self.files.folder)  # noqa: PTH118, PTH120
        return name, self.files.find(name) or self.files.within_archive(name)

    def _missing(self, name: str, what: str) -> Refused:
        close = self.files.like(name)
        return Refused(f"no such {what} file", f"{name!r} was looked for" + (f"; {close!r} is there" if close else ""))

    def _mask_of(self, table: str, row: Row) -> tuple[str | None, Refused | None]:
        """The mask that a row names, or why there is none to be had."""
        written = row.values.get(self.mask_column) if self.mask_column else None
        if isinstance(written, dict):
            written = written.get("path")
        if written is None or written == "":
            return None, None
        if not isinstance(written, str) or len(written) > _LONGEST or is_address(written) or undecoded(written, self.encoding):
            return None, Refused("mask is not the name of a file", str(written)[:80])
        name, found = self._find(table, written)
        return found, None if found else self._missing(name, "mask")

    def _masked(self, samples: list[Sample], may_lack: bool) -> list[Sample]:
        """The samples with the masks that lie beside images, of which none is a sample.

        Raises:
            UserError: there is not one mask, and they may not all lack.
        """
        for sample in samples:
            sample.mask = sample.mask or (None if sample.refused or self.tables else self._mask_beside(sample.name))
        masks = {sample.mask for sample in samples if sample.mask}
        if not masks and not may_lack and not any(sample.refused and "mask" in sample.refused.reason for sample in samples):
            raise UserError(
                f"{self.place}: --mask_column {self.mask_column}: no masks there; name them in that column of a "
                f"metadata.jsonl, or leave them beside the images as IMAGE-{self.mask_column}.png"
            )
        samples = [sample for sample in samples if sample.name not in masks]
        if bare := sum(not sample.mask and not sample.refused for sample in samples):
            self.files.remarks.append(f"{bare} images have no mask and are trained whole")
        return samples

    def _mask_beside(self, name: str) -> str | None:
        suffix = PurePosixPath(name).suffix
        stem = f"{name.removesuffix(suffix)}-{self.mask_column}"
        return next((mask for end in (".png", suffix, *_MASK_SUFFIXES) if self.files.find(mask := stem + end) == mask), None)

    def _unnamed(self, samples: list[Sample]) -> list[str]:
        """The images that no table names."""
        # Compared as written, without resolving links: a link that leaves the folder is refused when it is read.
        named = {os.path.normpath(sample.name) for sample in samples}
        if not self.tables and not any(looks_like_image(name) for name in self.files.names):
            self.files.look_into_archives()
        # An archive that no table needs may be a copy of what lies unpacked beside it.
        archives = [f"{archive}/" for archive in self.files.looked_into] if self.tables else []
        needless = tuple(archive for archive in archives if not any(name.startswith(archive) for name in named))
        images = (name for name in self.files.names if looks_like_image(name) and not name.startswith(needless))
        return [name for name in images if os.path.normpath(name) not in named]

    def _captions_beside(self) -> bool:
        known = {name for name in self.files.names if name.endswith((f".{self.caption_column}", *_CAPTION_SUFFIXES))}
        images = (name for name in self.files.names if known and looks_like_image(name))
        return any(not known.isdisjoint(self._names_beside(name)) for name in images)

    def _names_beside(self, name: str) -> list[str]:
        stem = name.removesuffix(PurePosixPath(name).suffix)
        return [start + suffix for suffix in (f".{self.caption_column}", *_CAPTION_SUFFIXES) for start in (stem, name)]

    def _captions_alone(self) -> list[str]:
        """Caption files that have no image."""
        used = {other for name in self.files.names if looks_like_image(name) for other in self._names_beside(name)}
        return [name for name in self.files.names if name.endswith(_CAPTION_SUFFIXES[:3]) and name not in used]

    def _beside(self, name: str) -> Sample:
        """An image with the captions of the file beside it: one on each line, or in the caption column of JSON."""
        beside = next((other for other in self._names_beside(name) if self.files.find(other) == other), None)
        if beside is None:
            return Sample(name)
        try:
            text = decode_text(self.files.read(beside), self.encoding)
            if beside.endswith(".json"):
                values = json.loads(text)
                return Sample(name, next((values[key] for key in (self.caption_column, "caption") if key in values), None))
        except Exception as error:  # as in `refusing`: whatever is wrong with it
            return Sample(name, refused=Refused("unreadable caption file", f"{beside}: {first_line(error)}"))
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        if problem := undecoded(lines, self.encoding):
            return Sample(name, refused=Refused(f"caption file {problem.reason}", f"{beside}: {problem.detail}"))
        return Sample(name, lines or "")

    def _note(self, samples: list[Sample]) -> None:
        """Notes what a person may not expect."""
        names = [sample.name for sample in samples if not sample.refused]
        if twice := len(names) - len(set(names)):
            self.files.remarks.append(
                f"{twice} rows name an image that another row names too ({', '.join(self.tables)}); each counts as a sample"
            )
        if self.tables and self.caption_column and self._captions_beside():
            self.files.remarks.append(f"text files beside images are not read, because {self.tables[0]} is there")
        folders = {name.split("/")[0] for name in names if "/" in name}
        if "train" in folders and (others := folders & {"test", "val", "valid", "validation", "eval", "dev"}):
            self.files.remarks.append(f"{', '.join(sorted(others))} is trained on too; give the folder train to leave it out")
        if self.beside:
            self._note_beside(samples, folders)

    def _note_beside(self, samples: list[Sample], folders: set[str]) -> None:
        if repeated := sorted(folder for folder in folders if re.match(r"\d{1,3}_", folder)):
            self.files.remarks.append(
                f"numbers of repeats in names of folders are not applied ({repeated[0]}, ...); give each of these folders a "
                "[[data]] table with `repeats` in the TOML file"
            )
        if many := sum(isinstance(sample.caption, list) and len(sample.caption) > 1 for sample in samples):
            self.files.remarks.append(f"{many} caption files have several lines, of which each is a caption")
        if alone := self._captions_alone():
            self.files.remarks.append(f"caption files without an image are left out: {some(alone)}")

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples.names[index]

    def refusal(self, index: int) -> Refused | None:
        return self.samples.refused.get(index)

    def captions(self, index: int) -> list[str]:
        sample = self.samples[index]
        # A row without an image has a caption all the same, so that captions keep their numbers when the image comes back.
        if sample.refused and sample.caption is None:
            raise sample.refused
        return clean_captions(sample.caption, self.keep_empty)

    def content(self, index: int) -> bytes:
        with room.turn():
            return content_of(self._opened(index))

    def size(self, index: int) -> tuple[int, int]:
        return size_of(self._opened(index))

    def _opened(self, index: int) -> Path | io.BytesIO:
        sample = self.samples[index]
        if sample.refused:
            raise sample.refused
        return self.files.open(sample.name)

    def mask(self, index: int) -> bytes | None:
        name = self.samples[index].mask
        if name is None:
            return None
        with room.turn():
            return content_of(self.files.open(name))

    def decode(self, content: bytes) -> Image.Image:
        return decode(content, self.decoding)

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        def stamps_of(places: range) -> list[int]:
            return [
                stamp_of(
                    sample.name,
                    *self._stat(sample.name),
                    sample.caption,
                    sample.refused and str(sample.refused),
                    *self._mask_stat(sample),
                )
                for sample in map(self.samples.__getitem__, places)
            ]

        parts = [range(len(self))[first : first + _AT_ONCE] for first in range(0, len(self), _AT_ONCE)]
        stamps = np.zeros(len(self), np.uint64)
        with concurrent.futures.ThreadPoolExecutor(_ASKING) as pool:
            for part, found in zip(parts, pool.map(stamps_of, parts), strict=True):
                stamps[part.start : part.stop] = found
        return told_apart(stamps), np.ones(len(self), np.int64)

    def identity(self) -> dict[str, Any]:
        files = [[sample.name, *self._stat(sample.name), *self._mask_stat(sample)] for sample in self.samples]
        beside = {"captions": digest_of([sample.caption for sample in self.samples])} if self.beside else {}
        return {"kind": "image folder", "metadata": self.digests, "files": digest_of(files)} | beside

    def _mask_stat(self, sample: Sample) -> tuple[Any, ...]:
        return (sample.mask, *self._stat(sample.mask)) if sample.mask else ()

    def _stat(self, name: str) -> tuple[int | None, int | None]:
        try:
            return self.files.stat(name)
        except (OSError, ValueError):
            return None, None
