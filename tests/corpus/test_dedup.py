from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from scale_wsl.corpus import dedup
from scale_wsl.corpus.dedup import NEAR, clusters, split
from scale_wsl.corpus.images import SIDE, look
from scale_wsl.corpus.sources import EmojiSource
from tests.loading.fakes import encode


def random_thumbnails(seed: int, count: int) -> NDArray[np.uint8]:
    """Blurred noise, about half of it variants of the rest, some of them on the border of being near."""
    rng = np.random.default_rng(seed)
    made: list[NDArray[np.uint8]] = []
    while len(made) < count:
        if made and rng.random() < 0.5:
            base = made[rng.integers(len(made))].astype(float)
            base = base[:, ::-1] if rng.random() < 0.3 else base
            new = base * rng.uniform(0.5, 1) + rng.normal(0, rng.choice([0, 2, 8, 12]), base.shape)
        else:
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8))
            new = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)
            if rng.random() < 0.1:
                new = 255 - new / 200  # nearly white
        made.append(new.clip(0, 255).round().astype(np.uint8))
    return np.stack(made)


def brute_force(thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The rule as it is stated, pair by pair, with each pair that is too close to the border to call."""
    pixels = thumbnails.astype(np.float64)
    pixels -= pixels.mean((1, 2), keepdims=True)
    pixels /= np.maximum(np.linalg.norm(pixels, axis=(1, 2), keepdims=True), 4 * SIDE)
    flat, mirrored = pixels.reshape(len(pixels), -1), pixels[:, :, ::-1].reshape(len(pixels), -1)
    squares = (flat**2).sum(1)
    apart = np.minimum(*(squares[:, None] + squares[None] - 2 * flat @ other.T for other in (flat, mirrored)))
    near = apart <= 2 * (1 - NEAR)
    root = np.arange(len(flat))
    for _ in range(len(flat)):
        root = np.where(near, root[None], len(flat)).min(1)
    return root


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 90), st.integers(4, 40))
def test_the_search_is_exact(seed: int, count: int, leaf: int) -> None:
    thumbnails = random_thumbnails(seed, count)
    before, dedup._LEAF = dedup._LEAF, leaf
    try:
        found = clusters(thumbnails, [()] * count)
    finally:
        dedup._LEAF = before
    assert np.array_equal(found, brute_force(thumbnails))


def test_groups_join_what_does_not_look_alike() -> None:
    thumbnails = random_thumbnails(1, 40)
    apart = clusters(thumbnails, [()] * 40)
    ends = sorted(set(apart.tolist()))[:2]
    groups = [("same",) if i in ends else () for i in range(40)]
    joined = clusters(thumbnails, groups)
    assert joined[ends[0]] == joined[ends[1]] != apart[ends[1]]
    assert len(set(joined.tolist())) == len(set(apart.tolist())) - 1


def test_an_image_of_several_groups_joins_them_all() -> None:
    thumbnails = random_thumbnails(1, 40)
    ends = sorted(set(clusters(thumbnails, [()] * 40).tolist()))[:4]
    groups: list[tuple[str, ...]] = [()] * 40
    for i, those in zip(ends, (("a",), ("b", "c"), ("a", "b"), ("d",)), strict=True):
        groups[i] = those
    joined = clusters(thumbnails, groups)
    assert joined[ends[0]] == joined[ends[1]] == joined[ends[2]] != joined[ends[3]]


def test_nearly_empty_images_are_near_to_each_other() -> None:
    faint = np.full((6, SIDE, SIDE), 255, np.uint8)
    for i in range(6):
        faint[i, i * 2, i] = 253
    assert set(clusters(faint, [()] * 6).tolist()) == {0}


def test_a_large_dense_cluster_is_one() -> None:
    rng = np.random.default_rng(0)
    base = random_thumbnails(3, 1)[0].astype(float)
    thumbnails = (base[None] + rng.normal(0, 2, (3000, SIDE, SIDE))).clip(0, 255).astype(np.uint8)
    assert set(clusters(thumbnails, [()] * 3000).tolist()) == {0}


def jpeg(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encode(image, "JPEG", quality=50))).convert("RGB")


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "halved": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "enlarged": lambda image: image.resize((image.width * 3, image.height * 3), Image.Resampling.BILINEAR),
    "stretched": lambda image: image.resize((image.width * 2, image.height), Image.Resampling.BICUBIC),
    "JPEG": jpeg,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.6),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "mirrored": ImageOps.mirror,
    "mirrored and JPEG": lambda image: jpeg(ImageOps.mirror(image)),
}


@pytest.fixture(scope="module")
def drawings() -> list[Image.Image]:
    posts = list(EmojiSource(limit=120, pixels=96).posts())
    assert all(callable(post.image) for post in posts)
    images = [Image.open(io.BytesIO(post.image())) for post in posts if callable(post.image)]
    white = [Image.new("RGB", image.size, "white") for image in images]
    for below, image in zip(white, images, strict=True):
        below.paste(image, mask=image.convert("RGBA"))
    return white


@pytest.mark.parametrize("edit", EDITS)
def test_planted_near_duplicates_never_straddle(edit: str, drawings: list[Image.Image]) -> None:
    both = [*drawings, *map(EDITS[edit], drawings)]
    thumbnails = np.stack([look(encode(image), 10**6).thumbnail for image in both])
    cluster = clusters(thumbnails, [()] * len(both))
    assert np.array_equal(cluster[: len(drawings)], cluster[len(drawings) :])
    for seed in range(5):
        validation = split(cluster, [f"k{i}" for i in range(len(both))], 0.3, seed)
        assert np.array_equal(validation[: len(drawings)], validation[len(drawings) :])
        assert 0.25 < validation.mean() <= 0.3


def test_different_drawings_stay_apart(drawings: list[Image.Image]) -> None:
    thumbnails = np.stack([look(encode(image), 10**6).thumbnail for image in drawings])
    sizes = np.bincount(clusters(thumbnails, [()] * len(drawings)))
    assert (sizes > 0).sum() > 0.9 * len(drawings)
    assert sizes.max() < 0.08 * len(drawings)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.floats(0.05, 0.9), st.integers(0, 9))
def test_the_split_keeps_clusters_whole_and_its_share(roots: list[int], share: float, seed: int) -> None:
    names = np.array(roots)
    cluster = np.array([int(np.flatnonzero(names == name)[0]) for name in names])
    keys = [f"k{i}" for i in range(len(names))]
    validation = split(cluster, keys, share, seed)
    room = min(max(1, round(share * len(names))), len(names) - 1)
    sizes = [int((names == name).sum()) for name in set(roots)]
    if len(sizes) > 1:
        assert 0 < validation.sum() < len(names)
    if min(sizes) <= room:
        assert validation.sum() <= room
    else:
        assert validation.sum() == (min(sizes) if len(sizes) > 1 else 0)
    for root in set(cluster.tolist()):
        assert len(set(validation[cluster == root].tolist())) == 1
    # Whatever was left out would have overshot.
    left = room - validation.sum()
    assert all((cluster == root).sum() > left for root in set(cluster[~validation].tolist()))

    order = np.random.default_rng(seed).permutation(len(names))
    moved = names[order]
    again = np.array([int(np.flatnonzero(moved == name)[0]) for name in moved])
    assert np.array_equal(split(again, [keys[i] for i in order], share, seed), validation[order])


@pytest.mark.parametrize(("roots", "share", "drawn"), [([0, 0, 0, 3, 3], 0.1, 2), ([0, 1], 0.01, 1), ([0, 1], 0.99, 1)])
def test_a_split_has_two_sides_wherever_it_can(roots: list[int], share: float, drawn: int) -> None:
    validation = split(np.array(roots), [f"k{i}" for i in range(len(roots))], share, 0)
    assert validation.sum() == drawn
    assert not split(np.zeros(5, np.int64), list("abcde"), 0.9, 0).any()


def test_the_seed_decides_who_is_drawn() -> None:
    keys = [f"k{i}" for i in range(100)]
    draws = [split(np.arange(100), keys, 0.2, seed) for seed in range(3)]
    assert all(draw.sum() == 20 for draw in draws)
    assert not np.array_equal(draws[0], draws[1])
    assert np.array_equal(draws[0], split(np.arange(100), keys, 0.2, 0))
