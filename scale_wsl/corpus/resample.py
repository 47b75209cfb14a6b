"""How often each image comes in an epoch, so that rare hashtags are not drowned by the head of the Zipf distribution.

The rule is that of Mahajan et al. 2018, section 3: a hashtag h carried by a share f(h) of the images has the factor
`r(h) = max(1, phi(t / f(h)))` with a threshold t, and an image has the largest factor of its hashtags. phi is 1
(natural), sqrt(x) (square-root, the paper's choice) or x (uniform). The factors are real numbers; what an epoch does
with their fractions is the business of `scale_wsl.loading.order`. Must never drop an image: no factor is below 1.

The threshold can be chosen by the length that an epoch is to have: successors state that instead (SWAG and MAWS: an
epoch of 5 billion samples of 3.6 and 3 billion images).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scale_wsl.errors import UserError

__all__ = [
    "DEFAULT_THRESHOLD",
    "MODES",
    "ExpectedEpoch",
    "choose_threshold",
    "expected_epoch",
    "expected_epochs",
    "hashtag_factors",
    "image_factors",
    "threshold_for",
]

MODES = ("natural", "square-root", "uniform")

DEFAULT_THRESHOLD = 0.001
"""That of the LVIS data set's sampler, which uses the same rule; the paper does not tell its own."""

_BLOCK = 1 << 20  # images whose factors are spread over their hashtags at a time


def hashtag_factors(counts: NDArray[np.int64], images: int, mode: str, threshold: float) -> NDArray[np.float64]:
    """The factor r(h) of every hashtag.

    Args:
        counts: `[V]`, in how many images each hashtag occurs; one that occurs in none gets the factor 1.
        images: the number of images of the data set, N. f(h) = counts / N is a share of *images*, so the shares of
            a data set with several hashtags an image add up to more than 1.
        mode: one of `MODES`.
        threshold: t, the share of images below which a hashtag is repeated.

    Returns:
        `[V]`, each at least 1.
    """
    if mode not in MODES:
        raise ValueError(f"the resampling mode is {mode!r}, but must be one of {', '.join(MODES)}")
    if not threshold > 0:
        raise ValueError(f"the resampling threshold is {threshold}, but must be above 0")
    factors = np.ones(len(counts), np.float64)
    if mode == "natural":
        return factors
    seen = counts > 0
    ratio = threshold * images / counts[seen]
    factors[seen] = np.maximum(1.0, np.sqrt(ratio) if mode == "square-root" else ratio)
    return factors


def image_factors(
    label_ids: NDArray[np.int32], label_start: NDArray[np.int64], mode: str, threshold: float
) -> NDArray[np.float64]:
    """The factor r(I) of every image: the largest r(h) of its hashtags, 1 for an image without any.

    Needs 8 bytes for each image and, for a moment, 8 for each (image, hashtag) pair.

    Args:
        label_ids: `[total]`, the hashtags of image 0, then of image 1, ...; none twice for the same image.
        label_start: `[N + 1]`, where each image's hashtags start in `label_ids` (compressed sparse rows).
        mode: one of `MODES`.
        threshold: t, see `hashtag_factors`.
    """
    images = len(label_start) - 1
    by_hashtag = hashtag_factors(np.bincount(label_ids), images, mode, threshold)
    factors = np.ones(images, np.float64)
    labelled = np.diff(label_start) > 0
    if mode != "natural" and labelled.any():
        # `reduceat` gives an empty row the value that stands at its start, so only rows with hashtags are reduced;
        # leaving the empty ones out moves no border between the others.
        factors[labelled] = np.maximum.reduceat(by_hashtag[label_ids], label_start[:-1][labelled])
    return factors


def choose_threshold(
    label_ids: NDArray[np.int32],
    label_start: NDArray[np.int64],
    mode: str,
    threshold: float | None,
    length: float | None,
) -> float:
    """The threshold that is given, or gives an epoch of a stated length, or `DEFAULT_THRESHOLD`.

    Raises:
        UserError: No threshold gives that length.
    """
    if length is not None:
        return threshold_for(label_ids, label_start, mode, length)
    return DEFAULT_THRESHOLD if threshold is None else threshold


def threshold_for(label_ids: NDArray[np.int32], label_start: NDArray[np.int64], mode: str, length: float) -> float:
    """The smallest threshold by which an epoch is expected to have at least `length` images, or one that repeats none.

    The expected length is the sum of all image factors. It rises with the threshold, so bisection down to neighbouring
    floating-point numbers finds it. An image has the factor of its rarest hashtag, so the sum runs over the different
    counts of rarest hashtags; it is rounded once (`math.fsum`), and square roots and quotients are IEEE 754's, so every
    machine finds the same threshold.

    Needs 8 bytes for each (image, hashtag) pair for a moment.

    Args:
        label_ids: `[total]`, as in `image_factors`.
        label_start: `[N + 1]`
        mode: one of `MODES`.
        length: images.

    Raises:
        UserError: It is below the number of images, or above what the threshold 1 gives.
    """
    images = len(label_start) - 1
    counts, rows = _rarest(label_ids, label_start)

    def expected(threshold: float) -> float:
        factors = hashtag_factors(counts, images, mode, threshold)
        return math.fsum((factors * rows).tolist())

    # Just below the rarest hashtag's share: no image is repeated, whichever way quotients are rounded.
    low = math.nextafter(int(counts[counts > 0].min(initial=images)) / max(images, 1), 0.0)
    high = 1.0
    longest = expected(high)
    if not images <= length <= longest:
        raise UserError(
            f"an epoch of {length:,.0f} images is wanted, but {mode} resampling of these {images:,} images gives one "
            f"of {images:,} (each once) to {math.floor(longest):,} (threshold 1)"
        )
    if length <= expected(low):
        return low
    while low < (middle := (low + high) / 2) < high:
        if expected(middle) < length:
            low = middle
        else:
            high = middle
    return high


def _rarest(
    label_ids: NDArray[np.int32], label_start: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different counts of images' rarest hashtags, and how many images have each; 0 for those without hashtag."""
    counts = np.bincount(label_ids)
    labelled = np.diff(label_start) > 0
    rarest = np.zeros(len(labelled), np.int64)
    if labelled.any():
        rarest[labelled] = np.minimum.reduceat(counts[label_ids], label_start[:-1][labelled])
    different, images = np.unique(rarest, return_counts=True)
    return different, images


@dataclass(frozen=True)
class ExpectedEpoch:
    """What an epoch holds on average under a resampling rule: the effective distribution of hashtags."""

    mode: str
    threshold: float | None
    """None under natural, where it means nothing."""
    images: int
    length: float
    """Images, repeated ones counted as often as they come."""
    repeated: int
    """Images that come more than once on average."""
    largest: float
    """The largest factor of an image."""
    hashtags: NDArray[np.float64]
    """`[V]`, the images of an epoch that carry each hashtag; 0 where no image does."""

    @property
    def top_share(self) -> float:
        """The share of an epoch's images that carry the most frequent hashtag."""
        return float(self.hashtags.max(initial=0)) / self.length if self.length else 0.0

    @property
    def gini(self) -> float:
        """The Gini coefficient of the hashtags that occur: 0 if all are equally frequent, near 1 if few make up all."""
        rising = np.sort(self.hashtags[self.hashtags > 0])
        n = len(rising)
        return float((2 * np.arange(1, n + 1) - n - 1) @ rising / (n * rising.sum())) if n else 0.0

    @property
    def perplexity(self) -> float:
        """exp(entropy) of a drawn hashtag: how many equally frequent hashtags would be as hard to guess."""
        there = self.hashtags[self.hashtags > 0]
        share = there / there.sum()
        return float(np.exp(-(share * np.log(share)).sum())) if len(there) else 0.0


def expected_epoch(
    label_ids: NDArray[np.int32], label_start: NDArray[np.int64], hashtags: int, mode: str, threshold: float
) -> ExpectedEpoch:
    """What an epoch holds on average; memory as for `image_factors`.

    Args:
        label_ids: `[total]`, as in `image_factors`.
        label_start: `[N + 1]`
        hashtags: the size of the vocabulary, V.
        mode: one of `MODES`.
        threshold: t, see `hashtag_factors`.
    """
    factors = image_factors(label_ids, label_start, mode, threshold)
    by_hashtag = np.zeros(hashtags)
    for first in range(0, len(factors), _BLOCK):
        bounds = label_start[first : first + _BLOCK + 1]
        weights = np.repeat(factors[first : first + _BLOCK], np.diff(bounds))
        by_hashtag += np.bincount(label_ids[bounds[0] : bounds[-1]], weights=weights, minlength=hashtags)
    return ExpectedEpoch(
        mode=mode,
        threshold=None if mode == "natural" else threshold,
        images=len(factors),
        length=float(factors.sum()),
        repeated=int((factors > 1).sum()),
        largest=float(factors.max(initial=1)),
        hashtags=by_hashtag,
    )


def expected_epochs(
    label_ids: NDArray[np.int32],
    label_start: NDArray[np.int64],
    hashtags: int,
    *,
    threshold: float | None = None,
    length: float | None = None,
) -> list[ExpectedEpoch]:
    """What an epoch holds under each of `MODES`, at one threshold, or each at that which gives an epoch of `length`.

    Raises:
        UserError: No threshold gives that length.
    """
    epochs = []
    for mode in MODES:
        stated = None if mode == "natural" else length
        chosen = choose_threshold(label_ids, label_start, mode, threshold, stated)
        epochs.append(expected_epoch(label_ids, label_start, hashtags, mode, chosen))
    return epochs
