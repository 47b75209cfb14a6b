"""On how many posts each hashtag and each label-to-be is, in a form that parts of a corpus are counted in and added up.

Must never depend on how the posts were dealt out, nor on their order, nor grow with their number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags.normalize import normalize
from scale_wsl.hashtags.rules import PLACELESS
from scale_wsl.hashtags.tally import Tally

if TYPE_CHECKING:
    from scale_wsl.hashtags.rules import Candidates

__all__ = ["HashtagCounts"]

FORMAT = "scale_wsl hashtag counts"
VERSION = 1
_METADATA = b"scale_wsl"
_COLUMNS = {"part": "string", "name": "string", "count": "int64", "missed": "int64"}
_PARTS = ("raw", "canonical", "dropped tags", *PLACELESS)
_MOST_ROWS = 10_000_000  # a thousand times a vocabulary; 4 GB in memory


@dataclass
class HashtagCounts:
    """Counts of posts under one rule. Equal whatever the order and the parts in which the posts were counted.

    Only of tallies that are no longer exact (`Tally.error`) the totals alone are equal, and the counts within bounds.
    """

    posts: int = 0
    known: int = 0
    """Posts with at least one hashtag that has a place."""
    raw: Counter[str] = field(default_factory=Counter)
    """Normalised hashtag with a place -> posts that have it."""
    canonical: Counter[str] = field(default_factory=Counter)
    """Key (`rules.canonical_key`) -> posts with at least one of its hashtags, each post once."""
    dropped_tags: Counter[str] = field(default_factory=Counter)
    """Tags dropped before any lookup: by the reason that `normalize_all` gives, "repeated" among them."""
    without_place: dict[str, Tally] = field(default_factory=dict)
    """Reason, each of `rules.PLACELESS` that came up -> normalised hashtag -> posts that have it."""

    def add(self, hashtags: Collection[str], candidates: Candidates, dropped: Mapping[str, int] | None = None) -> None:
        """Count a post.

        Args:
            hashtags: Its *normalised* hashtags; one that is repeated counts once.
            candidates: The rule's answers.
            dropped: Tags of its that are no hashtags, by reason, as `normalize_all` gives them.

        Raises:
            ValueError: A hashtag is not in normal form.
        """
        keys: set[str] = set()
        for hashtag in sorted(set(hashtags)):  # sorted, as what a tally forgets depends on the order
            key, reason = candidates.place(hashtag)
            if key:
                self.raw[hashtag] += 1
                keys.add(key)
                continue
            if normalize(hashtag) != hashtag:
                raise ValueError(f"{hashtag!r} is not in normal form; pass hashtags through normalize_all first")
            self.without_place.setdefault(reason, Tally()).add(hashtag)
        self.canonical.update(keys)
        self.posts += 1
        self.known += bool(keys)
        self.dropped_tags.update(dropped or {})

    @classmethod
    def of_posts(cls, posts: Iterable[Collection[str]], candidates: Candidates) -> HashtagCounts:
        """Counts of the normalised hashtags of many posts, by `add`."""
        counts = cls()
        for post in posts:
            counts.add(post, candidates)
        return counts

    def merge(self, other: HashtagCounts) -> None:
        """Add the counts of other posts, counted under the same rule."""
        self.posts += other.posts
        self.known += other.known
        self.raw.update(other.raw)
        self.canonical.update(other.canonical)
        self.dropped_tags.update(other.dropped_tags)
        for reason, tally in other.without_place.items():
            if reason in self.without_place:
                self.without_place[reason].merge(tally)
            else:
                fresh = Tally(tally.limit)  # not the other's own, which may go on counting
                fresh.merge(tally)
                self.without_place[reason] = fresh

    def save(self, path: str | Path) -> None:
        """Publish the counts as one Parquet file; equal counts give equal bytes (by the same release of pyarrow)."""
        import pyarrow
        import pyarrow.parquet

        parts = [pyarrow.table(columns, names=list(_COLUMNS)) for columns in self._columns()]
        table = pyarrow.concat_tables(parts).sort_by([("part", "ascending"), ("name", "ascending")])
        tallies = {reason: [tally.limit, tally.total, tally.error] for reason, tally in self.without_place.items()}
        head = {"format": FORMAT, "version": VERSION, "posts": self.posts, "known": self.known, "tallies": tallies}
        table = table.combine_chunks().replace_schema_metadata({_METADATA: json.dumps(head, sort_keys=True).encode()})
        with published_file(path) as aside:
            pyarrow.parquet.write_table(table, aside, compression="zstd")

    def _columns(self) -> Iterator[list[Any]]:
        """The columns of the file, part by part."""
        import pyarrow

        held: list[tuple[str, Mapping[str, int], Mapping[str, int]]] = [
            (part, counter, {})
            for part, counter in zip(_PARTS, (self.raw, self.canonical, self.dropped_tags), strict=False)
        ]
        held += [(reason, *tally.held()) for reason, tally in self.without_place.items()]
        for part, counter, missed in held:
            names = [name for name, count in counter.items() if count]
            columns = ([part] * len(names), names, [counter[name] for name in names], [missed.get(n, 0) for n in names])
            yield [pyarrow.array(column, kind) for column, kind in zip(columns, _COLUMNS.values(), strict=True)]

    @classmethod
    def load(cls, path: str | Path) -> HashtagCounts:
        """Read a file of counts, believing nothing in it before it is checked.

        Raises:
            UserError: The file is missing, holds no counts, is of another version, or was damaged or edited.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if file.metadata.num_rows > _MOST_ROWS:
                    raise ValueError(
                        f"it has {file.metadata.num_rows:,} rows, where counts have {_MOST_ROWS:,} at most"
                    )
                schema = file.schema_arrow
                if [(field.name, str(field.type)) for field in schema] != list(_COLUMNS.items()):
                    raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
                head = json.loads((schema.metadata or {}).get(_METADATA, b"null"))
                table = file.read()
            return cls._parsed(head, table)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())[:200]
            raise UserError(f"cannot read the counts {path}: {reason}") from None
        except (ValueError, RecursionError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} holds no hashtag counts, or is damaged: {reason}") from None

    @classmethod
    def _parsed(cls, head: Any, table: Any) -> HashtagCounts:
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if type(head.get("version")) is not int or head["version"] != VERSION:
            raise ValueError(f"its version is {head.get('version')!r}, where this release reads {VERSION}")
        posts, known, tallies = head.get("posts"), head.get("known"), head.get("tallies")
        if not isinstance(tallies, dict) or not _is_count(posts) or not _is_count(known) or known > posts:
            raise ValueError("its numbers of posts are none")
        parts = _parts(table, known)
        without_place = {}
        for reason in PLACELESS:
            figures = tallies.pop(reason, None)
            counted, missed = parts[reason]
            if figures is None and not counted:
                continue
            if not isinstance(figures, list) or len(figures) != 3 or not all(map(_is_count, figures)):
                raise ValueError(f"its figures of the hashtags without place ({reason}) are none")
            limit, total, error = figures
            without_place[reason] = Tally.restored(limit, total, error, counted, missed)
        if tallies:
            raise ValueError(f"it knows other reasons than {', '.join(PLACELESS)}")
        raw, canonical, dropped = (Counter(parts[part][0]) for part in _PARTS[:3])
        if bool(known) != bool(raw) or bool(raw) != bool(canonical):
            raise ValueError("its counts of posts, of hashtags and of labels contradict each other")
        return cls(posts, known, raw, canonical, dropped, without_place)


def _parts(table: Any, known: int) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """name -> count, and name -> missed where that is not 0, of each part of a file that is not believed yet."""
    import pyarrow.compute as pc

    if any(table.column(name).null_count for name in _COLUMNS):
        raise ValueError("it has empty cells")
    parts: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for part in _PARTS:
        rows = table.filter(pc.equal(table.column("part"), part))
        names, counts, missed = (rows.column(name).to_pylist() for name in ("name", "count", "missed"))
        parts[part] = dict(zip(names, counts, strict=True)), {n: m for n, m in zip(names, missed, strict=True) if m}
        if len(parts[part][0]) != len(names):
            raise ValueError(f"a row of {part!r} is there twice")
        if counts and min(counts) < 1:
            raise ValueError(f"a count of {part!r} is {min(counts)}")
        if parts[part][1] and part not in PLACELESS:
            raise ValueError(f"a count of {part!r} may not miss anything")
        if part in ("raw", "canonical") and counts and max(counts) > known:
            raise ValueError(f"a hashtag is on {max(counts)} of {known} posts")
        if part not in ("canonical", "dropped tags"):
            plain = pc.match_substring_regex(rows.column("name"), "^[0-9]{0,50}[a-z][a-z0-9]{0,49}$")
            for name in rows.column("name").filter(pc.invert(plain)).to_pylist():  # the others are in normal form
                if normalize(name) != name:
                    raise ValueError(f"{name[:60]!r} is no hashtag in normal form")
    if sum(len(counted) for counted, _ in parts.values()) != table.num_rows:
        raise ValueError(f"a row is of another part than {', '.join(_PARTS)}")
    return parts


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0  # a bool is an int too
