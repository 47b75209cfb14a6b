"""Which image comes at which global position: a pure function of (manifest hash, seed, resampling, epoch).

Training consumes one endless sequence of samples, epoch after epoch, and the number of samples consumed so far - the
global sample counter - is all that a resumed run needs to know, whatever its world size, number of workers or
accumulation. Must never keep generator state, or depend on who asks for which part of the sequence.
"""

from __future__ import annotations

import bisect
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.resample import image_factors
from scale_wsl.randomness import generator

__all__ = ["LabelledImages", "Order", "micro_batch_positions"]


class LabelledImages(Protocol):
    """What `Order.of` needs of a data set (`scale_wsl.corpus.shards.Dataset` has it)."""

    @property
    def manifest_hash(self) -> str:
        """SHA-256 of the manifest, which names the content of the data set."""

    @property
    def label_ids(self) -> NDArray[np.int32]:
        """`[total]`, the labels of all images, one image after the other."""

    @property
    def label_start(self) -> NDArray[np.int64]:
        """`[N + 1]`, where each image's labels start."""


class Order:
    """The endless sequence of samples: epoch lists one after the other, each repeated and shuffled on its own.

    The list of epoch e holds image i floor(r_i) times, and once more with the probability of r_i's fraction, redrawn
    each epoch (Mahajan et al. 2018, section 3), so epochs differ in length unless every factor is a whole number.

    Memory per rank: 8 bytes for each entry of one epoch list, 4 for each image, and 16 more for each image whose factor
    has a fraction; while a list is built, up to 20 more for each image. Building one takes about 0.1 us of CPU time an
    entry, for which the rank that asks waits. Only one list is kept; reading forwards, as training does, builds each
    once. The lengths of earlier epochs, which a jump to a far position needs, cost one Bernoulli draw for each image
    with a fraction, and no list.
    """

    def __init__(self, manifest_hash: str, repeat_factors: NDArray[np.float64], seed: int, *, resampling: str) -> None:
        """Set up the order of the images that `repeat_factors` counts.

        Args:
            manifest_hash: names the data set.
            repeat_factors: `[N]`, r_i >= 1 of each image.
            seed: the run's seed.
            resampling: names the rule that made the factors; two rules must never share a name.
        """
        if not len(repeat_factors):
            raise ValueError("there is no order of no images")
        if not np.all((repeat_factors >= 1) & (repeat_factors < 2**31)):
            raise ValueError("repeat factors must be at least 1, and finite")
        self.manifest_hash = manifest_hash
        self.seed = seed
        self.resampling = resampling
        self._whole = np.floor(repeat_factors).astype(np.int32)
        fraction = repeat_factors - self._whole
        self._fractional = np.flatnonzero(fraction)
        self._fraction = fraction[self._fractional]
        self._starts = [0]  # position at which each epoch known so far starts, and where the last of them ends
        self._kept: tuple[int, NDArray[np.int64]] | None = None

    @classmethod
    def of(cls, dataset: LabelledImages, *, seed: int, resampling: str, threshold: float) -> Order:
        """The order of a data set under a resampling mode of `scale_wsl.corpus.resample.MODES` and its threshold."""
        factors = image_factors(dataset.label_ids, dataset.label_start, resampling, threshold)
        rule = resampling if resampling == "natural" else f"{resampling} t={threshold!r}"
        return cls(dataset.manifest_hash, factors, seed, resampling=rule)

    @property
    def identity(self) -> str:
        """What the sequence is a function of, as text: a resumed run must find the same one in its checkpoint.

        How these become draws is NumPy's: its streams of `Generator.shuffle` and `Generator.random` may change with a
        release (NEP 19). Its version is not part of the identity; a test pins the draws themselves.
        """
        return f"manifest {self.manifest_hash}, seed {self.seed}, resampling {self.resampling}"

    @property
    def images(self) -> int:
        """The number of images, N."""
        return len(self._whole)

    def epoch_list(self, epoch: int) -> NDArray[np.int64]:
        """The records of an epoch in their order, `[M_e]`, read-only."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = None  # never two lists in memory beside the one being built
            repeats = self._whole.copy()
            repeats[self._fractional] += self._extra(epoch)
            entries = np.repeat(np.arange(self.images, dtype=np.int64), repeats)
            self._generator(epoch, "shuffle").shuffle(entries)
            entries.flags.writeable = False
            self._kept = epoch, entries
        return self._kept[1]

    def epoch_start(self, epoch: int) -> int:
        """The global position of an epoch's first sample."""
        if not len(self._fractional):
            return epoch * self._shortest
        while len(self._starts) <= epoch:
            self._append_epoch()
        return self._starts[epoch]

    def locate(self, position: int) -> tuple[int, int]:
        """The (epoch, index within the epoch) of a global position."""
        if position < 0:
            raise ValueError(f"there is no position {position}")
        if not len(self._fractional):
            return divmod(position, self._shortest)
        while self._starts[-1] <= position:
            self._append_epoch()
        epoch = bisect.bisect_right(self._starts, position) - 1
        return epoch, position - self._starts[epoch]

    def records(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """What comes at the global positions [start, stop).

        Returns:
            Three arrays `[stop - start]`: the records, the epochs, and the indices within the epochs.
        """
        records, epochs, indices = (np.empty(max(stop - start, 0), np.int64) for _ in range(3))
        position = start
        while position < stop:
            epoch, index = self.locate(position)
            part = self.epoch_list(epoch)[index : index + stop - position]
            here = slice(position - start, position - start + len(part))
            records[here] = part
            epochs[here] = epoch
            indices[here] = np.arange(index, index + len(part))
            position += len(part)
        return records, epochs, indices

    @property
    def _shortest(self) -> int:
        """The length of an epoch in which no fraction came up."""
        return int(self._whole.sum(dtype=np.int64))

    def _append_epoch(self) -> None:
        extra = int(self._extra(len(self._starts) - 1).sum())
        self._starts.append(self._starts[-1] + self._shortest + extra)

    def _extra(self, epoch: int) -> NDArray[np.bool_]:
        """Which of the images with a fraction come once more in this epoch."""
        return self._generator(epoch, "repeat").random(len(self._fraction)) < self._fraction

    def _generator(self, epoch: int, purpose: str) -> np.random.Generator:
        return generator("order", self.manifest_hash, self.seed, self.resampling, epoch, purpose)


def micro_batch_positions(
    counter: int, micro_step: int, *, micro_batch: int, accumulation: int, rank: int, world_size: int
) -> range:
    """The global positions of one rank's micro-batch in the step that starts at the global sample counter `counter`.

    A step consumes the positions [counter, counter + G), G = micro_batch * accumulation * world_size. They are dealt
    in this order: micro-steps, within a micro-step ranks, within a rank its samples. So the set of samples of a step
    depends on G alone, not on how G factors, and every rank reads forwards.
    """
    if not (0 <= rank < world_size and 0 <= micro_step < accumulation and micro_batch > 0 and counter >= 0):
        raise ValueError(
            f"there is no micro-batch of {micro_batch} samples for micro-step {micro_step} of {accumulation} on rank "
            f"{rank} of {world_size} at sample {counter}"
        )
    first = counter + (micro_step * world_size + rank) * micro_batch
    return range(first, first + micro_batch)
