"""The vocabulary: an ordered list of canonical hashtags, its hash, and its file.

Must never depend on the order in which images are counted, and never load a file that it cannot vouch for.

A hashtag's canonical form is the *set* of its WordNet synsets: hashtags with the same set merge into one entry
(brownbear and ursusarctos), and an ambiguous hashtag keeps an entry of its own, forced to no sense. Which hashtags may
have a place is the rule's to say (`rules.VocabularyRule`), and what is on too few posts is cut.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags.explain import explain
from scale_wsl.hashtags.normalize import normalize
from scale_wsl.hashtags.report import VocabularyReport
from scale_wsl.hashtags.rules import VocabularyRule, canonical_key

if TYPE_CHECKING:
    from scale_wsl.hashtags.counts import HashtagCounts
    from scale_wsl.hashtags.wordnet import WordNet

__all__ = ["Entry", "Vocabulary"]

FORMAT = "scale_wsl vocabulary"
VERSION = 2
_WNID = re.compile(r"n[0-9]{8}", re.ASCII)
_ENTRY_KEYS = {"hashtag", "count", "raw", "synsets"}
_FILE_KEYS = {"format", "version", "hash", "checksum", "min_count", "size", "entries"}
_RULE_KEYS = {"spec", "under", "stop", "sha256", "classes"}
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One canonical hashtag: a class of the hashtag head."""

    hashtag: str
    """The canonical name: the member on the most images, the alphabetically first of several."""
    raw: tuple[str, ...]
    """The normalised hashtags merged into it, on the most images first, then alphabetically."""
    synsets: tuple[str, ...]
    """WNIDs, sorted; none for a hashtag of the user's own list that WordNet does not know."""
    count: int
    """Images with at least one member, each counted once."""

    @property
    def key(self) -> str:
        """What its members merge by, see `rules.canonical_key`: what the class means, whatever its name."""
        return canonical_key(self.hashtag, self.synsets)


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
    rule: VocabularyRule = field(default_factory=VocabularyRule)
    """Which hashtags could have a place."""
    classes: tuple[str, ...] | None = None
    """Where the rule goes by a hashtag's first sense: those of its classes that are synsets of entries, sorted. They
    say whether a spelling that was never counted is inside the rule, without the rule's list. None for other rules."""

    def __post_init__(self) -> None:
        for entry in self.entries:
            if not entry.raw or entry.raw[0] != entry.hashtag:
                raise ValueError(f"entry {entry.hashtag!r} does not begin its own list of raw hashtags")
            if list(entry.synsets) != sorted(set(entry.synsets)):
                raise ValueError(f"the synsets of {entry.hashtag!r} are not a sorted set")
            if not entry.synsets and len(entry.raw) > 1:
                raise ValueError(f"hashtags are merged into {entry.hashtag!r}, which has no synsets")
            if any(normalize(hashtag) != hashtag for hashtag in entry.raw):
                raise ValueError(f"a raw hashtag of {entry.hashtag!r} is not in normal form")
            if entry.count < self.min_count:
                raise ValueError(f"{entry.hashtag!r} has a count of {entry.count}, below min_count {self.min_count}")
        if any(_rank(first) >= _rank(second) for first, second in pairwise(self.entries)):
            raise ValueError("the entries are not ordered by (-count, hashtag)")
        if len(self._index) != sum(len(entry.raw) for entry in self.entries):
            raise ValueError("a raw hashtag is in two entries")
        if len(self._index_of_key) != len(self.entries):
            raise ValueError("two entries have the same synsets")
        if self.rule.size is not None and self.size != self.rule.size:
            raise ValueError(f"its size is {self.size}, that of its rule {self.rule.size}")
        if (self.classes is not None) != self.rule.by_first_sense:
            raise ValueError("classes belong to a rule that goes by first senses, and to no other")
        if self.classes is not None:
            known = {wnid for entry in self.entries for wnid in entry.synsets}
            if list(self.classes) != sorted(set(self.classes)) or not known.issuperset(self.classes):
                raise ValueError("the classes are not a sorted set of its entries' synsets")

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def hash(self) -> str:
        """What shards and head checkpoints carry: SHA-256 (hex) over what each class index means.

        Of the UTF-8 text with one line an entry, in order: the canonical hashtag, a tab, its sorted WNIDs joined by
        single spaces, a newline. Counts, merged spellings and the rule are not part of it: recounting changes no class.
        """
        lines = (f"{entry.hashtag}\t{' '.join(entry.synsets)}\n" for entry in self.entries)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def index(self, hashtag: str) -> int | None:
        """Class index of a normalised hashtag, merged spellings included; None when it has no place."""
        return self._index.get(hashtag)

    def index_of_synsets(self, synsets: Collection[str]) -> int | None:
        """Class index of the entry with exactly this set of WNIDs, so of any spelling, seen or not; None for none."""
        return self._index_of_key.get(canonical_key("", synsets))

    def index_of_key(self, key: str) -> int | None:
        """Class index of the entry that hashtags of this key (`rules.canonical_key`) merge into."""
        return self._index_of_key.get(key)

    def label(self, hashtag: str, wordnet: WordNet) -> int | None:
        """Class index of a normalised hashtag in any spelling, whether or not it was counted when building.

        That of its own synsets, unless it is on the stop list or outside the rule: what the rule's `Candidates` and
        `index_of_key` give. Needs neither the rule's list nor timm.
        """
        if (index := self.index(hashtag)) is not None or hashtag in self._stop:
            return index
        if not wordnet.may_know(hashtag):
            return None
        reading = wordnet.read(hashtag)
        index = self.index_of_synsets(reading.synsets)
        if index is None or self._classes is None:  # any other rule takes all spellings of the same synsets, or none
            return index
        return None if self._classes.isdisjoint(map(wordnet.first_sense, reading.bases)) else index

    @property
    def stop(self) -> tuple[str, ...]:
        """Normalised hashtags that were left out by name, sorted."""
        return self.rule.stop

    def explain(self, text: str, wordnet: WordNet) -> str:
        """Why a hashtag is where it is, or why it has no place: several lines of text; see `explain.explain`."""
        return explain(text, wordnet, self)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {hashtag: index for index, entry in enumerate(self.entries) for hashtag in entry.raw}

    @cached_property
    def _index_of_key(self) -> dict[str, int]:
        return {entry.key: index for index, entry in enumerate(self.entries)}

    @cached_property
    def _stop(self) -> frozenset[str]:
        return frozenset(self.rule.stop)

    @cached_property
    def _classes(self) -> frozenset[str] | None:
        return None if self.classes is None else frozenset(self.classes)

    @classmethod
    def build(
        cls,
        posts: Iterable[Collection[str]],
        wordnet: WordNet,
        rule: VocabularyRule | None = None,
        *,
        min_count: int = 1,
        size: int | None = None,
    ) -> tuple[Vocabulary, VocabularyReport]:
        """Count, merge and cut, in one pass over the images; memory grows with the distinct hashtags only.

        Args:
            posts: The normalised hashtags of each image (`normalize_all`). An image that carries several members of an
                entry, or one of them twice, counts once.
            wordnet: What leads a hashtag to its synsets.
            rule: Which hashtags may have a place; all nouns when None.
            min_count: As for `of_counts`.
            size: As for `of_counts`.

        Raises:
            UserError: As `of_counts`.
            ValueError: A post's hashtag is not in normal form.
        """
        from scale_wsl.hashtags.counts import HashtagCounts

        rule = rule or VocabularyRule()
        _checked_size(min_count, size, rule)  # before the work, not after
        counts = HashtagCounts.of_posts(posts, rule.candidates(wordnet))
        return cls.of_counts(counts, rule, min_count=min_count, size=size, wordnet=wordnet)

    @classmethod
    def of_counts(
        cls,
        counts: HashtagCounts,
        rule: VocabularyRule,
        *,
        min_count: int,
        size: int | None = None,
        wordnet: WordNet | None = None,
    ) -> tuple[Vocabulary, VocabularyReport]:
        """Merge and cut what was counted, by (-count, hashtag).

        Args:
            counts: Counted under `rule`.
            rule: Which hashtags may have a place.
            min_count: An entry with fewer posts is dropped.
            size: Keep only the first `size` entries; None: as many as the rule says.
            wordnet: What leads a hashtag to its synsets; loaded when None.

        Raises:
            UserError: `min_count` or `size` below 1, two sizes that differ, or counts made under another rule.
        """
        if wordnet is None:
            from scale_wsl.hashtags.wordnet import WordNet

            wordnet = WordNet.load()
        size = _checked_size(min_count, size, rule)
        candidates = rule.candidates(wordnet)
        members: defaultdict[str, list[str]] = defaultdict(list)
        for hashtag in sorted(counts.raw, key=lambda hashtag: (-counts.raw[hashtag], hashtag)):
            members[candidates.key(hashtag)].append(hashtag)
        if members.keys() != counts.canonical.keys():
            odd = next(iter(members.keys() ^ counts.canonical.keys()))
            raise UserError(
                f"these counts were not made under the rule {rule.spec}: they differ about "
                f"{', '.join(members.get(odd, [odd]))}; count the posts again"
            )
        ranked = sorted(
            (
                Entry(raw[0], tuple(raw), () if key.startswith("#") else tuple(key.split()), counts.canonical[key])
                for key, raw in members.items()
            ),
            key=_rank,
        )
        often = [entry for entry in ranked if entry.count >= min_count]
        kept = tuple(often[:size])
        classes = None
        if rule.by_first_sense and candidates.classes is not None:
            classes = tuple(sorted(candidates.classes & {wnid for entry in kept for wnid in entry.synsets}))
        vocabulary = cls(kept, min_count, size, rule, classes)
        return vocabulary, VocabularyReport.of_cuts(counts, ranked, often, kept)

    def save(self, path: str | Path) -> None:
        """Publish the vocabulary as a JSON file, one entry a line; equal vocabularies give equal bytes."""
        head = {"format": FORMAT, "version": VERSION, "hash": self.hash, "checksum": self._checksum}
        lines = [f' "{key}": {_json(value)},\n' for key, value in (head | self._cuts | {"rule": self._rule}).items()]
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
        except (ValueError, UserError) as error:
            raise UserError(
                f"the vocabulary {path} is damaged: {error}; build it again or restore the original"
            ) from error

    @classmethod
    def _parsed(cls, parsed: Any) -> Vocabulary:
        if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if type(version := parsed.get("version")) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"its version is {version!r}, where this release reads 1 to {VERSION}")
        keys = _FILE_KEYS | {"stop" if version == 1 else "rule"}
        if parsed.keys() != keys:
            raise ValueError(f"its keys are not {', '.join(sorted(keys))}")
        if not isinstance(parsed["entries"], list):
            raise ValueError("its entries are not a list")
        min_count, size = parsed["min_count"], parsed["size"]
        if not _is_positive(min_count) or not (size is None or _is_positive(size)):
            raise ValueError("min_count or size is not a positive whole number")
        entries = tuple(_parsed_entry(entry) for entry in parsed["entries"])
        if version == 1:  # which knew one rule only: all nouns but those on the stop list
            stop = _strings("stop", parsed["stop"])
            vocabulary = cls(entries, min_count, size, VocabularyRule(stop=stop))
            checksum = _checksum({"min_count": min_count, "size": size, "stop": stop}, entries)
        else:
            rule, classes = _parsed_rule(parsed["rule"])
            vocabulary = cls(entries, min_count, size, rule, classes)
            checksum = vocabulary._checksum
        if vocabulary.hash != parsed["hash"]:
            raise ValueError("its hash is not that of its entries")
        if checksum != parsed["checksum"]:
            raise ValueError("its checksum is not that of its contents")
        return vocabulary

    @property
    def _cuts(self) -> dict[str, Any]:
        return {"min_count": self.min_count, "size": self.size}

    @property
    def _rule(self) -> dict[str, Any]:
        rule = self.rule
        facts = {"spec": rule.spec, "under": rule.under, "stop": rule.stop, "sha256": rule.sha256}
        return facts | {"classes": self.classes}

    @property
    def _checksum(self) -> str:
        return _checksum(self._cuts | self._rule, self.entries)


def _checksum(rule: dict[str, Any], entries: Iterable[Entry]) -> str:
    """SHA-256 over everything in the file, counts and members too, where `hash` covers what an index means."""
    return hashlib.sha256(_json([rule, [_fields(entry) for entry in entries]]).encode()).hexdigest()


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


def _parsed_rule(rule: Any) -> tuple[VocabularyRule, tuple[str, ...] | None]:
    if not isinstance(rule, dict) or rule.keys() != _RULE_KEYS:
        raise ValueError(f"its rule's keys are not {', '.join(sorted(_RULE_KEYS))}")
    spec, sha256, classes = rule["spec"], rule["sha256"], rule["classes"]
    if not isinstance(spec, str) or not spec.isprintable() or not isinstance(sha256, str):
        raise ValueError("its rule is no text")
    # Without a hash the rule would go and read the list that it names, which nobody has asked for.
    if not _SHA256.fullmatch(sha256) and not (sha256 == "" and re.fullmatch("noun(:[0-9]+)?", spec, re.ASCII)):
        raise ValueError(f"the hash of the list of its rule is {sha256[:80]!r}")
    under, stop = _strings("under", rule["under"]), _strings("stop", rule["stop"])
    return VocabularyRule(spec, under, stop, sha256), None if classes is None else _strings("classes", classes)


def _checked_size(min_count: int, size: int | None, rule: VocabularyRule) -> int | None:
    """How many entries to keep; None is no limit."""
    if min_count < 1:
        raise UserError(f"min_count is {min_count}; a hashtag is kept from 1 image upwards")
    if size is not None and size < 1:
        raise UserError(f"size is {size}; a vocabulary has at least 1 entry (leave it out for no limit)")
    if size is not None and rule.size not in (None, size):
        raise UserError(f"size is {size}, but the rule {rule.spec} keeps {rule.size}: leave one of them out")
    return rule.size if size is None else size
