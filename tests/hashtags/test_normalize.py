from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.hashtags.normalize import MAX_LENGTH, _examine_any, examine, normalize, normalize_all

# Text of every kind that a tag can hold, with the awkward characters often enough to meet each other.
AWKWARD = "#＃_-. '’ʼ·/\u0301\u0345\u200d\ufe0f\u20e3İßΣςﬁ①½カ\u3099❤🏽1aAé:@!&+\n\x00\ud800\ue000\u3164"
TEXT = st.text(st.one_of(st.characters(), st.sampled_from(AWKWARD)), max_size=30)
PLAIN = st.text("#aZ09 _-.'/w", max_size=12)


@pytest.mark.parametrize(
    ("text", "hashtag"),
    [
        ("#BrownBear", "brownbear"),
        ("brown bear", "brownbear"),
        ("  ##brown_bear ", "brownbear"),
        ("＃ＢＲＯＷＮ－ＢＥＡＲ", "brownbear"),
        ("brown\u200bbe\u00adar", "brownbear"),  # zero-width space, soft hyphen
        ("Jew's-ear", "jewsear"),
        ("Jew’s ear", "jewsear"),
        ("b.t.u.", "btu"),
        ("24/7 shop", "247shop"),
        ("“brown bear!”", "brownbear"),
        (":smile:", "smile"),
        ("#love❤️", "love"),
        ("#❤️love👍🏽", "love"),
        ("Straße", "strasse"),
        ("CAFÉ", "café"),
        ("cafe\u0301", "café"),
        ("日本語", "日本語"),
        ("हिन्दी", "हिन्दी"),
        ("ｶﾞﾝﾀﾞﾑ", "ガンダム"),
        ("rock´n roll", "rocknroll"),  # a spacing accent is NFKC-decomposed into space + accent: both go
        ("x" * MAX_LENGTH, "x" * MAX_LENGTH),
    ],
)
def test_normal_form(text: str, hashtag: str) -> None:
    assert examine(text) == (hashtag, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("#", "empty"),
        (" ❤️ ", "empty"),
        ("!!!", "empty"),
        ("2018", "no letter"),
        ("24/7", "no letter"),
        ("1️⃣", "no letter"),
        ("x" * (MAX_LENGTH + 1), "too long"),
        ("\ufdfa" * MAX_LENGTH, "too long"),  # one character, eighteen after NFKC
        ("a b " * 10_000, "too long"),
        ("brown\nbear", "control characters"),
        ("bear\x00", "control characters"),
        ("\x1b[31mbear", "control characters"),
        ("bear\ud800", "control characters"),
        ("bear\ue000", "control characters"),
        ("https://example.org/bear", "address"),
        ("www.bear.org", "address"),
        ("#www.bear.org", "address"),
        ("someone@example.org", "address"),
        ("＠someone", "address"),
        ("r&b", "symbols"),
        ("c++", "symbols"),
        ("c#", "symbols"),
        ("cat#dog", "symbols"),
        ("red, green", "symbols"),
        ("<b>bear", "symbols"),
    ],
)
def test_what_is_not_a_hashtag_is_refused_with_its_reason(text: str, reason: str) -> None:
    assert examine(text) == (None, reason)
    assert normalize(text) is None


def test_a_list_keeps_its_order_and_counts_what_it_drops() -> None:
    kept, dropped = normalize_all(["Zebra", "#brown bear", "BrownBear", "2018", "c++", "c#", "ant"])
    assert kept == ("zebra", "brownbear", "ant")
    assert dropped == {"repeated": 1, "no letter": 1, "symbols": 2}


def _check(text: str) -> None:
    hashtag, reason = examine(text)
    assert (hashtag is None) == bool(reason)
    if hashtag is None:
        return
    assert normalize(hashtag) == hashtag
    assert normalize("#" + hashtag) == hashtag
    assert unicodedata.normalize("NFKC", hashtag) == hashtag
    assert unicodedata.normalize("NFKC", hashtag.casefold()) == hashtag
    assert 0 < len(hashtag) <= MAX_LENGTH
    kinds = [unicodedata.category(char) for char in hashtag]
    assert set(kinds) <= {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd", "Nl"}
    assert any(kind[0] == "L" for kind in kinds)
    assert kinds[0][0] != "M"


@settings(deadline=None, max_examples=1500)
@given(TEXT)
def test_any_text_gives_a_stable_normal_form_or_none(text: str) -> None:
    _check(text)


def test_every_character_of_the_first_two_planes_alone_and_after_a_letter() -> None:
    for code in range(0x20000):
        _check(chr(code))
        _check("a" + chr(code))


@settings(deadline=None, max_examples=1000)
@given(st.one_of(PLAIN, TEXT))
def test_the_short_cut_for_plain_tags_changes_nothing(text: str) -> None:
    assert examine(text) == _examine_any(text)


@settings(deadline=None)
@given(st.lists(TEXT))
def test_every_tag_of_a_list_is_kept_or_counted(tags: list[str]) -> None:
    kept, dropped = normalize_all(tags)
    assert len(kept) + dropped.total() == len(tags)
    assert len(set(kept)) == len(kept)
    assert set(kept) == {normalize(tag) for tag in tags} - {None}
