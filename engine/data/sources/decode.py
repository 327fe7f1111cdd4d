"""Images and captions as a source holds them, made what the families take, or refused with a reason."""

import errno
import io
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from engine.data.sources.bare import without_metadata
from engine.data.sources.interface import Refused, refusing
from engine.data.sources.kinds import image_formats, what_it_is
from engine.data.sources.room import LARGE, room
from engine.errors import first_line
from engine.files import open_regular, read_bytes

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_LYING = (5, 6, 7, 8)  # those that change width and height
_LARGEST_FILE = 2**31  # bytes
_MOST_SCANS = 500  # of a JPEG; each goes over all of it, and takes but some bytes
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a segment of a JPEG, or its end; what scans hold is skipped
_LONGEST_CAPTION = 10**6  # characters
_DECODED_ASIDE = ("AVIF", "DDS", "HEIF", "JPEG2000", "JXL", "QOI", "WEBP", "XPM")  # into a copy, by a library or in Python
_MOST_IN_PYTHON = 2**21  # pixels, of which a decoder in Python takes a second or two for a million
_OF_OTHERS = ("BLP", "ICNS", "ICO")  # whose header need not be true of the JPEG, JPEG 2000 or PNG file inside


@dataclass
class Decoding:
    """How images become RGB.

    image_mode: `script` takes values of more than 8 bits as they are, above 255 as white; `scaled` scales them.
    background: what shows through where an image is transparent; None shows the colours that are hidden there.
    noticed: what was decided, and for how many images.
    """

    image_mode: str = "script"
    background: tuple[int, int, int] | None = None
    noticed: Counter[str] = field(default_factory=Counter)
    lock: Any = field(default_factory=threading.Lock)

    def notice(self, what: str) -> None:
        with self.lock:
            self.noticed[what] += 1


def decode(data: Path | io.BytesIO | bytes, decoding: Decoding | None = None) -> Image.Image:
    """Reads an image whole, upright and in RGB; by default as `datasets` and the scripts do together.

    Of several frames the first is taken. Metadata that cannot be read do not cost the image.

    Waits where other threads decode so much that memory could run out.

    Raises:
        Refused: no file, not an image, truncated, or so large that decoding it could exhaust memory (PIL's limit).
    """
    with room.turn():
        return _decode_content(content_of(data), decoding or Decoding())


def _decode_content(content: bytes, decoding: Decoding) -> Image.Image:
    try:
        with refusing("unreadable image"):
            try:
                return _decode(content, decoding)
            except (Image.DecompressionBombError, Refused):
                raise
            except Exception:
                if (bare := without_metadata(content)) is None:
                    raise
                return _decode(bare, decoding)
    except Refused as why:
        if isinstance(why.__cause__, Image.DecompressionBombError):
            raise Refused("image too large to decode safely", first_line(why.__cause__)) from None
        if better := what_it_is(content):
            raise better from None
        if isinstance(why.__cause__, UnidentifiedImageError):
            raise Refused("unreadable image", "nothing that Pillow opens") from None
        raise


def size_of(data: Path | io.BytesIO | bytes) -> tuple[int, int]:
    """Width and height of an image as `decode` gives it, of which its header is read alone, where it can be read as it is.

    Raises:
        Refused: as `decode`, as far as a header shows it.
    """
    with room.turn(), refusing("unreadable image"):
        try:
            with open_regular(data) if isinstance(data, Path) else io.BytesIO(content_of(data)) as file:
                return _size_upright(file)
        except Image.DecompressionBombError:
            raise
        except Exception:
            if (bare := without_metadata(content_of(data))) is None:
                raise
            return _size_upright(io.BytesIO(bare))


def _size_upright(file: BinaryIO) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=image_formats()) as image:
            # What stands behind the pixels of a PNG is found by decoding them, which only few need.
            turned = _orientation(image, Image.Image.getexif if image.format == "PNG" and not _ends_with_exif(file) else None)
            # Pillow turns a TIFF itself, from some version on before it is asked for the pixels.
            width, height = (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size
            return (height, width) if turned in _LYING else (width, height)


def _ends_with_exif(file: BinaryIO) -> bool:
    """Whether a PNG says how it is turned behind its pixels. The file stays where it is."""
    place, pixels = file.tell(), False
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        if pixels and head[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            break
        pixels |= head[4:] == b"IDAT"
        file.seek(int.from_bytes(head[:4]) + 4, io.SEEK_CUR)
    file.seek(place)
    return head[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt")


def decode_mask(content: bytes, size: tuple[int, int]) -> Image.Image:
    """Reads a mask as `decode` does an image, in grey; one of another size is brought to `size`, that of its image.

    Raises:
        Refused: as `decode`, or it has not the ratio of its image.
    """
    mask = decode(content, Decoding("scaled")).convert("L")
    if abs(mask.width * size[1] - mask.height * size[0]) > max(size):  # more than a pixel of the mask
        raise Refused("not of its image's ratio", f"{mask.width} x {mask.height}, and the image {size[0]} x {size[1]}")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BOX)


def _make_room(size: int) -> None:
    if size > _LARGEST_FILE:
        raise Refused(f"image file larger than {_LARGEST_FILE >> 30} GiB")
    if size > LARGE:
        room.take(room.size)


def content_of(data: Path | io.BytesIO | bytes) -> bytes:
    """What a file holds, read within the room of the caller's turn.

    Raises:
        Refused: there is none, or it cannot be read.
    """
    if not isinstance(data, Path):
        return data if isinstance(data, bytes) else data.getvalue()
    try:
        with refusing("unreadable image file"):
            return read_bytes(data, _make_room)
    except Refused as why:
        if isinstance(why.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise Refused("no such image file") from None
        if isinstance(why.__cause__, OSError) and why.__cause__.errno == errno.EINVAL:
            raise Refused("not a regular file") from None
        raise


def _decode(content: bytes, decoding: Decoding) -> Image.Image:
    if content.startswith(b"\xff\xd8") and _scans(content) > _MOST_SCANS:
        raise Refused("unreadable image", f"a JPEG of more than {_MOST_SCANS} scans")
    # PIL warns between one and two times its pixel limit, and refuses above; only the refusal matters here. The scripts drop
    # a palette's transparency too.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=image_formats()) as image:
            _refuse_slow(image)
            room.take(len(content) + _most_bytes(image))
            image.load()
            upright = image.transpose(_UPRIGHT[turned]) if (turned := _orientation(image)) in _UPRIGHT else image
            rgb = _to_rgb(upright, decoding)
            if image.format != "MPO" and _has_frames(image):
                decoding.notice("several frames or pages, of which the first is taken")
            return rgb


def _scans(content: bytes) -> int:
    """How many scans a JPEG has before its end, behind which cameras put other pictures and films."""
    scans, position = 0, 2
    while (marker := _MARKER.search(content, position)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        position = marker.end() + max(int.from_bytes(content[marker.end() : marker.end() + 2]), 2)  # its segment's length
    return scans


def _refuse_slow(image: Image.Image) -> None:
    """Refuses a large image of a kind that Pillow decodes pixel by pixel: a small file could take minutes."""
    slow = any(tile[0] in Image.DECODERS and tile[0] != "SGI16" for tile in getattr(image, "tile", ()))
    if slow and image.width * image.height > _MOST_IN_PYTHON:
        raise Refused(
            "image too large for its format, which decodes slowly; convert it to PNG",
            f"{image.format}, {image.width} x {image.height}",
        )


def _most_bytes(image: Image.Image) -> int:
    """Memory that an image takes at the most, from its loading until it is small: measured by format, and rounded up."""
    if image.format in _OF_OTHERS:
        return room.size
    per_pixel = 24 if image.format in _DECODED_ASIDE else 12 if image.mode in ("RGB", "L", "1", "CMYK", "YCbCr") else 16
    return image.width * image.height * per_pixel


def _orientation(image: Image.Image, read_exif: Callable[[Any], Image.Exif] | None = None) -> int:
    try:
        return int((read_exif(image) if read_exif else image.getexif()).get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever libraries raise at tags of the wrong kind
        return 1


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _to_rgb(image: Image.Image, decoding: Decoding) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        if decoding.image_mode == "scaled":
            decoding.notice("more than 8 bits per pixel, scaled to 8")
            image = _scaled(image)
        else:
            decoding.notice("more than 8 bits per pixel, white above 255 as in the scripts (--image_mode scaled scales them)")
    if image.mode == "CMYK":
        decoding.notice("CMYK, converted without a colour profile")
    if image.mode in ("RGBA", "LA", "La", "PA", "P", "RGBa", "L", "RGB", "1") and image.has_transparency_data:
        layered = image.convert("RGBA")
        if layered.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            if decoding.background is not None:
                decoding.notice("transparent, laid on --background")
                return Image.alpha_composite(Image.new("RGBA", image.size, (*decoding.background, 255)), layered).convert("RGB")
            decoding.notice(
                "transparent, with the colours hidden there showing as in the scripts (--background lays them on one)"
            )
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits with its whole range in 0 .. 255: 16 bits by their range, others by what they hold."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise Refused("pixels that are not finite")
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    return Image.fromarray(np.round((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8))


def refuse_extreme(size: tuple[int, int], covered: tuple[int, int], max_upscale: float) -> None:
    """Refuses an image that would be enlarged beyond reason to cover so many pixels.

    Raises:
        Refused: which limit it exceeds.
    """
    scale = max(covered[0] / size[0], covered[1] / size[1])
    if scale > max_upscale:
        raise Refused("image too small (--max_upscale)", f"{size[0]} x {size[1]} would be enlarged {scale:.0f} times")
    if scale * scale * size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or float("inf")):
        sides = sorted(round(side * scale) for side in size)
        raise Refused("image too long and narrow", f"{size[0]} x {size[1]} would become {sides[0]} x {sides[1]}")


def clean_captions(value: Any, keep_empty: bool = False) -> list[str]:
    """A caption column's value as a list of captions that are not empty, or with those that are.

    Raises:
        Refused: none is left, or the value is neither text nor a list of texts.
    """
    if isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0:
        value = "" if keep_empty else None
    if value is None:
        raise Refused("no caption")
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, np.ndarray)) or not all(isinstance(item, str) for item in values):
        raise Refused("caption is neither text nor a list of texts")
    captions = [item if item.strip() else "" for item in values if keep_empty or item.strip()]
    if not captions:
        raise Refused("empty caption")
    for caption in captions:
        if len(caption) > _LONGEST_CAPTION:
            raise Refused("caption longer than a million characters")
        with refusing("caption with broken characters"):
            caption.encode()
    return captions
