"""What is different between two vocabularies; what `scale-wsl vocab diff` prints.

Must never match two labels by their names: a label is what it merges by, see `rules.canonical_key`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scale_wsl.hashtags.vocabulary import Entry, Vocabulary

__all__ = ["Comparison", "compare", "described_rule"]

_NAMED = 10  # of each kind of difference, in a summary


@dataclass(frozen=True)
class Comparison:
    """Labels of two vocabularies by what became of them; a label of both is a pair of class indices (first, second)."""

    first: Vocabulary
    second: Vocabulary
    added: tuple[Entry, ...]
    """In the second only, and none of their hashtags had a place in the first."""
    removed: tuple[Entry, ...]
    """In the first only, and none of their hashtags has a place in the second."""
    other_synsets: tuple[tuple[Entry, Entry], ...]
    """(label of the first, label of the second) that share a hashtag, though not their synsets."""
    renamed: tuple[tuple[int, int], ...]
    moved: tuple[tuple[int, int], ...]
    """Of another class index, the farthest first."""
    recounted: tuple[tuple[int, int], ...]
    """Of another count, the largest change first."""
    respelled: tuple[tuple[int, int], ...]
    """Of other members."""

    @property
    def same_hash(self) -> bool:
        """Whether shards and heads of the one go with the other."""
        return self.first.hash == self.second.hash

    def summary(self) -> str:
        """A line for each kind of difference, the first few named."""
        a, b = self.first, self.second
        if self.same_hash:
            lines = [f"hash        equal ({a.hash[:12]}): the same classes in the same order"]
        else:
            lines = [f"hash        {a.hash[:12]} -> {b.hash[:12]}: shards and heads of one are refused by the other"]
        lines.append(f"rule        {_change(described_rule(a), described_rule(b))}")
        lines.append(f"min_count   {_change(f'{a.min_count:,}', f'{b.min_count:,}')}")
        lines.append(f"labels      {_change(f'{len(a):,}', f'{len(b):,}')}")
        pairs = [(a.entries[i], b.entries[j]) for i, j in self.recounted]
        for what, found in (
            ("added", [f"{entry.hashtag} ({entry.count:,})" for entry in self.added]),
            ("removed", [f"{entry.hashtag} ({entry.count:,})" for entry in self.removed]),
            (
                "synsets",
                [
                    f"{old.hashtag} ({_synsets(old)}) -> {new.hashtag} ({_synsets(new)})"
                    for old, new in self.other_synsets
                ],
            ),
            ("renamed", [f"{a.entries[i].hashtag} -> {b.entries[j].hashtag}" for i, j in self.renamed]),
            ("rank", [f"{b.entries[j].hashtag} {i:,} -> {j:,}" for i, j in self.moved]),
            ("count", [f"{new.hashtag} {old.count:,} -> {new.count:,}" for old, new in pairs]),
            ("spellings", [_respelled(a.entries[i], b.entries[j]) for i, j in self.respelled]),
        ):
            lines.append(f"{what:<11} {_some(found)}")
        return "\n".join(lines)


def compare(first: Vocabulary, second: Vocabulary) -> Comparison:
    """What is different in `second` from `first`."""
    both = [
        (index, other)
        for index, entry in enumerate(first.entries)
        if (other := second.index_of_key(entry.key)) is not None
    ]
    others: dict[tuple[int, int], None] = {}
    for i, entry in enumerate(first.entries):
        for hashtag in entry.raw:
            j = second.index(hashtag)
            if j is not None and second.entries[j].key != entry.key:
                others[i, j] = None
    old, new = {i for i, _ in (*both, *others)}, {j for _, j in (*both, *others)}

    def differing(pairs: Iterable[tuple[int, int]], field: str) -> list[tuple[int, int]]:
        return [(i, j) for i, j in pairs if getattr(first.entries[i], field) != getattr(second.entries[j], field)]

    def change(pair: tuple[int, int]) -> int:
        return -abs(first.entries[pair[0]].count - second.entries[pair[1]].count)

    return Comparison(
        first,
        second,
        added=tuple(entry for j, entry in enumerate(second.entries) if j not in new),
        removed=tuple(entry for i, entry in enumerate(first.entries) if i not in old),
        other_synsets=tuple((first.entries[i], second.entries[j]) for i, j in others),
        renamed=tuple(differing(both, "hashtag")),
        moved=tuple(sorted((pair for pair in both if pair[0] != pair[1]), key=lambda pair: -abs(pair[0] - pair[1]))),
        recounted=tuple(sorted(differing(both, "count"), key=change)),
        respelled=tuple((i, j) for i, j in both if set(first.entries[i].raw) != set(second.entries[j].raw)),
    )


def described_rule(vocabulary: Vocabulary) -> str:
    """A vocabulary's rule in a line, with nothing in it that a terminal would obey."""
    rule = vocabulary.rule
    parts = [rule.spec]
    if rule.sha256:
        parts.append(f"(list {rule.sha256[:12]})")
    if rule.under:
        parts.append(f"under {', '.join(map(ascii, rule.under))}".replace("'", ""))
    if rule.stop:
        parts.append(f"without {len(rule.stop):,} stop words")
    if vocabulary.size is not None and rule.size is None:
        parts.append(f"cut to {vocabulary.size:,}")
    return " ".join(parts)


def _change(old: str, new: str) -> str:
    return old if old == new else f"{old} -> {new}"


def _some(found: Sequence[str]) -> str:
    if not found:
        return "none"
    return f"{len(found):,}: " + ", ".join(found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")


def _synsets(entry: Entry) -> str:
    return " ".join(entry.synsets) or "none"


def _respelled(old: Entry, new: Entry) -> str:
    more = [f"+{hashtag}" for hashtag in new.raw if hashtag not in old.raw]
    fewer = [f"-{hashtag}" for hashtag in old.raw if hashtag not in new.raw]
    return f"{new.hashtag} ({' '.join([*more, *fewer])})"
