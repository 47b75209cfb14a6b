"""From the hashtags of a batch of posts, as typed, to canonical hashtags: the one inner loop of counting and labelling.

Must never give another result than `normalize_all` and `Candidates.place` give post by post. What is done for each post
is done in Arrow and NumPy; Python looks at each distinct spelling of a batch once, and remembers what it saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.hashtags.normalize import MAX_LENGTH, examine
from scale_wsl.hashtags.tally import Tally

if TYPE_CHECKING:
    from scale_wsl.hashtags import Vocabulary, WordNet
    from scale_wsl.hashtags.counts import HashtagCounts

__all__ = ["HashtagKernel", "Place", "Tagged", "count", "label", "place_by_label"]

Place = Callable[[str], tuple[str, str]]
"""From a normalised hashtag to its key and "", or to "" and why it has no place: `Candidates.place`."""

_REMEMBERED = 1 << 19  # hashtags without a place that are remembered; one takes about 150 bytes

_PLAIN = "^#*[A-Za-z0-9]+(?:[ _.'/-]+[A-Za-z0-9]+)*$"
_WWW = "(?i)^#*www\\."
_SEPARATORS = "[# _.'/-]+"


@dataclass(frozen=True)
class Tagged:
    """The distinct normalised hashtags of each post of a batch.

    Attributes:
        posts: How many posts there are, B.
        post: `[P]` int64, ascending: which post each pair is of.
        hashtag: `[P]` int64, index into `hashtags`; no pair comes twice.
        hashtags: `[H]`, the distinct normalised hashtags of the batch.
        key: `[H]`, the key of each by `Place`; "" where it has no place.
        reason: `[H]`, why it has none; "" where it has one.
        dropped: Tags that are no hashtag, or were there before, by reason.
    """

    posts: int
    post: NDArray[np.int64]
    hashtag: NDArray[np.int64]
    hashtags: list[str]
    key: list[str]
    reason: list[str]
    dropped: Counter[str]

    def canonical(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
        """The distinct canonical hashtags of each post that has any: pairs (post `[Q]`, index `[Q]`), and the keys."""
        numbers: dict[str, int] = {}
        number = np.array([numbers.setdefault(key, len(numbers)) if key else -1 for key in self.key], np.int64)
        of_pair = number[self.hashtag] if len(number) else self.hashtag
        placed = of_pair >= 0
        post, index = _distinct(self.post[placed], of_pair[placed], len(numbers))
        return post, index, list(numbers)


class HashtagKernel:
    """Reads the hashtags of batches; one for each process, since it remembers spellings.

    Plain hashtags, of ASCII letters and digits, are normalised by Arrow; Python normalises the others, and asks for a
    place once for each normalised hashtag. Memory: `_REMEMBERED` hashtags that have no place; those that have one are
    bounded.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._placed: dict[str, str] = {}  # normalised -> key
        self._idle: dict[str, str] = {}  # normalised -> why it has no place
        self._odd: dict[str, tuple[str | None, str]] = {}  # as typed and not plain -> normalised, or why not

    def read(self, hashtags: Any) -> Tagged:
        """The hashtags of a batch.

        Args:
            hashtags: A `pyarrow` list array of strings `[B]`, as typed; null is none.
        """
        import pyarrow.compute as pc

        encoded = hashtags.flatten().dictionary_encode()  # `flatten` leaves out what null lists point at
        lengths = pc.fill_null(pc.list_value_length(hashtags), 0).to_numpy(zero_copy_only=False)
        post = np.repeat(np.arange(len(hashtags)), lengths)
        typed = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        if encoded.indices.null_count:
            post, typed = post[typed >= 0], typed[typed >= 0]

        normalised, reasons = self._normalised(encoded.dictionary)
        distinct = normalised.dictionary_encode()
        codes = distinct.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        code = codes[typed] if len(codes) else typed
        none = code < 0
        dropped: Counter[str] = Counter()
        if none.any():
            numbers = np.bincount(typed[none], minlength=len(codes))
            for i, reason in reasons.items():
                dropped[reason] += int(numbers[i])
            post, code = post[~none], code[~none]
        names = distinct.dictionary.to_pylist()
        kept_post, kept_code = _distinct(post, code, len(names))
        if repeated := len(post) - len(kept_post):
            dropped["repeated"] += repeated
        keys, why = self._places(names)
        return Tagged(len(hashtags), kept_post, kept_code, names, keys, why, dropped)

    def _normalised(self, typed: Any) -> tuple[Any, dict[int, str]]:
        """The normal form of each spelling `[D]`, null where there is none, and why, by number."""
        import pyarrow as pa
        import pyarrow.compute as pc

        # The same as `normalize.examine` says of what its own expression for plain tags matches.
        plain = pc.and_not(pc.match_substring_regex(typed, _PLAIN), pc.match_substring_regex(typed, _WWW))
        words = pc.utf8_lower(pc.replace_substring_regex(pc.filter(typed, plain), _SEPARATORS, ""))
        good = pc.and_not(
            pc.less_equal(pc.binary_length(words), MAX_LENGTH), pc.match_substring_regex(words, "^[0-9]*$")
        )
        place = np.flatnonzero(plain.to_numpy(zero_copy_only=False))
        good = good.to_numpy(zero_copy_only=False)
        source = np.full(len(typed), -1, np.int64)  # where each normal form is in `words` and, behind it, `others`
        source[place[good]] = np.flatnonzero(good)
        others: list[str] = []
        reasons: dict[int, str] = {}
        odd = np.flatnonzero(source < 0)
        for i, text in zip(odd.tolist(), typed.take(pa.array(odd)).to_pylist(), strict=True):
            if (found := self._odd.get(text)) is None:
                if len(self._odd) == _REMEMBERED:
                    self._odd.clear()  # those that are common come back at once
                found = self._odd[text] = examine(text)
            hashtag, reason = found
            if hashtag is None:
                reasons[i] = reason
            else:
                source[i] = len(words) + len(others)
                others.append(hashtag)
        both = pa.concat_arrays([words, pa.array(others, words.type)])
        return both.take(pa.array(source, mask=source < 0)), reasons

    def _places(self, hashtags: list[str]) -> tuple[list[str], list[str]]:
        """Keys, and why there is none, of normalised hashtags."""
        keys: list[str] = []
        reasons: list[str] = []
        placed, idle = self._placed, self._idle
        for hashtag in hashtags:
            key = placed.get(hashtag, "")
            reason = "" if key else idle.get(hashtag, "")
            if not key and not reason:
                key, reason = self._place(hashtag)
                if key:
                    placed[hashtag] = key
                else:
                    if len(idle) == _REMEMBERED:
                        idle.clear()
                    idle[hashtag] = reason
            keys.append(key)
            reasons.append(reason)
        return keys, reasons


def count(tagged: Tagged, counts: HashtagCounts) -> NDArray[np.bool_]:
    """Add a batch to `counts`; returns `[B]`, which posts have a hashtag with a place."""
    on_posts = np.bincount(tagged.hashtag, minlength=len(tagged.hashtags)).tolist()
    placeless: list[tuple[str, str, int]] = []
    for hashtag, key, reason, number in zip(tagged.hashtags, tagged.key, tagged.reason, on_posts, strict=True):
        if key:
            counts.raw[hashtag] += number
        else:
            placeless.append((hashtag, reason, number))
    for hashtag, reason, number in placeless:
        if (tally := counts.without_place.get(reason)) is None:
            tally = counts.without_place[reason] = Tally()
        tally.add(hashtag, number)
    post, index, keys = tagged.canonical()
    for key, number in zip(keys, np.bincount(index, minlength=len(keys)).tolist(), strict=True):
        counts.canonical[key] += number
    counts.dropped_tags.update(tagged.dropped)
    known = np.zeros(tagged.posts, np.bool_)
    known[post] = True
    counts.posts += tagged.posts
    counts.known += int(known.sum())
    return known


def place_by_label(vocabulary: Vocabulary, wordnet: WordNet) -> Place:
    """A place for each hashtag that has a label, whose index is the key, as `label` takes it."""

    def place(hashtag: str) -> tuple[str, str]:
        index = vocabulary.label(hashtag, wordnet)
        return ("", "no label") if index is None else (str(index), "")

    return place


def label(tagged: Tagged) -> Any:
    """The labels of each post: a `pyarrow` list array of int32 `[B]`, ascending and distinct, empty where it has none.

    Args:
        tagged: A batch that was read with `place_by_label`.
    """
    import pyarrow as pa

    post, index, keys = tagged.canonical()
    ids = np.array(list(map(int, keys)), np.int64)[index] if keys else index
    order = np.lexsort((ids, post))
    offsets = np.zeros(tagged.posts + 1, np.int32)
    np.cumsum(np.bincount(post, minlength=tagged.posts), out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, ids[order].astype(np.int32))


def _distinct(
    post: NDArray[np.int64], code: NDArray[np.int64], codes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct pairs of (post, code), by post; `code` is below `codes`."""
    if not len(post):
        return post, code
    pairs = post * codes + code
    pairs.sort()
    first = np.ones(len(pairs), np.bool_)
    np.not_equal(pairs[1:], pairs[:-1], out=first[1:])
    distinct = pairs[first]
    return distinct // codes, distinct % codes
