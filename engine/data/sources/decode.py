"""Images and captions as a source holds them, made what the families take, or refused with a reason."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from engine.data.sources.interface import Refused
from engine.errors import first_line


def decode(data: Path | io.BytesIO) -> Image.Image:
    """Reads an image whole, upright and in RGB, as `datasets` and the scripts do together.

    Raises:
        Refused: not an image, truncated, or so large that decoding it could exhaust memory (PIL's limit).
    """
    try:
        # PIL warns between one and two times its pixel limit, and refuses above; only the refusal matters here. The scripts
        # drop a palette's transparency too.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency")
            with Image.open(data) as image:
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise Refused("image too large to decode safely") from None
    except FileNotFoundError:
        raise Refused("no such image file") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise Refused("unreadable image", first_line(error)[:120]) from None


def clean_captions(value: Any) -> list[str]:
    """A caption column's value as a list of captions that are not empty.

    Raises:
        Refused: none is left, or the value is neither text nor a list of texts.
    """
    if value is None or (isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0):
        raise Refused("no caption")
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, np.ndarray)) or not all(isinstance(item, str) for item in values):
        raise Refused("caption is neither text nor a list of texts")
    captions = [item for item in values if item.strip()]
    if not captions:
        raise Refused("empty caption")
    return captions
