from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from scale_wsl.corpus.figures import draw_epochs
from scale_wsl.corpus.resample import ExpectedEpoch, expected_epochs
from scale_wsl.errors import UserError
from tests.corpus.test_resample import csr
from tests.loading.fakes import zipf_rows

GREY, BLUE, ORANGE = ((0x6E, 0x77, 0x81), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00))


def epochs(rows: list[list[int]], **how: float) -> Sequence[ExpectedEpoch]:
    return expected_epochs(*csr(rows), 70, **how)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def inked(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture - colour).max(axis=-1) < 8).sum())


def test_every_rule_has_a_line_in_both_halves(tmp_path: Path) -> None:
    draw_epochs(epochs(zipf_rows(500, 60), threshold=0.2), "Hashtags", [tmp_path / "a.png"])
    picture = pixels(tmp_path / "a.png")
    assert picture.shape == (720, 1650, 3)
    for half in np.split(picture, 2, axis=1):
        assert all(inked(half[:600], colour) > 300 for colour in (GREY, BLUE, ORANGE))


def test_what_a_picture_shows_is_in_its_numbers(tmp_path: Path) -> None:
    few, many = (epochs(zipf_rows(500, 60), length=length) for length in (501, 1100))
    draw_epochs(few, "t", [tmp_path / "few.png"])
    draw_epochs(many, "t", [tmp_path / "many.png"])
    # Where hardly anything is repeated the last line hides the first.
    assert inked(pixels(tmp_path / "few.png")[:600], GREY) < inked(pixels(tmp_path / "many.png")[:600], GREY)


def test_equal_calls_give_equal_bytes_and_svg_is_xml_without_a_date(tmp_path: Path) -> None:
    title = "<b>& $x$ </svg> --> {}"
    digests = []
    for name in ("one", "two"):
        paths = [tmp_path / f"{name}.svg", tmp_path / f"{name}.png"]
        draw_epochs(epochs(zipf_rows(100, 20), threshold=0.2), title, paths)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert digests[0] == digests[1]
    text = (tmp_path / "one.svg").read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<dc:date>" not in text
    assert "<b>" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "one.svg", "two.png", "two.svg"]


@pytest.mark.parametrize("rows", [[[0]], [[0]] * 5, [[0], [1]], [[3, 4, 5]] * 2, [[0]] * 300 + [[1]]])
def test_small_and_flat_distributions(rows: list[list[int]], tmp_path: Path) -> None:
    draw_epochs(epochs(rows, threshold=0.5), "small", [tmp_path / "a.png", tmp_path / "a.svg"])
    assert inked(pixels(tmp_path / "a.png")[:600], ORANGE) > 10


def test_other_endings_and_places_are_refused(tmp_path: Path) -> None:
    some = epochs([[0], [1]])
    with pytest.raises(UserError, match=r"a\.pdf is no figure that can be drawn: its name must end in \.png or \.svg"):
        draw_epochs(some, "t", [tmp_path / "b.png", tmp_path / "a.pdf"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the figure"):
        draw_epochs(some, "t", [tmp_path / "file" / "a.png"])
