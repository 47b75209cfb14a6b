"""What is kept of a post that cannot be used: which one, why, and what was seen.

Must never hold the post's image, or more of what came from outside than a line.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RowReject"]

_LONGEST_DETAIL = 300  # characters


@dataclass(frozen=True, slots=True)
class RowReject:
    """A post, or a part of one, that was refused."""

    row: int
    """Which one, counted from 0: of a table's rows, or of a tar's members."""
    reason: str
    """One of the few that the source gives, to count by."""
    detail: str = ""
    """What was seen, printable and cut at 300 characters."""

    def __post_init__(self) -> None:
        printable = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in self.detail[:_LONGEST_DETAIL])
        object.__setattr__(self, "detail", printable[:_LONGEST_DETAIL])
