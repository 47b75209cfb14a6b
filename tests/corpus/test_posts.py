from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.posts import MAX_KEY, Post, key_of, split_hashtags


@given(st.text(min_size=0, max_size=200))
def test_any_text_gives_a_key(text: str) -> None:
    key = key_of(text)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", key)
    assert len(key) <= MAX_KEY
    assert key_of(key) == key
    Post(key, Path("x"), ())


def test_texts_that_look_alike_as_keys_stay_apart() -> None:
    assert len({key_of(text) for text in ("a/b", "a b", "a.b", "a_b", "a/b/", "x" * 90, "x" * 91)}) == 7


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "ä", "x" * 81, "../x", "a\n"])
def test_a_post_refuses_what_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        Post(key, Path("x"), ())


def test_hashtags_of_a_text() -> None:
    assert split_hashtags(" #brown_bear,cat;\n#＃dog\tfish ,, # ") == ("#brown_bear", "cat", "#＃dog", "fish")


@given(st.text(max_size=100))
def test_no_hashtag_holds_a_separator(text: str) -> None:
    assert all(tag and not re.search(r"[\s,;]", tag) for tag in split_hashtags(text))
