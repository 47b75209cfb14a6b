from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from scale_wsl.duplicates.rmac import Moments, Whitening, region_grids, region_vectors, rmac
from scale_wsl.errors import UserError


def reference_regions(height: int, width: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of each region, by the definition in exact fractions (Tolias et al. 2016, section 3.2)."""
    short, long = min(height, width), max(height, width)
    along = 1
    if long > short:

        def distance(count: int) -> Fraction:
            spacing = Fraction(long - short, count - 1)
            return abs((short - spacing) / short - Fraction(2, 5))

        along = min(range(2, 300), key=distance)
    found = []
    for scale in (1, 2, 3):
        side = max(1, int(Fraction(2 * short, scale + 1)))
        rows, columns = scale, scale + along - 1
        if height > width:
            rows, columns = columns, rows
        for i in range(rows):
            for j in range(columns):
                top = math.floor(Fraction(i * (height - side), rows - 1)) if rows > 1 else 0
                left = math.floor(Fraction(j * (width - side), columns - 1)) if columns > 1 else 0
                found.append((top, left, side))
    return found


def reference(maps: NDArray[Any], mean: NDArray[Any] | None = None, projection: NDArray[Any] | None = None) -> Any:
    """R-MAC of one feature map `[c, h, w]`, region by region in float64."""

    def unit(vector: NDArray[Any]) -> NDArray[Any]:
        length = math.sqrt(float((vector**2).sum()))
        return vector / length if length else vector

    total: Any = 0
    for top, left, side in reference_regions(*maps.shape[1:]):
        window = maps[:, top : top + side, left : left + side]
        assert window.shape[1:] == (side, side)  # inside the map
        vector = unit(np.array([channel.max() for channel in window]))
        if mean is not None:
            vector = unit((vector - mean) @ projection)
        total = total + vector
    return unit(total)


@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 1000))
@example(5, 9, 0)  # two and three regions along it are as near to 40 %
def test_rmac_is_its_definition(height: int, width: int, seed: int) -> None:
    maps = np.random.default_rng(seed).random((2, 5, height, width)) ** 3
    found = rmac(torch.from_numpy(maps))
    expected = np.stack([reference(one) for one in maps])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)
    in_fp32 = rmac(torch.from_numpy(maps).float())
    np.testing.assert_allclose(in_fp32.numpy(), expected, rtol=0, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 60))
def test_regions_are_where_the_definition_says(height: int, width: int) -> None:
    found = [(top, left, grid.side) for grid in region_grids(height, width) for top in grid.tops for left in grid.lefts]
    assert found == reference_regions(height, width)


def test_the_usual_square_map_has_14_regions() -> None:
    assert [grid.side for grid in region_grids(7, 7)] == [7, 4, 3]
    assert region_vectors(torch.rand(1, 3, 7, 7)).shape == (1, 14, 3)
    # 4:3 of 7 x 7's area: two regions at scale 1 overlap by 1 - 2/6 = 67 %, nearer to 40 % than three.
    assert region_vectors(torch.rand(1, 3, 6, 8)).shape == (1, 2 + 2 * 3 + 3 * 4, 3)


def test_a_map_without_activity_has_no_direction() -> None:
    maps = torch.zeros(2, 4, 5, 7)
    maps[1, 2, 1, 1] = 3.0
    found = rmac(maps)
    assert torch.equal(found[0], torch.zeros(4))
    assert torch.equal(found[1], torch.tensor([0.0, 0, 1, 0]))


def test_an_image_does_not_depend_on_its_batch() -> None:
    maps = torch.rand(5, 8, 6, 9)
    np.testing.assert_allclose(rmac(maps)[3:4].numpy(), rmac(maps[3:4]).numpy(), rtol=0, atol=1e-7)


def moments_of(vectors: torch.Tensor) -> Moments:
    moments = Moments(vectors.shape[1])
    for part in vectors.split(37):
        moments.add(part)
    return moments


def test_whitening_is_that_of_a_pca() -> None:
    numbers = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 6, dtype=torch.float64, generator=numbers) @ torch.randn(
        6, 6, dtype=torch.float64, generator=numbers
    )
    whitening = Whitening.learn(moments_of(vectors + 3), 4)
    assert whitening.projection.shape == (6, 4)
    ours = (vectors + 3 - whitening.mean.double()) @ whitening.projection.double()
    theirs = PCA(4, whiten=True).fit_transform((vectors + 3).numpy()) * math.sqrt(400 / 399)  # n - 1 there
    theirs *= np.sign((theirs * ours.numpy()).sum(0))  # an axis has no sign
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose((ours.t() @ ours).numpy() / 400, np.eye(4), rtol=0, atol=1e-4)
    assert torch.allclose(whitening(vectors.float()).norm(dim=1), torch.ones(400))


def test_rmac_with_whitening_is_its_definition() -> None:
    numbers = torch.Generator().manual_seed(1)
    maps = torch.rand(60, 5, 6, 8, dtype=torch.float64, generator=numbers)
    learned = Whitening.learn(moments_of(region_vectors(maps).flatten(0, 1)), 3)
    whitening = Whitening(learned.mean.double(), learned.projection.double())
    expected = np.stack([reference(one, whitening.mean.numpy(), whitening.projection.numpy()) for one in maps.numpy()])
    np.testing.assert_allclose(rmac(maps, whitening).numpy(), expected, rtol=0, atol=1e-12)
    assert rmac(maps[:2], whitening).shape == (2, 3)


def test_whitening_keeps_only_directions_in_which_there_is_variance() -> None:
    numbers = torch.Generator().manual_seed(2)
    flat = torch.randn(100, 2, dtype=torch.float64, generator=numbers) @ torch.randn(
        2, 7, dtype=torch.float64, generator=numbers
    )
    assert Whitening.learn(moments_of(flat)).projection.shape == (7, 2)
    with pytest.raises(UserError, match="vary in 2 directions, too few to whiten 3 dimensions"):
        Whitening.learn(moments_of(flat), 3)
    with pytest.raises(UserError, match="vary in 0 directions, too few to whiten any"):
        Whitening.learn(moments_of(torch.ones(10, 3)))
    with pytest.raises(UserError, match="too few"):
        Whitening.learn(Moments(3))


def test_whitening_is_kept_and_refused_where_it_is_none(tmp_path: Path) -> None:
    whitening = Whitening.learn(moments_of(torch.rand(50, 4, generator=torch.Generator().manual_seed(3))))
    path = tmp_path / "kept" / "whitening.safetensors"
    whitening.save(path)
    again = Whitening.load(path, 4)
    assert again.digest == whitening.digest
    assert torch.equal(again.projection, whitening.projection)
    with pytest.raises(UserError, match="no whitening of 5 channels"):
        Whitening.load(path, 5)
    for damaged in ({"mean": torch.zeros(4)}, {"mean": torch.full((4,), torch.nan), "projection": torch.zeros(4, 2)}):
        save_file(damaged, path)
        with pytest.raises(UserError, match="no whitening of 4 channels"):
            Whitening.load(path, 4)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="no whitening that can be read"):
        Whitening.load(path, 4)
