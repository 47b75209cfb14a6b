from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path

import pytest
from PIL import Image

from scale_wsl.corpus.images import RefusedImage
from scale_wsl.corpus.posts import Post
from scale_wsl.corpus.sources import EmojiSource, emoji, open_source
from scale_wsl.errors import UserError


@pytest.fixture(scope="module")
def posts() -> dict[str, Post]:
    return {post.key: post for post in EmojiSource(pixels=40).posts()}


def test_every_emoji_has_a_drawing_and_keywords(posts: dict[str, Post]) -> None:
    assert len(posts) == EmojiSource().count() == 1914
    assert posts["1F40D"].hashtags[0] == "snake"
    assert "animal" in posts["1F40D"].hashtags
    assert all(post.hashtags for post in posts.values())


def test_a_drawing_is_a_transparent_png_and_always_the_same(posts: dict[str, Post]) -> None:
    draw = posts["1F40D"].image
    assert not isinstance(draw, Path)
    data = draw()
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, image.mode) == ("PNG", (40, 40), "RGBA")
    assert image.getchannel("A").getextrema() == (0, 255)
    assert draw() == data


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1F3C3", "1F3C3-200D-2640-FE0F", True),  # person running, woman running
        ("1F3C3-200D-2642-FE0F", "1F3C3-200D-27A1-FE0F", True),  # man running, person running facing right
        ("1F468-200D-1F33E", "1F469-200D-1F33E", True),  # man farmer, woman farmer
        ("1F468-200D-1F468-200D-1F466", "1F468-200D-1F469-200D-1F467", True),  # families
        ("1F468", "1F468-200D-1F33E", False),
        ("1F600", "1F603", False),
        ("1F1E9-1F1EA", "1F1E9-1F1F0", False),  # two flags
    ],
)
def test_variants_of_one_emoji_are_a_group(posts: dict[str, Post], one: str, other: str, same: bool) -> None:
    assert posts[one].group is not None
    assert (posts[one].group == posts[other].group) is same


def test_a_part_is_spread_over_the_list() -> None:
    some = [post.key for post in open_source("emoji", limit=50).posts()]
    everything = [post.key for post in EmojiSource().posts()]
    places = [everything.index(key) for key in some]
    assert len(some) == 50
    assert places == sorted(places)
    assert places[-1] > 1800


def test_a_drawing_that_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    (tmp_path / "broken.svg").write_text("<svg")
    with pytest.raises(RefusedImage, match="undecodable"):
        emoji._draw(tmp_path / "broken.svg", 40)

    def panic(**_: object) -> bytes:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("resvg_py.svg_to_bytes", panic)
    with pytest.raises(RefusedImage, match="PanicException: index out of bounds"):
        emoji._draw(tmp_path / "broken.svg", 40)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "resvg-py":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"needs the package resvg-py.*pip install 'scale-wsl\[emoji\]'"):
        open_source("emoji")


@pytest.mark.parametrize("options", [{"pixels": 4}, {"limit": 0}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="but must be"):
        open_source("emoji", **options)
