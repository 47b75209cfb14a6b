"""Views on a data set: a nested subset of its images, and noise in their labels, without a copy of any image on disk.

Must never let what happens to an image depend on the other images that are in the view, on their order, or on chance;
and never touch a validation set.

Subsets. An image's place in line is a hash of its key and of the subset's seed, so the images of `images=35k` are the
first 35,000 in line, and are all among those of `images=350k` (Mahajan et al. 2018, figure 2, does so with random
subsets). How far that holds:

- Of one data set, and of one that holds the same images in other shards or another order: exactly, at any two sizes.
- When the data set grows, images keep their places, and newcomers are in line with them. So the subset of n images of
  the larger set holds no old image that was not in the old subset of n, but newcomers have taken the places of some.
  The old subset of n is within the new one of n' from the n' on that reaches its last image, which is about
  n' = n x growth: in other words a *share* of the images stays what it was, but for those at its border.
- Not where keys change, or images move between training and validation: `scale-wsl prepare` draws that split anew when
  it gets more posts.

Noise. Each (image, hashtag) pair is replaced with probability p by a draw from the hashtags of all pairs of the whole
data set (paper, figure 3: p = 0, 0.1, 0.25, 0.5). Both the choice and the draw are a function of the noise's seed, the
image's key and the hashtag's name - what is drawn also of the data set's vocabulary and counts - so pairs that are
replaced at 10 % are replaced at 25 % too, by the same hashtag, and an image has the same labels in every subset. A draw
may give what was there, and several may give the same; an image has a hashtag once, so it may end up with fewer, but
never with none. `View.noise` says how often that was.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.keyhash import drawn_for, mixed, text_hashes, uniform
from scale_wsl.corpus.naming import DatasetName, wanted_count
from scale_wsl.corpus.shards import Dataset
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Vocabulary

__all__ = ["Images", "Noise", "View", "ViewSpec", "view_of", "wanted_images"]

_RULE = 1  # goes up when a view of the same description holds other images or labels
_BLOCK = 1 << 16  # images whose labels are replaced at a time


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """What is taken of a data set; by default all of it, as it is.

    Raises:
        UserError: A value is out of range, or a seed is set that seeds nothing.
    """

    images: int | float | str | None = None
    """How many images, as `wanted_images` reads it; None: all."""
    subset_seed: int = 0
    """Of the images' places in line."""
    label_noise: float = 0.0
    """Probability with which each (image, hashtag) is replaced."""
    noise_seed: int = 0

    def __post_init__(self) -> None:
        if self.images is not None:
            wanted_images(self.images, 1, "images")
        if not 0 <= self.label_noise <= 1:
            raise UserError(f"label_noise is {self.label_noise}, but must be between 0 and 1")
        for key, about, idle in (
            ("subset_seed", "images", self.images is None),
            ("noise_seed", "label_noise", self.label_noise == 0),
        ):
            if getattr(self, key) < 0:
                raise UserError(f"{key} is {getattr(self, key)}, but must be 0 or more")
            if getattr(self, key) and idle:
                raise UserError(f"{key} is set, but not {about}, which it is about: take it out")


@dataclass(frozen=True)
class Noise:
    """What label noise did."""

    pairs: int
    """(image, hashtag) pairs before."""
    replaced: int
    """Pairs for which a hashtag was drawn."""
    unchanged: int
    """Of these, how many drew the hashtag that was there."""
    collapsed: int
    """Pairs that are no more, since their image has that hashtag already."""

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.replaced:,} of {self.pairs:,} hashtags replaced ({self.replaced / self.pairs:.2%}), "
            f"{self.unchanged:,} of them by the same; {self.collapsed:,} doubles on one image dropped"
        )


class View:
    """A data set as `ViewSpec` wants it, with everything that training needs of a `Dataset`.

    Needs 16 bytes of memory for each of its images and 4 for each of their labels beside the data set's own; while it
    is made, about 30 more for each image of the data set, and 1 for each label. A pickled copy is the data set's path
    and the spec: the view is made again where it is unpickled. Threads may share one.

    Attributes:
        dataset: What this is a view on.
        spec: What is taken of it.
        records: `[N]` int64, ascending, the numbers of the view's images in the data set.
        label_ids: `[total]` int32, the labels of image 0 of the view, ascending, then of image 1, ...
        label_start: `[N + 1]` int64; the labels of image i are `label_ids[label_start[i]:label_start[i + 1]]`.
        max_labels: the largest number of labels of one image.
        noise: What label noise did; None where there is none.
        name: Its `DatasetName` with the exact counts: the vocabulary stays whole.
        manifest_hash: SHA-256 over the data set's and the spec: equal contents, equal hash.
    """

    def __init__(self, dataset: Dataset, spec: ViewSpec, progress: bool = False) -> None:
        self.dataset = dataset
        self.spec = spec
        total = len(dataset)
        count = total if spec.images is None else wanted_images(spec.images, total, "images")
        if count > total:
            raise UserError(
                f"a subset of {count:,} images is wanted, but {dataset.name} in {dataset.folder} has only {total:,}"
            )
        hashes = None
        if count < total or spec.label_noise:
            hashes = text_hashes(dataset.keys, "hashing the images' keys" if progress else None)
        if hashes is None or count == total:
            self.records: NDArray[np.int64] = np.arange(total)
            self.label_ids, self.label_start = dataset.label_ids, dataset.label_start
        else:
            self.records = first_in_line(drawn_for(hashes, "subset", spec.subset_seed), dataset.keys, count)
            self.label_ids, self.label_start = _labels_of(self.records, dataset.label_ids, dataset.label_start)
        self.noise: Noise | None = None
        if spec.label_noise:
            assert hashes is not None
            self.label_ids, self.label_start, self.noise = _replaced(
                self.label_ids,
                self.label_start,
                drawn_for(hashes[self.records], "label noise", spec.noise_seed),
                hashtags=text_hashes([entry.hashtag for entry in dataset.vocabulary.entries]),
                marginal=np.bincount(dataset.label_ids, minlength=len(dataset.vocabulary)),
                probability=spec.label_noise,
            )
        self.max_labels = int(np.diff(self.label_start).max())
        self.name = DatasetName(dataset.name.role, dataset.name.source, count, dataset.name.labels)
        taken = f"images {count} seed {spec.subset_seed}" if count < total else "all images"
        noisy = f"label noise {spec.label_noise!r} seed {spec.noise_seed}" if spec.label_noise else "no label noise"
        described = f"scale_wsl view {_RULE} of {dataset.manifest_hash}: {taken}, {noisy}"
        self.manifest_hash = hashlib.sha256(described.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> Any:
        return View, (self.dataset, self.spec)

    @property
    def folder(self) -> Path:
        """The data set's folder."""
        return self.dataset.folder

    @property
    def vocabulary(self) -> Vocabulary:
        """What the label ids mean: the data set's whole vocabulary, with its counts, whatever the view holds of it."""
        return self.dataset.vocabulary

    @property
    def vocabulary_hash(self) -> str:
        """The vocabulary's hash."""
        return self.dataset.vocabulary_hash

    @cached_property
    def keys(self) -> Any:
        """`[N]` text; made when first asked for."""
        return self.dataset.keys[self.records]

    def labels(self, i: int) -> NDArray[np.int32]:
        """The labels `[k]` of image i, ascending; at least one."""
        return self.label_ids[self.label_start[i] : self.label_start[i + 1]]

    def read(self, i: int) -> bytes:
        """The bytes of image i's file.

        Raises:
            UserError: The shard has become shorter, or is gone.
        """
        return self.dataset.read(int(self.records[i]))

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        self.dataset.close()

    def summary(self) -> str:
        """One line that says what was taken."""
        parts = []
        if len(self) < len(self.dataset):
            parts.append(f"{len(self):,} of the {len(self.dataset):,} images of {self.dataset.name}")
            parts[-1] += f" (subset seed {self.spec.subset_seed})" if self.spec.subset_seed else ""
        if self.noise:
            seed = f" (seed {self.spec.noise_seed})" if self.spec.noise_seed else ""
            parts.append(f"label noise {self.spec.label_noise:g}{seed}: {self.noise.summary()}")
        return "; ".join(parts)


Images = Dataset | View
"""What a network can be trained on."""


def view_of(dataset: Dataset, spec: ViewSpec, progress: bool = False) -> Images:
    """A view on a data set, or the data set itself where nothing of it is left out or changed.

    Args:
        dataset: Which.
        spec: What to take of it.
        progress: Show a progress bar where hashing the keys takes long.

    Raises:
        UserError: The data set has fewer images than are wanted.
    """
    view = View(dataset, spec, progress)
    return dataset if len(view) == len(dataset) and view.noise is None else view


def wanted_images(value: int | float | str, total: int, key: str) -> int:
    """How many of `total` images a user wants: 35000, '3.5M' (see `wanted_count`), or the share 0.1 or '10 %' of them.

    Raises:
        UserError: It is neither; the sentence names `key`.
    """
    share = _share(value)
    if share is None:
        return wanted_count(value, key)
    if not 0 < share <= 1:
        raise UserError(f"{key} is {value!r:.80}, but a share of the images must be above 0 and at most 1 (100 %)")
    return max(1, round(share * total))


def first_in_line(places: NDArray[np.uint64], keys: Any, count: int) -> NDArray[np.int64]:
    """The numbers `[count]`, ascending, of the images with the smallest places; among equal ones the smallest keys.

    Args:
        places: `[N]`.
        keys: `[N]` text.
        count: At least 1 and at most N.
    """
    last = np.partition(places, count - 1)[count - 1]
    chosen = places < last
    tied = sorted(np.flatnonzero(places == last).tolist(), key=lambda record: str(keys[record]))
    chosen[tied[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def _share(value: int | float | str) -> float | None:
    """The share that a value is, in whatever range; None where it is a count."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return None
    if text.endswith("%"):
        return number / 100
    return number if number < 1 and number != 0 else None


def _labels_of(
    records: NDArray[np.int64], label_ids: NDArray[np.int32], label_start: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    k = np.diff(label_start)
    chosen = np.zeros(len(k), np.bool_)
    chosen[records] = True
    return label_ids[np.repeat(chosen, k)], np.concatenate(([0], np.cumsum(k[records])))


def _replaced(
    label_ids: NDArray[np.int32],
    label_start: NDArray[np.int64],
    images: NDArray[np.uint64],
    *,
    hashtags: NDArray[np.uint64],
    marginal: NDArray[np.int64],
    probability: float,
) -> tuple[NDArray[np.int32], NDArray[np.int64], Noise]:
    """Labels with noise.

    Args:
        label_ids: `[total]`, the labels before.
        label_start: `[N + 1]`.
        images: `[N]`, a draw for each image.
        hashtags: `[V]`, a hash of each hashtag's name.
        marginal: `[V]`, how often each hashtag is to be drawn, in proportion.
        probability: With which each label is replaced.
    """
    ends = np.cumsum(marginal)
    vocabulary = len(marginal)
    blocks, counts = [], []
    replaced = unchanged = 0
    for first in range(0, len(images), _BLOCK):
        bounds = label_start[first : first + _BLOCK + 1]
        old = label_ids[bounds[0] : bounds[-1]].astype(np.int64)
        image = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        draws = mixed(images[first : first + _BLOCK][image] ^ hashtags[old])
        noisy = uniform(draws) < probability
        # A draw is at most 1 - 2^-53, so its product with a count below 2^53 is below the count, rounded or not.
        picked = (uniform(mixed(draws[noisy])) * ends[-1]).astype(np.int64)
        new = old.copy()
        new[noisy] = np.searchsorted(ends, picked, side="right")
        replaced += int(noisy.sum())
        unchanged += int((new[noisy] == old[noisy]).sum())
        pairs = np.sort(image * vocabulary + new)
        distinct = np.ones(len(pairs), np.bool_)
        distinct[1:] = pairs[1:] != pairs[:-1]
        image, new = np.divmod(pairs[distinct], vocabulary)
        blocks.append(new.astype(np.int32))
        counts.append(np.bincount(image, minlength=len(bounds) - 1))
    ids = np.concatenate(blocks)
    starts = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
    return ids, starts, Noise(len(label_ids), replaced, unchanged, len(label_ids) - len(ids))
