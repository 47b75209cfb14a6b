"""What people judged about pairs of images, and what follows for an evaluation set: its duplicates.

Two files, both JSON, both from outside until parsed: judgements, which a report's page saves, and `duplicates.json`
beside an evaluation set's manifest, which every evaluation reads. Must never take an entry that is not exactly of its
form, and never believe a file that was made for another set of images.

    judgements       {"format": "scale_wsl judgements", "version": 1,
                      "train": {"name": ..., "sha256": ...}, "evaluation": {"name": ..., "sha256": ...},
                      "method": "R-MAC of ...",
                      "pairs": [[evaluation key, training key, similarity, verdict, how], ...]}
    duplicates.json  {"format": "scale_wsl duplicates", "version": 1, "evaluation": {...},
                      "searches": [{"train": {...}, "method": ..., "accept_above": 0.95 or null,
                                    "unsure": "duplicate" or "not", "pairs": [...]}, ...]}

The SHA-256 is that of a data set's manifest. The verdict is one of `VERDICTS`; how it came about, one of `HOW`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from scale_wsl.errors import UserError
from scale_wsl.files import published_file

__all__ = [
    "DUPLICATES",
    "FORMAT",
    "HOW",
    "VERDICTS",
    "VERSION",
    "Duplicates",
    "Judgements",
    "Pair",
    "SetId",
    "Verdicts",
    "combined",
    "dumped_judgements",
    "is_sha256",
    "is_text",
    "parse_judgements",
    "read_duplicates",
    "read_judgements",
]

DUPLICATES = "duplicates.json"
FORMAT, DUPLICATES_FORMAT = "scale_wsl judgements", "scale_wsl duplicates"
VERSION = 1
VERDICTS = ("duplicate", "not", "unsure")
HOW = ("by hand", "above threshold")
UNSURE_AS = ("duplicate", "not")

_LARGEST = 256 << 20  # bytes of a file: some two million pairs
_LONGEST_TEXT = 500  # characters of a name, a key or a method
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class SetId:
    """A set of images: its name for people, and the SHA-256 of its manifest."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Pair:
    """An evaluation and a training image, and what was decided about them."""

    evaluation: str
    training: str
    similarity: float
    verdict: str
    how: str = "by hand"


@dataclass(frozen=True)
class Judgements:
    """What was decided about pairs of two sets; no pair comes twice. Pairs are in order, whichever they came in."""

    train: SetId
    evaluation: SetId
    method: str
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        ordered = sorted(self.pairs, key=lambda pair: (pair.evaluation, -pair.similarity, pair.training))
        object.__setattr__(self, "pairs", tuple(ordered))


@dataclass(frozen=True)
class Verdicts:
    """The judgements about one training set that count, and what makes a pair a duplicate."""

    judgements: Judgements
    accept_above: float | None
    """Pairs without a verdict by hand were taken from this similarity on; None: none."""
    unsure: str
    """What an unsure pair counts as: "duplicate", so that a lower bound stays one, or "not"."""

    def keys(self) -> frozenset[str]:
        """Evaluation images with a duplicate in the training set."""
        counted = ("duplicate", "unsure") if self.unsure == "duplicate" else ("duplicate",)
        return frozenset(pair.evaluation for pair in self.judgements.pairs if pair.verdict in counted)

    def count(self, verdict: str, how: str | None = None) -> int:
        """Pairs of a verdict."""
        return sum(pair.verdict == verdict and how in (None, pair.how) for pair in self.judgements.pairs)


@dataclass(frozen=True)
class Duplicates:
    """All that is known about the duplicates of an evaluation set: one `Verdicts` for each training set searched."""

    evaluation: SetId
    searches: tuple[Verdicts, ...]

    @property
    def keys(self) -> frozenset[str]:
        """Evaluation images with a duplicate in any of the training sets.

        All of them count, whichever set a network was trained on: training sets are often parts of each other, and a
        lower bound may be too low, but not too high.
        """
        return frozenset[str]().union(*(search.keys() for search in self.searches))

    @property
    def digest(self) -> str:
        """How many images have a duplicate, and a hash of which."""
        keys = sorted(self.keys)
        return f"{len(keys)} images, {hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:12]}"

    def covers(self, train_sha256: str) -> bool:
        """Whether that training set was searched."""
        return any(search.judgements.train.sha256 == train_sha256 for search in self.searches)

    def with_search(self, verdicts: Verdicts) -> Duplicates:
        """With another search, in the place of an earlier one of the same training set by the same method."""
        new = verdicts.judgements
        others = [
            search
            for search in self.searches
            if (search.judgements.train.sha256, search.judgements.method) != (new.train.sha256, new.method)
        ]
        ordered = sorted([*others, verdicts], key=lambda it: (it.judgements.train.sha256, it.judgements.method))
        return replace(self, searches=tuple(ordered))

    def save(self, folder: Path) -> Path:
        """Write it into an evaluation set's folder, published by one rename; equal contents, equal bytes.

        Raises:
            UserError: The folder cannot be written to.
        """
        content = {
            "format": DUPLICATES_FORMAT,
            "version": VERSION,
            "evaluation": vars(self.evaluation),
            "searches": [
                {
                    "train": vars(search.judgements.train),
                    "method": search.judgements.method,
                    "accept_above": search.accept_above,
                    "unsure": search.unsure,
                    "pairs": _rows(search.judgements.pairs),
                }
                for search in self.searches
            ],
        }
        path = folder / DUPLICATES
        try:
            with published_file(path) as aside:
                aside.write_text(_dumped(content), "utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        return path

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.evaluation.name}: {len(self.keys):,} images have a duplicate in a training set"]
        for search in self.searches:
            unsure = search.count("unsure")
            counted = (
                f" ({'counted as duplicates' if search.unsure == 'duplicate' else 'not counted'})" if unsure else ""
            )
            above = f" {search.accept_above:g}" if search.accept_above is not None else ""
            lines.append(
                f"  in {search.judgements.train.name}: {len(search.keys()):,} images; pairs: "
                f"{search.count('duplicate', 'by hand'):,} duplicates by hand, "
                f"{search.count('duplicate', 'above threshold'):,} above the threshold{above}, "
                f"{search.count('not'):,} not, {unsure:,} unsure{counted}; by {search.judgements.method}"
            )
        return "\n".join(lines)


def dumped_judgements(judgements: Judgements) -> str:
    """The text of a judgements file."""
    return _dumped(
        {
            "format": FORMAT,
            "version": VERSION,
            "train": vars(judgements.train),
            "evaluation": vars(judgements.evaluation),
            "method": judgements.method,
            "pairs": _rows(judgements.pairs),
        }
    )


def _rows(pairs: Iterable[Pair]) -> list[list[Any]]:
    return [[pair.evaluation, pair.training, pair.similarity, pair.verdict, pair.how] for pair in pairs]


def _dumped(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


# --- reading what comes from outside -----------------------------------------------------------------------------


def read_judgements(path: Path) -> Judgements:
    """A judgements file.

    Raises:
        UserError: It cannot be read, or is not of the form that a report's page saves.
    """
    return parse_judgements(_read(path), str(path))


def parse_judgements(content: bytes, where: str) -> Judgements:
    """The judgements that a file's bytes are.

    Args:
        content: The bytes.
        where: What an error calls them.

    Raises:
        UserError: They are none.
    """
    found = _parsed(content, where, FORMAT, {"train", "evaluation", "method", "pairs"})
    return _judgements(found, _set_id(found["evaluation"], where, "evaluation"), where)


def read_duplicates(folder: Path, sha256: str) -> Duplicates | None:
    """What is known about the duplicates of the evaluation set in a folder; None where there is no duplicates.json.

    Args:
        folder: Of the evaluation set.
        sha256: Of its manifest.

    Raises:
        UserError: The file cannot be read, is not of the form that `scale-wsl duplicates apply` writes, or was made for
            another set of images.
    """
    path = folder / DUPLICATES
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    where = str(path)
    found = _parsed(_read(path), where, DUPLICATES_FORMAT, {"evaluation", "searches"})
    evaluation = _set_id(found["evaluation"], where, "evaluation")
    if evaluation.sha256 != sha256:
        raise UserError(
            f"{path} was made for another set of images ({evaluation.name}, {evaluation.sha256[:12]}) than the one "
            f"beside it ({sha256[:12]}): remove it, and search this one with scale-wsl duplicates find"
        )
    if not isinstance(found["searches"], list):
        _refuse(where, "searches is no list")
    searches = tuple(_verdicts(entry, evaluation, where) for entry in found["searches"])
    made = {(search.judgements.train.sha256, search.judgements.method) for search in searches}
    if len(made) != len(searches):
        _refuse(where, "a training set comes twice")
    return Duplicates(evaluation, searches)


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would keep its reader waiting for ever
            raise UserError(f"{path} is not there, or is no file")
        with open(path, "rb") as handle:
            content = handle.read(_LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > _LARGEST:
        raise UserError(f"{path} is larger than {_LARGEST >> 20} MiB, which no file of judgements is")
    return content


def _refuse(where: str, problem: str) -> NoReturn:
    raise UserError(f"{where} is no file of judgements: {problem}")


def _parsed(content: bytes, where: str, form: str, keys: set[str]) -> dict[str, Any]:
    try:
        found = json.loads(content.decode(), object_pairs_hook=_without_repetition, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError too
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        _refuse(where, f"it is not valid JSON ({reason[:200]})")
    if not isinstance(found, dict) or found.get("format") != form:
        _refuse(where, f'it does not say "format": "{form}"')
    if found.get("version") != VERSION or isinstance(found["version"], bool):
        raise UserError(f"{where} has version {found.get('version')!r:.40}, where this release reads {VERSION}")
    _exactly(found, keys | {"format", "version"}, where, "it")
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _exactly(found: Any, keys: set[str], where: str, what: str) -> None:
    if not isinstance(found, dict) or found.keys() != keys:
        _refuse(where, f"{what} must have {', '.join(sorted(keys))}, and nothing else")


def _text(value: Any, where: str, what: str) -> str:
    if not is_text(value):
        _refuse(where, f"{what} is no printable text of 1 to {_LONGEST_TEXT} characters")
    return str(value)


def is_text(value: Any) -> bool:
    """Whether it is a text that names may be: printable, of 1 to 500 characters."""
    return isinstance(value, str) and 1 <= len(value) <= _LONGEST_TEXT and value.isprintable()


def is_sha256(value: Any) -> bool:
    """Whether it is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _set_id(value: Any, where: str, what: str) -> SetId:
    _exactly(value, {"name", "sha256"}, where, what)
    if not is_sha256(value["sha256"]):
        _refuse(where, f"the sha256 of {what} is none")
    return SetId(_text(value["name"], where, f"the name of {what}"), value["sha256"])


def _number(value: Any, where: str, what: str) -> float:
    # Similarities are at most 1 but for rounding; what is far off is no similarity.
    if type(value) not in (int, float) or not -2 <= value <= 2 or not math.isfinite(value):
        _refuse(where, f"{what} is no number between -2 and 2")
    return float(value)


def _judgements(found: dict[str, Any], evaluation: SetId, where: str) -> Judgements:
    train = _set_id(found["train"], where, "train")
    if not isinstance(found["pairs"], list):
        _refuse(where, "pairs is no list")
    pairs = tuple(_pair(row, where, number) for number, row in enumerate(found["pairs"], start=1))
    if len({(pair.evaluation, pair.training) for pair in pairs}) != len(pairs):
        _refuse(where, "a pair comes twice")
    return Judgements(train, evaluation, _text(found["method"], where, "method"), pairs)


def _pair(row: Any, where: str, number: int) -> Pair:
    what = f"pair {number}"
    if not isinstance(row, list) or len(row) != 5:
        _refuse(where, f"{what} is not of the form [evaluation key, training key, similarity, verdict, how]")
    evaluation, training, similarity, verdict, how = row
    if not isinstance(verdict, str) or verdict not in VERDICTS:
        _refuse(where, f"the verdict of {what} must be one of {', '.join(VERDICTS)}")
    if not isinstance(how, str) or how not in HOW:
        _refuse(where, f"how {what} was judged must be one of {', '.join(HOW)}")
    return Pair(
        _text(evaluation, where, f"the evaluation key of {what}"),
        _text(training, where, f"the training key of {what}"),
        _number(similarity, where, f"the similarity of {what}"),
        verdict,
        how,
    )


def _verdicts(entry: Any, evaluation: SetId, where: str) -> Verdicts:
    _exactly(entry, {"train", "method", "accept_above", "unsure", "pairs"}, where, "a search")
    above = entry["accept_above"]
    if not isinstance(entry["unsure"], str) or entry["unsure"] not in UNSURE_AS:
        _refuse(where, f"unsure must be one of {', '.join(UNSURE_AS)}")
    return Verdicts(
        _judgements(entry, evaluation, where),
        None if above is None else _number(above, where, "accept_above"),
        entry["unsure"],
    )


def combined(files: Sequence[tuple[str, Judgements]]) -> dict[tuple[str, str], Pair]:
    """The pairs of several files of one report, by (evaluation key, training key).

    Raises:
        UserError: Two files disagree about a pair.
    """
    found: dict[tuple[str, str], Pair] = {}
    origin: dict[tuple[str, str], str] = {}
    for where, judgements in files:
        for pair in judgements.pairs:
            key = (pair.evaluation, pair.training)
            if key in found and found[key].verdict != pair.verdict:
                raise UserError(
                    f"{where} and {origin[key]} disagree about {pair.evaluation} and {pair.training} "
                    f"({pair.verdict}, {found[key].verdict}): judge that pair again, and save one of them anew"
                )
            found[key], origin[key] = pair, where
    return found
