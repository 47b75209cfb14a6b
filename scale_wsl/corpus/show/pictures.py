"""Chooses the images that stand for a data set, and makes small pictures of them.

Must never hold more than the small pictures, and never choose by anything but the data set and the seed.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.images import LARGEST_MAX_PIXELS, RefusedImage, small_picture
from scale_wsl.corpus.shards import Dataset
from scale_wsl.errors import UserError
from scale_wsl.randomness import generator

__all__ = ["SIDE", "Picture", "candidates", "examples", "pixel_limit", "samples", "thumbnails"]

SIDE = 192
"""Longer side of a small picture, in pixels."""

_QUALITY = 66  # of WebP
_MAX_PIXELS = 25_000_000  # where the manifest names no limit
_MAX_BYTES = 64 << 20
_BLOCK = 1 << 20  # (image, label) pairs looked at together
_THREADS = 4  # each may hold an image of the pixel limit


@dataclass(frozen=True)
class Picture:
    """A small picture, or why there is none."""

    index: int
    """Of the image in its data set."""
    source: str
    """A data: address; empty where the image cannot be shown."""
    refused: str = ""


def samples(images: int, number: int, seed: int, role: str) -> list[int]:
    """The numbers of `number` images drawn at random, ascending; all where there are no more."""
    drawn = generator("show", role, seed).choice(images, min(number, images), replace=False, shuffle=False)
    return sorted(drawn.tolist())


def candidates(
    label_ids: NDArray[np.int32], label_start: NDArray[np.int64], wanted: Sequence[int], each: int, seed: int
) -> NDArray[np.int64]:
    """`[W, each]`, images of each wanted label, drawn at random; -1 where there are no more.

    One pass, which keeps the `each` smallest of the random numbers that the (image, label) pairs draw.
    """
    place = np.full(max(int(label_ids.max(initial=-1)), max(wanted, default=-1)) + 1, -1, np.int64)
    place[list(wanted)] = np.arange(len(wanted))
    lowest, image = np.full((len(wanted), each), np.inf), np.full((len(wanted), each), -1, np.int64)
    if not len(wanted):
        return image
    for number, start in enumerate(range(0, len(label_ids), _BLOCK)):
        row = place[label_ids[start : start + _BLOCK]]
        draw = generator("show candidates", number, seed).random(len(row))
        better = np.flatnonzero((row >= 0) & (draw < lowest[row, -1]))
        rows = np.concatenate((np.repeat(np.arange(len(wanted)), each), row[better]))
        draws = np.concatenate((lowest.ravel(), draw[better]))
        found = np.searchsorted(label_start, start + better, side="right") - 1
        images = np.concatenate((image.ravel(), found))
        order = np.lexsort((draws, rows))
        rows = rows[order]
        first = order[np.arange(len(rows)) - np.searchsorted(rows, rows) < each]  # each row has `each` or more
        lowest, image = draws[first].reshape(lowest.shape), images[first].reshape(image.shape)
    return image


def examples(
    dataset: Dataset, wanted: Sequence[int], have: Iterable[int], each: int, most: int, seed: int
) -> list[int]:
    """At most `most` further images, so that the wanted labels, the first ones first, have `each` images to show.

    Args:
        dataset: Where from.
        wanted: Distinct labels.
        have: Images that are shown already.
        each: Images of a label.
        most: Images that are returned at most.
        seed: Of the draw.
    """
    shown = set(have)
    of_label: dict[int, int] = dict.fromkeys(wanted, 0)

    def show(index: int) -> None:
        for label in dataset.labels(index).tolist():
            if label in of_label:
                of_label[label] += 1

    for index in shown:
        show(index)
    chosen: list[int] = []
    found = candidates(dataset.label_ids, dataset.label_start, wanted, 2 * each, seed).tolist()
    for label, some in zip(wanted, found, strict=True):
        for index in some:
            if of_label[label] >= each or len(chosen) == most:
                break
            if index >= 0 and index not in shown:
                shown.add(index)
                chosen.append(index)
                show(index)
    return chosen


def pixel_limit(dataset: Dataset) -> int:
    """The largest image that is decoded: what the data set was prepared with, where the manifest says it."""
    settings = dataset.manifest.get("prepared_with")
    limit = settings.get("max_pixels") if isinstance(settings, dict) else None
    return limit if type(limit) is int and 1 <= limit <= LARGEST_MAX_PIXELS else _MAX_PIXELS


def thumbnails(
    dataset: Dataset, indices: Sequence[int], progress: Callable[[int], object] = lambda images: None
) -> list[Picture]:
    """Small pictures of these images, in order; one that cannot be decoded says why.

    Raises:
        UserError: A shard has become shorter, or is gone.
    """
    limit = pixel_limit(dataset)

    def picture(index: int) -> Picture:
        if dataset.length[index] > _MAX_BYTES:
            return Picture(index, "", f"more than {_MAX_BYTES >> 20} MiB")
        try:
            small = small_picture(dataset.read(index), limit, SIDE)
        except RefusedImage as refused:
            return Picture(index, "", f"{refused.reason}: {refused.detail}")
        buffer = io.BytesIO()
        try:
            small.save(buffer, "WEBP", quality=_QUALITY, method=4)
        except (KeyError, OSError):
            raise UserError("this Pillow writes no WebP, which the page needs: install one from PyPI") from None
        return Picture(index, "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode())

    made = []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # bombs and damaged metadata are judged; the filters are the whole process's
        try:
            for done in pool.map(picture, indices):
                made.append(done)
                progress(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return made
