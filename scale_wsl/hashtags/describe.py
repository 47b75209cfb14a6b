"""Shows a vocabulary to a reader: a page of its figures, or all of it as a table; what `scale-wsl vocab show` prints.

Must never decide anything, and never send a terminal anything but printable text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from scale_wsl.hashtags.compare import described_rule

if TYPE_CHECKING:
    from scale_wsl.hashtags.report import Coverage
    from scale_wsl.hashtags.rules import Candidates
    from scale_wsl.hashtags.vocabulary import Entry, Vocabulary

__all__ = ["describe", "rule_sizes", "table"]


def describe(vocabulary: Vocabulary, coverage: Coverage | None = None, top: int = 10) -> str:
    """Rule, sizes, coverage, and the `top` labels of each kind; lines of text without a final newline."""
    entries = vocabulary.entries
    merged = [entry for entry in entries if len(entry.raw) > 1]
    ambiguous = [entry for entry in entries if len(entry.synsets) > 1]
    own = [entry for entry in entries if not entry.synsets]
    spellings = sum(len(entry.raw) for entry in entries)
    lines = [
        f"rule           {described_rule(vocabulary)}, min_count {vocabulary.min_count:,}",
        f"labels         {len(entries):,}, of {spellings:,} hashtags; {len(merged):,} of several hashtags, "
        f"{len(ambiguous):,} ambiguous, {len(own):,} without synsets",
        f"hash           {vocabulary.hash}",
    ]
    if entries:
        lines.append(f"images         {entries[0].count:,} for the first label, {entries[-1].count:,} for the last")
    lines += (
        [f"coverage       {line}" for line in coverage.lines()] if coverage else ["coverage       no report beside it"]
    )
    lines += _listed("most frequent", entries, top, lambda entry: f"{entry.count:,}")
    merged.sort(key=lambda entry: (-len(entry.raw), entry.hashtag))
    lines += _listed("most merged", merged, top, lambda entry: f"{len(entry.raw)}: {_some(entry.raw[1:])}")
    ambiguous.sort(key=lambda entry: (-len(entry.synsets), entry.hashtag))
    lines += _listed("most ambiguous", ambiguous, top, lambda entry: f"{len(entry.synsets)} synsets")
    lines += _listed("own", own, top, lambda entry: f"{entry.count:,}")
    return "\n".join(lines)


def table(vocabulary: Vocabulary) -> str:
    """Every label as tab-separated values under a header; synsets and spellings are joined by spaces."""
    rows = (
        f"{index}\t{entry.hashtag}\t{entry.count}\t{' '.join(entry.synsets)}\t{' '.join(entry.raw)}\n"
        for index, entry in enumerate(vocabulary.entries)
    )
    return "index\thashtag\tcount\tsynsets\tspellings\n" + "".join(rows)


def rule_sizes(rules: Iterable[Candidates]) -> str:
    """A table with a line for each rule: hashtags with a place, labels they merge into, ambiguous ones of both."""
    lines = [f"{'rule':<24} {'hashtags':>9} {'labels':>9} {'ambiguous':>20}"]
    for candidates in rules:
        keys = [candidates.key(hashtag) for hashtag in candidates.hashtags]
        labels = set(keys)
        ambiguous = f"{sum(' ' in key for key in keys):,} / {sum(' ' in key for key in labels):,}"
        rule = candidates.rule
        kept = f"  {rule.size:,} are kept" if rule.size is not None and rule.size < len(labels) else ""
        lines.append(f"{rule.spec:<24} {len(keys):>9,} {len(labels):>9,} {ambiguous:>20}{kept}")
    return "\n".join(lines)


def _listed(what: str, entries: Sequence[Entry], top: int, note: Callable[[Entry], str]) -> list[str]:
    if not entries:
        return []
    return [f"{what}:", *(f"  #{entry.hashtag}  {note(entry)}" for entry in entries[:top])]


def _some(hashtags: Sequence[str]) -> str:
    return ", ".join(hashtags[:5]) + (", ..." if len(hashtags) > 5 else "")
