"""Opening a picture safely: whatever the file holds, an upright RGB picture comes out, or one clear sentence."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sightline.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What may be opened. The other decoders of Pillow are seldom needed and seldom hardened."""

MAX_PIXELS = 89_478_485
"""The largest picture that is decoded: a quarter of a gigabyte as RGB."""

Source = str | os.PathLike[str] | bytes | Image.Image


def open_picture(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as RGB, 8 bits a channel, upright, detached from its file.

    The EXIF orientation is applied, transparency is laid on white, an animation gives its first frame, 16-bit grey is
    brought to 8 bits by its full range, and a picture of real numbers is stretched from its own darkest to its own
    brightest pixel. The size is looked up in the header, before anything is decoded.

    Args:
        source: a path, the bytes of a file, or a Pillow image (which is not changed).
        max_pixels: refuse pictures with more than this.

    Raises:
        InputError: naming the source, when it is missing, a folder, no picture of the known `FORMATS`, too large, or
            cut off.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, "the given image", max_pixels)
    if isinstance(source, bytes):
        name = "the given bytes"
        file: IO[bytes] = io.BytesIO(source)
        if not source:
            raise InputError(f"{name}: there is nothing in them")
    else:
        path = Path(source)
        name = f"picture {str(path)!r}"
        file = open_file(path, name)
    with file:
        try:
            with warnings.catch_warnings():
                # Pillow warns of large pictures; here they are refused, or allowed by whoever set `max_pixels`.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise InputError(f"{name} is not a picture that can be read; known formats: {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError:
            raise InputError(f"{name} is too large: it has more than twice {Image.MAX_IMAGE_PIXELS} pixels") from None
        except Exception as error:
            raise InputError(f"{name} is damaged: {error}") from error
        with image:
            return _decoded(image, name, max_pixels)


def open_file(path: Path, name: str) -> IO[bytes]:
    """A file, open for reading; `name` is how it is called in messages.

    Raises:
        InputError: when it is missing, a folder or another thing that is no file, empty, or may not be opened.
    """
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder, not a file")
        if not path.exists():
            raise InputError(f"{name} does not exist")
        if not path.is_file():
            raise InputError(f"{name} is not a regular file")
        if path.stat().st_size == 0:
            raise InputError(f"{name} is empty")
        return path.open("rb")
    except InputError:
        raise
    except (OSError, ValueError) as error:  # no permission; a name that no file can have
        raise InputError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def _decoded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(f"{name} is too large: {width} x {height} pixels, at most {max_pixels} are allowed")
    if width * height == 0:
        raise InputError(f"{name} has no pixels")
    try:
        image.load()
        return _rgb(_upright(image))
    except Exception as error:  # the decoders raise errors of every kind for a damaged file
        raise InputError(f"{name} is damaged or cut off: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an EXIF block that cannot be read is common, and no reason to refuse the picture
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))
    elif image.mode == "F":
        levels = np.nan_to_num(np.asarray(image).astype(np.float64))
        low, high = levels.min(), levels.max()
        levels = (levels - low) * (255 / (high - low)) if high > low else np.zeros_like(levels)
        image = Image.fromarray(levels.round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image.copy() if image.mode == "RGB" else image.convert("RGB")
