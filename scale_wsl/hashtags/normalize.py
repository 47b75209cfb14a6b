"""Turns what a user typed as a tag into the one form that the rest of the toolkit counts and looks up.

Must never guess: what is not one hashtag is refused with a reason, and nothing here knows a language or a dictionary.

The normal form is a string of letters, marks and digits, case-folded and in Unicode NFKC, with at least one letter:
`#Brown_Bear`, `brown bear` and `ＢＲＯＷＮ－ＢＥＡＲ` all become `brownbear`. Accents stay (`café` is not `cafe`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

__all__ = ["MAX_LENGTH", "examine", "normalize", "normalize_all"]

MAX_LENGTH = 100
"""The longest hashtag, in characters of its normal form."""

_RAW_LIMIT = 10 * MAX_LENGTH  # of the text as typed: no work is spent on a pasted page
_ADDRESS = re.compile(r"://|^\W*www\.|^\W*(mailto|data|javascript):|@")
_SEPARATORS = frozenset("'.·・/\u2018\u2019\u02bc")  # and the categories below; WordNet writes 24/7, b.o., jew's-ear
_SEPARATING = frozenset(("Zs", "Pc", "Pd"))
_KEPT = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd", "Nl"))
_FORBIDDEN = frozenset(("Cc", "Cs", "Co", "Cn", "Zl", "Zp"))
_DECORATION = frozenset(("So", "Sk"))  # emoji, skin tones: allowed in a hashtag, and no part of the word

# Nearly every tag there is: the same answer as the careful way gives, several times sooner.
_PLAIN = re.compile(r"#*((?!www\.)[a-z0-9]+(?:[ _.'/-]+[a-z0-9]+)*)", re.IGNORECASE | re.ASCII)
_PLAIN_SEPARATORS = re.compile(r"[ _.'/-]+")

# Characters that Unicode calls default-ignorable, beyond the category Cf: Hangul fillers, variation selectors, ...
_IGNORABLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")


def normalize(text: str) -> str | None:
    """The normal form of a tag, or None when it is not a hashtag; idempotent, and raises for no text at all."""
    return examine(text)[0]


def normalize_all(tags: Iterable[str]) -> tuple[tuple[str, ...], Counter[str]]:
    """The distinct normal forms of an image's tags, in the order given, and how many tags were dropped by reason.

    The reasons are those of `examine`, and "repeated" for a tag whose normal form came before.
    """
    kept: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    for tag in tags:
        hashtag, reason = examine(tag)
        if hashtag is None:
            dropped[reason] += 1
        elif hashtag in kept:
            dropped["repeated"] += 1
        else:
            kept[hashtag] = None
    return tuple(kept), dropped


def examine(text: str) -> tuple[str | None, str]:
    """The normal form and "", or None and the reason why `text` is not a hashtag.

    The reasons: "empty", "control characters" (also line breaks and unassigned or private characters), "address" (a
    URL, an e-mail address, a mention), "symbols" (signs inside that neither join words nor decorate: `r&b`, `c++`,
    `cat#dog`, `red,green`), "no letter", "too long".
    """
    if len(text) <= _RAW_LIMIT and (plain := _PLAIN.fullmatch(text)) is not None:
        word = _PLAIN_SEPARATORS.sub("", plain[1]).lower()
        if len(word) <= MAX_LENGTH and not word.isdigit():  # then a letter is in it
            return word, ""
        return _checked(word)
    return _examine_any(text)


def _examine_any(text: str) -> tuple[str | None, str]:
    text = text.strip()
    if len(text) > _RAW_LIMIT:
        return None, "too long"
    if any(unicodedata.category(char) in _FORBIDDEN for char in text):
        return None, "control characters"
    folded = unicodedata.normalize("NFKC", text).casefold()
    if _ADDRESS.search(folded):
        return None, "address"
    while True:  # removing a character, or folding its case, can let its neighbours compose: go on until nothing moves
        word = _letters(folded)
        if word is None:
            return None, "symbols"
        again = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
        if again == folded:
            return _checked(again)
        folded = again


def _checked(word: str) -> tuple[str | None, str]:
    if not word:
        return None, "empty"
    if len(word) > MAX_LENGTH:
        return None, "too long"
    if word.isdigit() or not any(unicodedata.category(char)[0] == "L" for char in word):
        return None, "no letter"
    return word, ""


def _letters(text: str) -> str | None:
    """`text` without leading `#`, outer punctuation, separators and decoration; None when other signs are inside."""
    first, last = 0, len(text)
    while first < last and (text[first] == "#" or _is_outer(text[first])):
        first += 1
    while last > first and _is_outer(text[last - 1]):
        last -= 1
    kept: list[str] = []
    stands_on_kept = False  # a mark goes with the character that it stands on, so no accent moves to another letter
    for char in text[first:last]:
        category = unicodedata.category(char)
        if category == "Cf" or _IGNORABLE.match(char):
            continue
        if char in _SEPARATORS or category in _SEPARATING or category in _DECORATION:
            stands_on_kept = False
        elif category[0] == "M" and (category == "Me" or not stands_on_kept):
            continue
        elif category in _KEPT:
            kept.append(char)
            stands_on_kept = True
        else:
            return None
    return "".join(kept)


def _is_outer(char: str) -> bool:
    """Whether a character at either end is no part of the tag: spaces, quotes, brackets, emoji; never a `#`."""
    category = unicodedata.category(char)
    return char != "#" and (category[0] in "PZ" or category in _DECORATION)
