"""Image bytes in, a cropped `uint8` tensor out; the only place where files from outside meet an image decoder.

Every file is hostile until it is decoded. Must never open a format that is not listed here, allocate more than the
pixel limit allows, let a decoder's warning or error out other than as `CorruptImage`, or keep a generator of its own.

What no check here finds: a JPEG whose entropy-coded data is damaged but complete. libjpeg conceals that, as it does for
every viewer. JPEG's scaled decoding (`draft`) is not used: it is faster on images far larger than the crop, but its
pixels are not those of the resampling filter. The one colour that a PNG of 2, 4 or 3 x 16 bits may name as transparent
stays opaque: Pillow compares it at another depth.
"""

from __future__ import annotations

import functools
import io
import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

__all__ = [
    "LARGEST_MAX_PIXELS",
    "MEAN",
    "STD",
    "CorruptImage",
    "decode",
    "eval_crop",
    "normalize",
    "random_crop_box",
    "train_crop",
]

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training pixels in [0, 1], RGB: those of the released WSL-Images weights
STD = (0.229, 0.224, 0.225)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pillow itself refuses to open anything larger than this (twice its MAX_IMAGE_PIXELS).
LARGEST_MAX_PIXELS = 2 * (1024**3 // 4 // 3)

_WIDEST = 16  # aspect ratio beyond which an evaluation image is cut before it is resized; see `eval_crop`
_UPRIGHT = {  # what undoes each EXIF orientation (EXIF 2.3, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class CorruptImage(Exception):  # noqa: N818 - it names the image
    """These bytes are not a whole image of a known format within the pixel limit; the message says why."""


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file to RGB, upright, transparency composited over white; of an animation its first frame.

    JPEG (CMYK too, converted without a colour profile), PNG (palette, grey, 16 bits a channel reduced to 8), WebP, GIF
    and BMP are read. Takes up to 12 bytes of memory per pixel: three copies of the image.

    Args:
        data: the file's bytes.
        max_pixels: the largest width x height, checked from the header before anything is decoded; at most
            `LARGEST_MAX_PIXELS`.

    Raises:
        CorruptImage: the bytes are truncated, damaged, empty, of another format, or of too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bombs and damaged metadata: judged here, so nothing is left to warn of
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width < 1 or height < 1:
                raise CorruptImage(f"{width} x {height} pixels")
            if width * height > max_pixels:
                raise CorruptImage(f"{width} x {height} pixels are more than the limit of {max_pixels:,}")
            image.load()
            return _upright(image, _to_rgb(image))
        except (CorruptImage, MemoryError):  # short memory is this machine's state, not the file's fault
            raise
        except UnidentifiedImageError:
            raise CorruptImage(f"{len(data):,} bytes that are no image of the formats {', '.join(FORMATS)}") from None
        # Pillow's readers raise whatever their parsing runs into: SyntaxError, struct.error, KeyError, EOFError ...
        except Exception as error:
            raise CorruptImage(f"{type(error).__name__}: {error}") from None


def random_crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    min_scale: float = 0.08,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random part of an image, (left, top, right, bottom), by the algorithm of torchvision's RandomResizedCrop.

    The area is uniform in [min_scale, 1] of the image's, the aspect ratio log-uniform in `ratio`, the place uniform.
    After ten draws that do not fit, the largest centred part with an allowed ratio. The defaults are those of Mahajan
    et al. 2018.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1.0)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h + 1))
            left = int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_crop(
    image: Image.Image, size: int, rng: np.random.Generator, *, min_scale: float = 0.08, flip: bool = True
) -> torch.Tensor:
    """A random part of an RGB image, resized to a square and mirrored half of the time; uint8 `[3, size, size]`.

    Bilinear with antialiasing. The pixels are those of torchvision's resized_crop: cut, then resized. (Pillow's
    `resize(box=...)` would let the filter see across the cut; it was no faster.)
    """
    part = image.crop(random_crop_box(*image.size, rng, min_scale=min_scale))
    pixels = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return _to_tensor(pixels)


def eval_crop(image: Image.Image, resize: int, size: int) -> torch.Tensor:
    """An RGB image resized so that its short side is `resize`, and the centre of it; uint8 `[3, size, size]`.

    The pixels are those of torchvision's Resize + CenterCrop. An image wider than 16:1, or taller, is first cut to its
    middle of that ratio, because the side that is thrown away would else be blown up to any length.
    """
    if resize < size:
        raise ValueError(f"cannot cut {size} pixels out of {resize}")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > _WIDEST * short:
        long = _WIDEST * short
        left, top = max(0, (width - long) // 2), max(0, (height - long) // 2)
        image = image.crop((left, top, left + min(width, long), top + min(height, long)))
        width, height = image.size
    other = int(resize * long / short)
    width, height = (resize, other) if width <= height else (other, resize)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _to_tensor(np.asarray(image.crop((left, top, left + size, top + size))))


def normalize(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Pixels `[N, 3, H, W]` uint8 as the network's input: ImageNet's mean 0 and variance 1 for each channel.

    Computed where the images are, in at least fp32 and then rounded to `dtype`; keeps the memory format. Sending uint8
    to the device and doing this there moves a quarter of the bytes.
    """
    precise = torch.promote_types(dtype, torch.float32)
    mean, std = _mean_and_std(images.device, precise)
    return images.to(precise).sub_(mean).div_(std).to(dtype)


def mean_colour(size: int) -> torch.Tensor:
    """What stands in a batch for an image that is not there, uint8 `[3, size, size]`: zero once it is normalised."""
    return torch.tensor([round(255 * mean) for mean in MEAN], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)


@functools.lru_cache(maxsize=16)  # once per device: making them is a copy that waits for the device
def _mean_and_std(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = ((255 * torch.tensor(values, dtype=torch.float64)).view(1, 3, 1, 1) for values in (MEAN, STD))
    return mean.to(device, dtype), std.to(device, dtype)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips instead of scaling
        grey = np.asarray(image)
        pixels = (grey.clip(0, 65535) >> 8).astype(np.uint8)
        if "transparency" in image.info:
            pixels[grey == image.info["transparency"]] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", layer.size, "white")
        white.paste(layer, mask=layer)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """`rgb` turned as the metadata of `image` says; metadata that cannot be read says nothing."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # again whatever the parser runs into; the pixels are whole
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _to_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # a copy: Pillow's memory is read-only
