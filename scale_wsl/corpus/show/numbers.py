"""The figures of one data set: how often each hashtag is, how many an image has, and the Zipf law behind it.

Must never look at an image, nor hold more than a few numbers for each hashtag.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Figures", "Zipf", "figures", "fit_zipf", "ranked", "spread_ranks"]

_STEEPEST = 64.0  # no counts that fit 63 bits are steeper
_HALVINGS = 60


@dataclass(frozen=True)
class Zipf:
    """The finite Zipf law nearest to some counts: `p(r) = r^-s / H`, H the sum of `r^-s` over the ranks 1 to R."""

    exponent: float
    """s"""
    ranks: int
    """R, hashtags that are on at least one image."""
    total: int
    """Of the counts."""
    distance: float
    """Kolmogorov-Smirnov: the largest difference between the two cumulative shares, 0 to 1."""

    def expected(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """The counts that the law gives these ranks."""
        every = np.arange(1, self.ranks + 1, dtype=np.float64) ** -self.exponent
        values: NDArray[np.float64] = self.total / every.sum() * ranks.astype(np.float64) ** -self.exponent
        return values


@dataclass(frozen=True)
class Figures:
    """What the page says of a data set."""

    images: int
    counts: NDArray[np.int64]
    """`[V]`, images with each label."""
    per_image: NDArray[np.int64]
    """`[most + 1]`, images with 0, 1, 2, ... labels."""
    zipf: Zipf | None
    """None where fewer than two labels occur."""

    @property
    def pairs(self) -> int:
        """(image, label) pairs."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Labels an image."""
        return self.pairs / self.images

    @property
    def median(self) -> int:
        """Labels of the image in the middle, the lower one of two."""
        return int(np.searchsorted(np.cumsum(self.per_image), (self.images + 1) // 2))

    @property
    def occurring(self) -> int:
        """Labels that are on at least one image."""
        return int(np.count_nonzero(self.counts))

    def share_of_first(self, most: int) -> float:
        """Share of the (image, label) pairs that the `most` most frequent labels have."""
        return float(np.sort(self.counts)[::-1][:most].sum() / self.pairs)

    def rarer_than(self, count: int) -> int:
        """Labels on fewer images than that."""
        return int(np.count_nonzero(self.counts < count))


def figures(label_ids: NDArray[np.int32], label_start: NDArray[np.int64], labels: int) -> Figures:
    """The figures of a data set.

    Args:
        label_ids: `[total]`, the labels of image 0, then of image 1, ...; none twice for the same image.
        label_start: `[N + 1]`, where each image's labels start in `label_ids`.
        labels: V, the size of the vocabulary.
    """
    counts = np.bincount(label_ids, minlength=labels)
    return Figures(len(label_start) - 1, counts, np.bincount(np.diff(label_start)), fit_zipf(counts))


def fit_zipf(counts: NDArray[np.int64]) -> Zipf | None:
    """Fit the Zipf law to counts by maximum likelihood; None for fewer than two hashtags that occur.

    The counts, sorted, are taken as draws of ranks 1 to R. The likelihood is largest where the law's mean of log r is
    the counts' own (Clauset, Shalizi and Newman 2009, section 3, for a law that ends at R); it falls with s, so it is
    found by halving. A line through log-log points would give each of the many rare hashtags as much say as the head.
    The ranks are those of the same counts, which makes s a little too large where counts are small.
    """
    seen = np.sort(counts[counts > 0])[::-1].astype(np.float64)
    if len(seen) < 2:
        return None
    log_rank = np.log(np.arange(1, len(seen) + 1))
    wanted = seen @ log_rank / seen.sum()
    low, high = 0.0, _STEEPEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        weights = np.exp(-middle * log_rank)
        if weights @ log_rank / weights.sum() > wanted:
            low = middle
        else:
            high = middle
    weights = np.exp(-high * log_rank)
    difference = np.cumsum(seen) / seen.sum() - np.cumsum(weights) / weights.sum()
    return Zipf(high, len(seen), int(seen.sum()), float(np.abs(difference).max()))


def ranked(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels that occur, the most frequent first, by their number where counts are equal."""
    order = np.argsort(-counts, kind="stable")
    return order[: int(np.count_nonzero(counts))]


def spread_ranks(ranks: int, most: int) -> NDArray[np.int64]:
    """At most `most` ranks of 1 to `ranks`, the first and the last among them, evenly apart on a logarithmic axis."""
    if ranks <= most:
        return np.arange(1, ranks + 1)
    return np.unique(np.rint(np.geomspace(1, ranks, most)).astype(np.int64))
