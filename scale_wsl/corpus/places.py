"""What a process keeps from one task to the next: WordNet, and which hashtags have a place.

Must never answer from a file that has been replaced since.
"""

from __future__ import annotations

import functools
import os

from scale_wsl.corpus.kernel import Place, place_by_label
from scale_wsl.hashtags import Vocabulary, WordNet
from scale_wsl.hashtags.rules import PLACELESS, VocabularyRule

__all__ = ["edition", "label_places", "places_of"]

_OUTSIDE = PLACELESS[2]


@functools.lru_cache(maxsize=2)
def places_of(rule: VocabularyRule | Vocabulary) -> Place:
    """From a normalised hashtag to its canonical key; a process's own, as it takes a moment to make."""
    if isinstance(rule, VocabularyRule):
        return rule.candidates(WordNet.load()).place

    def place(hashtag: str) -> tuple[str, str]:
        index = rule.label(hashtag, WordNet.load())
        return ("", _OUTSIDE) if index is None else (rule.entries[index].key, "")

    return place


def label_places(vocabulary: str) -> Place:
    """`place_by_label` of a vocabulary's file; a process's own, as it takes a moment to make."""
    return _label_places(vocabulary, edition(vocabulary))


@functools.lru_cache(maxsize=2)
def _label_places(vocabulary: str, edition: tuple[int, int]) -> Place:
    return place_by_label(Vocabulary.load(vocabulary), WordNet.load())


def edition(path: str) -> tuple[int, int]:
    """Which file is at a path: another one that takes its place is another edition."""
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns
