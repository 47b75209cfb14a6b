"""WordNet 3.0's nouns, shipped with the package: which synsets a normalised hashtag stands for.

Must never download anything, and never force a hashtag to one sense: a hashtag stands for the set of all its synsets.

A synset is named by its WNID, as ImageNet does: `n` and the eight-digit byte offset in `data.noun` ("n02132136" is the
brown bear). The files are unpacked once into a cache folder, and read as wndb(5WN) describes them: the lookup table
comes from `index.noun`, what is in a synset from `data.noun`, when it is asked for. NLTK's reader, which takes seconds
to import and open, is for whoever wants more of WordNet; the tests take it for a reference.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags.normalize import normalize

__all__ = ["DETACHMENTS", "Reading", "WordNet", "cache_folder"]

DETACHMENTS = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)
"""WordNet's detachment rules for nouns (morphy(7WN), with the `ves` that NLTK adds)."""
_DETACHABLE = frozenset(suffix[-1] for suffix, _ in DETACHMENTS) | {"l"}  # "l": of "ful"

_EMPTY = ("index.sense", *(f"{kind}.{pos}" for kind in ("data", "index") for pos in ("adj", "adv", "verb")))
_EMPTY_FILES = (*_EMPTY, "adj.exc", "adv.exc", "verb.exc")  # NLTK opens every part of speech


@dataclass(frozen=True)
class Reading:
    """How WordNet reads a normalised hashtag."""

    hashtag: str
    how: Literal["lemma", "irregular form", "inflected form", "unknown"]
    """A lemma itself; led back to `bases` by noun.exc, or by the detachment rules; or in no way at all."""
    bases: tuple[str, ...]
    """The hashtags, each of which is a lemma, that it was led back to; itself for a lemma."""
    synsets: frozenset[str]
    """WNIDs of all noun synsets of all bases."""


class WordNet:
    """The noun lookup table, ready after construction, and the synsets themselves, read when needed.

    Nothing changes it, so whoever loads or unpickles the same cache folder in a process gets the same object.

    `wnids` holds the WNIDs of all 82,115 noun synsets.

    Args:
        corpus: The folder that holds the unpacked files, laid out as NLTK wants it; see `load`.
    """

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus
        spellings: defaultdict[str, list[str]] = defaultdict(list)
        offsets: defaultdict[str, set[str]] = defaultdict(set)
        everything: dict[str, str] = {}
        self._senses: dict[str, tuple[str, ...]] = {}
        for lemma, listed in _read_index(corpus / "index.noun"):
            wnids = tuple(everything.setdefault(wnid, wnid) for wnid in listed)  # one string for each synset
            self._senses[lemma] = wnids
            # A lemma without a letter ("24/7") is no hashtag.
            if (hashtag := normalize(lemma)) is not None:
                spellings[hashtag].append(lemma)
                offsets[hashtag].update(wnids)
        same: dict[frozenset[str], frozenset[str]] = {}  # synonyms share one set object
        self._synsets = {hashtag: same.setdefault(key := frozenset(wnids), key) for hashtag, wnids in offsets.items()}
        self._spellings = {hashtag: tuple(lemmas) for hashtag, lemmas in spellings.items()}
        self._irregular, self._irregular_words = _read_exceptions(corpus / "noun.exc")
        self._irregular_ends = frozenset(form[-2:] for form in (*self._irregular, *self._irregular_words))
        self._reader: tuple[int, Any] | None = None
        self.wnids = frozenset(everything)

    def __reduce__(self) -> tuple[Callable[[Path], WordNet], tuple[Path]]:
        return _opened, (self.corpus,)

    @staticmethod
    def load(cache: Path | None = None) -> WordNet:
        """Open the shipped files, unpacking them first (2.9 MB to 20 MB) where the cache lacks them or is damaged.

        Any number of processes may do so at once. The cache is `cache_folder()` unless given.

        Raises:
            UserError: The cache folder cannot be written, or the installed package itself is damaged.
        """
        return _opened(_unpacked(cache or cache_folder()))

    @property
    def hashtags(self) -> frozenset[str]:
        """Every normalised hashtag that is a noun lemma."""
        return frozenset(self._synsets)

    def synsets(self, hashtag: str) -> frozenset[str]:
        """WNIDs of all noun synsets of a normalised hashtag, by `read`; empty when WordNet does not know it."""
        return self.read(hashtag).synsets

    def spellings(self, hashtag: str) -> tuple[str, ...]:
        """The lemmas of index.noun with this normal form, lower case as there: ("ice-cream", "ice_cream")."""
        return self._spellings.get(hashtag, ())

    def first_sense(self, hashtag: str) -> str:
        """WNID of the first noun sense of a hashtag that is a lemma: WordNet's most frequent one, listed first.

        Where several spellings share the hashtag, the one that index.noun has first decides. That matters little: five
        of the 1,108 such hashtags have a spelling whose first sense is a class of ImageNet-1k beside one whose first
        sense is none; `bearcat`, `chowchow` and `daybed` begin with the former, `ashcan` and `walkingstick` do not.

        Raises:
            KeyError: The hashtag is no lemma.
        """
        return self._senses[self._spellings[hashtag][0]][0]

    def may_know(self, hashtag: str) -> bool:
        """False only where `read` finds nothing, for most such hashtags, and ten times as fast."""
        return hashtag in self._synsets or hashtag[-1:] in _DETACHABLE or hashtag[-2:] in self._irregular_ends

    def read(self, hashtag: str) -> Reading:
        """Lead a normalised hashtag back to lemmas by WordNet's own morphology, on forms joined without spaces.

        The first of these that finds anything decides: (1) the hashtag is a lemma ("glasses"); (2) it is an irregular
        form ("geese"), or ends in one whose base is the last word of a lemma ("canadageese", Canada goose); (3) the
        detachment rules ("brownbears"). Where (2) or (3) give several bases, all count, and the hashtag stands for the
        union of their synsets, forced to neither: "axes" are of both kinds, ax and axis (some ninety plurals are like
        that, and merge with neither singular). Only the last word of a compound is led back; plurals inside one
        ("attorneysgeneral") are found where noun.exc lists them.
        """
        if hashtag in self._synsets:
            return self._reading(hashtag, "lemma", (hashtag,))
        if hashtag in self._irregular:  # as in WordNet, a listed form is not also taken apart by rule
            bases = tuple(base for base in self._irregular[hashtag] if base in self._synsets)
            return self._reading(hashtag, "irregular form", bases)
        if bases := tuple(self._irregular_compounds(hashtag)):
            return self._reading(hashtag, "irregular form", bases)
        return self._reading(hashtag, "inflected form", tuple(self._detached(hashtag)))

    def _reading(
        self, hashtag: str, how: Literal["lemma", "irregular form", "inflected form"], bases: tuple[str, ...]
    ) -> Reading:
        if len(bases) == 1:
            synsets = self._synsets[bases[0]]
        else:
            synsets = frozenset[str]().union(*(self._synsets[base] for base in bases))
        return Reading(hashtag, how if bases else "unknown", bases, synsets)

    def _irregular_compounds(self, hashtag: str) -> Iterator[str]:
        if hashtag[-2:] not in self._irregular_ends:  # nearly every word that WordNet does not know
            return
        for start in range(1, len(hashtag) - 1):
            for base in self._irregular_words.get(hashtag[start:], ()):
                candidate = hashtag[:start] + base
                if any(re.split("[_-]", lemma)[-1] == base for lemma in self.spellings(candidate)):
                    yield candidate

    def _detached(self, hashtag: str) -> Iterator[str]:
        if hashtag[-1:] not in _DETACHABLE:
            return
        word, rest = (hashtag[:-3], "ful") if hashtag.endswith("ful") else (hashtag, "")  # "boxesful"
        if len(hashtag) <= 2 or hashtag.endswith("ss"):  # these two guards are WordNet's own
            return
        for suffix, ending in DETACHMENTS:
            if word.endswith(suffix) and (base := word[: -len(suffix)] + ending + rest) in self._synsets:
                yield base

    def lemmas(self, wnid: str) -> tuple[str, ...]:
        """The words of a synset in WordNet's spelling and order: ("brown_bear", "bruin", "Ursus_arctos")."""
        return self._synset(wnid)[0]

    def hypernyms(self, wnid: str) -> tuple[str, ...]:
        """WNIDs of the synsets directly above (hypernyms and, for a name, what it is an instance of), sorted."""
        return tuple(sorted(self._pointed(wnid, "@", "@i")))

    def ancestors(self, wnid: str) -> frozenset[str]:
        """WNIDs of every synset above, up to the root n00001740 (entity)."""
        found: set[str] = set()
        waiting = [wnid]
        while waiting:
            above = set(self.hypernyms(waiting.pop())) - found
            found |= above
            waiting.extend(above)
        return frozenset(found)

    def descendants(self, wnid: str) -> frozenset[str]:
        """WNIDs of a synset and of every one below it, instances too: the inverse of `ancestors`."""
        found = {wnid}
        waiting = [wnid]
        while waiting:
            below = self._pointed(waiting.pop(), "~", "~i") - found
            found |= below
            waiting.extend(below)
        return frozenset(found)

    def resolve(self, name: str) -> str:
        """The WNID that a user means by `n01861778` or, as NLTK names synsets, by `mammal.n.01`: its first sense.

        Raises:
            UserError: There is no such noun synset.
        """
        if name in self.wnids:
            return name
        lemma, _, number = name.lower().rpartition(".n.")
        senses = self._senses.get(lemma.replace(" ", "_"), ())
        if re.fullmatch("[0-9]{1,4}", number, re.ASCII) and 1 <= int(number) <= len(senses):
            return senses[int(number) - 1]
        has = f"; {lemma} has {len(senses)} noun senses" if senses else ""
        raise UserError(f"{name!r} is no noun synset of WordNet 3.0, such as animal.n.01 or n00015388{has}")

    def _pointed(self, wnid: str, *pointers: str) -> set[str]:
        """WNIDs of the nouns that a synset points to."""
        return {f"n{offset}" for pointer, offset in self._synset(wnid)[1] if pointer in pointers}

    def _synset(self, wnid: str) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
        """The words of a synset and its (pointer, offset) pairs, of its line in data.noun.

        offset file type words(hexadecimal) (word id)*words pointers (pointer offset part-of-speech at)*pointers |
        """
        if wnid not in self.wnids:
            raise UserError(f"{wnid!r} is no noun synset of WordNet 3.0; an id looks like n02132136")
        start = int(wnid[1:])
        fields = self._data[start : self._data.index(b"|", start)].decode("ascii").split()
        first = 4 + 2 * int(fields[3], 16)
        pointers = fields[first + 1 : first + 1 + 4 * int(fields[first])]
        return tuple(fields[4:first:2]), list(zip(pointers[::4], pointers[1::4], strict=True))

    @cached_property
    def _data(self) -> bytes:
        return (self.corpus / "data.noun").read_bytes()

    @property
    def reader(self) -> Any:
        """NLTK's `WordNetCorpusReader` over these files (nouns only), of this process's own.

        Its file handle has one position, so a forked child must not use its parent's.
        """
        if self._reader is None or self._reader[0] != os.getpid():
            self._reader = os.getpid(), _open_reader(self.corpus)
        return self._reader[1]


@lru_cache(maxsize=2)
def _opened(corpus: Path) -> WordNet:
    return WordNet(corpus)  # a second or more


def cache_folder() -> Path:
    """Where the package keeps what it unpacks: $SCALE_WSL_CACHE, else `scale_wsl` in the user's cache folder."""
    if named := os.environ.get("SCALE_WSL_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "scale_wsl"


def _unpacked(cache: Path) -> Path:
    """The folder with every file whole, each verified by its SHA-256 (0.06 s) and written anew where it is not.

    Each file is published by its own rename, so processes that unpack at once only replace a file by its equal, and
    one that has it open keeps what it opened. The folder's name holds the hash of the list of hashes: another release
    with other files has another folder.
    """
    shipped = resources.files("scale_wsl.hashtags") / "data"
    sums = shipped.joinpath("SHA256SUMS").read_bytes()
    expected = {name: digest for digest, name in map(str.split, sums.decode("ascii").splitlines())}
    expected |= dict.fromkeys(_EMPTY_FILES, hashlib.sha256().hexdigest())
    folder = cache / f"wordnet-3.0-{hashlib.sha256(sums).hexdigest()[:12]}" / "corpora" / "wordnet"
    for name, digest in expected.items():
        if _is_whole(folder / name, digest):
            continue
        content = b""
        if name not in _EMPTY_FILES:
            try:
                content = lzma.decompress(shipped.joinpath(f"{name}.xz").read_bytes())
            except (OSError, lzma.LZMAError):
                content = b""
            if hashlib.sha256(content).hexdigest() != digest:
                raise UserError(f"the installed file {shipped / name}.xz is damaged; install scale-wsl again")
        try:
            _make_private(cache, folder)
            with published_file(folder / name) as path:
                path.write_bytes(content)
                path.chmod(0o644)  # NLTK refuses data that the group may write, which some umasks allow
        except OSError as error:
            if not _is_whole(folder / name, digest):  # another process may have published it, and hold it open
                raise UserError(
                    f"cannot unpack WordNet to {folder} ({error.strerror}); "
                    "set SCALE_WSL_CACHE to a folder that can be written"
                ) from error
    return folder


def _make_private(cache: Path, folder: Path) -> None:
    """Make `cache` and the folders from there down to `folder`, which nobody else may write, whatever the umask."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    current = cache
    for part in ("", *folder.relative_to(cache).parts):
        current /= part
        current.mkdir(mode=0o755, exist_ok=True)  # `parents=True` would give the mode to the last one alone


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except OSError:
        return False


def _read_index(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(lemma, WNIDs with the most frequent sense first) of each line of index.noun; the licence lines are indented."""
    with path.open(encoding="ascii") as lines:
        for line in lines:
            if not line.startswith(" "):
                fields = line.split()  # lemma pos synset_count ... offset*synset_count
                yield fields[0], [f"n{offset}" for offset in fields[-int(fields[2]) :]]


def _read_exceptions(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Joined irregular form -> joined bases of noun.exc, and the same for single words only."""
    joined: defaultdict[str, list[str]] = defaultdict(list)
    words: dict[str, tuple[str, ...]] = {}
    for line in path.read_text("ascii").splitlines():
        form, *bases = line.split()
        if form.isalpha():
            words[form] = tuple(bases)
        joined[normalize(form) or form].extend(normalize(base) or base for base in bases)
    return {form: tuple(dict.fromkeys(bases)) for form, bases in joined.items()}, words


def _open_reader(corpus: Path) -> Any:
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class NounReader(WordNetCorpusReader):  # type: ignore[misc]
        def map_wn(self, version: str = "wordnet") -> None:
            """No table to other languages' WordNets, for which NLTK would open any corpora/wordnet it finds."""

    root = str(corpus.parents[1])
    if root not in nltk.data.path:  # NLTK opens no file outside the folders listed here
        nltk.data.path.append(root)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The multilingual functions are not available", UserWarning)
            reader = NounReader(str(corpus), None)
        reader.synset_from_pos_and_offset("n", 1740)  # the root: opens data.noun now, so that a refusal comes here
    except PermissionError as error:
        raise UserError(
            f"NLTK will not read {corpus}, where another account may write; "
            "take that right away (chmod -R go-w) or set SCALE_WSL_CACHE to a folder of your own"
        ) from error
    return reader
