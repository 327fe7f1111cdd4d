"""What people would rather look at than read: labelled grids of images, and curves of metrics."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from engine.files import write_atomically

_MARGIN = 4
_MIN_CELL = 64


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """A grid with a caption over each row of images; small images are enlarged without smoothing."""
    side = max(image.width for _, images in rows for image in images)
    factor = max(1, -(-_MIN_CELL // side))
    width = max(image.width * factor for _, images in rows for image in images)
    height = max(image.height * factor for _, images in rows for image in images)
    columns = max(len(images) for _, images in rows)
    font = ImageFont.load_default(14)
    label_height = 20
    grid = Image.new(
        "RGB",
        (columns * (width + _MARGIN) + _MARGIN, len(rows) * (height + label_height + _MARGIN) + _MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(grid)
    for number, (label, images) in enumerate(rows):
        top = _MARGIN + number * (height + label_height + _MARGIN)
        draw.text((_MARGIN, top), _fit(label, draw, font, grid.width - 2 * _MARGIN), fill="black", font=font)
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            grid.paste(enlarged, (_MARGIN + column * (width + _MARGIN), top + label_height))
    return grid


def _fit(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def curves(lines: Sequence[dict[str, float]], names: Sequence[str], path: Path) -> None:
    """Plots metrics by step, one panel per name, as a PNG."""
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(10, 3 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, 2, squeeze=False).flat, names, strict=True):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def save_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
