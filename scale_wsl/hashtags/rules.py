"""Which hashtags may have a place in a vocabulary, and by what they merge: fixed before any post is counted.

Must never look at how often a hashtag is used, and never force an ambiguous hashtag to one of its senses: a sense may
decide whether the hashtag has a place, but it keeps its whole set of synsets.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from scale_wsl.errors import UserError
from scale_wsl.hashtags.lists import CLASS_LISTS, digest, imagenet_classes, read_classes, read_hashtags
from scale_wsl.hashtags.normalize import normalize

if TYPE_CHECKING:
    from scale_wsl.hashtags.wordnet import Reading, WordNet

__all__ = ["PLACELESS", "Candidates", "VocabularyRule", "canonical_key"]

PLACELESS = ("stop list", "no noun synset", "outside the rule")
"""Why a hashtag has no place: it was left out by name; WordNet does not know it; the rule does not take it."""

_STOPPED, _UNKNOWN, _OUTSIDE = PLACELESS
_NAMED = re.compile(r"(?P<name>[a-z0-9-]+)(?P<any>:any)?(?::(?P<size>[0-9]{1,9}))?", re.ASCII)
_FILE = re.compile(r"(?P<kind>list|wnids)(?P<any>:any)?:(?P<file>.+)", re.DOTALL)
_SYNSET = re.compile(r"n[0-9]{8}|.+\.n\.[0-9]{1,4}", re.ASCII)
_NO_SYNSETS = "#"  # begins the key of a hashtag that has none; no WNID does


def canonical_key(hashtag: str, synsets: Collection[str]) -> str:
    """What a hashtag merges by: its sorted WNIDs joined by single spaces; `#` and itself where there is none."""
    return " ".join(sorted(synsets)) if synsets else _NO_SYNSETS + hashtag


@dataclass(frozen=True)
class VocabularyRule:
    """Which hashtags may have a place. Holds the contents of the file that it names, so a pickled copy needs no file.

    Raises:
        UserError: There is no such rule, its list cannot be read, or a stop word is not in normal form.
    """

    spec: str = "noun"
    """
    noun           lemmas of any noun synset of WordNet
    in1k           lemmas whose first noun sense is a class of ImageNet-1k; also the other lists of `CLASS_LISTS`
    in1k:any       lemmas of which any noun sense is one
    noun:8500      of those the 8,500 most frequent labels; also in21k:8500, in21k:any:8500
    wnids:FILE     as in1k, with the classes of a file, a WNID a line; also wnids:any:FILE
    list:FILE      the user's own hashtags, one a line, and every hashtag that has exactly the synsets of one of them;
                   those that WordNet does not know become labels of their own
    """
    under: tuple[str, ...] = ()
    """Synsets, as animal.n.01 or n00015388: only hashtags that have a sense at or below one of them; (): all."""
    stop: tuple[str, ...] = ()
    """Normalised hashtags left out by name; other spellings of the same synsets stay."""
    sha256: str = ""
    """Of what the list holds, by `lists.digest`; filled in. Given for a rule that was recorded, whose list is read, and
    must still have this hash, when it is needed."""
    _listed: tuple[str, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if not self.spec.isprintable():  # it is shown, and written down
            raise UserError(f"the vocabulary rule {self.spec!r} has characters that cannot be shown: rename its file")
        parts = self._parts
        set_(self, "under", tuple(sorted(set(self.under))))
        set_(self, "stop", tuple(sorted(set(self.stop))))
        for name in self.under:
            if not _SYNSET.fullmatch(name):
                raise UserError(f"under names {name!r}, which is no synset such as animal.n.01 or n00015388")
        for hashtag in self.stop:
            if (normal := normalize(hashtag)) != hashtag:
                right = f"write {normal!r}" if normal else "it is not a hashtag"
                raise UserError(f"the stop list holds {hashtag!r}, which is not in normal form: {right}")
        if parts["name"] != "noun" and not self.sha256:
            set_(self, "_listed", self._read())
            set_(self, "sha256", digest(self._listed or ()))

    @property
    def _parts(self) -> dict[str, str]:
        """Of the spec: name (noun, a list of ImageNet classes, list, wnids), any, size, file; "" where absent."""
        if named := _NAMED.fullmatch(self.spec):
            parts = {key: value or "" for key, value in named.groupdict().items()} | {"file": ""}
            if parts["name"] == "noun" and parts["any"]:
                raise UserError("noun takes hashtags of any sense as it is: write noun, or noun:8500")
            if parts["size"] and not int(parts["size"]):
                raise UserError(f"the vocabulary rule {self.spec} is to keep 0 labels; it takes 1 or more")
            if parts["name"] == "noun" or parts["name"] in CLASS_LISTS:
                return parts
        elif found := _FILE.fullmatch(self.spec):
            if found["kind"] == "list" and found["any"]:
                raise UserError("list:FILE takes its hashtags with all their senses as it is: write list:FILE")
            return {"name": found["kind"], "any": found["any"] or "", "size": "", "file": found["file"]}
        names = ["noun", *CLASS_LISTS, "list:FILE", "wnids:FILE"]
        close = difflib.get_close_matches(self.spec, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"{self.spec!r} is no vocabulary rule: there are noun, {', '.join(CLASS_LISTS)}, each with :any or :SIZE, "
            f"list:FILE and wnids:FILE{hint}"
        )

    @property
    def size(self) -> int | None:
        """How many labels to keep; None: no limit."""
        return int(self._parts["size"]) if self._parts["size"] else None

    @property
    def by_first_sense(self) -> bool:
        """Whether a hashtag's first sense decides, and not merely its set of synsets."""
        return self._parts["name"] not in ("noun", "list") and not self._parts["any"]

    def stopping(self, hashtags: Collection[str]) -> VocabularyRule:
        """The same rule with more normalised hashtags left out by name."""
        rule = dataclasses.replace(self, stop=(*self.stop, *hashtags))
        object.__setattr__(rule, "_listed", self._listed)  # which the copy would read from its file again
        return rule

    def _read(self) -> tuple[str, ...]:
        parts = self._parts
        if parts["name"] == "list":
            return read_hashtags(parts["file"])
        return read_classes(parts["file"]) if parts["name"] == "wnids" else imagenet_classes(parts["name"])

    def candidates(self, wordnet: WordNet) -> Candidates:
        """What answers for single hashtags; takes a tenth of a second.

        Raises:
            UserError: `under` or the list names what is no noun synset, or the list of a recorded rule cannot be read
                or holds something else by now.
        """
        parts = self._parts
        if parts["name"] == "noun":
            return Candidates(wordnet, self)
        listed = self._listed
        if listed is None:
            listed = self._read()
            if digest(listed) != self.sha256:
                raise UserError(
                    f"the list of the vocabulary rule {self.spec} has changed since it was recorded "
                    f"({digest(listed)[:12]}, then {self.sha256[:12]}): put back the original"
                )
        if parts["name"] == "list":
            return Candidates(wordnet, self, listed=frozenset(listed))
        if unknown := next((wnid for wnid in listed if wnid not in wordnet.wnids), None):
            raise UserError(f"the list of the vocabulary rule {self.spec} has {unknown}, no noun synset of WordNet 3.0")
        return Candidates(wordnet, self, classes=frozenset(listed))


class Candidates:
    """A rule's answer for each hashtag. Can be pickled; a copy reads WordNet from the same cache folder.

    Args:
        wordnet: What leads a hashtag to its synsets.
        rule: The rule; its lists are given apart.
        classes: WNIDs one of which must be a sense (or, by the rule, the first one); None: any synset will do.
        listed: The user's own normalised hashtags; None: the rule is no list.
    """

    def __init__(
        self,
        wordnet: WordNet,
        rule: VocabularyRule,
        *,
        classes: frozenset[str] | None = None,
        listed: frozenset[str] | None = None,
    ) -> None:
        self.wordnet = wordnet
        self.rule = rule
        self.classes = classes
        self._stop = frozenset(rule.stop)
        self._first = rule.by_first_sense
        self._under: frozenset[str] | None = None
        if rule.under:
            self._under = frozenset[str]().union(*(wordnet.descendants(wordnet.resolve(name)) for name in rule.under))
        self._own: frozenset[str] = frozenset()
        self._listed: frozenset[frozenset[str]] | None = None
        if listed is not None:
            synsets = {hashtag: wordnet.synsets(hashtag) for hashtag in listed}
            self._listed = frozenset(found for found in synsets.values() if found)
            if not rule.under:  # what WordNet does not know is below none of its synsets
                self._own = frozenset(hashtag for hashtag, found in synsets.items() if not found)

    def key(self, hashtag: str) -> str:
        """What a *normalised* hashtag merges by, see `canonical_key`; "" where it has no place."""
        return self.place(hashtag)[0]

    def reason(self, hashtag: str) -> str:
        """Why a normalised hashtag has no place, one of `PLACELESS`; "" where it has one."""
        return self.place(hashtag)[1]

    def place(self, hashtag: str) -> tuple[str, str]:
        """Key and reason, one of which is empty."""
        if hashtag in self._stop:
            return "", _STOPPED
        reading = self.wordnet.read(hashtag) if self.wordnet.may_know(hashtag) else None
        if reading is None or not reading.synsets:
            return (canonical_key(hashtag, ()), "") if hashtag in self._own else ("", _UNKNOWN)
        if self._refusal(reading):
            return "", _OUTSIDE
        return canonical_key(hashtag, reading.synsets), ""

    def verdict(self, hashtag: str) -> str:
        """A line for the user: whether a normalised hashtag has a place, and why."""
        key, reason = self.place(hashtag)
        if key.startswith(_NO_SYNSETS):
            return "has a place: it is on the list, as a label of its own"
        if key:
            return "has a place"
        if reason == _OUTSIDE:
            return f"outside the rule: {self._refusal(self.wordnet.read(hashtag))}"
        return f"no place: {'it is on the stop list' if reason == _STOPPED else reason}"

    @cached_property
    def hashtags(self) -> frozenset[str]:
        """Every lemma that has a place, and the user's own hashtags: what the rule comes to before any merging.

        Inflected forms, which have a place too, are not among them.
        """
        return frozenset(filter(self.key, self.wordnet.hashtags | self._own))

    def _refusal(self, reading: Reading) -> str:
        """Why the rule does not take a hashtag that WordNet knows; "" where it does."""
        if self._under is not None and self._under.isdisjoint(reading.synsets):
            return f"none of its senses is at or below {' or '.join(self.rule.under)}"
        if self._listed is not None and reading.synsets not in self._listed:
            return "neither it nor a hashtag of exactly the same senses is on the list"
        if self.classes is not None:
            if not self._first:
                if self.classes.isdisjoint(reading.synsets):
                    return f"none of its senses is among the {len(self.classes):,} classes"
            elif self.classes.isdisjoint(firsts := [self.wordnet.first_sense(base) for base in reading.bases]):
                return f"its first sense, {' or '.join(firsts)}, is none of the {len(self.classes):,} classes"
        return ""
