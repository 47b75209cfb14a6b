from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scale_wsl.corpus.images import EXTENSIONS, LARGEST_MAX_PIXELS, SIDE, RefusedImage, look, small_picture
from scale_wsl.loading import decode
from tests.loading.fakes import encode

LIMIT = 10_000_000


def scene(width: int = 80, height: int = 60) -> Image.Image:
    """A dark square in the upper left of a bright picture."""
    pixels = np.full((height, width, 3), (250, 240, 200), np.uint8)
    pixels[: height // 2, : width // 2] = (20, 60, 40)
    return Image.fromarray(pixels)


def test_formats_and_limits_are_the_loaders() -> None:
    assert set(EXTENSIONS) == set(decode.FORMATS)
    assert LARGEST_MAX_PIXELS == decode.LARGEST_MAX_PIXELS


@pytest.mark.parametrize(("kind", "extension"), EXTENSIONS.items())
def test_every_format_is_looked_at(kind: str, extension: str) -> None:
    seen = look(encode(scene(), kind), LIMIT)
    assert (seen.extension, seen.width, seen.height) == (extension, 80, 60)
    assert seen.thumbnail.shape == (SIDE, SIDE)
    assert seen.thumbnail[: SIDE // 2 - 1, : SIDE // 2 - 1].max() < 70
    assert seen.thumbnail[SIDE // 2 + 1 :].min() > 220


def test_what_shows_through_is_white() -> None:
    drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 0, 32, 64))
    thumbnail = look(encode(drawing), LIMIT).thumbnail
    assert thumbnail[:, : SIDE // 2 - 1].max() < 5
    assert thumbnail[:, SIDE // 2 + 1 :].min() > 250
    palette = drawing.convert("P")
    palette.info["transparency"] = palette.getpixel((60, 10))
    assert (
        np.abs(
            look(encode(palette, transparency=palette.info["transparency"]), LIMIT).thumbnail.astype(int) - thumbnail
        ).max()
        < 5
    )


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.tile(np.arange(64, dtype=np.uint16) * 1000, (64, 1)))
    thumbnail = look(encode(grey), LIMIT).thumbnail
    assert (np.diff(thumbnail.astype(int), axis=1) > 5).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_seen_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(96, 96), "JPEG", quality=95, exif=exif)
    upright = np.asarray(decode.decode(data, LIMIT).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), int)
    assert np.abs(look(data, LIMIT).thumbnail - upright).max() < 40


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_truncated_file_is_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(noise, kind)
    with pytest.raises(RefusedImage) as refused:
        look(data[: len(data) * 2 // 3], LIMIT)
    assert refused.value.reason == "undecodable"


def test_pixels_are_limited_before_anything_is_decoded() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for width, height in ((5_000, 2_001), (2**30, 2**30)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        with pytest.raises(RefusedImage) as refused:
            look(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""), LIMIT)
        assert refused.value.reason == "too many pixels"


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", None]), st.integers(0, 200))
def test_any_bytes_are_looked_at_or_refused(noise: bytes, kind: str | None, at: int) -> None:
    data = noise if kind is None else (whole := encode(scene(), kind))[:at] + noise + whole[at + len(noise) :]
    with contextlib.suppress(RefusedImage):
        assert look(data, LIMIT).thumbnail.shape == (SIDE, SIDE)


def test_what_is_looked_at_the_loader_decodes() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr"):
        kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
        buffer = io.BytesIO()
        image = scene().convert("L").convert("I").convert("I;16") if mode == "I;16" else scene().convert(mode)
        image.save(buffer, kind)
        seen = look(buffer.getvalue(), LIMIT)
        assert decode.decode(buffer.getvalue(), LIMIT).size == (seen.width, seen.height)


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_small_picture_is_the_loaders_image_shrunk(kind: str) -> None:
    data = encode(scene(400, 300), kind, **({"quality": 95} if kind == "JPEG" else {}))
    small = small_picture(data, LIMIT, 80)
    assert (small.mode, small.size) == ("RGB", (80, 60))
    whole = decode.decode(data, LIMIT).resize((80, 60), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small, int) - np.asarray(whole, int)).mean() < 3


def test_a_small_picture_of_a_small_or_a_thin_image_keeps_its_proportions() -> None:
    assert small_picture(encode(scene(20, 10)), LIMIT, 80).size == (20, 10)
    assert small_picture(encode(scene(900, 2)), LIMIT, 80).size == (80, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_small_picture_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(160, 120), "JPEG", quality=95, exif=exif)
    upright = decode.decode(data, LIMIT)
    upright.thumbnail((80, 80))
    small = small_picture(data, LIMIT, 80)
    assert small.size == upright.size
    assert np.abs(np.asarray(small, int) - np.asarray(upright, int)).mean() < 6


def test_a_small_picture_shows_white_through_and_scales_sixteen_bits() -> None:
    drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    drawing.paste((255, 0, 0, 255), (0, 0, 32, 64))
    small = np.asarray(small_picture(encode(drawing), LIMIT, 32))
    assert small[16, 4].tolist() == [255, 0, 0]
    assert small[16, 28].tolist() == [255, 255, 255]
    grey = Image.fromarray(np.tile(np.arange(64, dtype=np.uint16) * 1000, (64, 1)))
    assert (np.diff(np.asarray(small_picture(encode(grey), LIMIT, 64), int)[:, :, 0], axis=1) > 0).all()


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_no_small_picture_of_a_damaged_or_large_file(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(pixels), kind)
    for damaged, limit, reason in ((data[: len(data) // 2], LIMIT, "undecodable"), (data, 4095, "too many pixels")):
        with pytest.raises(RefusedImage) as refused:
            small_picture(damaged, limit, 32)
        assert refused.value.reason == reason


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(EXTENSIONS)), st.data())
def test_a_small_picture_of_any_bytes_is_made_or_refused(kind: str, data: st.DataObject) -> None:
    content = bytearray(encode(scene(), kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings(), contextlib.suppress(RefusedImage):
        warnings.simplefilter("ignore")
        assert max(small_picture(bytes(content), LIMIT, 32).size) <= 32
