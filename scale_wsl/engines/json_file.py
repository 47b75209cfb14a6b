"""Checks of a user's JSON file, each of which names the file in what it raises."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from scale_wsl.errors import UserError

__all__ = [
    "BOOLEAN",
    "EVEN",
    "FACTOR",
    "NATURAL",
    "POSITIVE",
    "TEXT",
    "TEXTS",
    "JsonFile",
    "Kind",
    "is_number",
    "name_for_message",
    "shown",
    "whole",
]


class Kind(NamedTuple):
    """What a tuning value must be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(least: int) -> Kind:
    """A whole number, of at least so much."""
    # 5e8 is how most files write it; NaN and infinity fail the comparisons.
    return Kind(
        f"a whole number of at least {least}",
        lambda value: is_number(value) and least <= value <= sys.maxsize and value == int(value),
    )


BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
POSITIVE = whole(1)
NATURAL = whole(0)
# DeepSpeed divides by allgather_bucket_size, and asserts that it is a multiple of its alignment of 2.
EVEN = Kind("an even whole number of at least 2", lambda value: whole(2).fits(value) and value % 2 == 0)
FACTOR = Kind("a number of at least 0", lambda value: is_number(value) and 0 <= value <= sys.maxsize)
TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of strings", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
)


@dataclass(frozen=True)
class JsonFile:
    """Checks that name the file in what they raise. `prefix` is "" or the enclosing block's name with its dot."""

    origin: str

    def block(self, content: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
        """The object at a key; {} where there is none."""
        value = content.get(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.origin} sets {prefix}{key} to {shown(value)}, but it must be a JSON object")
        return value or {}

    def only_keys(
        self, prefix: str, content: dict[str, Any], taken: Iterable[str], besides: Iterable[str] = ()
    ) -> None:
        """Refuse a key outside both lists; only the first is suggested."""
        taken = sorted(taken)
        for key in content:
            if key not in taken and key not in besides:
                close = difflib.get_close_matches(key, taken, n=1)
                hint = f"did you mean {prefix}{close[0]}?" if close else f"it takes {', '.join(taken)}"
                named = prefix + name_for_message(key)
                raise UserError(f"{self.origin} sets {named}, which this engine does not use; {hint}")

    def value(self, key: str, theirs: Any, kind: Kind) -> Any:
        """A tuning value, a whole number as an int; None where it is null or "auto"."""
        if theirs is None or theirs == "auto":
            return None
        if not kind.fits(theirs):
            raise UserError(f"{self.origin} sets {key} to {shown(theirs)}, but it must be {kind.words}")
        return int(theirs) if isinstance(theirs, float) and theirs.is_integer() else theirs

    def tuning(self, prefix: str, content: dict[str, Any], kinds: dict[str, Kind]) -> dict[str, Any]:
        """The tuning values that a block sets."""
        values = {key: self.value(prefix + key, content.get(key), kind) for key, kind in kinds.items()}
        return {key: value for key, value in values.items() if value is not None}

    def fixed(self, key: str, theirs: Any, ours: Any, reason: str) -> None:
        """Refuse any value but ours, or one that says nothing."""
        if theirs not in (None, "auto", {}) and not _equal(theirs, ours):
            raise UserError(f"{self.origin} sets {key} to {shown(theirs)}, but only {shown(ours)} works: {reason}")

    def agrees(self, key: str, theirs: Any, ours: Any, fact: str) -> None:
        """Refuse a value that is neither "auto" nor the recipe's."""
        if theirs != "auto" and not _equal(theirs, ours):
            raise UserError(
                f"{self.origin} sets {key} to {shown(theirs)}, but {fact}: "
                f'make them agree, or write "auto" in {self.origin}'
            )


def _equal(theirs: Any, ours: Any) -> bool:
    """Numbers by value, whatever their size; all else by type too, for 1 is not true."""
    return bool(theirs == ours) and (type(theirs) is type(ours) or (is_number(theirs) and is_number(ours)))


def shown(value: Any) -> str:
    """A JSON value for a message: short, on one line."""
    if value and isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def name_for_message(key: str) -> str:
    """A key that may hold anything, for a message."""
    return shown(key)[1:].removesuffix('"')
