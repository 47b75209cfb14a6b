"""How often each image comes in an epoch, so that rare hashtags are not drowned by the head of the Zipf distribution.

The rule is that of Mahajan et al. 2018, section 3: a hashtag h carried by a share f(h) of the images has the factor
`r(h) = max(1, phi(t / f(h)))` with a threshold t, and an image has the largest factor of its hashtags. phi is 1
(natural), sqrt(x) (square-root, the paper's choice) or x (uniform). The factors are real numbers; what an epoch does
with their fractions is the business of `scale_wsl.loading.order`. Must never drop an image: no factor is below 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MODES", "hashtag_factors", "image_factors"]

MODES = ("natural", "square-root", "uniform")


def hashtag_factors(counts: NDArray[np.int64], images: int, mode: str, threshold: float) -> NDArray[np.float64]:
    """The factor r(h) of every hashtag.

    Args:
        counts: `[V]`, in how many images each hashtag occurs; one that occurs in none gets the factor 1.
        images: the number of images of the data set, N. f(h) = counts / N is a share of *images*, so the shares of
            a data set with several hashtags an image add up to more than 1.
        mode: one of `MODES`.
        threshold: t, the share of images below which a hashtag is repeated. The paper does not tell its value;
            0.001 is the default of the LVIS data set's sampler, which uses the same rule.

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
