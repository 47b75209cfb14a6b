"""Names of data sets, `role-source-I-L`: train-IG-1B-17k is 1 billion training images of IG with 17,000 labels.

The counts are rounded for reading; must never be taken for the exact ones, which stand in the manifest. Counts that a
user writes are read here too, since they look alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from scale_wsl.errors import UserError

__all__ = ["ROLES", "DatasetName", "format_count", "parse_count", "wanted_count"]

ROLES = ("train", "val", "test")

_UNITS = ("", "k", "M", "B", "T")
_SOURCE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}", re.ASCII)
_COUNT = re.compile(r"(0|[1-9][0-9]{0,2}|[1-9]\.[1-9])([kMBT]?)", re.ASCII)
_WANTED = re.compile(r"([0-9][0-9_]{0,17}(?:\.[0-9]{1,15})?(?:e\+?[0-9]{1,2})?) ?([kMBT]?)(?: ?images?)?", re.ASCII)
_LARGEST = 10**15


@dataclass(frozen=True)
class DatasetName:
    """A data set's name; `str` gives the text, in which the counts are rounded.

    Raises:
        UserError: The role or the source is not one.
    """

    role: str
    """One of `ROLES`."""
    source: str
    """A letter, then letters, digits and _, at most 40: no hyphen, which separates the parts of the name."""
    images: int
    labels: int

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"the role of a data set is {self.role!r}, but must be one of {', '.join(ROLES)}")
        if not _SOURCE.fullmatch(self.source):
            raise UserError(
                f"the source of a data set is {self.source!r}, but must be a letter, then letters, digits and _, "
                "at most 40 characters"
            )
        if self.images < 0 or self.labels < 0:
            raise ValueError("a data set has no negative number of images or labels")

    def __str__(self) -> str:
        return f"{self.role}-{self.source}-{format_count(self.images)}-{format_count(self.labels)}"

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """The name that a text is, its counts as rounded there.

        Raises:
            UserError: It is no such name.
        """
        parts = text.split("-")
        if len(parts) != 4:
            raise UserError(f"{text!r} is no data set's name, which is role-source-images-labels: train-IG-1B-17k")
        return cls(parts[0], parts[1], parse_count(parts[2]), parse_count(parts[3]))


def format_count(count: int) -> str:
    """A count as the paper writes it: 420, 1.5k, 17k, 940M, 3.5B; two digits below 10 of a unit, else whole units."""
    scale = 1
    for unit in _UNITS:
        if unit and (tenths := _rounded(count * 10, scale)) < 100:
            whole, tenth = divmod(tenths, 10)
            return f"{whole}.{tenth}{unit}" if tenth else f"{whole}{unit}"
        if (whole := _rounded(count, scale)) < 1000:
            return f"{whole}{unit}"
        scale *= 1000
    raise ValueError(f"{count} is too large a count for a name")


def parse_count(text: str) -> int:
    """The count that `format_count` wrote, as rounded there.

    Raises:
        UserError: It never writes this text.
    """
    if (match := _COUNT.fullmatch(text)) is None or (match[1] == "0" and match[2]) or ("." in text and not match[2]):
        raise UserError(f"{text!r} is no count of a data set's name, such as 420, 1.5k, 17k or 3.5B")
    whole, _, tenth = match[1].partition(".")
    scale: int = 1000 ** _UNITS.index(match[2])
    return (int(whole) * 10 + int(tenth or 0)) * scale // 10


def wanted_count(value: int | float | str, key: str) -> int:
    """The exact number of images that a user asks for: 35000, 3.5e6, '35k', '12.75M' or '5M images'.

    Raises:
        UserError: It is no whole number of at least 1, or beyond 1e15; the sentence names `key`.
    """
    match = _WANTED.fullmatch(value.strip() if isinstance(value, str) else f"{value}")
    count = Decimal(match[1]) * 1000 ** _UNITS.index(match[2]) if match else Decimal(0)
    if not 1 <= count <= _LARGEST or count != int(count):
        raise UserError(f"{key} is {value!r:.80}, but must be a number of images such as 35000, 35k, 3.5M or 1e6")
    return int(count)


def _rounded(count: int, scale: int) -> int:
    return (2 * count + scale) // (2 * scale)  # half up, in whole numbers
