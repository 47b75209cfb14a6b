"""Finds the hashtags in what a user wrote, in any script and as platforms do.

Must never judge a hashtag's meaning or form beyond the rules below (`normalize` does), and never take more than linear
time, whatever the text.

The rules, a superset of what X and Instagram link and close to UAX #31's hashtag identifiers (UAX31-R8):

1. A *sign* is `#` or `＃`. A *word character* is a letter, a number, `_`, or a mark (Mn, Mc) that is no variation
   selector. A *joiner* is one of `JOINERS`: the zero-width joiners, middle dots, and the signs that Hebrew and Tibetan
   write inside words.
2. A *tag* is a sign and, directly behind it, a word: word characters, the first of them no mark, where a single joiner
   may stand between two. All else ends it: spaces, punctuation, emoji.
3. A tag counts where it begins the text, or follows another tag directly (`#a#b`), or follows a character that is
   neither a word character nor `&` (`&#39;` is an HTML entity, `page#part` and `me@x.org#y` are addresses).
4. Nothing in a URL counts. A URL begins with `://`, or with the slash behind a dotted name (`example.com/`,
   `example.com:80/`), and goes on to white space, `<`, `>` or `"`.
5. A hashtag is a tag that counts and has a letter: `#2024` is none, `#2024goals` is one.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["JOINERS", "find_hashtags", "find_hashtags_in"]

JOINERS = "\u200c\u200d\u00b7\u30fb\uff65\u05be\u05f3\u05f4\u0f0b\u30a0"
"""What may stand between two word characters. All but the zero-width ones are in UAX #31's tables 3a and 3b or in
XID_Continue, and all are among the special characters of hashtags in X's `twitter-text`, or their half-width form."""

# Where marks are. A test looks at all code points, so a Unicode version with marks elsewhere is noticed.
_PLANES = (range(0x300, 0x20000), range(0xE0000, 0xE1000))
_VARIATION_SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))

_BORDER = "\x01"  # behind a sign, between two texts
_NO_BORDER = "\x02"  # what takes its place in a text: it ends a tag as well, and no URL
_JOINED = 256  # texts at a time, which stay in the processor's cache

# Both begin with a literal, which the scan finds by memchr; what stands before the dot is looked at behind it.
_URL_SCHEME = re.compile(r'://[^\s<>"]*+')
_URL_DOMAIN = re.compile(r'\.(?<=[0-9A-Za-z-]\.)[A-Za-z]{2,24}(?::[0-9]{1,5})?/[^\s<>"]*+')


def find_hashtags(text: str) -> list[str]:
    """The hashtags of a caption without their signs, in order, as typed, repeated ones too.

    Args:
        text: Any text, as a user wrote it. No HTML is unescaped.
    """
    if "#" not in text and "＃" not in text:
        return []
    return [tag for tag in _tags(text.replace(_BORDER, _NO_BORDER)) if tag.isalpha() or _has_letter(tag)]


def find_hashtags_in(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The hashtags of many captions, found in one pass over all of them.

    Args:
        texts: `[N]`

    Returns:
        All hashtags, and offsets `[N + 1]`: those of text i are `hashtags[offsets[i]:offsets[i + 1]]`, and they are
        what `find_hashtags` finds in it.
    """
    hashtags: list[str] = []
    counts = np.zeros(len(texts) + 1, np.int64)
    tagged = [i for i, text in enumerate(texts) if "#" in text or "＃" in text]
    for start in range(0, len(tagged), _JOINED):
        places = tagged[start : start + _JOINED]
        joined = [texts[i].replace(_BORDER, _NO_BORDER) for i in places]
        found = _tags(f"\n#{_BORDER}\n".join(joined))
        kept = [tag for tag in found if tag.isalpha() or tag == _BORDER or _has_letter(tag)]
        borders = [place for place, tag in enumerate(kept) if tag == _BORDER]
        counts[np.array(places) + 1] = np.diff([-1, *borders, len(kept)]) - 1
        hashtags += [tag for tag in kept if tag != _BORDER]
    return hashtags, np.cumsum(counts)


def _tags(text: str) -> list[str]:
    """The words of all tags that count, with or without a letter, and the borders."""
    text = text.replace("＃", "#")
    if "/" in text:
        text = _URL_DOMAIN.sub("", _URL_SCHEME.sub("", text))
    # A match is a run of tags, which spares an object each; no word holds a sign or a space.
    runs = _pattern().findall(text)
    return "#".join(runs).replace(" #", "#").split("#") if runs else []


def _has_letter(word: str) -> bool:
    return any(map(str.isalpha, word))


@functools.cache
def _pattern() -> re.Pattern[str]:
    """Runs of tags that count, the first one's sign left out; made when first needed, for it takes 0.1 s.

    Every repetition is possessive, so nothing is tried twice. Python's `\\w` is letters, numbers and `_`, tested by one
    call; marks of the basic plane are a bitmap beside it. A set of characters beyond that plane is a list that is
    walked, so those marks are asked for only where such a character is.
    """
    marks = [code for plane in _PLANES for code in plane if _is_mark(chr(code))]
    basic = _ranges(code for code in marks if code < 0x10000)
    beyond = _ranges(code for code in marks if code >= 0x10000)
    word = rf"[\w{basic}]"
    name = (
        rf"\w{word}*+(?:(?=[{JOINERS}\U00010000-\U0010ffff])"
        rf"(?:[{beyond}]|[{JOINERS}](?={word}|[{beyond}])){word}*+)*+"
    )
    counts = rf"(?<![\w{basic}&]#)(?:(?<![\U00010000-\U0010ffff]#)|(?<![{beyond}]#))"
    return re.compile(rf"#{counts}({name}(?: ?#{name})*+|{_BORDER})")


def _is_mark(char: str) -> bool:
    if any(ord(char) in selectors for selectors in _VARIATION_SELECTORS):
        return False
    return unicodedata.category(char) in ("Mn", "Mc")


def _ranges(codes: Iterable[int]) -> str:
    """The inside of a regular expression's set of characters; `codes` ascend."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
