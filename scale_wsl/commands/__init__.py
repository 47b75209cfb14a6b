"""Subcommands of `scale-wsl` that need a file of their own; thin: parse, call one function, print."""

from __future__ import annotations

from scale_wsl.errors import UserError

__all__ = ["nothing_else"]


def nothing_else(extra: list[str]) -> None:
    """Refuse what a command line has beyond what was asked for.

    Raises:
        UserError: there is something.
    """
    if extra:
        raise UserError(f"{extra[0]} means nothing here; --help lists what there is")
