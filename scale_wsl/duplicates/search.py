"""The nearest training images of every evaluation image, exactly; the search is inverted: training images stream past.

Must never miss a neighbour, and never let the result depend on how the stream is cut into blocks, on their order, on
the device or on the library that multiplies matrices.

How that is so. Vectors are rounded to multiples of 2^-24, which features in fp16 are anyway. A product of two such
numbers is a multiple of 2^-48 and fits into fp64, and so does every partial sum while |a| |b| < 2^5: the similarity in
fp64 is exact in any order of summation. The matrix product in fp32 only chooses candidates: with an error of at most
e (`_rounding`), no vector can be among the k nearest whose fp32 product is below the block's k-th largest one minus 2e,
or below the k-th largest similarity so far minus e. Candidates are few; their exact similarities decide, ties by the
smaller index.

Memory: the evaluation vectors (M x D x 4 bytes), one block of training vectors (B x D x 4 bytes), the result
(M x k x 16 bytes), and about 60 MB for a part of a block's products and its candidates; 300 MB where thousands of
training images are equal and all among an evaluation image's nearest.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Nearest", "Search", "merged"]

_GRID = float(1 << 24)
_LARGEST_NORM = 4.0  # of a vector; R-MAC's is 1
_PRODUCTS = 1 << 21  # products that are in memory at a time
_ELEMENTS = 1 << 21  # elements of candidates' vectors that are in memory at a time
_SPARE = 16  # neighbours beyond k that faiss is asked for, so that near-ties at the border are seen


@dataclass(frozen=True)
class Nearest:
    """The k nearest training images of M evaluation images, best first, ties by the smaller index.

    Attributes:
        similarity: `[M, k]` float64; minus infinity where there are fewer than k training images.
        index: `[M, k]` int64, of training images; -1 there.
    """

    similarity: NDArray[np.float64]
    index: NDArray[np.int64]

    @classmethod
    def none(cls, queries: int, k: int) -> Nearest:
        """Of no training image."""
        return cls(np.full((queries, k), -np.inf), np.full((queries, k), -1, np.int64))


def merged(parts: Sequence[Nearest]) -> Nearest:
    """The nearest of all from the nearest of parts of the training images; an index that comes twice counts once.

    The parts have the same evaluation images and the same k.
    """
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    index = np.concatenate([part.index for part in parts], axis=1)
    order = np.lexsort((index, -similarity), axis=1)
    similarity, index = (np.take_along_axis(array, order, axis=1) for array in (similarity, index))
    # Of an index that comes twice, with two similarities perhaps, the first is the better one.
    for row in np.flatnonzero(_has_twice(index)):
        _, first = np.unique(index[row], return_index=True)
        again = np.ones(index.shape[1], np.bool_)
        again[first] = False
        similarity[row, again], index[row, again] = -np.inf, -1
        order = np.argsort(-similarity[row], kind="stable")
        similarity[row], index[row] = similarity[row, order], index[row, order]
    k = parts[0].index.shape[1]
    return Nearest(similarity[:, :k].copy(), index[:, :k].copy())


def _has_twice(index: NDArray[np.int64]) -> NDArray[np.bool_]:
    ordered = np.sort(index, axis=1)
    return np.asarray(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1))


class Search:
    """The running k nearest of every evaluation vector.

    Args:
        queries: `[M, D]` float32, |x| at most 4, elements between -1 and 1.
        k: Neighbours of each.
        device: Where products are computed.
        faiss: Let `faiss.knn` choose a block's candidates; the result is the same. On the CPU.
    """

    def __init__(
        self, queries: NDArray[np.float32], k: int, *, device: torch.device | None = None, faiss: bool = False
    ) -> None:
        self.device = device or torch.device("cpu")
        self.k = k
        self.queries = _on_grid(queries).to(self.device)
        self._norm = float(torch.linalg.vector_norm(self.queries, dim=1).max()) if len(queries) else 0.0
        self._nearest = Nearest.none(len(queries), k)
        self._faiss = faiss

    def add(self, vectors: NDArray[np.float32], indices: NDArray[np.int64]) -> None:
        """Take in a block of training vectors `[B, D]` of these indices `[B]`; no index may come twice."""
        if not len(vectors) or not len(self.queries):
            return
        block = _on_grid(vectors).to(self.device)
        error = _rounding(block.shape[1]) * self._norm * float(torch.linalg.vector_norm(block, dim=1).max())
        step = max(1, _PRODUCTS // len(block))
        for first in range(0, len(self.queries), step):
            rows = slice(first, first + step)
            if self._faiss:
                row, column = self._candidates_by_faiss(rows, block, error)
            else:
                row, column = self._candidates(rows, block, error)
            if len(row):
                self._take(first, row, column, block, indices)

    def result(self) -> Nearest:
        """The nearest of all vectors so far."""
        return Nearest(self._nearest.similarity.copy(), self._nearest.index.copy())

    def _least(self, rows: slice, error: float) -> Tensor:
        """The product `[r]` from which on a vector may be among the k nearest of all so far; fp32, rounded down."""
        least = torch.from_numpy(self._nearest.similarity[rows, -1] - error).float()
        return torch.nextafter(least, torch.tensor(-torch.inf)).to(self.device)

    def _candidates(self, rows: slice, block: Tensor, error: float) -> tuple[Tensor, Tensor]:
        """Pairs of (row within `rows`, column of the block) that hold all that may be among the k nearest."""
        products = self.queries[rows] @ block.t()
        least = self._least(rows, error)
        wanted = products >= least[:, None]
        if int(wanted.sum()) > self.k * len(products) and len(block) > self.k:
            # Much passes at the beginning: the block's own k-th product says more.
            kth = products.topk(self.k, dim=1).values[:, -1]
            wanted &= products >= (kth - 2 * error)[:, None]
        row, column = wanted.nonzero(as_tuple=True)
        return row, column

    def _candidates_by_faiss(self, rows: slice, block: Tensor, error: float) -> tuple[Tensor, Tensor]:
        faiss = importlib.import_module("faiss")  # no types, and not everybody has it
        count = min(self.k + _SPARE, len(block))
        queries = self.queries[rows].numpy()
        products, columns = faiss.knn(queries, block.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
        least = self._least(rows, error).numpy()
        if len(block) > self.k:
            least = np.maximum(least, products[:, self.k - 1] - np.float32(2 * error))
        row, place = np.nonzero(products >= least[:, None])
        column = columns[row, place]
        if count < len(block):  # where even the last one passes, more may
            unsure = np.flatnonzero(products[:, -1] >= least)
            if len(unsure):
                sure = ~np.isin(row, unsure)
                more_row, more_column = np.nonzero(queries[unsure] @ block.numpy().T >= least[unsure][:, None])
                row = np.concatenate([row[sure], unsure[more_row]])
                column = np.concatenate([column[sure], more_column])
        return torch.from_numpy(row), torch.from_numpy(column)

    def _take(self, first: int, row: Tensor, column: Tensor, block: Tensor, indices: NDArray[np.int64]) -> None:
        """Merge candidates by their exact similarities into the nearest so far."""
        exact = torch.empty(len(row), dtype=torch.float64, device=self.device)
        step = max(1, _ELEMENTS // block.shape[1])
        for start in range(0, len(row), step):
            some = slice(start, start + step)
            pairs = self.queries[first + row[some]].double() * block[column[some]].double()
            exact[some] = pairs.sum(1)
        row_, similarity = row.cpu().numpy() + first, exact.cpu().numpy()
        index = indices[column.cpu().numpy()]
        touched = np.unique(row_)
        old = self._nearest
        all_rows = np.concatenate([np.repeat(touched, self.k), row_])
        all_similarity = np.concatenate([old.similarity[touched].ravel(), similarity])
        all_index = np.concatenate([old.index[touched].ravel(), index])
        order = np.lexsort((all_index, -all_similarity, all_rows))
        all_rows, all_similarity, all_index = all_rows[order], all_similarity[order], all_index[order]
        start_of_row = np.searchsorted(all_rows, touched)
        place = np.arange(len(all_rows)) - np.repeat(start_of_row, np.diff(np.append(start_of_row, len(all_rows))))
        kept = place < self.k
        old.similarity[all_rows[kept], place[kept]] = all_similarity[kept]
        old.index[all_rows[kept], place[kept]] = all_index[kept]


def _on_grid(vectors: NDArray[np.float32]) -> Tensor:
    """The vectors with every element rounded to a multiple of 2^-24.

    Raises:
        ValueError: A vector is too long for exact sums, or not finite.
    """
    rounded = torch.round(torch.as_tensor(vectors, dtype=torch.float32) * _GRID) / _GRID
    if rounded.numel() and not (
        float(rounded.abs().max()) <= 1 and float(torch.linalg.vector_norm(rounded, dim=1).max()) <= _LARGEST_NORM
    ):
        raise ValueError("vectors to search must be finite, of elements between -1 and 1 and of length 4 at most")
    return rounded


def _rounding(dimensions: int) -> float:
    """By how much a dot product in fp32 differs at most from the exact one, for vectors of length 1, in any order.

    Higham 2002, section 3.1: n u / (1 - n u) times the sum of |a_i b_i|, which is at most |a| |b|; u = 2^-24. Doubled
    for the roundings of the threshold and of the norms.
    """
    n = (dimensions + 2) * 2.0**-24
    return 2 * n / (1 - n)
