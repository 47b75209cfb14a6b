"""The vocabulary: an ordered list of canonical hashtags, its hash, and its file.

Must never depend on the order in which images are counted, and never load a file that it cannot vouch for.

A hashtag's canonical form is the *set* of its WordNet synsets: hashtags with the same set merge into one entry
(brownbear and ursusarctos), and an ambiguous hashtag keeps an entry of its own, forced to no sense.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags.explain import explain
from scale_wsl.hashtags.normalize import normalize

if TYPE_CHECKING:
    from scale_wsl.hashtags.wordnet import WordNet

__all__ = ["DROP_REASONS", "Entry", "Vocabulary", "VocabularyReport"]

FORMAT = "scale_wsl vocabulary"
VERSION = 1
DROP_REASONS = ("stop list", "no noun synset", "below min_count", "cut by size")
_WNID = re.compile(r"n[0-9]{8}", re.ASCII)
_ENTRY_KEYS = {"hashtag", "count", "raw", "synsets"}
_FILE_KEYS = {"format", "version", "hash", "checksum", "min_count", "size", "stop", "entries"}


@dataclass(frozen=True)
class Entry:
    """One canonical hashtag: a class of the hashtag head."""

    hashtag: str
    """The canonical name: the member on the most images, the alphabetically first of several."""
    raw: tuple[str, ...]
    """The normalised hashtags merged into it, on the most images first, then alphabetically."""
    synsets: tuple[str, ...]
    """WNIDs, sorted."""
    count: int
    """Images with at least one member, each counted once."""


@dataclass(frozen=True)
class VocabularyReport:
    """What building a vocabulary did with every hashtag it met; `dataclasses.asdict` makes it JSON-able."""

    images: int
    known: int
    """Images with at least one hashtag that WordNet knows and the stop list spares, before any cut."""
    entries: int
    ambiguous: int
    """Entries with more than one synset."""
    merged: Mapping[str, Mapping[str, int]]
    """Canonical hashtag -> member -> images, of the entries with more than one member."""
    dropped: Mapping[str, Mapping[str, int]]
    """Reason, each of `DROP_REASONS` -> normalised hashtag -> images."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.images:,} images, {self.known:,} of them with a hashtag that WordNet knows",
            f"{self.entries:,} canonical hashtags, {self.ambiguous:,} of them ambiguous; "
            f"{sum(map(len, self.merged.values())):,} hashtags merged into {len(self.merged):,} of them",
        ]
        for reason, hashtags in self.dropped.items():
            most = ", ".join(sorted(hashtags, key=lambda hashtag: (-hashtags[hashtag], hashtag))[:5])
            more = ", ..." if len(hashtags) > 5 else ""
            lines.append(f"dropped, {reason}: {len(hashtags):,} hashtags" + (f" ({most}{more})" if most else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Vocabulary:
    """Canonical hashtags in class order, by (-count, hashtag), and the rule by which they were chosen.

    Raises:
        ValueError: The entries contradict each other or the order; `build` and `load` never let that happen.
    """

    entries: tuple[Entry, ...]
    min_count: int = 1
    size: int | None = None
    """At most this many entries were kept; None is no limit."""
    stop: tuple[str, ...] = ()
    """Normalised hashtags that were left out by name, sorted."""

    def __post_init__(self) -> None:
        for entry in self.entries:
            if not entry.raw or entry.raw[0] != entry.hashtag:
                raise ValueError(f"entry {entry.hashtag!r} does not begin its own list of raw hashtags")
            if not entry.synsets or list(entry.synsets) != sorted(set(entry.synsets)):
                raise ValueError(f"the synsets of {entry.hashtag!r} are not a sorted set")
            if any(normalize(hashtag) != hashtag for hashtag in entry.raw):
                raise ValueError(f"a raw hashtag of {entry.hashtag!r} is not in normal form")
            if entry.count < self.min_count:
                raise ValueError(f"{entry.hashtag!r} has a count of {entry.count}, below min_count {self.min_count}")
        if any(_rank(first) >= _rank(second) for first, second in pairwise(self.entries)):
            raise ValueError("the entries are not ordered by (-count, hashtag)")
        if len(self._index) != sum(len(entry.raw) for entry in self.entries):
            raise ValueError("a raw hashtag is in two entries")
        if len(self._index_of_synsets) != len(self.entries):
            raise ValueError("two entries have the same synsets")

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def hash(self) -> str:
        """What shards and head checkpoints carry: SHA-256 (hex) over what each class index means.

        Of the UTF-8 text with one line an entry, in order: the canonical hashtag, a tab, its sorted WNIDs joined by
        single spaces, a newline. Counts and merged spellings are not part of it: recounting changes no class.
        """
        lines = (f"{entry.hashtag}\t{' '.join(entry.synsets)}\n" for entry in self.entries)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def index(self, hashtag: str) -> int | None:
        """Class index of a normalised hashtag, merged spellings included; None when it has no place."""
        return self._index.get(hashtag)

    def index_of_synsets(self, synsets: Collection[str]) -> int | None:
        """Class index of the entry with exactly this set of WNIDs, so of any spelling of it, seen or not."""
        return self._index_of_synsets.get(frozenset(synsets))

    def explain(self, text: str, wordnet: WordNet) -> str:
        """Why a hashtag is where it is, or why it has no place: several lines of text; see `explain.explain`."""
        return explain(text, wordnet, self)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {hashtag: index for index, entry in enumerate(self.entries) for hashtag in entry.raw}

    @cached_property
    def _index_of_synsets(self) -> dict[frozenset[str], int]:
        return {frozenset(entry.synsets): index for index, entry in enumerate(self.entries)}

    @classmethod
    def build(
        cls,
        posts: Iterable[Collection[str]],
        wordnet: WordNet,
        *,
        min_count: int = 1,
        size: int | None = None,
        stop: Iterable[str] = (),
    ) -> tuple[Vocabulary, VocabularyReport]:
        """Count, merge and cut, in one pass over the images; memory grows with the distinct hashtags only.

        Args:
            posts: The normalised hashtags of each image (`normalize_all`). An image that carries several members of an
                entry, or one of them twice, counts once.
            wordnet: What leads a hashtag to its synsets.
            min_count: An entry with fewer images is dropped.
            size: Keep only the first `size` entries by (-count, hashtag).
            stop: Normalised hashtags to leave out; other spellings of the same synsets stay.

        Raises:
            UserError: `min_count` or `size` below 1, or a stop word that is not in normal form.
            ValueError: A post's hashtag is not in normal form.
        """
        stopped = frozenset(stop)
        _check_rule(min_count, size, stopped)
        raw_counts: Counter[str] = Counter()
        counts: Counter[frozenset[str]] = Counter()
        keys: dict[str, frozenset[str]] = {}  # of every hashtag met; empty where it has no place
        images = known = 0
        for post in posts:
            hashtags = set(post)
            for hashtag in hashtags:
                if hashtag in keys:
                    continue
                if normalize(hashtag) != hashtag:
                    raise ValueError(f"{hashtag!r} is not in normal form; pass hashtags through normalize_all first")
                keys[hashtag] = frozenset() if hashtag in stopped else wordnet.synsets(hashtag)
            raw_counts.update(hashtags)
            found = {key for hashtag in hashtags if (key := keys[hashtag])}
            counts.update(found)
            images += 1
            known += bool(found)

        members: defaultdict[frozenset[str], list[str]] = defaultdict(list)
        dropped: dict[str, dict[str, int]] = {reason: {} for reason in DROP_REASONS}
        for hashtag in sorted(raw_counts, key=lambda hashtag: (-raw_counts[hashtag], hashtag)):
            if key := keys[hashtag]:
                members[key].append(hashtag)
            else:
                dropped["stop list" if hashtag in stopped else "no noun synset"][hashtag] = raw_counts[hashtag]
        ranked = sorted(
            (Entry(raw[0], tuple(raw), tuple(sorted(key)), counts[key]) for key, raw in members.items()), key=_rank
        )
        often = [entry for entry in ranked if entry.count >= min_count]
        kept = tuple(often[:size])
        for reason, entries in (("below min_count", ranked[len(often) :]), ("cut by size", often[len(kept) :])):
            dropped[reason] |= {hashtag: raw_counts[hashtag] for entry in entries for hashtag in entry.raw}
        report = VocabularyReport(
            images=images,
            known=known,
            entries=len(kept),
            ambiguous=sum(len(entry.synsets) > 1 for entry in kept),
            merged={e.hashtag: {raw: raw_counts[raw] for raw in e.raw} for e in kept if len(e.raw) > 1},
            dropped=dropped,
        )
        return cls(kept, min_count, size, tuple(sorted(stopped))), report

    def save(self, path: str | Path) -> None:
        """Publish the vocabulary as a JSON file, one entry a line; equal vocabularies give equal bytes."""
        head = {"format": FORMAT, "version": VERSION, "hash": self.hash, "checksum": self._checksum}
        lines = [f' "{key}": {_json(value)},\n' for key, value in (head | self._rule).items()]
        entries = ",\n".join(f"  {_json(_fields(entry))}" for entry in self.entries)
        with published_file(path) as aside:
            aside.write_bytes(f'{{\n{"".join(lines)} "entries": [\n{entries}\n ]\n}}\n'.encode())

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary file, believing nothing in it before it is checked.

        Raises:
            UserError: The file is missing, is no vocabulary, is of another version, or was damaged or edited.
        """
        try:
            parsed = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a vocabulary file: it is not valid JSON ({error})") from error
        try:
            return cls._parsed(parsed)
        except ValueError as error:
            raise UserError(
                f"the vocabulary {path} is damaged: {error}; build it again or restore the original"
            ) from error

    @classmethod
    def _parsed(cls, parsed: Any) -> Vocabulary:
        if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if type(version := parsed.get("version")) is not int or version != VERSION:
            raise ValueError(f"its version is {version!r}, where this release reads {VERSION}")
        if parsed.keys() != _FILE_KEYS:
            raise ValueError(f"its keys are not {', '.join(sorted(_FILE_KEYS))}")
        if not isinstance(parsed["entries"], list):
            raise ValueError("its entries are not a list")
        min_count, size = parsed["min_count"], parsed["size"]
        if not _is_positive(min_count) or not (size is None or _is_positive(size)):
            raise ValueError("min_count or size is not a positive whole number")
        entries = tuple(_parsed_entry(entry) for entry in parsed["entries"])
        vocabulary = cls(entries, min_count, size, _strings("stop", parsed["stop"]))
        if vocabulary.hash != parsed["hash"]:
            raise ValueError("its hash is not that of its entries")
        if vocabulary._checksum != parsed["checksum"]:
            raise ValueError("its checksum is not that of its contents")
        return vocabulary

    @property
    def _rule(self) -> dict[str, Any]:
        return {"min_count": self.min_count, "size": self.size, "stop": self.stop}

    @property
    def _checksum(self) -> str:
        """SHA-256 over everything in the file, counts and members too, where `hash` covers what an index means."""
        return hashlib.sha256(_json([self._rule, [_fields(entry) for entry in self.entries]]).encode()).hexdigest()


def _rank(entry: Entry) -> tuple[int, str]:
    return -entry.count, entry.hashtag


def _fields(entry: Entry) -> dict[str, Any]:
    return {"hashtag": entry.hashtag, "count": entry.count, "raw": entry.raw, "synsets": entry.synsets}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_positive(value: Any) -> bool:
    return type(value) is int and value >= 1  # a bool is an int too


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} is not a list of strings")
    return tuple(value)


def _parsed_entry(entry: Any) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise ValueError(f"an entry's keys are not {', '.join(sorted(_ENTRY_KEYS))}")
    if not isinstance(entry["hashtag"], str) or not _is_positive(entry["count"]):
        raise ValueError(f"the entry {entry['hashtag']!r} has no hashtag or no positive count")
    raw, synsets = _strings("raw", entry["raw"]), _strings("synsets", entry["synsets"])
    if not all(_WNID.fullmatch(wnid) for wnid in synsets):
        raise ValueError(f"a synset of {entry['hashtag']!r} is not a WNID such as n02132136")
    return Entry(entry["hashtag"], raw, synsets, entry["count"])


def _check_rule(min_count: int, size: int | None, stop: Collection[str]) -> None:
    if min_count < 1:
        raise UserError(f"min_count is {min_count}; a hashtag is kept from 1 image upwards")
    if size is not None and size < 1:
        raise UserError(f"size is {size}; a vocabulary has at least 1 entry (leave it out for no limit)")
    for hashtag in sorted(stop):
        if (normal := normalize(hashtag)) != hashtag:
            right = f"write {normal!r}" if normal else "it is not a hashtag"
            raise UserError(f"the stop list holds {hashtag!r}, which is not in normal form: {right}")
