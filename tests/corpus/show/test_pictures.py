from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.show import pictures
from scale_wsl.corpus.show.pictures import candidates, examples, pixel_limit, samples, thumbnails
from tests.corpus.show.data import rows, vocabulary, write
from tests.corpus.show.test_numbers import ROWS, compressed


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write(tmp_path_factory.mktemp("toy") / "a", rows(60), vocabulary()))


@given(st.integers(1, 3000), st.integers(0, 60), st.integers(0, 5))
def test_samples_are_distinct_images(images: int, number: int, seed: int) -> None:
    drawn = samples(images, number, seed, "train")
    assert len(drawn) == min(images, number)
    assert drawn == sorted(set(drawn))
    assert all(0 <= index < images for index in drawn)
    assert drawn == samples(images, number, seed, "train")


def test_samples_prefer_no_image() -> None:
    counts = np.bincount([index for seed in range(2000) for index in samples(20, 5, seed, "train")], minlength=20)
    assert counts.sum() == 10_000
    assert (np.abs(counts - 500) < 100).all()  # five standard deviations


@given(ROWS, st.lists(st.integers(0, 9), unique=True), st.integers(1, 5), st.integers(1, 9), st.integers(0, 3))
def test_candidates_have_their_label(sets: list[set[int]], wanted: list[int], each: int, block: int, seed: int) -> None:
    chosen = [sorted(row) for row in sets]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_BLOCK", block)
        found = candidates(*compressed(chosen), wanted, each, seed)
    assert found.shape == (len(wanted), each)
    for label, images in zip(wanted, found.tolist(), strict=True):
        there = [image for image in images if image >= 0]
        assert len(there) == len(set(there)) == min(each, sum(label in row for row in chosen))
        assert all(label in chosen[image] for image in there)
        assert images == there + [-1] * (each - len(there))


def test_candidates_prefer_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_BLOCK", 7)
    labels = compressed([[0, 1] if image % 2 else [1] for image in range(20)])
    drawn = [image for seed in range(2000) for image in candidates(*labels, [0], 3, seed)[0]]
    counts = np.bincount(drawn, minlength=20)[1::2]
    assert counts.sum() == 6000
    assert (np.abs(counts - 600) < 110).all()


def test_examples_fill_up_what_the_sample_lacks(toy: Dataset) -> None:
    have = [index for index in range(60) if 2 not in toy.labels(index)][:5]
    more = examples(toy, [2, 0, 1], have, 4, 480, 0)
    shown = [*have, *more]
    assert len(shown) == len(set(shown))
    assert all(sum(label in toy.labels(index) for index in shown) >= 4 for label in range(3))
    assert len(more) <= 12
    assert examples(toy, [2, 0, 1], have, 4, 2, 0) == more[:2]
    assert all(2 in toy.labels(index) for index in more[:2])
    assert examples(toy, [2], range(60), 4, 480, 0) == []


def test_thumbnails_are_small_webp_pictures_and_damage_is_told(toy: Dataset) -> None:
    done: list[int] = []
    made = thumbnails(toy, [5, 3, 7], done.append)
    assert [picture.index for picture in made] == [5, 3, 7]
    assert sum(done) == 3
    assert made[1].source == ""
    assert "undecodable" in made[1].refused
    for picture in (made[0], made[2]):
        head, data = picture.source.split(",")
        assert head == "data:image/webp;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (image.format, image.size) == ("WEBP", (24, 24))


def test_an_image_file_of_too_many_bytes_is_not_read(toy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_MAX_BYTES", 10)
    monkeypatch.setattr(Dataset, "read", None)
    assert "MiB" in thumbnails(toy, [5])[0].refused


@pytest.mark.parametrize(
    ("told", "limit"),
    [
        ({"max_pixels": 100}, 100),
        ({"max_pixels": True}, 25_000_000),
        ({"max_pixels": 1 << 60}, 25_000_000),
        ("x", 25_000_000),
    ],
)
def test_the_pixel_limit_is_that_of_the_preparation(tmp_path: Path, told: object, limit: int) -> None:
    folder = write(tmp_path / "a", rows(2), vocabulary(), prepared_with=told)
    dataset = Dataset.open(folder)
    assert pixel_limit(dataset) == limit
    assert ("too many pixels" in thumbnails(dataset, [0])[0].refused) == (limit == 100)
