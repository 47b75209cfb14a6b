"""From the text of a tag to a canonical hashtag to a vocabulary."""

from __future__ import annotations

from scale_wsl.hashtags.captions import find_hashtags, find_hashtags_in
from scale_wsl.hashtags.counts import HashtagCounts
from scale_wsl.hashtags.explain import explain
from scale_wsl.hashtags.normalize import normalize, normalize_all
from scale_wsl.hashtags.report import Coverage, VocabularyReport
from scale_wsl.hashtags.rules import Candidates, VocabularyRule
from scale_wsl.hashtags.tally import Tally
from scale_wsl.hashtags.vocabulary import Entry, Vocabulary
from scale_wsl.hashtags.wordnet import WordNet

__all__ = [
    "Candidates",
    "Coverage",
    "Entry",
    "HashtagCounts",
    "Tally",
    "Vocabulary",
    "VocabularyReport",
    "VocabularyRule",
    "WordNet",
    "explain",
    "find_hashtags",
    "find_hashtags_in",
    "normalize",
    "normalize_all",
]
