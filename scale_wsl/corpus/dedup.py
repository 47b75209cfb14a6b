"""Finds images that are nearly the same, so that a training and a validation split never share one.

Must never miss a pair that is near by the rule below: the search is exact, not sampled or hashed.

The rule: two images are near-identical when their grey 16 x 16 thumbnails (`images.look`), or one and the mirror image
of the other, correlate with at least `NEAR`. Correlation takes out brightness and contrast, and grey the colour: what
counts is the drawing. Near-identity is then made transitive, and variants that a source groups join too.

Why not a perceptual hash of a few bits: on flat drawings most bits of one (dHash and pHash, of 64 and 256 bits, were
tried) hang on rounding. Halving one, or saving it as a poor JPEG, moved a 64-bit pHash by 23 bits or more in 1 of 100
cases, where the nearest *other* drawing is 12 bits away in the median. The correlation stayed above 0.98 in 99 of 100
of these cases, and the nearest other drawing has 0.88 in the median. The pairs found at 0.97 are recolours, mirror
images and variants of one drawing, playing cards of one rank, and flags of one layout; from 0.95 on, different things
of one outline join.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.images import SIDE
from scale_wsl.randomness import derived_seed

__all__ = ["NEAR", "Near", "clusters", "correlation_vectors", "split"]

NEAR = 0.97
"""The correlation from which on two thumbnails are near-identical."""

_FAINT = 4.0
"""Grey levels (standard deviation). A thumbnail that varies less is scaled as if it varied by so much: what little
shows on nearly empty images is noise, which must not tell them apart, so they are near-identical to each other."""

_LEAF = 1024  # rows of a leaf of the search tree: a block of distances takes 4 MB
_PREFIX = 32  # coordinates that rule out most pairs
_RADIUS = np.float32(2 * (1 - NEAR) + 1e-6)  # squared; 1e-6: rounding must not lose a pair on the border
_DENSE = 1 << 15  # pairs left of a block from which on one product of all coordinates is cheaper than pair by pair


def clusters(thumbnails: NDArray[np.uint8], groups: Sequence[Collection[str]]) -> NDArray[np.int64]:
    """The cluster of each image, named by the index of its first member.

    Takes 1 kB of memory for each distinct thumbnail. Time grows with the square of their number, divided by what the
    bounding boxes rule out (8,000 images take seconds).

    Args:
        thumbnails: `[N, SIDE, SIDE]`.
        groups: `[N]`, the groups of each image, often none: images that share one are put in one cluster.

    Returns:
        `[N]`
    """
    forest = _Forest(len(thumbnails))
    distinct, first, which = np.unique(
        thumbnails.reshape(len(thumbnails), -1), axis=0, return_index=True, return_inverse=True
    )
    forest.join(np.arange(len(thumbnails)), first[which.reshape(-1)])
    first_of_group: dict[str, int] = {}
    members = [(i, first_of_group.setdefault(group, i)) for i, those in enumerate(groups) for group in those]
    if members:
        forest.join(*np.array(members).T)
    spectrum = _spectrum(distinct.reshape(-1, SIDE, SIDE))
    for a, b in _near_blocks(spectrum):
        forest.join(first[a], first[b])
    return forest.find(np.arange(len(thumbnails)))


def split(cluster: NDArray[np.int64], keys: Sequence[str], share: float, seed: int) -> NDArray[np.bool_]:
    """Which images are for validation: whole clusters, drawn until their images are `share` of all.

    The order of the draw is by a hash of the seed and each cluster's smallest key, so it does not depend on the order
    of the images. A cluster that would overshoot the share is passed over, so the largest clusters are for training; if
    all would, the smallest one is drawn.

    Args:
        cluster: `[N]`, as `clusters` gives it.
        keys: `[N]`
        share: Above 0 and below 1.
        seed: Of the draw.

    Returns:
        `[N]`, at least one and not all where there are two clusters or more, else none.
    """
    members: dict[int, list[int]] = {}
    for i, root in enumerate(cluster.tolist()):
        members.setdefault(root, []).append(i)
    drawn = sorted(members.values(), key=lambda rows: derived_seed("split", seed, min(keys[row] for row in rows)))
    room = min(max(1, round(share * len(keys))), len(keys) - 1)
    validation = np.zeros(len(keys), np.bool_)
    for rows in drawn:
        if len(rows) <= room:
            validation[rows] = True
            room -= len(rows)
    if not validation.any() and len(drawn) > 1:
        validation[min(drawn, key=len)] = True
    return validation


class Near:
    """Says which of a stream of images are near-identical to any of a fixed set, by the same rule, exactly.

    Holds 2 kB for each image of the set, and 4 bytes for each of them and image that is asked about at a time.

    Args:
        thumbnails: `[M, SIDE, SIDE]`, the set.
    """

    def __init__(self, thumbnails: NDArray[np.uint8]) -> None:
        vectors = _spectrum(np.unique(thumbnails, axis=0))
        self._vectors = np.concatenate([vectors, vectors * _mirror_signs()])

    def any_near(self, thumbnails: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Whether each of `thumbnails` `[N, SIDE, SIDE]` is near any of the set: `[N]`."""
        near = np.zeros(len(thumbnails), np.bool_)
        if not len(self._vectors):
            return near
        vectors = _spectrum(thumbnails)
        for start in range(0, len(vectors), _LEAF):
            some = vectors[start : start + _LEAF]
            for other in range(0, len(self._vectors), 8 * _LEAF):
                part = self._vectors[other : other + 8 * _LEAF]
                rows, columns = np.nonzero(_squared_distances(some[:, :_PREFIX], part[:, :_PREFIX]) <= _RADIUS)
                if len(rows) > _DENSE:
                    near[start : start + len(some)] |= (_squared_distances(some, part) <= _RADIUS).any(1)
                else:
                    close = ((some[rows] - part[columns]) ** 2).sum(1) <= _RADIUS
                    near[start + rows[close]] = True
        return near


def correlation_vectors(thumbnails: NDArray[np.uint8], *, mirrored: bool = False) -> NDArray[np.float32]:
    """Vectors for a search between two sets: a and b are near-identical where `1 - |a - b|^2 / 2` is `NEAR` or more.

    Args:
        thumbnails: `[N, SIDE, SIDE]`.
        mirrored: Give the vectors of the mirror images.

    Returns:
        `[N, SIDE * SIDE]`, of length 1, shorter for thumbnails that hardly vary.
    """
    vectors = _spectrum(thumbnails)
    return vectors * _mirror_signs() if mirrored else vectors


class _Forest:
    """Union-find over N elements; every root is the smallest element of its tree."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size)

    def join(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Join a[i] and b[i] for every i."""
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            # Each root is hung on the smallest of those it meets; what it met beside that is for the next round.
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def find(self, elements: NDArray[np.int64]) -> NDArray[np.int64]:
        """The root of each element, to which it is linked directly from now on."""
        roots = self.parent[elements]
        while not np.array_equal(above := self.parent[roots], roots):
            roots = above
        self.parent[elements] = roots
        return roots


def _spectrum(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """`[N, SIDE * SIDE]`: the thumbnails in the orthonormal cosine basis, without their mean, at length 1.

    The distance of two such vectors is sqrt(2 (1 - correlation)). Low frequencies come first and hold most of it, and
    the mirror image is the same vector with the sign of the odd horizontal frequencies turned.
    """
    vectors = np.empty((len(thumbnails), SIDE * SIDE), np.float32)
    order, basis = _frequency_order(), _cosines()
    for start in range(0, len(thumbnails), 4096):
        part = basis @ thumbnails[start : start + 4096].astype(np.float32) @ basis.T
        part = part.reshape(len(part), -1)[:, order]
        part[:, 0] = 0
        length = np.linalg.norm(part, axis=1, keepdims=True)
        vectors[start : start + 4096] = part / np.maximum(length, _FAINT * SIDE)
    return vectors


def _cosines() -> NDArray[np.float32]:
    """The orthonormal DCT-II of length SIDE: a row for each frequency."""
    frequency, place = np.mgrid[:SIDE, :SIDE]
    basis = np.cos(np.pi / SIDE * frequency * (place + 0.5)) * np.sqrt(2 / SIDE)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis, np.float32)


def _frequency_order() -> NDArray[np.int64]:
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    return np.lexsort((row, row + column))


def _mirror_signs() -> NDArray[np.float32]:
    return np.where(_frequency_order() % SIDE % 2, -1, 1).astype(np.float32)


def _near_blocks(vectors: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All near pairs (a[i], b[i]) of rows, mirrored or not, in portions.

    Rows are sorted into leaves of a k-d tree over the low frequencies. Two leaves whose bounding boxes are further
    apart than the radius hold no near pair; of the others, the low frequencies alone rule out most pairs, for a
    distance in some coordinates never exceeds the distance in all.
    """
    leaves = list(_leaves(vectors[:, :_PREFIX], np.arange(len(vectors))))
    low = np.stack([vectors[leaf, :_PREFIX].min(0) for leaf in leaves])
    high = np.stack([vectors[leaf, :_PREFIX].max(0) for leaf in leaves])
    for signs in (np.ones(vectors.shape[1], np.float32), _mirror_signs()):
        head = signs[:_PREFIX]
        flipped_low, flipped_high = np.where(head < 0, -high, low), np.where(head < 0, -low, high)
        for number, leaf in enumerate(leaves):
            a = vectors[leaf] * signs
            gap = np.maximum(0, np.maximum(low - flipped_high[number], flipped_low[number] - high))
            for other in np.flatnonzero((gap**2).sum(1) <= _RADIUS):
                if other < number:  # each pair of leaves once: being near is mutual, also mirrored
                    continue
                b = vectors[leaves[other]]
                rows, columns = np.nonzero(_squared_distances(a[:, :_PREFIX], b[:, :_PREFIX]) <= _RADIUS)
                if len(rows) > _DENSE:
                    rows, columns = np.nonzero(_squared_distances(a, b) <= _RADIUS)
                else:
                    near = ((a[rows] - b[columns]) ** 2).sum(1) <= _RADIUS
                    rows, columns = rows[near], columns[near]
                yield leaf[rows], leaves[other][columns]


def _squared_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    distances = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * (a @ b.T)
    return np.asarray(distances - 1e-5, np.float32)  # the product's rounding must not lose a pair either


def _leaves(points: NDArray[np.float32], rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    if len(rows) <= _LEAF:
        yield rows
        return
    inside = points[rows]
    axis = int(np.argmax(inside.var(0)))
    order = np.argsort(inside[:, axis], kind="stable")
    yield from _leaves(points, rows[order[: len(rows) // 2]])
    yield from _leaves(points, rows[order[len(rows) // 2 :]])
