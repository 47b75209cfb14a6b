"""Reads what a preparation left beside its data sets: prepared.json, rejects.parquet and vocabulary.report.json.

Each may be missing, and so may anything in them. Must never believe what is there: a file that is too large, or holds
something else than it should, is refused before the page is made.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from scale_wsl.corpus.show.markup import clean
from scale_wsl.errors import UserError

__all__ = ["Report", "Unplaced", "read_report"]

PREPARED, REJECTS, VOCABULARY = "prepared.json", "rejects.parquet", "vocabulary.report.json"
FORMAT = "scale_wsl preparation"

_LARGEST = {PREPARED: 16 << 20, REJECTS: 256 << 20, VOCABULARY: 64 << 20}  # bytes
_MOST_UNPACKED = 2 << 30  # bytes that a Parquet file may say that it holds
_MOST_ROWS = 2_000_000  # of rejects.parquet that are looked through for examples
_BATCH = 1 << 16  # rows
_MOST_REASONS = 50
_EXAMPLES = 12  # of each reason
_UNPLACED = 120  # hashtags of each reason
_LONGEST, _LONGEST_JSON = 240, 1000  # characters of a text that is shown
_LARGEST_COUNT = 1 << 62

T = TypeVar("T")


@dataclass(frozen=True)
class Unplaced:
    """Hashtags that are no labels, for one reason."""

    distinct: int
    at_least: bool = False
    """There are more than that: whoever counted them forgot the rare ones."""
    pairs: int | None = None
    """(post, hashtag) pairs."""
    most_frequent: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    """And on how many posts each is."""


@dataclass
class Report:
    """What is known of how the data sets came about; empty or None where nothing is."""

    posts: int | None = None
    """That were read."""
    copies: int | None = None
    """Posts that were merged into an earlier one, because their image files are equal."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Posts, by reason."""
    examples: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    """Reason -> (key, detail) of some of them."""
    dropped_tags: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tags that are no hashtags, by reason."""
    near_identical: dict[str, int | float] = dataclasses.field(default_factory=dict)
    unplaced: dict[str, Unplaced] = dataclasses.field(default_factory=dict)
    """By reason."""
    members: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """Canonical hashtag -> hashtags merged into it -> images."""
    coverage: dict[str, int | float] = dataclasses.field(default_factory=dict)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the preparation, as JSON."""
    rule: str = ""
    """Of the vocabulary, as JSON."""
    fingerprint: str = ""
    """Of the source, as JSON."""


def read_report(folder: Path) -> Report:
    """What `folder` says of its preparation.

    Raises:
        UserError: A file is there, but too large, unreadable or not what it should be.
    """
    report = Report()
    if (prepared := _read_json(folder / PREPARED)) is not None:
        _take_prepared(report, _Reader(folder / PREPARED), prepared)
    if (vocabulary := _read_json(folder / VOCABULARY)) is not None:
        _take_vocabulary(report, _Reader(folder / VOCABULARY), vocabulary)
    _take_rejects(report, folder / REJECTS)
    return report


_Where = tuple[str, ...]


class _Reader:
    """Takes parsed JSON apart; says which file, and where in it, something is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, where: _Where, right: str) -> UserError:
        place = ".".join(clean(key, 40) for key in where) or "it"
        return UserError(
            f"{self.path} is damaged: {place} must be {right}; restore it, or move it away and the page goes without it"
        )

    def mapping(self, value: Any, where: _Where, take: Callable[[Any, _Where], T]) -> dict[str, T]:
        """A JSON object, in its order; each value through `take`."""
        if not isinstance(value, dict):
            raise self.wrong(where, "an object")
        # JSON text may hold halves of surrogate pairs, which no later step could write.
        return {_encodable(key): take(item, (*where, key)) for key, item in value.items()}

    def reasons(self, value: Any, where: _Where, take: Callable[[Any, _Where], T]) -> dict[str, T]:
        """The first ones of an object whose keys are reasons."""
        found = self.mapping(value, where, take)
        return {clean(reason, _LONGEST): found[reason] for reason in list(found)[:_MOST_REASONS]}

    def count(self, value: Any, where: _Where) -> int:
        if type(value) is not int or not 0 <= value <= _LARGEST_COUNT:
            raise self.wrong(where, "a count")
        return value

    def counts(self, value: Any, where: _Where) -> dict[str, int]:
        return self.mapping(value, where, self.count)

    def texts(self, value: Any, where: _Where) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(where, "a list of texts")
        return [clean(text, _LONGEST) for text in value]

    def anything(self, value: Any, where: _Where) -> Any:
        return value


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _read_json(path: Path) -> Any:
    """The parsed file; None where there is none."""
    content = _read(path)
    if content is None:
        return None
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not valid JSON; restore it, or move it away") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read(path: Path) -> bytes | None:
    most = _LARGEST[path.name]
    try:
        with open(path, "rb") as handle:
            content = handle.read(most + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > most:
        raise UserError(f"{path} is larger than {most >> 20} MiB: move it away, and the page goes without it")
    return content


def _take_prepared(report: Report, reader: _Reader, prepared: Any) -> None:
    whole = reader.mapping(prepared, (), reader.anything)
    if whole.get("format") != FORMAT:
        raise reader.wrong(("format",), f'"{FORMAT}"')

    def inside(value: Mapping[str, Any], *where: str) -> dict[str, Any]:
        return reader.mapping(value.get(where[-1], {}), where, reader.anything)

    def reasons(value: Mapping[str, Any], take: Callable[[Any, _Where], T], *where: str) -> dict[str, T]:
        return reader.reasons(value.get(where[-1], {}), where, take)

    told = inside(whole, "report")
    for key in ("posts", "copies"):
        if key in told:
            setattr(report, key, reader.count(told[key], ("report", key)))
    report.dropped = reasons(told, reader.count, "report", "dropped")
    examples = reasons(told, reader.texts, "report", "examples")
    report.examples = {
        reason: [_key_and_detail(text) for text in some[:_EXAMPLES]] for reason, some in examples.items()
    }
    report.dropped_tags = reasons(told, reader.count, "report", "dropped_hashtags")
    report.near_identical = _figures(inside(told, "report", "near_identical"))
    counts = reasons(inside(told, "report", "vocabulary"), reader.count, "report", "vocabulary", "dropped_hashtags")
    report.unplaced = {reason: Unplaced(distinct) for reason, distinct in counts.items()}

    recipe = inside(whole, "recipe")
    settings = list(inside(recipe, "recipe", "settings").items())[:_MOST_REASONS]
    report.settings = {clean(key, 60): _short_json(value) for key, value in settings}
    rule, fingerprint = recipe.get("rule"), recipe.get("fingerprint")
    report.rule, report.fingerprint = (_short_json(value) if value else "" for value in (rule, fingerprint))


def _key_and_detail(text: str) -> tuple[str, str]:
    key, _, detail = text.partition(": ")
    return key, detail


def _short_json(value: Any) -> str:
    try:
        return clean(json.dumps(value, ensure_ascii=False, sort_keys=True), _LONGEST_JSON)
    except RecursionError:  # the parser goes a little deeper than the writer
        return "nested too deeply to be shown"


def _figures(values: Mapping[str, Any]) -> dict[str, int | float]:
    """Those of the values that are numbers; what they are called is theirs."""
    return {
        clean(key, _LONGEST): value
        for key, value in list(values.items())[:_MOST_REASONS]
        if type(value) in (int, float) and math.isfinite(value) and abs(value) <= _LARGEST_COUNT
    }


def _take_vocabulary(report: Report, reader: _Reader, vocabulary: Any) -> None:
    whole = reader.mapping(vocabulary, (), reader.anything)
    report.members = reader.mapping(whole.get("merged", {}), ("merged",), reader.counts)
    for reason, told in reader.reasons(whole.get("dropped", {}), ("dropped",), reader.anything).items():
        before = report.unplaced.get(reason, Unplaced(0))
        report.unplaced[reason] = _unplaced(reader, told, ("dropped", reason), before)
    report.coverage = _figures(_flat(reader.mapping(whole.get("coverage", {}), ("coverage",), reader.anything)))


def _unplaced(reader: _Reader, told: Any, where: _Where, before: Unplaced) -> Unplaced:
    """From the counts of all hashtags, or from figures and the counts of the most frequent ones."""
    figures = reader.mapping(told, where, reader.anything)
    hashtags, known = figures, {}
    if isinstance(figures.get("most_frequent"), dict):
        hashtags, where = figures["most_frequent"], (*where, "most_frequent")
        keys = [key for key in ("hashtags", "pairs", "error") if key in figures]
        known = {key: reader.count(figures[key], (*where[:-1], key)) for key in keys}
    counts = reader.counts(hashtags, where)
    most = heapq.nsmallest(_UNPLACED, counts.items(), key=lambda item: (-item[1], item[0]))
    return Unplaced(
        max(before.distinct, known.get("hashtags", 0), len(counts)),
        known.get("error", 0) > 0,
        known.get("pairs"),
        [(clean(hashtag, _LONGEST), posts) for hashtag, posts in most],
    )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an object and of the objects in it."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key} {name}".rstrip(): figure for name, figure in inner}
    return flat


def _take_rejects(report: Report, path: Path) -> None:
    """Examples of each reason, with what was found: more than prepared.json names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = _read(path)
    if content is None:
        return
    columns = ["key", "reason", "detail"]
    examples: dict[str, list[tuple[str, str]]] = {}
    try:
        # Kept as dictionaries: a text that comes a million times is in memory once.
        schema = pq.read_schema(pa.BufferReader(content))
        if any(name not in schema.names or not _is_text(schema.field(name).type) for name in columns):
            raise UserError(f"{path} is damaged: it must have the columns key, reason and detail, which are text")
        with pq.ParquetFile(pa.BufferReader(content), read_dictionary=columns) as file:
            groups = range(file.metadata.num_row_groups)
            if sum(file.metadata.row_group(group).total_byte_size for group in groups) > _MOST_UNPACKED:
                raise UserError(f"{path} holds more than 2 GiB: move it away, and the page goes without it")
            looked = 0
            for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
                if batch.num_rows:
                    _add_examples(examples, batch)
                looked += batch.num_rows
                if looked >= _MOST_ROWS:
                    break
    # ValueError: a text that is not UTF-8; LookupError: two schemas in it that contradict each other
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        reason = clean(" ".join(str(error).split()), 200)
        raise UserError(f"{path} is no Parquet file that can be read: {reason}; restore it, or move it away") from None
    report.examples |= examples


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in (pa.string(), pa.large_string())


def _add_examples(examples: dict[str, list[tuple[str, str]]], batch: Any) -> None:
    keys, reasons, details = (batch.column(name) for name in ("key", "reason", "detail"))
    codes = reasons.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    for code in np.unique(codes[codes >= 0]).tolist():
        reason = clean(reasons.dictionary[code].as_py() or "", _LONGEST)
        if reason not in examples and len(examples) == _MOST_REASONS:
            continue
        some = examples.setdefault(reason, [])
        for row in np.flatnonzero(codes == code)[: _EXAMPLES - len(some)].tolist():
            key, detail = keys[row].as_py() or "", details[row].as_py() or ""
            some.append((clean(key, _LONGEST), clean(detail, _LONGEST)))
