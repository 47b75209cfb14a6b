from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scale_wsl.training.picture import prediction_sheet

GREEN = np.array([0x1A, 0x7F, 0x37])


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def sheet(path: Path, true: list[list[str]], predicted: list[list[tuple[str, float]]], title: str = "") -> np.ndarray:
    images = np.full((len(true), 3, 32, 32), 255, dtype=np.uint8)
    prediction_sheet(images, true, predicted, path, title)
    return drawn(path)


def greens(pixels: np.ndarray) -> int:
    return int((np.abs(pixels - GREEN).max(axis=-1) < 8).sum())


def test_what_was_predicted_right_is_green(tmp_path: Path) -> None:
    wrong = sheet(tmp_path / "wrong.png", [["bear"]], [[("cat", 0.9), ("dog", 0.1)]])
    right = sheet(tmp_path / "right.png", [["bear"]], [[("cat", 0.9), ("bear", 0.1)]])
    assert greens(wrong) == 0
    assert greens(right) > 50
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["right.png", "wrong.png"]  # published by rename


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 5, 1), (6, 6, 1), (8, 4, 2), (24, 6, 4)])
def test_the_sheet_grows_with_the_images(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    images = torch.zeros(count, 3, 48, 40, dtype=torch.uint8)
    images[:, 0] = 200  # red all over, so that the images can be found again
    guesses = [[("bear", 0.5)]] * count
    prediction_sheet(images, [["bear"]] * count, guesses, tmp_path / "sheet.png", "a title")
    red = np.abs(drawn(tmp_path / "sheet.png") - [200, 0, 0]).max(axis=-1) < 8

    def runs(line: np.ndarray) -> int:
        return int((np.diff(line.astype(int), prepend=0) == 1).sum())

    assert runs(red.any(axis=0)) == columns
    assert runs(red.any(axis=1)) == rows
    assert red.sum() > count * 150 * 150


def test_long_hashtags_stay_under_their_image(tmp_path: Path) -> None:
    long = "ursusarctoshorribilis" * 9
    pixels = sheet(tmp_path / "long.png", [[long] * 3, ["a"]], [[(long, 0.99)], [("a", 0.1)]])
    middle = pixels.shape[1] // 2
    assert (pixels[:, middle - 5 : middle + 5] == 255).all()  # the gap between the two images
    many = sheet(tmp_path / "many.png", [[f"hashtag{n}" for n in range(200)], []], [[("a", 0.1)], [("a", 0.1)]])
    assert many.shape[0] < pixels.shape[0] + 80
    assert (many[:, middle - 5 : middle + 5] == 255).all()


@given(
    hashtags=st.lists(st.text(max_size=60), max_size=4),
    probability=st.floats(allow_nan=True, allow_infinity=True),
    title=st.text(max_size=500),
)
@settings(max_examples=15, deadline=None)
def test_any_text_is_drawn_without_a_warning(
    tmp_path_factory: pytest.TempPathFactory, hashtags: list[str], probability: float, title: str
) -> None:
    folder = tmp_path_factory.mktemp("sheet")
    sheet(folder / "a.png", [hashtags], [[(hashtag, probability) for hashtag in hashtags]], title)


def test_scripts_and_markup_are_drawn_without_a_warning(tmp_path: Path) -> None:
    hashtags = ["日本語", "قطة", "हिन्दी", "한국어", "$x^{2$", "\\frac", "a\nb", "\ud800", "👩‍👩‍👧", ""]
    sheet(tmp_path / "a.png", [hashtags], [[(hashtag, 0.1) for hashtag in hashtags]], "日本語 $\\alpha$")


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 8, 8), dtype=np.uint8)
    for true, predicted in (([["a"]], [[("a", 1.0)]] * 2), ([["a"]] * 2, [[("a", 1.0)]])):
        with pytest.raises(ValueError, match="hashtags"):
            prediction_sheet(images, true, predicted, tmp_path / "a.png")
    with pytest.raises(ValueError, match="images"):
        prediction_sheet(images[:0], [], [], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
