"""Vocabulary surgery: a head trained on one vocabulary becomes the start of a head over another one.

Rows go by meaning, never by index. Must never hold more of a tensor than what is asked for, and never let a row stand
for something else without saying so.

What a class means is its set of synsets (see `hashtags.vocabulary`), or, where WordNet does not know it, its one
hashtag. The canonical name of a class with synsets is merely its commonest spelling and may change with the data. So:

taken over   the old vocabulary has a class of the same synset set, whatever that was called, or the same hashtag where
             neither has synsets
ambiguous    it has none, but a hashtag of the class had a place in the old vocabulary, under other synsets: WordNet or
             the rules for hashtags have changed. Images with that hashtag trained that row, so it is a fair start, but
             it is not the same class: the row starts anew, unless the caller says to take it.
new          none of the class's hashtags had a place
dropped      an old class whose row goes nowhere
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.models.head import INITIAL_BLOCK, initial_rows
from scale_wsl.shards import Source

__all__ = ["OperatedSource", "SurgeryReport", "match_rows"]

_NO_ROW = -1
_LARGEST_GAP = 8  # rows that nobody wants, read rather than skipped: about what a read costs to begin
_ROWS_AT_ONCE = 4096  # of one read


@dataclass(frozen=True)
class SurgeryReport:
    """What became of every class of two vocabularies; `dataclasses.asdict` makes it JSON-able.

    Every class of the new vocabulary is in one of the first three, and every class of the old one is taken over, taken
    because it is ambiguous, or dropped.
    """

    taken_over: int
    """Classes of the same meaning in both."""
    new: tuple[str, ...]
    """Canonical hashtags that start anew, as none of their hashtags had a place before."""
    ambiguous: Mapping[str, tuple[str, ...]]
    """Canonical hashtag -> canonical hashtags of the old classes, of other synsets, that its hashtags belonged to."""
    dropped: tuple[str, ...]
    """Canonical hashtags of the old vocabulary whose rows go nowhere."""
    renamed: Mapping[str, str]
    """Old canonical hashtag -> new one, of classes that are taken over under another name."""
    takes_ambiguous: bool
    """Whether an ambiguous class takes the row of the first of its old classes, instead of starting anew."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        fate = "take the row of the class that had their hashtag" if self.takes_ambiguous else "start anew"
        lines = [
            f"{self.taken_over:,} hashtags taken over, {len(self.renamed):,} of them under another name",
            _listed("new", self.new),
            _listed(f"of other synsets than before, which {fate}", tuple(self.ambiguous)),
            _listed("dropped", self.dropped),
        ]
        return "\n".join(lines)


def _listed(what: str, hashtags: tuple[str, ...]) -> str:
    some = ", ".join(hashtags[:5]) + (", ..." if len(hashtags) > 5 else "")
    return f"{len(hashtags):,} {what}" + (f": {some}" if some else "")


def match_rows(
    old: Vocabulary, new: Vocabulary, *, take_ambiguous: bool = False
) -> tuple[NDArray[np.int64], SurgeryReport]:
    """For each class of `new`, the row of `old` that it starts from, -1 for none: int64 `[len(new)]`; and the report.

    Args:
        old: the vocabulary of the trained head.
        new: the vocabulary of the head to be.
        take_ambiguous: whether a class whose hashtag had other synsets takes that hashtag's row all the same: that of
            its canonical hashtag, or of its commonest one that had a place. Two classes may then take the same row.
    """
    rows = np.full(len(new), _NO_ROW, dtype=np.int64)
    taken = 0
    fresh: list[str] = []
    ambiguous: dict[str, tuple[str, ...]] = {}
    renamed: dict[str, str] = {}
    for index, entry in enumerate(new.entries):
        row = old.index_of_key(entry.key)
        if row is not None:
            rows[index] = row
            taken += 1
            if old.entries[row].hashtag != entry.hashtag:
                renamed[old.entries[row].hashtag] = entry.hashtag
            continue
        places = [place for hashtag in entry.raw if (place := old.index(hashtag)) is not None]  # canonical one first
        if not places:
            fresh.append(entry.hashtag)
            continue
        ambiguous[entry.hashtag] = tuple(old.entries[place].hashtag for place in dict.fromkeys(places))
        if take_ambiguous:
            rows[index] = places[0]
    used = set(rows[rows >= 0].tolist())
    dropped = tuple(entry.hashtag for row, entry in enumerate(old.entries) if row not in used)
    return rows, SurgeryReport(taken, tuple(fresh), ambiguous, dropped, renamed, take_ambiguous)


@dataclass(frozen=True)
class OperatedSource:
    """A checkpoint's tensors as they are for another vocabulary.

    Tensors of the head's rows, `[V, ...]`, are made up row by row: `head.weight` and `head.bias`, and whatever an
    optimizer keeps for them (`momentum.head.weight`, say). A new row of the weight starts as `initial_rows` has it, of
    the bias as 0, of optimizer state as 0. All other tensors are the old source's.

    Attributes:
        old: the trained head's.
        rows: from `match_rows`.
        old_size: classes of the old vocabulary.
        seed: of new rows, as a new head's.
    """

    old: Source
    rows: NDArray[np.int64]
    old_size: int
    seed: int

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` in row-major order of a tensor of the new vocabulary; see `Source.read`.

        Needs memory for these elements and a few MiB; reads from the old source in ascending order of rows.

        Raises:
            ValueError: a tensor of the head that has not one row for each class.
        """
        if "head" not in name.split(".") or not shape:
            return self.old.read(name, shape, start, stop)
        if shape[0] != len(self.rows):
            raise ValueError(f"{name} has {shape[0]} rows, but the new vocabulary has {len(self.rows)} classes")
        if start >= stop:
            return torch.empty(0)
        width = math.prod(shape[1:])
        first, last = start // width, -(-stop // width)
        wanted = self.rows[first:last]
        found = torch.zeros(last - first, width)
        fresh = np.flatnonzero(wanted == _NO_ROW)
        if name == "head.weight":
            for block in np.unique((fresh + first) // INITIAL_BLOCK).tolist():
                rows = range(block * INITIAL_BLOCK, min((block + 1) * INITIAL_BLOCK, len(self.rows)))
                here = fresh[(fresh + first >= rows.start) & (fresh + first < rows.stop)]
                found[here] = initial_rows(self.seed, rows, width)[here + first - rows.start]
        for places, rows in self._runs(wanted):
            old_shape = torch.Size([self.old_size, *shape[1:]])
            values = self.old.read(name, old_shape, rows.start * width, rows.stop * width).view(len(rows), width)
            found = found.to(values.dtype)
            found[places] = values[wanted[places] - rows.start]
        return found.view(-1)[start - first * width : stop - first * width]

    @staticmethod
    def _runs(wanted: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], range]]:
        """Places in `wanted` of old rows that lie together, and the range of old rows that holds them."""
        order = np.argsort(wanted, kind="stable")
        order = order[wanted[order] != _NO_ROW]
        rows, begin = wanted[order], 0
        for end in range(1, len(order) + 1):
            if end < len(order):
                near = rows[end] - rows[end - 1] <= _LARGEST_GAP
                if near and rows[end] - rows[begin] < _ROWS_AT_ONCE:
                    continue
            yield order[begin:end], range(int(rows[begin]), int(rows[end - 1]) + 1)
            begin = end
