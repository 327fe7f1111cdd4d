"""Files below a folder, those inside of its archives included, by their path relative to the folder."""

import bz2
import copy
import functools
import io
import os
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from engine.data.sources.interface import Refused, refusing
from engine.data.sources.room import LARGE, room
from engine.errors import UserError, first_line
from engine.files import LARGEST_TEXT, open_regular, read_bytes

ARCHIVES = (".zip", ".tar")
_NOT_DATA = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}  # what systems leave among people's files
_LARGEST_MEMBER = 2**30  # bytes of a file in an archive


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in _NOT_DATA for part in name.split("/"))


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


class Files:
    """The files of a folder or an archive; hidden ones are left out.

    names: relative paths with slashes, in the order of a sorted listing.
    remarks: what was left out, for a person.
    looked_into: the archives of the folder whose files are among the names.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root = root.resolve()
        self.follow_links = follow_links
        self.remarks: list[str] = []
        self._members: dict[str, tuple[Callable[[], bytes], int, int]] = {}  # name -> its content, size and date or checksum
        self._links: list[str] = []  # to folders, not followed
        self.looked_into: set[str] = set()
        self._listed: set[str] = set()  # archives whose files are among the members; "" is the root itself
        self._lock = threading.Lock()
        self._alike: dict[str, str] = {}
        if self.root.is_file():
            self.folder = self.root.parent
            self._listed.add("")
            self.names = self._open_archive(self.root, "")
        else:
            self.folder = self.root
            self.names = sorted(self._walk(), key=lambda name: name.split("/"))
        self._known = set(self.names)

    def forget_names(self) -> None:
        """To be called when all that is wanted was found: from then on files are only opened."""
        self.names, self._known, self._alike = [], set(), {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"names": [], "_known": set(), "_alike": {}, "_members": {}, "_listed": set()}

    def _walk(self) -> list[str]:
        names, seen = [], {str(self.folder)}
        unreadable: list[str] = []
        walk = os.walk(self.folder, followlinks=self.follow_links, onerror=lambda error: unreadable.append(str(error.filename)))
        for folder, folders, files in walk:
            inside = os.path.relpath(folder, self.folder)
            prefix = "" if inside == "." else f"{inside}/"
            if self.follow_links:
                real = {name: os.path.realpath(f"{folder}/{name}") for name in folders}
                folders[:] = [name for name in folders if real[name] not in seen]
                seen |= set(real.values())
            else:
                self._links += [prefix + name for name in folders if Path(folder, name).is_symlink()]
            folders[:] = [name for name in folders if not is_hidden(name)]
            names += [prefix + name for name in files if not is_hidden(name)]
        if self._links:
            self.remarks.append(f"links to folders are not followed without --follow_links: {some(self._links)}")
        if unreadable:
            self.remarks.append(f"folders that cannot be read are left out: {some(unreadable)}")
        return names

    def look_into_archives(self) -> list[str]:
        """Opens the archives of the folder; the names of what is in them, behind those of the archives."""
        found = []
        for name in [name for name in self.names if name.lower().endswith(ARCHIVES) and name not in self.looked_into]:
            self.looked_into.add(name)
            self._listed.add(name)
            try:
                self.open(name)  # as for what lies unpacked: a link may lead out
                found += self._open_archive(self.folder / name, f"{name}/")
            except (UserError, Refused) as error:
                self.remarks.append(f"left out: {error}" if isinstance(error, UserError) else f"left out: {name}: {error}")
        self.names += found
        self._known |= set(found)
        self._alike.clear()
        return found

    def _open_archive(self, path: Path, prefix: str) -> list[str]:
        read = self._read_zip if path.suffix.lower() == ".zip" else self._read_tar
        try:
            names = read(path, prefix)
        except Exception as error:  # archives that are damaged, or made to be, raise anything
            raise UserError(f"{path}: not a readable archive: {first_line(error)}") from None
        return [name for name in names if not is_hidden(name.removeprefix(prefix))]

    def _read_zip(self, path: Path, prefix: str) -> list[str]:
        archive = zipfile.ZipFile(open_regular(path))  # stays open; may be read from several threads
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            name = prefix + member.filename
            self._members[name] = (functools.partial(_unpacked, archive, member), member.file_size, member.CRC)
        return [prefix + member.filename for member in members]

    def _read_tar(self, path: Path, prefix: str) -> list[str]:
        names = []
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            try:
                for member in archive:
                    if member.isfile():
                        names.append(prefix + member.name.removeprefix("./"))
                        content = _piece_of(path, member.offset_data, member.size)
                        self._members[names[-1]] = (content, member.size, int(member.mtime))
            except tarfile.TarError as error:
                self.remarks.append(f"{path}: ends early ({first_line(error)}): the {len(names)} files before that are read")
        return names

    def find(self, name: str) -> str | None:
        """The name under which there is what a person calls `name`; None where there is nothing of that name.

        Backslashes and the composition of accents depend on who wrote the name, not on what it means.
        """
        if name in self._known or (not self.root.is_file() and os.path.lexists(self.folder / name)):
            return name
        match = self.like(name)
        return match if match is not None and _composed(match) == _composed(name) else None

    def like(self, name: str) -> str | None:
        """A file whose name nearly is `name`: in other letters' case, percent-encoded, of another kind or in another folder."""
        if not self._alike:
            for known in reversed(self.names):
                for key in _keys(known):
                    self._alike[key] = known
        return next((self._alike[key] for key in _keys(name) if key in self._alike), None)

    def within_archive(self, name: str) -> str | None:
        """The name of a file that an archive of the same folder, or of the name of its folder, holds."""
        self.look_into_archives()
        folder, _, file = name.rpartition("/")
        archives = [archive for archive in self.looked_into if archive.rpartition("/")[0] == folder or archive[:-4] == folder]
        tried = (f"{archive}/{inside}" for archive in sorted(archives) for inside in (file, name, f"{_stem(archive)}/{file}"))
        return next((found for found in tried if found in self._members), None)

    def stat(self, name: str) -> tuple[int, int]:
        """Size and what else tells a file's content from another's.

        Raises:
            OSError: no such file.
        """
        if name in self._members:
            return self._members[name][1:]
        stat = (self.folder / name).stat()
        return stat.st_size, stat.st_mtime_ns

    def is_elsewhere(self, name: str) -> Refused | None:
        """Why what lies behind a link to a folder cannot be used; nothing for other names, which are looked at when read."""
        if any(name.startswith(f"{link}/") for link in self._links):
            try:
                with refusing("not a path"):
                    self.open(name)
            except Refused as why:
                return why
        return None

    def open(self, name: str) -> Path | io.BytesIO:
        """Where a file lies, or its content.

        Raises:
            Refused: it lies elsewhere.
        """
        if self._is_member(name):
            return io.BytesIO(self._member(name))
        path = self.folder / name
        resolved = Path(os.path.realpath(path))
        if resolved.is_relative_to(self.folder):
            return resolved
        if os.path.relpath(path, self.folder).startswith(".."):
            raise Refused("path leaves the folder", f"{resolved}; give a folder above both")
        if not self.follow_links:
            raise Refused("path leaves the folder", f"a link to {resolved}; --follow_links follows links")
        return resolved

    def read(self, name: str) -> bytes:
        """The content of a table or a caption file.

        Raises:
            Refused: it lies elsewhere.
            OSError, ValueError and what archives raise: it cannot be read.
        """
        return self._member(name) if name in self._members else read_bytes(self.open(name), check_size)  # type: ignore[arg-type]

    def _member(self, name: str) -> bytes:
        read, size, _ = self._members[name]
        if size > _LARGEST_MEMBER:
            raise Refused("file in an archive larger than 1 GiB")
        with room.turn():  # which is the caller's where that decodes what it is given
            room.take(room.size if size > LARGE else 2 * size)
            return read()

    def _is_member(self, name: str) -> bool:
        """Whether an archive holds a file. One that another process listed is listed here when a file of it is first asked
        for."""
        if name not in self._members:
            with self._lock:
                archives = (
                    [""] if self.root.is_file() else [archive for archive in self.looked_into if name.startswith(f"{archive}/")]
                )
                for archive in set(archives) - self._listed:
                    self._listed.add(archive)
                    self._open_archive(self.folder / archive if archive else self.root, f"{archive}/" if archive else "")
        return name in self._members


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def check_size(size: int) -> None:
    if size > LARGEST_TEXT:
        raise ValueError(f"larger than {LARGEST_TEXT >> 20} MiB, which this machine can hold; divide it among subfolders")


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """What a member holds, and never more of it than it says."""
    if member.compress_type == zipfile.ZIP_BZIP2:  # which `zipfile` unpacks without bounds
        packed = copy.copy(member)
        packed.compress_type, packed.file_size, packed.CRC = zipfile.ZIP_STORED, member.compress_size, None  # type: ignore[assignment]
        content = bz2.BZ2Decompressor().decompress(archive.read(packed), member.file_size)
        if zlib.crc32(content) != member.CRC:
            raise zipfile.BadZipFile(f"bad CRC-32 for {member.filename!r}")
        return content
    piece = 4096 if member.compress_type == zipfile.ZIP_LZMA else member.file_size  # LZMA: bounded by what goes in
    with archive.open(member) as file:
        return b"".join(iter(lambda: file.read(piece), b""))


def _piece_of(path: Path, offset: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with open_regular(path) as file:
            file.seek(offset)
            return file.read(size)

    return read


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/").strip()))


def _keys(name: str) -> list[str]:
    """What names that mean the same file have in common, from the strictest on."""
    whole = _composed(unquote(name)).casefold()
    file = whole.rpartition("/")[2]
    return [_composed(name), whole, whole.rpartition(".")[0] or whole, f"/{file}", f"/{file.rpartition('.')[0] or file}"]


def some(names: list[str]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
