"""Writes HTML, SVG and JSON in which text from outside is text and nothing else.

Must never let a string through unescaped: markup is what `h` made, and everything else is escaped when it gets there.
"""

from __future__ import annotations

import html
import json
import unicodedata
from typing import Any

__all__ = ["Markup", "clean", "h", "json_block", "number"]

_VOID = frozenset(("img", "input", "link", "meta"))
_UNDRAWABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))  # control characters, halves of surrogate pairs, line separators


class Markup(str):
    """HTML that `h` has made."""

    __slots__ = ()


def h(tag: str, *children: str, **attributes: str | int | float | bool | None) -> Markup:
    """An element; children that are no `Markup` are escaped.

    `class_` is the attribute class, `data_tag` is data-tag; True writes the bare name, None and False nothing.
    """
    start = "".join(
        f" {name.strip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Markup(f"<{tag}{start}>")
    inner = "".join(child if isinstance(child, Markup) else html.escape(child) for child in children)
    return Markup(f"<{tag}{start}>{inner}</{tag}>")


def clean(text: str, most: int) -> str:
    """`text` without what cannot be drawn, cut to `most` characters; in any script, and safe to encode."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join("\ufffd" if unicodedata.category(letter) in _UNDRAWABLE else letter for letter in cut)


def json_block(identity: str, value: Any) -> Markup:
    """A script element that holds JSON and that nothing inside it can end: ASCII alone, without <, > and &."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return h("script", Markup(text), type="application/json", id=identity)


def number(value: int | float, digits: int = 2) -> str:
    """A number for reading: 12,345; 3.80; a float that is whole and large without digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.{digits}f}"
