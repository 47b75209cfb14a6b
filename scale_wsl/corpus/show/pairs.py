"""Which hashtags are on the same images: counts of pairs, pointwise mutual information, and an order that shows blocks.

Must never hold a matrix over the whole vocabulary: pairs are counted among a bounded number of hashtags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pair", "block_order", "information", "pair_counts", "strongest"]

_BLOCK = 1 << 16  # images looked at together
_CODES = 1 << 22  # pairs counted together


@dataclass(frozen=True)
class Pair:
    """Two hashtags that share images."""

    first: int
    second: int
    images: int
    bits: float
    """Pointwise mutual information."""


def pair_counts(
    label_ids: NDArray[np.int32],
    label_start: NDArray[np.int64],
    chosen: NDArray[np.int64],
    progress: Callable[[int], object] = lambda images: None,
) -> NDArray[np.int64]:
    """`[T, T]`, images that have both of two labels; on the diagonal, images that have the one.

    Takes time in proportion to the pairs that there are, and memory for three matrices.

    Args:
        label_ids: `[total]`, the labels of image 0, then of image 1, ...; none twice for the same image.
        label_start: `[N + 1]`, where each image's labels start in `label_ids`.
        chosen: `[T]`, the labels to look at.
        progress: Called with a number of images that are done.
    """
    number = len(chosen)
    place = np.full(max(int(label_ids.max(initial=-1)), int(chosen.max(initial=-1))) + 1, -1, np.int64)
    place[chosen] = np.arange(number)
    total = np.zeros(number * number, np.int64)
    waiting: list[NDArray[np.int64]] = []
    images = len(label_start) - 1

    def count() -> None:
        if waiting:
            total[:] += np.bincount(np.concatenate(waiting), minlength=len(total))
            waiting.clear()

    for start in range(0, images, _BLOCK):
        stop = min(start + _BLOCK, images)
        found = place[label_ids[label_start[start] : label_start[stop]]]
        image = np.repeat(np.arange(stop - start), np.diff(label_start[start : stop + 1]))
        image, found = image[found >= 0], found[found >= 0]
        first = np.arange(len(found))
        apart = 0
        while len(first):  # each label with itself, the next one of its image, the one after that, ...
            waiting.append(found[first] * number + found[first + apart])
            if sum(map(len, waiting)) >= _CODES:
                count()
            apart += 1
            first = first[first + apart < len(found)]
            first = first[image[first] == image[first + apart]]
        progress(stop - start)
    count()
    matrix = total.reshape(number, number)
    return matrix + np.triu(matrix, 1).T + np.tril(matrix, -1).T


def information(counts: NDArray[np.int64], images: int) -> NDArray[np.float64]:
    """Pointwise mutual information in bits, `log2(n_ab N / (n_a n_b))`; -inf for two that share no image.

    0 is what chance would give, 1 twice as many shared images, -1 half as many. The diagonal is meaningless.

    Args:
        counts: `[T, T]` of `pair_counts`.
        images: N.
    """
    alone = np.diagonal(counts).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits: NDArray[np.float64] = np.log2(counts * float(images) / np.outer(alone, alone))
    bits[counts == 0] = -np.inf
    return bits


def strongest(
    counts: NDArray[np.int64], bits: NDArray[np.float64], most: int, *, by_images: bool, least: int = 1
) -> list[Pair]:
    """The `most` strongest pairs on at least `least` images: of most information, or of most images.

    Numbers are places in `counts`. Where one measure is equal the other decides, then the place.
    """
    first, second = np.nonzero(np.triu(counts, 1) >= least)
    images, information_of = counts[first, second], bits[first, second]
    keys = (-information_of, -images) if by_images else (-images, -information_of)  # lexsort: the last counts most
    order = np.lexsort((second, first, *keys))[:most]
    columns = (first[order], second[order], images[order], information_of[order])
    return [Pair(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def block_order(affinity: NDArray[np.float64]) -> list[int]:
    """An order of rows in which those that belong together are neighbours.

    Average-linkage clustering; where two clusters join, they are turned so that their most similar ends touch. Takes
    time with the cube of the rows, so for some tens or hundreds of them.

    Args:
        affinity: `[M, M]`, symmetric; the larger, the closer.
    """
    groups = [[row] for row in range(len(affinity))]
    between = affinity.astype(np.float64).copy()
    np.fill_diagonal(between, -np.inf)
    while len(groups) > 1:
        one, other = sorted(divmod(int(np.argmax(between)), len(groups)))
        left, right = groups[one], groups[other]
        turns = [(a, b) for a in (left, left[::-1]) for b in (right, right[::-1])]
        a, b = max(turns, key=lambda turn: affinity[turn[0][-1], turn[1][0]])  # the first of the best
        weights = len(left), len(right)
        joined = (weights[0] * between[one] + weights[1] * between[other]) / sum(weights)
        groups[one] = a + b
        between[one] = between[:, one] = joined
        between[one, one] = -np.inf
        between = np.delete(np.delete(between, other, 0), other, 1)
        del groups[other]
    return groups[0] if groups else []
