"""Computes everything that a page shows, each part within its bound.

Must never grow with the data set but for a few numbers for each image and hashtag while it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scale_wsl.corpus.naming import ROLES
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.corpus.show.numbers import Figures, figures, ranked
from scale_wsl.corpus.show.pairs import Pair, block_order, information, pair_counts, strongest
from scale_wsl.corpus.show.pictures import Picture, examples, samples, thumbnails
from scale_wsl.corpus.show.report import Report, read_report
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Vocabulary, WordNet

__all__ = ["MOST_PAIRED", "MOST_SAMPLES", "Contents", "Shared", "Side", "gather_contents"]

MOST_SAMPLES = 1000
"""Images drawn from each data set, at most."""
MOST_PAIRED = 2000
"""Hashtags among which pairs are counted: 2,000 x 2,000 numbers."""

_HEAT = 40  # hashtags in the heat map
_PAIRS = 24  # strongest pairs of each kind
_ROWS = 120  # labels in the table for each of: most frequent, merged, ambiguous
_EXAMPLES, _EACH = 480, 4  # images beside the samples, and how many a hashtag should have
_CHARACTERS = 3_500_000  # of all pictures in the page: examples that do not fit are left out
_LEAST = 5  # images that a pair must share before its information is worth a look, or ...
_LEAST_SHARE = 1e-5  # ... this share of all


@dataclass(frozen=True)
class Side:
    """One data set."""

    dataset: Dataset
    figures: Figures
    pictures: list[Picture]
    """Those drawn at random come first."""
    samples: int
    """How many of them were."""

    @property
    def role(self) -> str:
        """Train, val or test."""
        return self.dataset.name.role


@dataclass(frozen=True)
class Shared:
    """Which hashtags share images, in the first data set."""

    counted: int
    """Hashtags among which pairs were counted, the most frequent ones."""
    order: list[int]
    """Labels of the heat map."""
    counts: NDArray[np.int64]
    """`[M, M]` in that order."""
    bits: NDArray[np.float64]
    """`[M, M]`, pointwise mutual information."""
    least: int
    by_bits: list[Pair]
    """Of labels; on at least `least` images."""
    by_images: list[Pair]


@dataclass(frozen=True)
class Contents:
    """All that a page shows."""

    sides: list[Side]
    report: Report
    shared: Shared
    rows: list[int]
    """Labels in the vocabulary's table."""
    lemmas: dict[str, tuple[str, ...]]
    """WNID -> words, of every synset of those."""

    @property
    def vocabulary(self) -> Vocabulary:
        """That of all the data sets."""
        return self.sides[0].dataset.vocabulary


def gather_contents(data: Path, number: int, seed: int) -> Contents:
    """Open what is at `data` and compute what the page shows of it.

    Raises:
        UserError: It is neither a data set nor a folder with some, something in it is damaged, or `number` or `seed`
            is out of range.
    """
    if not 0 <= number <= MOST_SAMPLES:
        raise UserError(f"{number} sample images of a data set were asked for, but it must be 0 to {MOST_SAMPLES:,}")
    if seed < 0:
        raise UserError(f"the seed is {seed}, but must be 0 or more")
    datasets, report = _open(data)
    try:
        return _contents(datasets, report, number, seed)
    finally:
        for dataset in datasets:
            dataset.close()


def _open(data: Path) -> tuple[list[Dataset], Report]:
    try:
        is_dataset = (data / "manifest.json").exists()
        there = [] if is_dataset else [role for role in ROLES if any(data.glob(f"{role}-*/manifest.json"))]
    except OSError as error:
        raise UserError(f"cannot read {data}: {error.strerror}") from None
    if is_dataset:
        return [Dataset.open(data)], Report()
    if not there:
        raise UserError(
            f"there is no data set in {data}: name a data set's folder, or one that scale-wsl prepare has made"
        )
    report = read_report(data)
    datasets = [Dataset.open(find_dataset(data, role)) for role in there]
    for other in datasets[1:]:
        if other.vocabulary_hash != datasets[0].vocabulary_hash:
            raise UserError(
                f"{datasets[0].folder} and {other.folder} have different vocabularies: show them one by one"
            )
    return datasets, report


def _contents(datasets: Sequence[Dataset], report: Report, number: int, seed: int) -> Contents:
    first, vocabulary = datasets[0], datasets[0].vocabulary
    told = [figures(dataset.label_ids, dataset.label_start, len(vocabulary)) for dataset in datasets]
    shared = _shared(first, told[0])
    pairs = [label for pair in (*shared.by_bits, *shared.by_images) for label in (pair.first, pair.second)]
    rows = _rows(vocabulary, told[0].counts)
    # In this order: what stands in a chart should have images first.
    wanted = list(dict.fromkeys((*shared.order, *pairs, *rows)))

    drawn = [samples(len(dataset), number, seed, dataset.name.role) for dataset in datasets]
    more = examples(first, wanted, drawn[0], _EACH, _EXAMPLES, seed) if number else []
    sides = []
    with tqdm(total=sum(map(len, drawn)) + len(more), desc="pictures", unit=" images", disable=None) as bar:
        for dataset, about, indices in zip(datasets, told, drawn, strict=True):
            sides.append(Side(dataset, about, thumbnails(dataset, indices, bar.update), len(indices)))
        room = _CHARACTERS - sum(len(picture.source) for side in sides for picture in side.pictures)
        sides[0].pictures.extend(_within(thumbnails(first, more, bar.update), room))
    return Contents(sides, report, shared, rows, _lemmas(vocabulary, rows))


def _shared(dataset: Dataset, about: Figures) -> Shared:
    frequent = ranked(about.counts)[:MOST_PAIRED]
    with tqdm(total=about.images, desc="hashtags on the same image", unit=" images", disable=None) as bar:
        counts = pair_counts(dataset.label_ids, dataset.label_start, frequent, bar.update)
    bits = information(counts, about.images)
    least = max(_LEAST, round(_LEAST_SHARE * about.images))
    tables = [
        [
            Pair(int(frequent[pair.first]), int(frequent[pair.second]), pair.images, pair.bits)
            for pair in strongest(counts, bits, _PAIRS, by_images=by_images, least=1 if by_images else least)
        ]
        for by_images in (False, True)
    ]
    top = bits[:_HEAT, :_HEAT]
    order = block_order(np.maximum(top, 0))  # rarer together than by chance is not close either
    chosen = np.ix_(order, order)
    labels = frequent[order].tolist()
    return Shared(len(frequent), labels, counts[chosen], bits[chosen], least, *tables)


def _rows(vocabulary: Vocabulary, counts: NDArray[np.int64]) -> list[int]:
    """Labels of the table, the most frequent first: the first ones of all, of the merged and of the ambiguous."""
    order = np.argsort(-counts, kind="stable").tolist()
    chosen = set(order[:_ROWS])
    for special in (
        (label for label in order if len(vocabulary.entries[label].raw) > 1),
        (label for label in order if len(vocabulary.entries[label].synsets) > 1),
    ):
        chosen.update(label for label, _ in zip(special, range(_ROWS), strict=False))
    return [label for label in order if label in chosen]


def _within(pictures: Sequence[Picture], characters: int) -> list[Picture]:
    """The first ones of `pictures` that have room."""
    ends = np.cumsum([len(picture.source) for picture in pictures])
    return list(pictures[: int(np.searchsorted(ends, characters, side="right"))])


def _lemmas(vocabulary: Vocabulary, rows: Sequence[int]) -> dict[str, tuple[str, ...]]:
    wordnet = WordNet.load()
    wnids = {wnid for label in rows for wnid in vocabulary.entries[label].synsets}
    return {wnid: wordnet.lemmas(wnid) for wnid in sorted(wnids & wordnet.wnids)}
