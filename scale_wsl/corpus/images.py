"""Looks at one image file: is it whole, what format and size, and what does it look like when it is small.

Every file is hostile until it is decoded. Must never re-encode or keep an image, and never decode more pixels than the
limit allows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["EXTENSIONS", "LARGEST_MAX_PIXELS", "SIDE", "Look", "RefusedImage", "look", "opened", "small_picture"]

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""The formats that are taken, those that the loader decodes, and the extension that each gets in a shard."""

SIDE = 16
"""Side of the thumbnail, in pixels."""

# Pillow itself refuses to open anything larger than this (twice its MAX_IMAGE_PIXELS).
LARGEST_MAX_PIXELS = 2 * (1024**3 // 4 // 3)


class RefusedImage(Exception):  # noqa: N818 - it names the image
    """An image that cannot be used; `reason` is one of "undecodable" and "too many pixels"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, or it could not be pickled
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Look:
    """What is remembered of an image."""

    extension: str
    width: int
    height: int
    thumbnail: NDArray[np.uint8]
    """`[SIDE, SIDE]`, grey, upright, transparency over white: what a network that sees it over white is shown."""


def look(data: bytes, max_pixels: int) -> Look:
    """Decode an image file, of an animation the first frame, and shrink it to a grey thumbnail.

    A JPEG is decoded at a reduced scale, which still reads all of it, so a truncated one is found. Safe in threads;
    Pillow's warnings are left to the caller, for the filters belong to the whole process.

    Args:
        data: The file's bytes.
        max_pixels: The largest width x height, checked from the header before anything is decoded.

    Raises:
        RefusedImage: The bytes are truncated, damaged, empty, of another format, or of too many pixels.
    """
    with _judged():
        image = opened(data, max_pixels)
        extension = EXTENSIONS[image.format or ""]
        width, height = image.size
        if extension == "jpg":
            image.draft("L", (4 * SIDE, 4 * SIDE))
        image.load()
        return Look(extension, width, height, _thumbnail(image))


def small_picture(data: bytes, max_pixels: int, side: int) -> Image.Image:
    """Decode an image file, of an animation the first frame, and shrink it for people to look at.

    Safe in threads, as `look` is.

    Args:
        data: The file's bytes.
        max_pixels: The largest width x height, checked from the header before anything is decoded.
        side: The longer side of the result, in pixels; a smaller image keeps its size.

    Returns:
        RGB, upright, transparency over white, in the image's own proportions.

    Raises:
        RefusedImage: The bytes are truncated, damaged, empty, of another format, or of too many pixels.
    """
    with _judged():
        image = opened(data, max_pixels)
        if image.format == "JPEG":
            image.draft("RGB", (2 * side, 2 * side))
        image.load()
        scale = min(1.0, side / max(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        small = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return _upright(image, _over_white(small))


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """The image whose header this is; nothing is decoded yet.

    Raises:
        RefusedImage: It has no pixels, or more than the limit.
        Exception: Whatever Pillow's readers run into.
    """
    image = Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
    width, height = image.size
    if width < 1 or height < 1:
        raise RefusedImage("undecodable", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise RefusedImage("too many pixels", f"{width} x {height} are more than the limit of {max_pixels:,}")
    return image


@contextmanager
def _judged() -> Iterator[None]:
    """Whatever decoding runs into becomes a `RefusedImage`."""
    try:
        yield
    except (RefusedImage, MemoryError):  # short memory is this machine's state, not the file's fault
        raise
    except UnidentifiedImageError:
        raise RefusedImage("undecodable", f"no image of the formats {', '.join(EXTENSIONS)}") from None
    except Image.DecompressionBombError as error:
        raise RefusedImage("too many pixels", str(error)) from None
    # Pillow's readers raise whatever their parsing runs into: SyntaxError, struct.error, KeyError, EOFError ...
    except Exception as error:
        raise RefusedImage("undecodable", f"{type(error).__name__}: {error}") from None


def _thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode != "L":
        image = image.convert("L")
    size = (SIDE, SIDE)
    # Shrinking multiplies the colours by alpha, so compositing the few pixels left equals compositing all of them.
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(_upright(image, _over_white(small).convert("L")), np.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow's own conversion clips instead of scaling."""
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _upright(image: Image.Image, small: Image.Image) -> Image.Image:
    """`small` turned as the metadata of `image` says; metadata that cannot be read says nothing."""
    try:
        small.info["exif"] = image.info["exif"]
        return ImageOps.exif_transpose(small)
    except Exception:  # again whatever the parser runs into; the pixels are whole
        return small
