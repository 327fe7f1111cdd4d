"""Images from strangers: only pictures are opened, and those that are large wait for each other."""

import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from engine.data.sources import decode as module
from engine.data.sources.decode import decode
from engine.data.sources.interface import Refused
from engine.data.sources.kinds import image_formats, image_suffixes
from engine.data.sources.room import Room


def test_threads_never_hold_more_than_there_is():
    room, held, most, lock = Room(100), [0], [0], threading.Lock()

    def work(count: int) -> None:
        with room.turn():
            room.take(count // 2)
            with room.turn():  # of the same thread
                room.take(count)
            with lock:
                held[0] += count
                most[0] = max(most[0], held[0])
            time.sleep(0.001)
            with lock:
                held[0] -= count

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [90, 10, 60, 100, 30, 5] * 8))
    assert most[0] <= 100
    assert room.left == 100


def test_what_is_larger_than_the_room_has_it_alone_and_gives_it_back_after_an_error():
    room = Room(100)

    def work() -> None:
        with room.turn():
            room.take(10**12)
            assert room.left == 0
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert room.left == 100


def test_an_image_takes_room_by_its_header(monkeypatch):
    room, taken = Room(2**30), []
    monkeypatch.setattr(module, "room", room)
    monkeypatch.setattr(room, "take", taken.append)
    for kind, mode, expected in [("PNG", "RGB", 12), ("PNG", "RGBA", 16), ("WEBP", "RGB", 24), ("JPEG", "L", 12)]:
        buffer = io.BytesIO()
        Image.new(mode, (100, 50)).save(buffer, kind)
        decode(buffer)
        assert taken.pop() == 100 * 50 * expected + len(buffer.getvalue())
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16)).save(buffer, "ICO")
    decode(buffer)
    assert taken.pop() == len(buffer.getvalue()) + 2**30  # for the PNG file inside may be of any size


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
IPTC = (
    b"\x1c\x03\x3c\0\2\1\0\x1c\3\x14\0\4\0\0\0\x08\x1c\3\x1e\0\4\0\0\0\x08\x1c\3\x78\0\1\x05\x1c\x08\x0a\0"
    + bytes([len(EPS)])
    + EPS
)


@pytest.mark.parametrize("content", [EPS, IPTC, b"%PDF-1.7\n", b"\x89HDF\r\n\x1a\n" + bytes(99)])
def test_what_starts_a_program_or_is_no_picture_is_not_opened(content, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: pytest.fail("was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda self: pytest.fail("was opened"))
    with pytest.raises(Refused):
        decode(io.BytesIO(content))


def test_the_formats_are_those_of_a_list():
    assert not {"EPS", "IPTC", "FITS", "HDF5", "GRIB", "BUFR", "WMF", "MPEG", "SPIDER"} & set(image_formats())
    assert {".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", ".avif", ".jp2", ".dds", ".psd"} <= image_suffixes()


def test_what_cameras_put_behind_a_jpeg_is_no_scan():
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "JPEG")
    film = io.BytesIO(content.getvalue() + b"\xff\xda\x00\x02" * 1000)
    assert decode(film).size == (8, 8)


def test_a_jpeg_of_thousands_of_scans_is_not_decoded():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    scan = content[content.index(b"\xff\xda") : -2]
    decode(io.BytesIO(content[:-2] + scan * 9 + content[-2:]))
    with pytest.raises(Refused, match="more than 500 scans"):
        decode(io.BytesIO(content[:-2] + scan * 5000 + content[-2:]))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 2**40)
    for name, said in [("pipe", "not a regular file"), ("zero", "not a regular file"), ("sparse", "larger than 2 GiB")]:
        with pytest.raises(Refused, match=said):
            decode(tmp_path / f"{name}.png")
