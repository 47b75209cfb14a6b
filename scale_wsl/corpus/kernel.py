"""From the hashtags of a batch of posts, as typed, to canonical hashtags: the one inner loop of counting and labelling.

Must never give another result than `normalize_all` and `Candidates.place` give post by post. What is done for each post
is done in Arrow and NumPy; Python looks at each distinct spelling of a batch once, and remembers what it saw.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.hashtags.counts import HashtagCounts
from scale_wsl.hashtags.normalize import MAX_LENGTH, examine
from scale_wsl.hashtags.tally import Tally

if TYPE_CHECKING:
    from scale_wsl.hashtags import Vocabulary, WordNet

__all__ = ["HashtagCounter", "HashtagKernel", "Place", "Tagged", "label", "place_by_label"]

Place = Callable[[str], tuple[str, str]]
"""From a normalised hashtag to its key and "", or to "" and why it has no place: `Candidates.place`."""

_REMEMBERED = 1 << 19  # hashtags without a place that are remembered; one takes about 150 bytes

_LONGEST_REMEMBERED = 200  # characters

_PLAIN = "^#*[A-Za-z0-9]+(?:[ _.'/-]+[A-Za-z0-9]+)*$"
_WWW = "(?i)^#*www\\."
_SEPARATORS = "[# _.'/-]+"


@dataclass(frozen=True)
class Tagged:
    """The distinct normalised hashtags of each post of a batch.

    Attributes:
        posts: How many posts there are, B.
        post: `[P]` int64, ascending: which post each pair is of.
        hashtag: `[P]` int64, below H, the batch's distinct normalised hashtags; no pair comes twice.
        number: `[H]` int64, of each hashtag in the kernel's `hashtags`; -1 where it has no place.
        key: `[H]` int64, of its key in the kernel's `keys`; -1 where it has no place.
        placeless: The hashtags without a place, by their number in the batch: themselves, and why.
        dropped: Tags that are no hashtag, or were there before, by reason.
    """

    posts: int
    post: NDArray[np.int64]
    hashtag: NDArray[np.int64]
    number: NDArray[np.int64]
    key: NDArray[np.int64]
    placeless: Mapping[int, tuple[str, str]]
    dropped: Counter[str]

    def canonical(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The distinct keys of each post that has any: pairs of post, ascending, and number of the key, `[Q]` each."""
        of_pair = self.key[self.hashtag]
        placed = of_pair >= 0
        return _distinct(self.post[placed], of_pair[placed])


class HashtagKernel:
    """Reads the hashtags of batches; one for each process, since it remembers hashtags.

    Plain hashtags, of ASCII letters and digits, are normalised by Arrow, the others by Python. Those that have a place
    are found by Arrow too, once they were met. Memory: `_REMEMBERED` hashtags that have none; the others are bounded.

    Attributes:
        hashtags: The normalised hashtags with a place that were met, by number.
        keys: The keys that were met, by number.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.hashtags: list[str] = []
        self.keys: list[str] = []
        self._number: dict[str, int] = {}  # of a hashtag
        self._key_number: dict[str, int] = {}
        self._key_of = array("q")  # from a hashtag's number to its key's
        self._found: Any = None  # the first of `hashtags` as an Arrow array
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
        typed = _numbers(encoded.indices)
        if encoded.indices.null_count:
            post, typed = post[typed >= 0], typed[typed >= 0]

        normalised, reasons = self._normalised(encoded.dictionary)
        distinct = normalised.dictionary_encode()
        codes = _numbers(distinct.indices)
        code = codes[typed]
        none = code < 0
        dropped: Counter[str] = Counter()
        if reasons:
            numbers = np.bincount(typed[none], minlength=len(codes))
            for i, reason in reasons.items():
                dropped[reason] += int(numbers[i])
            post, code = post[~none], code[~none]
        kept_post, kept_code = _distinct(post, code)
        if repeated := len(post) - len(kept_post):
            dropped["repeated"] += repeated
        number, placeless = self._places(distinct.dictionary)
        key = np.append(np.frombuffer(self._key_of, np.int64), -1)[number]
        return Tagged(len(hashtags), kept_post, kept_code, number, key, placeless, dropped)

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
                found = examine(text)
                if len(text) <= _LONGEST_REMEMBERED:
                    self._odd[text] = found
            hashtag, reason = found
            if hashtag is None:
                reasons[i] = reason
            else:
                source[i] = len(words) + len(others)
                others.append(hashtag)
        both = pa.concat_arrays([words, pa.array(others, words.type)])
        return both.take(pa.array(source, mask=source < 0)), reasons

    def _places(self, hashtags: Any) -> tuple[NDArray[np.int64], dict[int, tuple[str, str]]]:
        """The number of each normalised hashtag `[H]`, -1 where it has no place, and why."""
        import pyarrow as pa
        import pyarrow.compute as pc

        met = 0 if self._found is None else len(self._found)
        if len(self.hashtags) > met + met // 8:
            self._found = pa.array(self.hashtags, pa.string())
        if self._found is None:
            number = np.full(len(hashtags), -1, np.int64)
        else:
            number = _numbers(pc.index_in(hashtags, value_set=self._found))
        placeless: dict[int, tuple[str, str]] = {}
        left = np.flatnonzero(number < 0)
        for i, hashtag in zip(left.tolist(), hashtags.take(pa.array(left)).to_pylist(), strict=True):
            if (found := self._number.get(hashtag)) is not None:
                number[i] = found
            elif reason := self._idle.get(hashtag):
                placeless[i] = hashtag, reason
            else:
                key, reason = self._place(hashtag)
                if key:
                    number[i] = self._add(hashtag, key)
                else:
                    if len(self._idle) == _REMEMBERED:
                        self._idle.clear()  # those that are common come back at once
                    self._idle[hashtag] = reason
                    placeless[i] = hashtag, reason
        return number, placeless

    def _add(self, hashtag: str, key: str) -> int:
        number = self._number[hashtag] = len(self.hashtags)
        self.hashtags.append(hashtag)
        of_key = self._key_number.setdefault(key, len(self.keys))
        if of_key == len(self.keys):
            self.keys.append(key)
        self._key_of.append(of_key)
        return number


class HashtagCounter:
    """Counts the batches of one kernel."""

    def __init__(self, kernel: HashtagKernel) -> None:
        self._kernel = kernel
        self._posts = self._known = 0
        self._raw = np.zeros(0, np.int64)
        self._canonical = np.zeros(0, np.int64)
        self._dropped: Counter[str] = Counter()
        self._without_place: dict[str, Tally] = {}

    def add(self, tagged: Tagged) -> NDArray[np.bool_]:
        """Count a batch; returns `[B]`, which posts have a hashtag with a place."""
        on_posts = np.bincount(tagged.hashtag, minlength=len(tagged.number))
        placed = tagged.number >= 0
        self._raw = _grown(self._raw, len(self._kernel.hashtags))
        self._raw[tagged.number[placed]] += on_posts[placed]  # each hashtag once
        for i, (hashtag, reason) in tagged.placeless.items():
            if (tally := self._without_place.get(reason)) is None:
                tally = self._without_place[reason] = Tally()
            tally.add(hashtag, int(on_posts[i]))
        post, key = tagged.canonical()
        self._canonical = _grown(self._canonical, len(self._kernel.keys))
        self._canonical += np.bincount(key, minlength=len(self._canonical))
        self._dropped.update(tagged.dropped)
        known = np.zeros(tagged.posts, np.bool_)
        known[post] = True
        self._posts += tagged.posts
        self._known += int(known.sum())
        return known

    def counts(self) -> HashtagCounts:
        """What was counted so far."""
        raw, canonical = (
            Counter({name: number for name, number in zip(names, numbers.tolist(), strict=False) if number})
            for names, numbers in ((self._kernel.hashtags, self._raw), (self._kernel.keys, self._canonical))
        )
        return HashtagCounts(self._posts, self._known, raw, canonical, self._dropped, self._without_place)


def place_by_label(vocabulary: Vocabulary, wordnet: WordNet) -> Place:
    """A place for each hashtag that has a label, whose index is the key, as `label` takes it."""

    def place(hashtag: str) -> tuple[str, str]:
        index = vocabulary.label(hashtag, wordnet)
        return ("", "no label") if index is None else (str(index), "")

    return place


def label(tagged: Tagged, kernel: HashtagKernel) -> Any:
    """The labels of each post: a `pyarrow` list array of int32 `[B]`, ascending and distinct, empty where it has none.

    Args:
        tagged: A batch.
        kernel: That it was read with, by `place_by_label`.
    """
    import pyarrow as pa

    post, key = tagged.canonical()
    ids = np.fromiter(map(int, kernel.keys), np.int64, len(kernel.keys))[key]
    order = np.lexsort((ids, post))
    offsets = np.zeros(tagged.posts + 1, np.int32)
    np.cumsum(np.bincount(post, minlength=tagged.posts), out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, ids[order].astype(np.int32))


def _distinct(post: NDArray[np.int64], code: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct pairs of (post, code), by post."""
    if not len(post):
        return post, code
    codes = int(code.max()) + 1
    pairs = post * codes + code
    pairs.sort()
    first = np.ones(len(pairs), np.bool_)
    np.not_equal(pairs[1:], pairs[:-1], out=first[1:])
    distinct = pairs[first]
    return distinct // codes, distinct % codes


def _numbers(indices: Any) -> NDArray[np.int64]:
    """An Arrow array of numbers, -1 where it is null."""
    return np.asarray(indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _grown(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    return np.concatenate([counts, np.zeros(size - len(counts), np.int64)]) if size > len(counts) else counts
