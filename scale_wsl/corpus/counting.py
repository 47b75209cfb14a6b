"""Counts the hashtags of a source of posts, without looking at a single image.

Must never read an image, and never hold more posts than one.
"""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from scale_wsl.corpus.posts import Post, Source
from scale_wsl.hashtags import HashtagCounts, Vocabulary, VocabularyRule, WordNet, normalize_all

__all__ = ["count_covered", "count_posts"]


def count_posts(source: Source, rule: VocabularyRule) -> HashtagCounts:
    """On how many posts each hashtag and each label-to-be is; every post counts, also one of an image seen before.

    Raises:
        UserError: The source cannot be read, or the rule names what is not there.
    """
    candidates = rule.candidates(WordNet.load())
    counts = HashtagCounts()
    for post in _posts(source, "counting"):
        hashtags, dropped = normalize_all(post.hashtags)
        counts.add(hashtags, candidates, dropped)
    return counts


def count_covered(source: Source, vocabulary: Vocabulary) -> int:
    """How many posts have at least one label of a vocabulary.

    Raises:
        UserError: The source cannot be read.
    """
    wordnet = WordNet.load()
    return sum(
        any(vocabulary.label(hashtag, wordnet) is not None for hashtag in normalize_all(post.hashtags)[0])
        for post in _posts(source, "coverage")
    )


def _posts(source: Source, what: str) -> Iterator[Post]:
    yield from tqdm(source.posts(), f"{source.name}: {what}", source.count(), unit=" posts", disable=None)
