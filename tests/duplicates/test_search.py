from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scale_wsl.duplicates.search import Nearest, Search, merged

FAISS = [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore::DeprecationWarning"))]
"""Its SWIG bindings warn of types without a module when they are imported."""


def brute_force(queries: NDArray[Any], vectors: NDArray[Any], k: int) -> Nearest:
    """All similarities in float64, sorted by (-similarity, index)."""
    exact = np.array([[float(np.dot(q.astype(np.float64), v.astype(np.float64))) for v in vectors] for q in queries])
    exact = exact.reshape(len(queries), len(vectors))
    found = Nearest.none(len(queries), k)
    for row, similarities in enumerate(exact):
        order = sorted(range(len(vectors)), key=lambda index: (-similarities[index], index))[:k]
        found.similarity[row, : len(order)], found.index[row, : len(order)] = similarities[order], order
    return found


def units(seed: int, count: int, dimensions: int, kinds: int = 0) -> NDArray[np.float32]:
    """Vectors of length 1 in fp16, as features are; with `kinds`, copies of so many, so that there are many ties."""
    draws = np.random.default_rng(seed)
    vectors = draws.standard_normal((kinds or count, dimensions)) ** 2
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    return vectors[draws.integers(kinds, size=count)] if kinds else vectors


def searched(
    queries: NDArray[Any], vectors: NDArray[Any], k: int, blocks: list[NDArray[np.int64]], faiss: bool = False
) -> Nearest:
    search = Search(queries, k, faiss=faiss)
    for block in blocks:
        search.add(vectors[block], block)
    return search.result()


def same(found: Nearest, expected: Nearest) -> None:
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_array_equal(found.similarity, expected.similarity)  # bit for bit


@pytest.mark.parametrize("faiss", FAISS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 80),
    kinds=st.integers(0, 6),
    k=st.integers(1, 30),
    block=st.integers(1, 90),
)
def test_the_search_is_exact_with_ties_whatever_the_blocks(
    faiss: bool, seed: int, count: int, kinds: int, k: int, block: int
) -> None:
    if faiss:
        pytest.importorskip("faiss", reason="needs faiss-cpu")
    vectors, queries = units(seed, count, 16, kinds), units(seed + 1, 5, 16)
    if count:
        queries[0] = vectors[0]
    order = np.random.default_rng(seed).permutation(count)
    blocks = [order[start : start + block] for start in range(0, count, block)]
    same(searched(queries, vectors, k, blocks, faiss), brute_force(queries, vectors, k))


@pytest.mark.parametrize("faiss", FAISS)
def test_differences_below_the_rounding_of_fp32_decide(faiss: bool) -> None:
    """2,048 dimensions, vectors that differ by 2^-24 in one element: a sum in fp32 cannot tell them apart."""
    if faiss:
        pytest.importorskip("faiss", reason="needs faiss-cpu")
    base = units(0, 1, 2048)[0]
    vectors = np.repeat(base[None], 300, 0)
    draws = np.random.default_rng(1)
    vectors[np.arange(300), draws.integers(2048, size=300)] += draws.integers(-3, 4, size=300) * np.float32(2**-24)
    queries = np.stack([base, units(5, 1, 2048)[0]])
    products = queries @ vectors.T
    assert (np.argsort(-products, axis=1, kind="stable")[:, :21] != brute_force(queries, vectors, 21).index).any()
    same(searched(queries, vectors, 21, np.array_split(np.arange(300), 7), faiss), brute_force(queries, vectors, 21))
    same(searched(queries, vectors, 21, [np.arange(300)], faiss), brute_force(queries, vectors, 21))


def test_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = units(3, 60, 12, 20), units(4, 23, 12)
    expected = brute_force(queries, vectors, 4)
    monkeypatch.setattr("scale_wsl.duplicates.search._PRODUCTS", 130)
    monkeypatch.setattr("scale_wsl.duplicates.search._ELEMENTS", 50)
    same(searched(queries, vectors, 4, np.array_split(np.arange(60), 3)), expected)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=25)
def test_the_nearest_of_parts_merge_to_those_of_the_whole(seed: int, parts: int, k: int) -> None:
    vectors, queries = units(seed, 50, 8, 9), units(seed + 1, 4, 8)
    each = [searched(queries, vectors, k, [np.arange(part, 50, parts)]) for part in range(parts)]
    np.random.default_rng(seed).shuffle(each)  # type: ignore[arg-type]
    same(merged(each), brute_force(queries, vectors, k))


def test_an_index_that_two_parts_found_counts_once_with_its_better_similarity() -> None:
    one = Nearest(np.array([[0.9, 0.8, 0.1]]), np.array([[4, 2, 7]]))
    other = Nearest(np.array([[0.85, 0.8, -np.inf]]), np.array([[2, 4, -1]]))
    found = merged([one, other])
    np.testing.assert_array_equal(found.index, [[4, 2, 7]])
    np.testing.assert_array_equal(found.similarity, [[0.9, 0.85, 0.1]])
    few = merged([Nearest(np.array([[0.5, -np.inf]]), np.array([[1, -1]]))] * 3)
    np.testing.assert_array_equal(few.index, [[1, -1]])


def test_the_result_is_not_changed_by_what_comes_later() -> None:
    search = Search(units(0, 2, 4), 3)
    search.add(units(1, 5, 4), np.arange(5))
    before = search.result()
    kept = before.index.copy()
    search.add(units(2, 50, 4), np.arange(5, 55))
    np.testing.assert_array_equal(before.index, kept)


@pytest.mark.parametrize("bad", [[[np.nan, 0.0]], [[np.inf, 0.0]], [[1.5, 0.0]]])
def test_vectors_that_cannot_be_summed_exactly_are_refused(bad: list[list[float]]) -> None:
    vectors = np.array(bad, np.float32)
    with pytest.raises(ValueError, match="vectors to search must be finite"):
        Search(vectors, 1)
    search = Search(np.array([[1.0, 0.0]], np.float32), 1)
    with pytest.raises(ValueError, match="vectors to search must be finite"):
        search.add(vectors, np.arange(1))


def test_nothing_to_search() -> None:
    found = Search(np.zeros((0, 3), np.float32), 2)
    found.add(units(0, 4, 3), np.arange(4))
    assert found.result().index.shape == (0, 2)
    nothing = Search(units(0, 4, 3), 2)
    nothing.add(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert (nothing.result().index == -1).all()


def test_thousands_of_equal_images_take_bounded_memory_and_go_by_index() -> None:
    vectors = np.repeat(units(0, 1, 64), 5000, 0)
    search = Search(np.repeat(units(0, 1, 64), 300, 0), 5, device=torch.device("cpu"))
    search.add(vectors, np.arange(5000)[::-1].copy())
    np.testing.assert_array_equal(search.result().index, np.repeat([[0, 1, 2, 3, 4]], 300, 0))
