"""The parts that img2dataset calls; that it calls them is tested in test_download.py."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scale_wsl.corpus.download_shard import Settings, _Resizer, _Writer
from scale_wsl.corpus.opener import Budget
from tests.corpus.toy import noise
from tests.loading.fakes import encode


def resized(data: bytes, size: int | None = None, max_pixels: int = 1_000_000) -> tuple[Any, ...]:
    settings = Settings(
        out="",
        staging="",
        images_per_shard=1,
        threads=1,
        timeout=1.0,
        retries=0,
        size=size,
        max_bytes=1,
        max_pixels=max_pixels,
        allow_private=False,
    )
    budget = Budget(1 << 30)
    budget.reserve(len(data))
    result = _Resizer(settings, budget)(io.BytesIO(data))
    assert budget.taken == 0
    return result


def picture(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_stays_as_it_is(format: str) -> None:
    data = encode(noise(1, 40), format)
    assert resized(data) == (data, 40, 40, 40, 40, None)
    assert resized(data, size=40) == (data, 40, 40, 40, 40, None)
    assert resized(data, size=64) == (data, 40, 40, 40, 40, None)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
def test_a_large_image_is_shrunk_to_a_jpeg(mode: str) -> None:
    if mode == "I;16":
        data = encode(Image.fromarray(np.full((60, 90), 40_000, np.uint16)))
    else:
        data = encode(picture(90, 60, mode), "JPEG" if mode == "CMYK" else "PNG")
    small, *sides, error = resized(data, size=20)
    assert (sides, error) == ([30, 20, 90, 60], None)
    image = Image.open(io.BytesIO(small))
    assert (image.format, image.size) == ("JPEG", (30, 20))
    left = np.asarray(image.convert("RGB"))[5:15, 2:8].mean((0, 1))
    if mode in ("RGB", "P", "RGBA", "CMYK"):
        assert left[0] > 200
        assert left[2] < 60
    if mode == "I;16":
        assert abs(left - 40_000 / 256).max() < 3


def test_transparency_is_over_white() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    small = resized(encode(image), size=16)[0]
    assert np.asarray(Image.open(io.BytesIO(small))).min() > 250


@pytest.mark.parametrize(("orientation", "size"), [(1, (30, 20)), (3, (30, 20)), (6, (20, 30)), (8, (20, 30))])
def test_a_shrunk_image_is_upright(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(90, 60).save(buffer, "JPEG", exif=exif, quality=95)
    small, width, height, *_ = resized(buffer.getvalue(), size=20)
    image = Image.open(io.BytesIO(small))
    assert image.size == (width, height) == size
    assert 0x0112 not in image.getexif()
    red = np.asarray(image)[..., 0] > 128
    where = {1: red[:, :10], 3: red[:, -10:], 6: red[:10], 8: red[-10:]}[orientation]
    assert where.mean() > 0.95


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "undecodable: UnidentifiedImageError, 0 bytes"),
        (b"<html>", "undecodable: UnidentifiedImageError, 6 bytes"),
        (encode(noise(1), "TIFF"), "undecodable: UnidentifiedImageError"),
        (encode(Image.new("1", (2000, 2000))), "too many pixels: 2000 x 2000"),
    ],
)
def test_what_is_no_image(data: bytes, error: str) -> None:
    for size in (None, 16):
        *nothing, said = resized(data, size)
        assert nothing == [None] * 5
        assert said.startswith(error)


def test_a_bomb_and_a_truncated_image() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the process does
        bomb = encode(Image.new("1", (20_000, 20_000)))
        assert resized(bomb)[-1].startswith("too many pixels")
    cut = encode(noise(1, 200))[:2000]
    assert resized(cut)[0] == cut  # only the header was read: prepare looks at all of it
    assert resized(cut, size=20)[-1].startswith("undecodable: ")


@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]), st.integers(0, 200))
def test_any_bytes_are_an_image_or_none(junk: bytes, format: str, kept: int) -> None:
    data = encode(noise(1), format)[:kept] + junk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, *_, error = resized(data, size=16)
    assert (image is None) == isinstance(error, str)


# --- the writer ----------------------------------------------------------------------------------------------------


def row(number: int, refused: str | None = None) -> dict[str, Any]:
    return {"row": number, "url": f"u{number}", "hashtags": ["a"], "caption": None, "group": None, "refused": refused}


def facts(number: int, status: str = "success", error: str | None = None) -> dict[str, Any]:
    sides = dict.fromkeys(("width", "height", "original_width", "original_height"), 24)
    return {**row(number), "key": "theirs", "status": status, "error_message": error, **sides, "sha256": "0"}


def test_the_tar_and_the_table_are_by_row(tmp_path: Path) -> None:
    rows = [row(7), row(8, "scheme: ftp"), row(9), row(10), row(11)]
    writer = _Writer(rows, 3, str(tmp_path), False, 6, None, "jpg")
    writer.write(encode(noise(2), "GIF"), "x", None, facts(11))
    writer.write(None, "x", None, facts(9, "failed_to_download", "HTTP 404: "))
    writer.write(encode(noise(1)), "x", None, facts(7))
    writer.close()
    with tarfile.open(tmp_path / "000003.tar") as tar:
        assert tar.getnames() == ["000000007.png", "000000007.json", "000000011.gif", "000000011.json"]
        assert tar.extractfile("000000007.png").read() == encode(noise(1))  # type: ignore[union-attr]
        assert json.load(tar.extractfile("000000011.json"))["url"] == "u11"  # type: ignore[arg-type]
    table = pq.read_table(tmp_path / "000003.parquet").to_pylist()
    assert [(line["row"], line["status"], line["error_message"]) for line in table] == [
        (7, "success", None),
        (8, "refused", "scheme: ftp"),
        (9, "failed_to_download", "HTTP 404: "),
        (10, "failed_to_download", "lost: img2dataset failed on it"),
        (11, "success", None),
    ]


def test_a_full_disk_is_not_passed_over(tmp_path: Path) -> None:
    writer = _Writer([row(0), row(1)], 0, str(tmp_path))
    writer._spool.close()

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    writer._spool = Full()  # type: ignore[assignment]
    for number in range(2):
        writer.write(b"x", "", None, facts(number))
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not (tmp_path / "000000.tar").exists()
