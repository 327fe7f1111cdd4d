"""Kinds of image files: which there are, which need a plug-in, and what something is that only looks like one."""

import functools
import importlib
import importlib.util
from pathlib import PurePosixPath

from PIL import Image

from engine.data.sources.interface import Refused

_PLUGINS = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}  # module -> package
# What is opened, whatever a file is called: no format that starts another program, holds a file of any other, or has a name in
# Pillow and no decoder.
_FORMATS = {
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "GIF", "HEIF", "ICNS", "ICO", "IM", "JPEG",
    "JPEG2000", "JXL", "MSP", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM",
}  # fmt: skip
# Pictures that need a plug-in or another program: counted, and refused by name.
_OTHER_PICTURES = {
    ".heic", ".heif", ".hif", ".jxl", ".svg", ".exr", ".hdr", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2",
}  # fmt: skip


def what_it_is(content: bytes) -> Refused | None:
    """What a file that is no readable image is, where its first bytes say so."""
    begin = content[:64].lstrip().lower()
    heif = content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
    for is_it, module in ((heif, "pillow_heif"), (content.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")), "pillow_jxl")):
        if is_it and importlib.util.find_spec(module) is None:
            return Refused(f"unreadable image without {_PLUGINS[module]}; install the extra `images`", passing=True)
    if not content:
        return Refused("unreadable image", "an empty file")
    if begin.startswith(b"version https://git-lfs"):
        return Refused("unreadable image", "a Git LFS pointer; run `git lfs pull`")
    if begin.startswith((b"<!doctype", b"<html")):
        return Refused("unreadable image", "a web page, perhaps of a download that failed")
    if begin.startswith((b"<svg", b"<?xml")):
        return Refused("unreadable image", "a drawing (SVG or XML); convert it to pixels")
    if begin.startswith((b"%!ps", b"%pdf", b"\xc5\xd0\xd3\xc6")):
        return Refused("unreadable image", "a page (PostScript or PDF); convert it to pixels")
    return None


@functools.cache
def image_formats() -> list[str]:
    """Pillow's names of what is opened, with its plug-ins where they are installed, in the order in which they are tried."""
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")
    Image.init()
    return [name for name in Image.ID if name in _FORMATS]


@functools.cache
def image_suffixes() -> frozenset[str]:
    formats = image_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def looks_like_image(name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in image_suffixes() or suffix in _OTHER_PICTURES
