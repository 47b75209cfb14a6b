from __future__ import annotations

from collections import Counter
from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.hashtags.tally import Tally

WORDS = [f"w{i}" for i in range(30)]
stream = st.lists(st.tuples(st.sampled_from(WORDS), st.integers(1, 5)), max_size=120)


def tally_of(pairs: list[tuple[str, int]], limit: int) -> Tally:
    tally = Tally(limit)
    for word, number in pairs:
        tally.add(word, number)
    return tally


def check(tally: Tally, pairs: list[tuple[str, int]]) -> None:
    """All that a tally promises, against a plain count."""
    true: Counter[str] = Counter()
    for word, number in pairs:
        true[word] += number
    assert tally.total == true.total()
    assert len(tally) <= tally.limit
    kept = tally.limit - tally.limit // 4
    assert tally.error <= true.total() / (kept + 1)
    for word in WORDS:
        assert tally.count(word) <= true[word] <= tally.most(word) <= tally.count(word) + tally.error
    if len(true) <= tally.limit:
        assert tally.error == 0
        assert tally.ranked() == dict(sorted(true.items(), key=lambda item: (-item[1], item[0])))
    assert Tally.restored(tally.limit, tally.total, tally.error, *tally.held()) == tally


@settings(max_examples=300)
@given(stream, st.integers(1, 30))
def test_counts_are_exact_or_within_their_bound(pairs: list[tuple[str, int]], limit: int) -> None:
    tally = tally_of(pairs, limit)
    check(tally, pairs)
    assert tally_of(pairs, limit) == tally


@settings(max_examples=300)
@given(st.lists(stream, min_size=1, max_size=5), st.integers(1, 30), st.randoms())
def test_merging_in_any_order_keeps_the_bound(parts: list[list[tuple[str, int]]], limit: int, random: object) -> None:
    tallies = [tally_of(part, limit) for part in parts]

    def merged(first: Tally, second: Tally) -> Tally:
        first.merge(second)
        return first

    random.shuffle(tallies)  # type: ignore[attr-defined]
    everything = [pair for part in parts for pair in part]
    if random.random() < 0.5:  # type: ignore[attr-defined]
        check(reduce(merged, tallies), everything)
    else:  # a tree
        while len(tallies) > 1:
            tallies = [reduce(merged, tallies[i : i + 2]) for i in range(0, len(tallies), 2)]
        check(tallies[0], everything)


def test_frequent_hashtags_stay_exact_beside_a_long_tail() -> None:
    tally = Tally(100)
    for i in range(20_000):
        tally.add("cat")
        tally.add(f"tail{i}")
    assert tally.total == 40_000
    assert tally.count("cat") == tally.most("cat") == 20_000
    assert 0 < tally.error <= 40_000 / 76
    assert next(iter(tally.ranked())) == "cat"
    assert tally.most("never seen") == tally.error


def test_what_is_no_tally() -> None:
    for limit in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            Tally(limit)
    with pytest.raises(ValueError, match="cannot be counted 0 times"):
        Tally().add("cat", 0)
    for limit, total, error, held in [
        (1, 2, 0, {"a": (1, 0), "b": (1, 0)}),  # more than the limit
        (5, 3, 0, {"a": (1, 0)}),  # exact, but does not add up
        (5, 1, 2, {"a": (2, 1)}),  # more than the total
        (5, 9, -1, {}),
        (5, 9, 2, {"a": (0, 2)}),
        (5, 9, 2, {"a": (1, 3)}),
        (5, 9, 2, {"a": (1, -1)}),
        (5, 9, 2, {"a": (1, 1)}),  # would have been forgotten
    ]:
        with pytest.raises(ValueError, match="tally"):
            Tally.restored(
                limit, total, error, {k: v[0] for k, v in held.items()}, {k: v[1] for k, v in held.items() if v[1]}
            )
    with pytest.raises(ValueError, match="missed more"):
        Tally.restored(5, 9, 2, {"a": 3}, {"b": 1})
    assert Tally() != 3
