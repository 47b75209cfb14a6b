from __future__ import annotations

import io
import math
import struct
import types
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.transforms as torchvision_module
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import functional

from scale_wsl.loading.decode import (
    LARGEST_MAX_PIXELS,
    MEAN,
    STD,
    CorruptImage,
    decode,
    eval_crop,
    mean_colour,
    normalize,
    random_crop_box,
    train_crop,
)
from tests.loading.fakes import encode

LIMIT = 1_000_000


def photo(width: int = 63, height: int = 54, seed: int = 0) -> np.ndarray:
    """Smooth random colours: like a photograph, unlike noise, it survives JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, row: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body


def colours(data: bytes) -> list[list[int]]:
    image = decode(data, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 40),
        ("JPEG", {"quality": 95, "subsampling": 0}, 10),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 10),
        ("MPO", {"quality": 95, "subsampling": 0}, 10),  # a JPEG with further pictures behind it, as phones write
    ],
)
def test_formats(format: str, options: dict[str, object], tolerance: int) -> None:
    image = decode(encode(photo(), format, **options), LIMIT)
    assert (image.mode, image.size) == ("RGB", (63, 54))
    assert np.abs(np.asarray(image).astype(int) - photo()).max() <= tolerance


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        data = encode(
            frames[0],
            format,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if format == "WEBP" else {}),
        )
        assert colours(data) == [[255, 0, 0]] * 20


def test_transparency_shows_white() -> None:
    half = np.array([[[200, 0, 0, 0], [200, 0, 0, 128], [200, 0, 0, 255]]], np.uint8)
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    assert colours(encode(half)) == expected
    assert colours(encode(half, "WEBP", lossless=True, exact=True)) == expected
    palette = chunk(b"PLTE", bytes([200, 0, 0, 200, 0, 0, 200, 0, 0])) + chunk(b"tRNS", bytes([0, 128]))
    assert colours(png(3, 1, 8, 3, bytes([0, 1, 2]), palette)) == expected
    grey = np.array([[[100, 0], [100, 255]]], np.uint8)
    assert colours(encode(Image.fromarray(grey, "LA"))) == [[255] * 3, [100] * 3]
    assert colours(png(2, 1, 8, 0, bytes([1, 200]), chunk(b"tRNS", struct.pack(">H", 1)))) == [[255] * 3, [200] * 3]
    named = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    assert colours(png(2, 1, 8, 2, bytes([1, 2, 3, 4, 5, 6]), named)) == [[255] * 3, [4, 5, 6]]


def test_other_depths_and_colour_models() -> None:
    deep = struct.pack(">HH", 0x1234, 0xFEDC)
    assert colours(png(2, 1, 16, 0, deep)) == [[0x12] * 3, [0xFE] * 3]  # scaled, not clipped
    assert colours(png(2, 1, 16, 0, deep, chunk(b"tRNS", struct.pack(">H", 0x1234)))) == [[255] * 3, [0xFE] * 3]
    assert colours(png(1, 1, 16, 2, deep + b"\x80\0")) == [[0x12, 0xFE, 0x80]]
    assert colours(png(8, 1, 1, 0, bytes([0b10100000])))[:4] == [[255] * 3, [0] * 3, [255] * 3, [0] * 3]
    assert colours(encode(Image.new("L", (2, 1), 77))) == [[77] * 3] * 2
    assert colours(encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG")) == [[255, 0, 0]]
    assert colours(encode(Image.new("L", (1, 1), 77), "JPEG")) == [[77] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data, LIMIT)), np.asarray(expected))


def test_damaged_metadata_does_not_cost_the_image() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 50):
        data = encode(photo(), "JPEG", exif=exif)
        assert decode(data, LIMIT).size == (63, 54)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes that are no image"),
        (b"#brownbear\n" * 20, "220 bytes that are no image"),
        (encode(photo(), "TIFF"), "no image of the formats JPEG, PNG, WEBP, GIF, BMP"),
        (encode(photo(), "PPM"), "no image of the formats"),
        (encode(photo(), "ICO"), "no image of the formats"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "no image of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of the formats"),  # would start ghostscript
        (png(0, 0, 8, 0, b""), "no image"),
        (png(1001, 1000, 8, 0, b""), "1001 x 1000 pixels are more than the limit of 1,000,000"),
        (png(50_000, 50_000, 8, 0, b""), "exceeds limit"),
        (b"GIF89a" + b"\xff" * 4 + encode(Image.new("P", (5, 4)), "GIF")[10:], "exceeds limit"),
        (b"BM" + b"\0" * 60, "header"),
        (encode(photo())[:-200], "truncated"),
    ],
)
def test_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptImage, match=reason):
        decode(data, LIMIT)


def test_the_pixel_limit_is_ours_up_to_pillows() -> None:
    # 8,000 x 12,000: Pillow would warn, and the limit allows it; the data is cut short, so decoding is what fails
    with pytest.raises(CorruptImage, match="truncated"):
        decode(png(8_000, 12_000, 8, 0, b"\0" * 9), LARGEST_MAX_PIXELS)
    at_limit = encode(Image.new("RGB", (50, 40)))
    assert decode(at_limit, 2000).size == (50, 40)
    with pytest.raises(CorruptImage, match="50 x 40 pixels are more than the limit of 1,999"):
        decode(at_limit, 1999)
    with pytest.raises(CorruptImage, match="exceeds limit"):
        decode(png(13_378, 13_378, 8, 0, b""), LARGEST_MAX_PIXELS)
    assert 13_377**2 <= LARGEST_MAX_PIXELS < 13_378**2


def test_short_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    data = encode(photo())
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(MemoryError):
        decode(data, LIMIT)


FILES = {
    "png": encode(photo()),
    "palette": encode(Image.fromarray(photo()).quantize(16)),
    "jpeg": encode(photo(), "JPEG"),
    "progressive": encode(photo(), "JPEG", progressive=True),
    "webp": encode(photo(), "WEBP"),
    "lossless": encode(photo(), "WEBP", lossless=True),
    "gif": encode(Image.fromarray(photo()).quantize(16), "GIF"),
    "bmp": encode(photo(), "BMP"),
    "large jpeg": encode(photo(700, 500), "JPEG", quality=95),
    "large png": encode(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_unless_no_pixel_is_missing(name: str, share: float) -> None:
    data = FILES[name]
    cut = int(share * len(data)) if share < 0.5 else len(data) - 1 - int((1 - share) ** 4 * len(data))
    try:
        image = decode(data[:cut], LIMIT)
    except CorruptImage:
        return
    assert np.array_equal(np.asarray(image), np.asarray(decode(data, LIMIT)))


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.tuples(
            st.sampled_from(sorted(FILES)),
            st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
            st.binary(max_size=40),
        ),
        st.tuples(
            st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x40\0\0\0WEBPVP8 ", b"GIF89a", b"BM"]),
            st.binary(max_size=200),
        ),
    )
)
def test_any_bytes_are_an_image_or_corrupt(made: bytes | tuple[object, ...]) -> None:
    if isinstance(made, bytes):
        data = made
    elif len(made) == 2:
        data = made[0] + made[1]  # type: ignore[operator]
    else:
        changed = bytearray(FILES[made[0]])  # type: ignore[index]
        for place, value in made[1]:  # type: ignore[union-attr]
            changed[int(place * min(len(changed), 400))] = value
        data = bytes(changed) + made[2]  # type: ignore[operator]
    try:
        image = decode(data, LIMIT)
    except CorruptImage as error:
        assert str(error)  # noqa: PT017 - that it is raised is not asserted
    else:
        assert image.mode == "RGB"
        assert 1 <= image.width * image.height <= LIMIT


# --- crops -----------------------------------------------------------------------------------------------------------

sides = st.integers(1, 400)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 64), st.integers(0, 40))
def test_evaluation_pixels_are_torchvisions(width: int, height: int, size: int, more: int) -> None:
    if max(width, height) > 16 * min(width, height):
        width = height
    image = Image.fromarray(photo(width, height, seed=size))
    expected = T.Compose([T.Resize(size + more), T.CenterCrop(size), T.PILToTensor()])(image)
    got = eval_crop(image, size + more, size)
    assert (got.dtype, got.shape, got.is_contiguous()) == (torch.uint8, (3, size, size), True)
    assert torch.equal(got, expected)


def test_an_absurdly_long_image_costs_no_more_than_its_middle() -> None:
    # Resized as it stands, this would be 256 x 25,600,000 pixels.
    strip = np.zeros((100_000, 1, 3), np.uint8)
    strip[49_992:50_008] = 255
    for image in (Image.fromarray(strip), Image.fromarray(strip.transpose(1, 0, 2).copy())):
        assert eval_crop(image, 256, 224).float().mean() == 255
    with pytest.raises(ValueError, match="cannot cut 9 pixels out of 8"):
        eval_crop(Image.fromarray(strip), 8, 9)


@settings(max_examples=150, deadline=None)
@given(sides, sides, st.integers(0, 2**32), st.floats(0.05, 1))
def test_crop_boxes_are_torchvisions_on_the_same_draws(width: int, height: int, seed: int, min_scale: float) -> None:
    rng = np.random.default_rng(seed)

    class Drawn:
        def uniform_(self, low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
            return torch.tensor(rng.uniform(float(low), float(high)), dtype=torch.float64)

    on_the_same_draws = types.SimpleNamespace(
        log=lambda values: [math.log(value) for value in values],
        tensor=lambda values: values,
        exp=lambda value: torch.tensor(math.exp(value.item()), dtype=torch.float64),
        empty=lambda _: Drawn(),
        randint=lambda low, high, size: torch.tensor(int(rng.integers(low, high))),
    )
    theirs_torch, torchvision_module.torch = torchvision_module.torch, on_the_same_draws
    try:
        i, j, h, w = T.RandomResizedCrop.get_params(Image.new("L", (width, height)), [min_scale, 1], [3 / 4, 4 / 3])
    finally:
        torchvision_module.torch = theirs_torch
    ours = random_crop_box(width, height, np.random.default_rng(seed), min_scale=min_scale)
    assert ours == (j, i, j + w, i + h)
    assert 0 <= ours[0] < ours[2] <= width
    assert 0 <= ours[1] < ours[3] <= height


def test_training_pixels_are_torchvisions() -> None:
    image = Image.fromarray(photo(300, 200))
    flips = 0
    for seed in range(20):
        left, top, right, bottom = random_crop_box(300, 200, np.random.default_rng(seed))
        expected = functional.resized_crop(image, top, left, bottom - top, right - left, [64, 64])
        expected = functional.pil_to_tensor(expected)
        got = train_crop(image, 64, np.random.default_rng(seed), flip=False)
        assert torch.equal(got, expected)
        flipped = train_crop(image, 64, np.random.default_rng(seed), flip=True)
        assert (flipped.dtype, flipped.shape, flipped.is_contiguous()) == (torch.uint8, (3, 64, 64), True)
        flips += not torch.equal(flipped, got)
        assert torch.equal(flipped, got) or torch.equal(flipped, got.flip(2))
    assert 4 <= flips <= 16


def test_crops_are_uniform_in_area_and_log_ratio() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(2000, 2000, rng, min_scale=0.08) for _ in range(4000)], float)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    small = w * h / 4e6 < 0.7  # larger ones are rejected more often the longer they are
    area = np.sort(w[small] * h[small] / 4e6)
    ratio = np.sort(np.log(w / h)[small])
    for drawn, low, high in ((area, 0.08, 0.7), (ratio, math.log(3 / 4), math.log(4 / 3))):
        distance = np.abs((drawn - low) / (high - low) - np.linspace(0, 1, len(drawn))).max()
        assert distance < 1.63 / math.sqrt(len(drawn)) + 0.005  # Kolmogorov-Smirnov at 1 %, and rounding to pixels
    centred = train_crop(Image.new("RGB", (1, 1000), "red"), 8, rng)  # no draw fits: the fallback
    assert centred[:, 0, 0].tolist() == [255, 0, 0]


# --- what the network sees -------------------------------------------------------------------------------------------


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = functional.normalize(images.double() / 255, MEAN, STD)
    torch.testing.assert_close(normalize(images, torch.float64), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(normalize(images), expected.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(normalize(images, torch.bfloat16), normalize(images).bfloat16())
    before = images.clone()
    last = normalize(images.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, normalize(images))
    assert torch.equal(images, before)
    assert normalize(mean_colour(4).unsqueeze(0)).abs().max() < 0.01
