from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from scale_wsl.corpus.dedup import NEAR, clusters
from scale_wsl.corpus.images import SIDE
from scale_wsl.duplicates import methods
from scale_wsl.duplicates.methods import RmacMethod, ThumbnailMethod, Unreadable, input_size, network_input, preview
from scale_wsl.duplicates.network import Network
from scale_wsl.duplicates.search import Nearest, Search, merged
from scale_wsl.errors import UserError
from tests.corpus.test_dedup import random_thumbnails
from tests.corpus.toy import noise
from tests.loading.fakes import encode


def nearest_by_thumbnail(evaluation: np.ndarray, train: np.ndarray, k: int) -> Nearest:
    method = ThumbnailMethod()
    ways = method.queries(evaluation)
    search = Search(np.concatenate(ways), k)
    search.add(method.vectors(train), np.arange(len(train)))
    result, count = search.result(), len(evaluation)
    return merged([Nearest(result.similarity[at : at + count], result.index[at : at + count]) for at in (0, count)])


def test_the_similarity_of_thumbnails_is_dedups_rule() -> None:
    """In float64, pair by pair: 1 - |a - b|^2 / 2 of what varies, scaled, the better of straight and mirrored."""
    thumbnails = random_thumbnails(7, 120)
    pixels = thumbnails.astype(np.float64)
    pixels -= pixels.mean((1, 2), keepdims=True)
    pixels /= np.maximum(np.linalg.norm(pixels, axis=(1, 2), keepdims=True), 4 * SIDE)
    train, evaluation = pixels[40:], pixels[:40]
    straight = ((evaluation[:, None] - train[None]) ** 2).sum((2, 3))
    mirrored = ((evaluation[:, None, :, ::-1] - train[None]) ** 2).sum((2, 3))
    expected = 1 - np.minimum(straight, mirrored) / 2
    found = nearest_by_thumbnail(thumbnails[:40], thumbnails[40:], 80)
    by_index = np.take_along_axis(found.similarity, np.argsort(found.index, axis=1), axis=1)
    np.testing.assert_allclose(by_index, expected, rtol=0, atol=1e-5)
    # And what is near there is joined by clusters: the two ways to look at one rule agree.
    near = np.abs(expected - NEAR) > 1e-4
    for row, column in np.argwhere((expected >= NEAR) & near)[:30]:
        pair = np.stack([thumbnails[row], thumbnails[40 + column]])
        assert set(clusters(pair, [(), ()]).tolist()) == {0}


def test_thumbnails_find_a_mirrored_copy() -> None:
    method = ThumbnailMethod()
    originals = [noise(seed, 40) for seed in range(12)]
    train = method.features([method.pixels(encode(image)) for image in originals])
    copies = [encode(ImageOps.mirror(image), "JPEG", quality=80) for image in originals]
    evaluation = method.features([method.pixels(data) for data in copies])
    found = nearest_by_thumbnail(evaluation, train, 1)
    np.testing.assert_array_equal(found.index[:, 0], np.arange(12))
    assert found.similarity.min() > NEAR


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 512))
def test_input_sizes_keep_area_and_shape(width: int, height: int, side: int) -> None:
    w, h = input_size(width, height, side)
    assert w % 32 == h % 32 == 0
    assert min(w, h) >= 32
    ratio = min(3.0, max(1 / 3, width / height))
    for found, exact in ((w, side * ratio**0.5), (h, side / ratio**0.5)):
        assert abs(found - exact) <= 16.0001 or found == 32


def test_the_usual_input_sizes() -> None:
    assert input_size(500, 500, 224) == (224, 224)
    assert input_size(500, 375, 224) == (256, 192)
    assert input_size(375, 500, 224) == (192, 256)
    assert input_size(1, 1000, 224) == (128, 384)
    assert network_input(Image.new("RGB", (50, 20)), 224).shape == (3, 128, 352)


class Mean(torch.nn.Module):
    """A network whose feature map is the image, each place the mean of 32 x 32 pixels."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 32).relu() * self.factor


def network(factor: float = 1.0) -> Network:
    return Network("mean", "none", {"network": "mean"}, Mean(factor), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_features_are_of_length_1_in_fp16() -> None:
    method = RmacMethod(network(), side=64)
    pixels = [method.pixels(encode(noise(seed, 50))) for seed in range(3)]
    features = method.features(pixels)
    assert features.dtype == np.float16
    assert features.shape == (3, *method.shape) == (3, 3)
    np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=1), 1, atol=1e-3)
    with pytest.raises(UserError, match="not finite: are its weights whole"):
        RmacMethod(network(float("nan")), side=64).features(pixels)
    for side in (31, 2049):
        with pytest.raises(UserError, match="between 32 and 2048"):
            RmacMethod(network(), side=side)


@pytest.mark.parametrize("method", [ThumbnailMethod(), RmacMethod(network(), side=64)], ids=["thumbnail", "rmac"])
def test_what_is_no_image_is_unreadable(method: ThumbnailMethod | RmacMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"no image", encode(noise(1))[:60]):
        with pytest.raises(Unreadable):
            method.pixels(data)
    monkeypatch.setattr(methods, "MAX_PIXELS", 100)
    with pytest.raises(Unreadable, match="more than the limit"):
        method.pixels(encode(noise(1)))


def test_previews_are_small_jpegs() -> None:
    made = preview(encode(Image.new("RGBA", (900, 300), (255, 0, 0, 128))), 144)
    assert made is not None
    image = Image.open(io.BytesIO(made))
    assert (image.format, image.size) == ("JPEG", (144, 48))
    assert preview(b"no image", 144) is None
