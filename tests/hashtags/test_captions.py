from __future__ import annotations

import re
import sys
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scale_wsl.hashtags import find_hashtags, find_hashtags_in, normalize
from scale_wsl.hashtags.captions import _PLANES, JOINERS, _is_mark

# --- the rules once more, one character at a time ------------------------------------------------------------------


def is_word(char: str) -> bool:
    if 0xFE00 <= ord(char) <= 0xFE0F or 0xE0100 <= ord(char) <= 0xE01EF:
        return False
    return char.isalnum() or char == "_" or unicodedata.category(char) in ("Mn", "Mc")


def is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "M"


def url_places(text: str) -> list[bool]:
    """Whether each character is in a URL, by the place where its URL begins."""
    inside = [False] * len(text)
    for i in range(len(text)):
        if text.startswith("://", i):
            begins = True
        else:
            begins = text[i] == "." and i > 0 and re.match(r"[0-9A-Za-z-]", text[i - 1]) is not None
            begins = begins and re.match(r"\.[A-Za-z]{2,24}(:[0-9]{1,5})?/", text[i:]) is not None
        if begins:
            while i < len(text) and not (text[i].isspace() or text[i] in '<>"'):
                inside[i] = True
                i += 1
    return inside


def reference(text: str) -> list[str]:
    inside = url_places(text)
    found, i = [], 0
    ended = -1  # where the tag before ended
    while i < len(text):
        if text[i] not in "#＃" or inside[i]:
            i += 1
            continue
        counts = i in (0, ended) or not (is_word(text[i - 1]) or text[i - 1] == "&")
        j = i + 1
        if counts and j < len(text) and not inside[j] and is_word(text[j]) and not is_mark(text[j]):
            while j < len(text) and not inside[j]:
                joins = text[j] in JOINERS and j + 1 < len(text) and not inside[j + 1] and is_word(text[j + 1])
                if not is_word(text[j]) and not (joins and is_word(text[j - 1])):
                    break
                j += 1
            ended = j
            if any(char.isalpha() for char in text[i + 1 : j]):
                found.append(text[i + 1 : j])
            i = j
        else:
            i += 1
    return found


_PIECES = st.one_of(
    st.sampled_from(
        [
            *"#＃#a1_&/.:@<> \n\"'-é🐻\u0301\ufe0f\u20e3\x01\x1c\u2028",
            *JOINERS,
            "\u093f",
            "\U00011000",
            "\U0001e8d0",
            "\U000e0101",
            "𝐁",
            "〇",
            "²",
            "http://",
            "https://x.y/",
            "example.com/",
            "example.com:80/",
            "&#39;",
            "#cat",
            "#cat#dog",
            "#1#b",
        ]
    ),
    st.characters(),
)
_TEXTS = st.lists(_PIECES, max_size=14).map("".join)


@settings(max_examples=1500)
@given(_TEXTS)
@example("http://\x01#http://")
def test_it_finds_what_the_rules_say(text: str) -> None:
    assert find_hashtags(text) == reference(text)


@settings(max_examples=300)
@given(st.lists(_TEXTS, max_size=6))
def test_many_texts_at_once_are_each_alone(texts: list[str]) -> None:
    hashtags, offsets = find_hashtags_in(texts)
    assert offsets.tolist()[0] == 0
    assert offsets.tolist()[-1] == len(hashtags)
    found = [hashtags[first:last] for first, last in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]
    assert found == [find_hashtags(text) for text in texts]


# --- what users write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hashtags"),
    [
        ("", []),
        ("no tag", []),
        ("#", []),
        ("# cat", []),
        ("My #BrownBear in the #zoo, #Sunday!", ["BrownBear", "zoo", "Sunday"]),
        ("#cat", ["cat"]),
        ("＃猫 と ＃イヌ", ["猫", "イヌ"]),
        ("(#cat)[#dog]/#fish", ["cat", "dog", "fish"]),
        ("#a#b", ["a", "b"]),
        ("#a＃b", ["a", "b"]),
        ("##cat", ["cat"]),
        ("#2024", []),
        ("#2024#goals", ["goals"]),
        ("#2024goals", ["2024goals"]),
        ("#snake_case #_x", ["snake_case", "_x"]),
        ("#___", []),
        ("#brown-bear", ["brown"]),
        ("#don't", ["don"]),
        ("#love❤️#you", ["love", "you"]),
        ("#dog👩‍💻", ["dog"]),
        ("#️⃣ #1️⃣ #top5️⃣", ["top5"]),
        ("❤️#x", ["x"]),
        ("#cafe\u0301s", ["cafe\u0301s"]),
        ("#\u0301cat", []),
        ("#हिन्दी #தமிழ் #ไทย #العربية #עברית", ["हिन्दी", "தமிழ்", "ไทย", "العربية", "עברית"]),
        ("#می\u200cخواهم", ["می\u200cخواهم"]),
        ("#क्\u200dष #x\u200d", ["क्\u200dष", "x"]),
        ("#col·lecció #·x #x·", ["col·lecció", "x"]),
        ("#スター・ウォーズ", ["スター・ウォーズ"]),
        ("#צה״ל", ["צה״ל"]),
        ("#བོད་སྐད", ["བོད་སྐད"]),
        ("#𝐁𝐨𝐥𝐝 #m²", ["𝐁𝐨𝐥𝐝", "m²"]),
        ("word#tag 1#tag _#tag é#tag", []),
        ("&#39; &#x27;a &amp;#cat", ["cat"]),
        ("https://x.y/#frag #cat", ["cat"]),
        ("see https://x.y/a#b=#c,#d #cat", ["cat"]),
        ("HTTP://X.Y/#frag ftp://x/#y (https://x.y/#z)", []),
        ('<a href="https://x.y/#frag">#cat</a>', ["cat"]),
        ("www.x.com/#frag x.co.uk/?#frag x.com:8080/#frag #cat", ["cat"]),
        ("example.com/page#part example.com#part", []),
        ("me@example.com#x #cat", ["cat"]),
        ("dogs.#cat ./#cat 3./#cat", ["cat", "cat", "cat"]),
        ("#one\n#two\t#three\u3000#four", ["one", "two", "three", "four"]),
        ("#cat\x01#dog #\x01", ["cat", "dog"]),
        ("#\ud800 #a\ud800", ["a"]),
    ],
)
def test_captions(text: str, hashtags: list[str]) -> None:
    assert find_hashtags(text) == hashtags
    assert reference(text) == hashtags


def test_no_text_at_all() -> None:
    hashtags, offsets = find_hashtags_in([])
    assert (hashtags, offsets.tolist()) == ([], [0])
    hashtags, offsets = find_hashtags_in(["", "x", ""])
    assert (hashtags, offsets.tolist()) == ([], [0, 0, 0, 0])


def test_every_mark_and_every_word_character_of_this_unicode_version_is_known() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if _is_mark(char):
            assert any(code in plane for plane in _PLANES), hex(code)
        assert (re.fullmatch(r"\w", char) is not None) == (char.isalnum() or char == "_"), hex(code)
    text = " ".join(f"#a{chr(code)}b" for code in range(0x21, 0x30000) if is_word(chr(code)))
    assert find_hashtags(text) == text.replace("#", "").split(" ")


@settings(max_examples=300)
@given(_TEXTS)
def test_what_is_found_is_found_again_and_never_raises_later(text: str) -> None:
    for hashtag in find_hashtags(text):
        assert find_hashtags("#" + hashtag) == [hashtag]
        normalize(hashtag)


@pytest.mark.parametrize(
    "unit",
    [
        "#",
        "&#",
        "#a",
        "#1",
        "#a ",
        "a#",
        "\u0301",
        "#a\u0301",
        "#a\u00b7",
        "#\U00011000",
        "\U00011000#",
        "http://",
        "/#",
        "a.bc/",
        "a.",
        "x.y:1",
        "\x01",
        "a",
    ],
)
def test_hostile_text_takes_linear_time(unit: str) -> None:
    """Ten times as long takes about ten times as long: a quadratic rule would take a hundred times, and hours at 10 MB.

    A ratio of CPU times in one process, never a time: long texts, for a clock's grain; the smallest of some trials, for
    a busy machine. The bound is far from both, 10 and 100.
    """

    def seconds(length: int) -> float:
        text = "#a" + unit * (length // len(unit))
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            find_hashtags(text)
            best = min(best, time.process_time() - start)
        return best

    find_hashtags("#warm")
    assert seconds(1_000_000) < 40 * max(seconds(100_000), 0.001)
