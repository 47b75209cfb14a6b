from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.show import pairs
from scale_wsl.corpus.show.pairs import block_order, information, pair_counts, strongest
from tests.corpus.show.test_numbers import ROWS, compressed


@given(ROWS, st.lists(st.integers(0, 9), unique=True, max_size=10), st.integers(1, 7), st.integers(1, 40))
def test_pairs_are_those_of_counting_by_hand(sets: list[set[int]], chosen: list[int], block: int, codes: int) -> None:
    rows = [sorted(row) for row in sets]
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_BLOCK", block)
        patch.setattr(pairs, "_CODES", codes)
        found = pair_counts(*compressed(rows), np.array(chosen, np.int64), done.append)
    expected = [[sum(a in row and b in row for row in rows) for b in chosen] for a in chosen]
    assert found.tolist() == expected
    assert sum(done) == len(rows)


@given(ROWS)
def test_information_is_its_definition(sets: list[set[int]]) -> None:
    rows = [sorted(row) for row in sets]
    counts = pair_counts(*compressed(rows), np.arange(10))
    bits = information(counts, len(rows))
    for a, b in combinations(range(10), 2):
        shared, alone = counts[a, b], (counts[a, a], counts[b, b])
        expected = math.log2(shared * len(rows) / alone[0] / alone[1]) if shared else -math.inf
        assert bits[a, b] == bits[b, a] == pytest.approx(expected, abs=1e-9)


@given(ROWS, st.integers(1, 3), st.booleans())
def test_the_strongest_pairs_are_those_of_sorting_all(sets: list[set[int]], least: int, by_images: bool) -> None:
    counts = pair_counts(*compressed([sorted(row) for row in sets]), np.arange(10))
    bits = information(counts, len(sets))
    found = strongest(counts, bits, 6, by_images=by_images, least=least)
    every = [(a, b, counts[a, b], bits[a, b]) for a, b in combinations(range(10), 2) if counts[a, b] >= least]
    every.sort(key=lambda pair: (-pair[2], -pair[3]) if by_images else (-pair[3], -pair[2]))
    assert [(pair.first, pair.second, pair.images, pair.bits) for pair in found] == every[:6]


def test_blocks_come_together_whatever_the_order_was() -> None:
    group = np.repeat(np.arange(5), 8)
    rng = np.random.default_rng(3)
    noise = rng.uniform(0, 0.4, (40, 40))
    affinity = np.where(group[:, None] == group, 3.0, 0.0) + noise + noise.T
    mixed = rng.permutation(40)
    order = block_order(affinity[np.ix_(mixed, mixed)])
    assert sorted(order) == list(range(40))
    assert np.count_nonzero(np.diff(group[mixed[order]])) == 4


def test_a_chain_is_laid_out_in_a_line() -> None:
    """Turned so that similar ends touch: neighbours of the chain stay neighbours."""
    place = np.array([3, 0, 5, 1, 4, 2])
    affinity = np.exp(-np.abs(place[:, None] - place).astype(float))
    assert place[block_order(affinity)].tolist() in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])


@pytest.mark.parametrize("size", [0, 1, 2])
def test_small_orders(size: int) -> None:
    assert block_order(np.zeros((size, size))) == list(range(size))
