"""What people would rather look at than read: labelled grids of images, and bars."""

import functools
import itertools
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from engine.files import write_atomically

_MARGIN = 4
_MIN_CELL = 64
_MIN_LABEL = 144  # pixels, enough for three words
_IMAGES_BESIDE = 12  # of one row, before it wraps
_LABEL_HEIGHT = 20
_FONT_SIZE = 13
_LARGEST_FRAME = 1024  # pixels of a GIF's longer side
_BLENDS, _SHOWN_MS, _BLEND_MS = 6, 900, 70  # pictures between two of a GIF, and for how long each is shown
_LONGEST_LABEL = 1000  # characters, of which no grid shows all
_DEJAVU = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Latin, Greek, Cyrillic, Arabic, Hebrew


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """A grid with a caption over each row of images; small images are enlarged without smoothing.

    Many rows stand beside each other, and many images of a row below each other, so that the grid is no strip.
    """
    factor, width, height = _cell([image for _, row in rows for image in row])
    longest = max(len(row) for _, row in rows)
    columns = min(longest, max(_IMAGES_BESIDE, math.isqrt(longest)))
    block_width = max(columns * width, _MIN_LABEL)
    block_height = -(-longest // columns) * height + _LABEL_HEIGHT
    beside = min(len(rows), max(1, round(math.sqrt(len(rows) * block_height / block_width))))
    size = (beside * block_width + _MARGIN, -(-len(rows) // beside) * block_height + _MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for number, (label, row) in enumerate(rows):
        left, top = _MARGIN + number % beside * block_width, _MARGIN + number // beside * block_height
        _write(label, draw, left, top, block_width - _MARGIN)
        for place, image in enumerate(row):
            at = left + place % columns * width, top + _LABEL_HEIGHT + place // columns * height
            grid.paste(_enlarged(image, factor), at)
    return grid


def side_by_side(labels: Sequence[str], rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]]) -> Image.Image:
    """A column of images under each label: of every row its text, and below it lines of an image per label.

    Args:
        rows: text -> lines, each an image for every label.
    """
    factor, width, height = _cell([image for _, lines in rows for line in lines for image in line])
    width = max(width, _MIN_LABEL + _MARGIN)
    lines_in_all = sum(len(lines) for _, lines in rows)
    size = (len(labels) * width + _MARGIN, (1 + len(rows)) * _LABEL_HEIGHT + lines_in_all * height + _MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(labels):
        _write(label, draw, _MARGIN + column * width, _MARGIN, width - _MARGIN)
    top = _MARGIN + _LABEL_HEIGHT
    for text, lines in rows:
        _write(text, draw, _MARGIN, top, size[0] - 2 * _MARGIN)
        top += _LABEL_HEIGHT
        for line in lines:
            for column, image in enumerate(line):
                grid.paste(_enlarged(image, factor), (_MARGIN + column * width, top))
            top += height
    return grid


def _cell(images: Sequence[Image.Image]) -> tuple[int, int, int]:
    """How often images are enlarged to be seen, and the width and height that each then has in a grid, with a margin."""
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    factor = max(1, -(-_MIN_CELL // width))
    return factor, width * factor + _MARGIN, height * factor + _MARGIN


def _enlarged(image: Image.Image, factor: int) -> Image.Image:
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def save_fading(pictures: Iterable[Image.Image], path: Path) -> None:
    """Writes pictures of one size as a GIF in which each fades into the next, without end; asks for one when the one before it
    is shrunk."""
    shown = [_shrunk(picture) for picture in pictures]
    frames = (
        Image.blend(now, then, step / (_BLENDS + 1))
        for now, then in zip(shown, [*shown[1:], shown[0]], strict=True)
        for step in range(_BLENDS + 1)
    )
    times = [_SHOWN_MS, *[_BLEND_MS] * _BLENDS] * len(shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(frames)
    options: dict[str, Any] = {"save_all": True, "append_images": frames, "duration": times, "loop": 0}
    write_atomically(path, lambda temporary: first.save(temporary, format="GIF", **options))


def _shrunk(picture: Image.Image) -> Image.Image:
    """A picture in the size of a GIF's frame."""
    largest = max(picture.size)
    width, height = (max(1, side * min(largest, _LARGEST_FRAME) // largest) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _write(text: str, draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """Writes `text` in one line, cut with an ellipsis where it is wider than `width` pixels."""
    runs = _runs(text)
    total = sum(font.getlength(run) for font, run in runs)
    ellipsis = _font(_DEJAVU).getlength("…") if total > width else 0
    end = left + width - ellipsis
    x: float = left
    for font, run in runs:
        fitting = run
        while fitting and x + font.getlength(fitting) > end:
            fitting = fitting[:-1]
        draw.text((x, top), fitting, fill="black", font=font)
        x += font.getlength(fitting)
        if fitting != run:
            break
    if ellipsis:
        draw.text((x, top), "…", fill="black", font=_font(_DEJAVU))


def _runs(text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """`text` on one line, in pieces that one font each can draw; characters that no font has are written as escapes."""
    drawn = []
    for character in " ".join(text[:_LONGEST_LABEL].split()):
        path = _font_with(character) if character.isprintable() else None
        if path is None and unicodedata.category(character) != "Cf":  # joiners and marks of direction, which are not seen
            drawn.append((_DEJAVU, character.encode("unicode_escape").decode()))
        elif path is not None:
            drawn.append((path, character))
    grouped = itertools.groupby(drawn, key=lambda piece: piece[0])
    return [(_font(path), "".join(piece for _, piece in pieces)) for path, pieces in grouped]


@functools.cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, _FONT_SIZE)


@functools.cache
def _font_with(character: str) -> Path | None:
    """The font to draw a character with: DejaVu Sans, or one that is installed on this machine."""
    return next((path for path in (_DEJAVU, *_installed_fonts()) if ord(character) in _characters(path)), None)


@functools.cache
def _installed_fonts() -> list[Path]:
    """Regular fonts of the system; not those that matplotlib brings for formulas, or to show boxes for everything."""
    own = Path(matplotlib.get_data_path())
    fonts = [font for font in fontManager.ttflist if font.style == "normal" and not Path(font.fname).is_relative_to(own)]
    return [Path(font.fname) for font in sorted(fonts, key=lambda font: (font.weight not in (400, "normal"), font.fname))]


@functools.cache
def _characters(path: Path) -> frozenset[int]:
    """The code points that a font draws at our size; none for one that cannot be opened, as bitmaps of another size."""
    try:
        _font(path)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def bars(names: Sequence[str], panels: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws numbers by name as bars, one panel beside another by its title, as a PNG."""
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(names)), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        drawn = axes.barh(range(len(names)), values)
        axes.bar_label(drawn, [f"{value:,.4g}" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(title=title, xlim=(0, 1.15 * max(*values, 1e-9)))
        axes.invert_yaxis()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes a picture, and texts by keyword into it, as programs that show pictures read them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    information = PngInfo()
    for keyword, text in (texts or {}).items():
        information.add_text(keyword, text)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=information))
