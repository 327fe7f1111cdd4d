"""Image files without their metadata, so that what is broken there does not cost the image."""

import struct
import zlib

# Tags of a TIFF that say where its pixels lie and how to read them, and the orientation.
_PIXEL_TAGS = {
    *range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339, 347,
    *range(529, 533),
}  # fmt: skip


def without_metadata(content: bytes) -> bytes | None:
    """A PNG, JPEG, TIFF or WebP file with what its pixels need and its orientation; None for other formats.

    For files that cannot be opened as they are: whatever in them is broken is left as it is, or out.
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content[:8] + b"".join(_png_chunks(content))
    if content.startswith(b"\xff\xd8"):
        return content[:2] + b"".join(_jpeg_segments(content))
    if content.startswith((b"II*\0", b"MM\0*")):
        return _bare_tiff(content)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        chunks = b"".join(_webp_chunks(content))
        return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
    return None


def _png_chunks(content: bytes) -> list[bytes]:
    chunks, start = [], 8
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        chunk = content[start : start + length + 12]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind in (b"tRNS", b"eXIf") and whole):
            chunks.append(chunk)
        start += length + 12
    return chunks


def _jpeg_segments(content: bytes) -> list[bytes]:
    """All segments but comments and those of applications, of which the orientation and Adobe's colours are kept."""
    segments: list[bytes] = []
    start = 2
    while start + 4 <= len(content):
        marker, length = content[start + 1], int.from_bytes(content[start + 2 : start + 4], "big")
        segment = content[start : start + length + 2]
        if content[start] != 0xFF or marker == 0xDA:  # the pixels
            return [*segments, content[start:]]
        kept = marker == 0xEE or (marker == 0xE1 and segment[4:8] == b"Exif")
        if kept or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            segments.append(segment)
        start += length + 2
    return segments


def _bare_tiff(content: bytes) -> bytes | None:
    """The file with a shorter first directory at its end."""
    order = "<" if content.startswith(b"II") else ">"
    try:
        (place,) = struct.unpack_from(f"{order}I", content, 4)
        (count,) = struct.unpack_from(f"{order}H", content, place)
        entries = [content[start : start + 12] for start in range(place + 2, place + 2 + 12 * count, 12)]
        kept = [entry for entry in entries if _is_of_the_pixels(order, entry)]
    except struct.error:
        return None
    content += b"\0" * (len(content) % 2)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + b"\0" * 4
    return content[:4] + struct.pack(f"{order}I", len(content)) + content[8:] + directory


def _is_of_the_pixels(order: str, entry: bytes) -> bool:
    tag, kind, count = struct.unpack_from(f"{order}HHI", entry)
    return tag in _PIXEL_TAGS and (tag != 274 or (kind, count) == (3, 1))


def _webp_chunks(content: bytes) -> list[bytes]:
    chunks, start = [], 12
    while start + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, start)
        chunk = content[start : start + 8 + length + length % 2]
        if kind == b"VP8X":  # whose flags say that there are a profile, EXIF and XMP
            chunk = chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:]
        if kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            chunks.append(chunk)
        start += 8 + length + length % 2
    return chunks
