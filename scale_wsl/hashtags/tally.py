"""Counts hashtags of which there may be more than memory has room for, and says by how much a count may be too low.

Must never lose an occurrence from the total, and never show a count without the means to say how far it is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["DEFAULT_LIMIT", "Tally"]

DEFAULT_LIMIT = 200_000
"""Hashtags that a tally keeps: about 30 MB."""


class Tally:
    """Hashtag -> count: exact for at most `limit` distinct hashtags, and a lower bound within `error` beyond.

    Lossy counting (Manku and Motwani, VLDB 2002) with the pruning of a mergeable Misra-Gries summary (Agarwal et al.,
    PODS 2012). Beside a hashtag's count stands what may have been counted of it before it was last taken up. Its credit
    is count + that - `error`. Whenever more than `limit` hashtags are held, `error` grows by the credit of the first
    one that is too many by rank, and those left without credit are forgotten. So:

    - the true count of any hashtag, held or not, lies between its `count` and its `most`, and `most - count <= error`;
    - `error <= total / (kept + 1)`, where `kept` is three quarters of `limit`; 0 as long as nothing was forgotten;
    - both hold after any merging of tallies, in any order.

    The same additions in the same order give the same tally.

    Args:
        limit: Distinct hashtags to hold, at least 1.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        if limit < 1:
            raise ValueError(f"a tally holds at least 1 hashtag, not {limit}")
        self.limit = limit
        self.total = 0
        """Occurrences counted, those of forgotten hashtags too; exact."""
        self.error = 0
        """No hashtag's true count is further than this above its count; 0: all counts are exact."""
        self._counts: dict[str, int] = {}
        self._missed: dict[str, int] = {}  # where not 0: what may have been counted before the hashtag was taken up

    @classmethod
    def restored(
        cls, limit: int, total: int, error: int, counts: Mapping[str, int], missed: Mapping[str, int]
    ) -> Tally:
        """A tally as it was, from what `held` gave.

        Raises:
            ValueError: The figures contradict each other.
        """
        tally = cls(limit)
        tally.total, tally.error = total, error
        tally._counts, tally._missed = dict(counts), dict(missed)
        if len(counts) > limit:
            raise ValueError(f"a tally of at most {limit} hashtags holds {len(counts)}")
        counted = sum(counts.values())
        if error < 0 or counted > total or (error == 0 and counted != total):
            raise ValueError(f"a tally's counts add up to {counted}, its total is {total} and its error {error}")
        if counts and (min(counts.values()) < 1 or (missed and not 0 < min(missed.values()) <= max(missed.values()))):
            raise ValueError("a tally's count is below 1")
        if (missed and max(missed.values()) > error) or not missed.keys() <= counts.keys():
            raise ValueError(f"a tally may have missed more than its error, {error}")
        if error and any(count <= error and count + missed.get(name, 0) <= error for name, count in counts.items()):
            raise ValueError(f"a tally holds a hashtag that its error, {error}, would have made it forget")
        return tally

    def held(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Hashtag -> count of all that are held, and hashtag -> what may be missing from it, where that is not 0."""
        return self._counts, self._missed

    def __len__(self) -> int:
        """Distinct hashtags held."""
        return len(self._counts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tally):
            return NotImplemented
        return self._all == other._all

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Tally(limit={self.limit}, total={self.total}, error={self.error}, held={len(self)})"

    @property
    def _all(self) -> tuple[object, ...]:
        return self.limit, self.total, self.error, self._counts, self._missed

    def count(self, hashtag: str) -> int:
        """Occurrences counted for certain; 0 for what is not held."""
        return self._counts.get(hashtag, 0)

    def most(self, hashtag: str) -> int:
        """Occurrences that there can have been at most."""
        return self._counts[hashtag] + self._missed.get(hashtag, 0) if hashtag in self._counts else self.error

    def ranked(self) -> dict[str, int]:
        """Hashtag -> count of all that are held, by (-count, hashtag)."""
        return dict(sorted(self._counts.items(), key=lambda item: (-item[1], item[0])))

    def add(self, hashtag: str, number: int = 1) -> None:
        """Count a hashtag `number` times, at least once."""
        if number < 1:
            raise ValueError(f"{hashtag!r} cannot be counted {number} times")
        self.total += number
        if hashtag in self._counts:
            self._counts[hashtag] += number
            return
        self._counts[hashtag] = number
        if self.error:
            self._missed[hashtag] = self.error
        if len(self._counts) > self.limit:
            self._prune()

    def merge(self, other: Tally) -> None:
        """Add what another tally has counted; the smaller of the two limits holds from now on."""
        counts = {hashtag: self.count(hashtag) + other.count(hashtag) for hashtag in self._counts | other._counts}
        most = {hashtag: self.most(hashtag) + other.most(hashtag) for hashtag in counts}
        self._counts = counts
        self._missed = {hashtag: missed for hashtag in counts if (missed := most[hashtag] - counts[hashtag])}
        self.total += other.total
        self.error += other.error
        self.limit = min(self.limit, other.limit)
        if len(self._counts) > self.limit:
            self._prune()

    def _prune(self) -> None:
        kept = self.limit - self.limit // 4  # room for a quarter of new ones, or each would mean sorting
        missed = self._missed.get
        most = {hashtag: count + missed(hashtag, 0) for hashtag, count in self._counts.items()}
        self.error = sorted(most.values(), reverse=True)[kept]
        self._counts = {hashtag: count for hashtag, count in self._counts.items() if most[hashtag] > self.error}
        self._missed = {hashtag: missed for hashtag, missed in self._missed.items() if hashtag in self._counts}
