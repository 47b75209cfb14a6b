"""What became of every hashtag that was counted for a vocabulary: merged, dropped and why, and how many posts are left.

Must never say a number that was not counted: what counts alone do not tell is given as a range.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags.rules import PLACELESS

if TYPE_CHECKING:
    from scale_wsl.hashtags.counts import HashtagCounts
    from scale_wsl.hashtags.vocabulary import Entry

__all__ = ["DROP_REASONS", "Coverage", "VocabularyReport", "report_path"]

FORMAT = "scale_wsl vocabulary report"
VERSION = 1
DROP_REASONS = (*PLACELESS, "below min_count", "cut by size")
_LISTED = 1000  # hashtags of each reason that are named in the file


@dataclass(frozen=True)
class Coverage:
    """How many posts, and how many (post, label) pairs, a vocabulary covers."""

    posts: int
    known: int
    """Posts with at least one hashtag that the rule gives a place, before any cut."""
    covered_least: int
    covered_most: int
    """Posts that keep at least one label after the cuts: within these two, since counts of labels do not tell which of
    them are on the same posts. Equal where nothing was cut, or where a second look at the posts has counted them."""
    pairs: int
    """(post, label) pairs before the cuts."""
    kept_pairs: int
    """And after them."""

    def counted(self, covered: int) -> Coverage:
        """The same with the true number of posts that keep a label.

        Raises:
            UserError: It is out of the range, so other posts were counted.
        """
        if not self.covered_least <= covered <= self.covered_most:
            raise UserError(
                f"{covered:,} posts keep a label, where the counts allow {self.covered_least:,} to "
                f"{self.covered_most:,}: the posts have changed in between"
            )
        return replace(self, covered_least=covered, covered_most=covered)

    def lines(self) -> list[str]:
        """For the terminal."""
        share, least, most = (_share(number, self.posts) for number in (self.known, *self._covered))
        if self.covered_least == self.covered_most:
            covered = f"{self.covered_most:,} ({most}) keep a label after the cuts"
        else:
            covered = f"{self.covered_least:,} to {self.covered_most:,} ({least} to {most}) keep a label after the cuts"
        return [
            f"{self.posts:,} posts, {self.known:,} of them ({share}) with a hashtag that has a place; {covered}",
            f"{self.pairs:,} pairs of a post and a label, {self.kept_pairs:,} of them "
            f"({_share(self.kept_pairs, self.pairs)}) after the cuts",
        ]

    @property
    def _covered(self) -> tuple[int, int]:
        return self.covered_least, self.covered_most


@dataclass(frozen=True)
class VocabularyReport:
    """What building a vocabulary did with every hashtag it met; `as_json` makes it JSON-able."""

    coverage: Coverage
    hashtags: int
    """Distinct normalised hashtags with a place, before merging."""
    labels: int
    """Distinct labels that they merge into, before the cuts."""
    entries: int
    """Labels after the cuts."""
    ambiguous: int
    """Entries with more than one synset."""
    without_synsets: int
    """Entries with none: the user's own."""
    merged: Mapping[str, Mapping[str, int]]
    """Canonical hashtag -> member -> posts, of the entries with more than one member."""
    dropped: Mapping[str, Mapping[str, int]]
    """Reason, each of `DROP_REASONS` -> normalised hashtag -> posts, by (-posts, hashtag)."""
    dropped_pairs: Mapping[str, int]
    """Reason -> (post, hashtag) pairs, also of hashtags that a tally has forgotten."""
    dropped_error: Mapping[str, int]
    """Reason -> by how much a hashtag's posts may be too few, as in `Tally.error`; 0: all are exact, none forgotten."""
    dropped_tags: Mapping[str, int]
    """Tags that are no hashtags, by reason."""

    @classmethod
    def of_cuts(
        cls, counts: HashtagCounts, ranked: Sequence[Entry], often: Sequence[Entry], kept: Sequence[Entry]
    ) -> VocabularyReport:
        """Of all labels counted, those of them on `min_count` posts or more, and those of them within the size."""
        placeless = counts.without_place
        dropped = {reason: placeless[reason].ranked() if reason in placeless else {} for reason in DROP_REASONS}
        for reason, entries in (("below min_count", ranked[len(often) :]), ("cut by size", often[len(kept) :])):
            dropped[reason] = _ranked({hashtag: counts.raw[hashtag] for entry in entries for hashtag in entry.raw})
        pairs, kept_pairs = counts.canonical.total(), sum(entry.count for entry in kept)
        coverage = Coverage(
            posts=counts.posts,
            known=counts.known,
            covered_least=max(kept[0].count if kept else 0, counts.known - (pairs - kept_pairs)),
            covered_most=min(counts.known, kept_pairs),
            pairs=pairs,
            kept_pairs=kept_pairs,
        )
        return cls(
            coverage=coverage,
            hashtags=len(counts.raw),
            labels=len(ranked),
            entries=len(kept),
            ambiguous=sum(len(entry.synsets) > 1 for entry in kept),
            without_synsets=sum(not entry.synsets for entry in kept),
            merged={e.hashtag: {raw: counts.raw[raw] for raw in e.raw} for e in kept if len(e.raw) > 1},
            dropped=dropped,
            dropped_pairs={
                reason: placeless[reason].total if reason in placeless else sum(hashtags.values())
                for reason, hashtags in dropped.items()
            },
            dropped_error={reason: placeless[reason].error if reason in placeless else 0 for reason in dropped},
            dropped_tags=_ranked(counts.dropped_tags),
        )

    def summary(self) -> str:
        """A few lines for the terminal."""
        own = f", {self.without_synsets:,} without synsets" if self.without_synsets else ""
        lines = [
            *self.coverage.lines(),
            f"{self.hashtags:,} hashtags with a place merge into {self.labels:,} labels, {self.entries:,} of them kept",
            f"{self.entries:,} canonical hashtags, {self.ambiguous:,} of them ambiguous{own}; "
            f"{sum(map(len, self.merged.values())):,} hashtags merged into {len(self.merged):,} of them",
        ]
        for reason, hashtags in self.dropped.items():
            most = ", ".join(list(hashtags)[:5])
            more = ", ..." if len(hashtags) > 5 else ""
            more_than = "more than " if self.dropped_error[reason] else ""
            lines.append(
                f"dropped, {reason}: {more_than}{len(hashtags):,} hashtags" + (f" ({most}{more})" if most else "")
            )
        if self.dropped_tags:
            tags = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped_tags.items())
            lines.append(f"tags that are no hashtags, or repeated: {tags}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, but of the dropped hashtags the thousand most frequent ones of each reason."""
        figures = {key: value for key, value in asdict(self).items() if not key.startswith("dropped")}
        dropped = {
            reason: {
                "hashtags": len(hashtags),
                "pairs": self.dropped_pairs[reason],
                "error": self.dropped_error[reason],
                "most_frequent": dict(list(hashtags.items())[:_LISTED]),
            }
            for reason, hashtags in self.dropped.items()
        }
        return figures | {"dropped": dropped, "dropped_tags": dict(self.dropped_tags)}

    def save(self, path: str | Path, vocabulary_hash: str) -> None:
        """Publish the report as JSON; equal reports give equal bytes."""
        head = {"format": FORMAT, "version": VERSION, "vocabulary": vocabulary_hash}
        text = json.dumps(head | self.as_json(), ensure_ascii=False, indent=1)
        with published_file(path) as aside:
            aside.write_bytes(f"{text}\n".encode())

    @staticmethod
    def load_coverage(path: str | Path, vocabulary_hash: str) -> Coverage:
        """The coverage that a report beside a vocabulary states.

        Raises:
            UserError: The file cannot be read, is no report, or is that of another vocabulary.
        """
        try:
            parsed = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the report {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict) or parsed.get("format") != FORMAT or parsed.get("version") != VERSION:
            raise UserError(f"{path} is no report of a vocabulary of version {VERSION}")
        if parsed.get("vocabulary") != vocabulary_hash:
            raise UserError(f"{path} is the report of another vocabulary than the one beside it")
        stated, names = parsed.get("coverage"), {field.name for field in fields(Coverage)}
        if (
            not isinstance(stated, dict)
            or stated.keys() != names
            or not all(type(n) is int and n >= 0 for n in stated.values())
        ):
            raise UserError(f"{path} is damaged: its coverage is not whole numbers of {', '.join(sorted(names))}")
        return Coverage(**stated)


def report_path(vocabulary: Path) -> Path:
    """Where the report of a vocabulary file is: `vocab.report.json` beside `vocab.json`."""
    return vocabulary.with_name(f"{vocabulary.stem}.report.json")


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}".replace("%", " %") if whole else "none"
