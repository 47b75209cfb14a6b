from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.resample import MODES, hashtag_factors, image_factors


def csr(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = [label for row in rows for label in row]
    return np.array(flat, np.int32), np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


def test_a_worked_example_of_section_3() -> None:
    # 100 images; hashtag 0 on 40 of them, 1 on 10, 2 on one (which carries 0 too), 3 on four; t = 0.1, so t / f is
    # 0.25, 1, 10 and 2.5; its square root 0.5, 1, 3.162 and 1.581; and no factor falls below 1.
    rows = [[0]] * 39 + [[0, 2]] + [[1]] * 10 + [[3]] * 3 + [[1, 3]] * 0 + [[0, 3]] * 0 + [[3]] + [[]] * 46
    labels = csr(rows)
    assert hashtag_factors(np.bincount(labels[0]), 100, "square-root", 0.1).round(3).tolist() == [1, 1, 3.162, 1.581]
    assert hashtag_factors(np.bincount(labels[0]), 100, "uniform", 0.1).tolist() == [1, 1, 10, 2.5]
    assert hashtag_factors(np.bincount(labels[0]), 100, "natural", 0.1).tolist() == [1, 1, 1, 1]
    by_image = image_factors(*labels, "square-root", 0.1).round(3).tolist()
    assert by_image == [1] * 39 + [3.162] + [1] * 10 + [1.581] * 4 + [1] * 46


@given(
    st.lists(st.lists(st.integers(0, 8), unique=True, max_size=4), max_size=30),
    st.sampled_from(MODES),
    st.floats(1e-3, 1.0),
)
def test_equals_the_formula_image_by_image(rows: list[list[int]], mode: str, threshold: float) -> None:
    phi = {"natural": lambda x: 1.0, "square-root": lambda x: x**0.5, "uniform": lambda x: x}[mode]
    share = {h: sum(h in row for row in rows) / len(rows) for row in rows for h in row}
    expected = [max([max(1.0, phi(threshold / share[h])) for h in row], default=1.0) for row in rows]
    np.testing.assert_allclose(image_factors(*csr(rows), mode, threshold), expected, rtol=1e-12)


def test_uniform_evens_out_and_square_root_halves_the_exponent() -> None:
    counts = np.array([6400, 1600, 400, 100, 25])
    rows = [[h] for h, count in enumerate(counts) for _ in range(count)]
    labels = csr(rows)
    share = counts.max() / counts.sum()  # with t at the most common hashtag's share every other one is repeated
    for mode, power in (("natural", 1.0), ("square-root", 0.5), ("uniform", 0.0)):
        drawn = np.bincount(labels[0], weights=image_factors(*labels, mode, share))
        np.testing.assert_allclose(drawn / drawn[0], (counts / counts[0]) ** power, rtol=1e-12)


def test_hashtags_that_no_image_carries_do_no_harm() -> None:
    assert image_factors(*csr([[5], [], [5]]), "uniform", 1.0).tolist() == [1.5, 1.0, 1.5]
    assert image_factors(*csr([[], []]), "uniform", 1.0).tolist() == [1.0, 1.0]
    assert image_factors(*csr([]), "uniform", 1.0).tolist() == []


def test_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="must be one of natural, square-root, uniform"):
        image_factors(*csr([[0]]), "sqrt", 0.1)
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            image_factors(*csr([[0]]), "uniform", threshold)
