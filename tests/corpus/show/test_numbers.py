from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from scale_wsl.corpus.show.numbers import figures, fit_zipf, ranked, spread_ranks

ROWS = st.lists(st.sets(st.integers(0, 8), min_size=1), min_size=1, max_size=30)


def compressed(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """`label_ids` and `label_start` of these rows."""
    start = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return np.array([label for row in rows for label in row], np.int32), start


@given(ROWS)
def test_figures_are_those_of_counting_by_hand(sets: list[set[int]]) -> None:
    rows = [sorted(row) for row in sets]
    found = figures(*compressed(rows), 10)
    sizes = sorted(map(len, rows))
    counts = [sum(label in row for row in rows) for label in range(10)]
    assert found.images == len(rows)
    assert found.counts.tolist() == counts
    assert found.per_image.tolist() == [sizes.count(k) for k in range(max(sizes) + 1)]
    assert found.pairs == sum(sizes)
    assert found.mean == pytest.approx(sum(sizes) / len(rows))
    assert found.median == sizes[(len(sizes) - 1) // 2]
    assert found.occurring == sum(count > 0 for count in counts)
    assert found.rarer_than(3) == sum(count < 3 for count in counts)
    assert found.share_of_first(2) == pytest.approx(sum(sorted(counts)[-2:]) / sum(sizes))
    order = ranked(found.counts).tolist()
    assert order == sorted((label for label in range(10) if counts[label]), key=lambda label: (-counts[label], label))


def surprise(s: float, counts: list[int]) -> float:
    """Minus the log-likelihood of the finite Zipf law, the most frequent first."""
    weights = [rank**-s for rank in range(1, len(counts) + 1)]
    return -sum(n * math.log(weight / sum(weights)) for n, weight in zip(sorted(counts)[::-1], weights, strict=True))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40))
def test_the_exponent_has_the_largest_likelihood(counts: list[int]) -> None:
    law = fit_zipf(np.array([0, *counts, 0]))
    assert law is not None
    assert (law.ranks, law.total) == (len(counts), sum(counts))
    best = minimize_scalar(surprise, bounds=(0, 30), args=(counts,), method="bounded", options={"xatol": 1e-9})
    assert surprise(law.exponent, counts) <= best.fun + 1e-6
    expected = law.expected(np.arange(1, law.ranks + 1))
    assert expected.sum() == pytest.approx(law.total)
    shares = np.cumsum(sorted(counts)[::-1]) / sum(counts)
    assert law.distance == pytest.approx(np.abs(shares - np.cumsum(expected) / law.total).max())


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.7])
def test_the_exponent_of_drawn_hashtags_is_found(exponent: float) -> None:
    weights = np.arange(1, 501) ** -exponent
    counts = np.random.default_rng(1).multinomial(200_000, weights / weights.sum())
    law = fit_zipf(counts)
    assert law is not None
    assert law.exponent == pytest.approx(exponent, abs=0.01)
    assert law.distance < 0.01


@pytest.mark.parametrize("counts", [[], [0, 0], [7, 0]])
def test_one_hashtag_has_no_law(counts: list[int]) -> None:
    assert fit_zipf(np.array(counts, np.int64)) is None


def test_equal_counts_have_the_exponent_nought() -> None:
    law = fit_zipf(np.full(50, 9))
    assert law is not None
    assert law.exponent == pytest.approx(0, abs=1e-9)


@given(st.integers(1, 10**9), st.integers(2, 400))
def test_ranks_are_spread_from_the_first_to_the_last(ranks: int, most: int) -> None:
    found = spread_ranks(ranks, most)
    assert 1 <= len(found) <= most
    assert (found[0], found[-1]) == (1, ranks)
    assert (np.diff(found) > 0).all()
