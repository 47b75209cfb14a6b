"""The batched kernel against the plain way, post by post."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.corpus import kernel as kernel_module
from scale_wsl.corpus.kernel import HashtagCounter, HashtagKernel, label, place_by_label
from scale_wsl.corpus.labels import label_ids
from scale_wsl.hashtags import HashtagCounts, Vocabulary, VocabularyRule, WordNet, normalize_all

RULE = VocabularyRule("noun", stop=("horse",))
CANDIDATES = RULE.candidates(WordNet.load())
KNOWN = ["cat", "#Cat", "CATS", "brown bear", "brown_bear", "ursus_arctos", "#BrownBears", "geese", "crane", "horse"]
ODD = [
    "été",
    "＃東京",
    "c++",
    "",
    "#",
    "123",
    "www.cat",
    "a" * 101,
    "a" * 100,
    "a b",
    "zzzq",
    "x\ny",
    "e\u0301te\u0301",
    "boxesful",
]
TAGS = st.one_of(
    st.sampled_from(KNOWN + ODD), st.text(max_size=12), st.from_regex(r"#{0,2}[A-Za-z0-9_ .'/-]{0,8}", fullmatch=True)
)
POSTS = st.lists(st.lists(TAGS, max_size=6), max_size=12)


def array(posts: Sequence[Sequence[str] | None]) -> pa.Array:
    clean = [None if tags is None else [tag.encode("utf-8", "replace").decode() for tag in tags] for tags in posts]
    return pa.array(clean, pa.list_(pa.string()))


def reference(posts: Sequence[Sequence[str] | None]) -> HashtagCounts:
    counts = HashtagCounts()
    for tags in array(posts).to_pylist():
        hashtags, dropped = normalize_all(tags or ())
        counts.add(hashtags, CANDIDATES, dropped)
    return counts


def counted(batches: Sequence[Sequence[Sequence[str] | None]]) -> HashtagCounts:
    kernel = HashtagKernel(CANDIDATES.place)
    counter = HashtagCounter(kernel)
    for posts in batches:
        counter.add(kernel.read(array(posts)))
    return counter.counts()


@settings(max_examples=300, deadline=None)
@given(st.lists(POSTS, max_size=4))
def test_counts_are_those_of_the_plain_way(batches: list[list[list[str]]]) -> None:
    assert counted(batches) == reference([tags for posts in batches for tags in posts])


@settings(max_examples=100, deadline=None)
@given(POSTS, POSTS)
def test_parts_add_up(first: list[list[str]], second: list[list[str]]) -> None:
    parts = counted([first])
    parts.merge(counted([second]))
    assert parts == reference(first + second)


@settings(max_examples=200, deadline=None)
@given(POSTS)
def test_labels_are_those_of_the_plain_way(posts: list[list[str]]) -> None:
    vocabulary, _ = Vocabulary.build([("cat", "brownbear"), ("cat",), ("crane", "goose")], WordNet.load(), RULE)
    kernel = HashtagKernel(place_by_label(vocabulary, WordNet.load()))
    tagged = kernel.read(array(posts))
    expected = [
        label_ids(normalize_all(tags)[0], vocabulary, WordNet.load()).tolist() for tags in array(posts).to_pylist()
    ]
    assert label(tagged, kernel).to_pylist() == expected
    assert label(tagged, kernel).type == pa.list_(pa.int32())


def test_every_lemma_in_every_spelling() -> None:
    lemmas = sorted(WordNet.load().hashtags)
    posts = [[lemma, f"#{lemma.title()}", f"{lemma}s", f"_{lemma}"] for lemma in lemmas[::7]]
    assert counted([posts[:5000], posts[5000:]]) == reference(posts)


def test_nothing_and_null() -> None:
    assert counted([]) == HashtagCounts()
    assert counted([[]]) == HashtagCounts()
    posts: list[list[str] | None] = [None, [], ["cat"], None]
    assert counted([posts]) == reference(posts)
    sliced = array([["dog"], ["cat", "dog"], None, ["bird"]]).slice(1, 2)
    assert HashtagKernel(CANDIDATES.place).read(sliced).post.tolist() == [0, 0]
    with_null = pa.array([["cat", None, "dog"]], pa.list_(pa.string()))
    kernel = HashtagKernel(CANDIDATES.place)
    assert [kernel.hashtags[i] for i in kernel.read(with_null).number] == ["cat", "dog"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "_REMEMBERED", 50)
    posts = [[f"zz{i}q", f"zz{i}é", f"zz{i}+", "cat"] for i in range(300)]
    kernel = HashtagKernel(CANDIDATES.place)
    counter = HashtagCounter(kernel)
    for start in range(0, 300, 20):
        counter.add(kernel.read(array(posts[start : start + 20])))
        assert max(len(kernel._idle), len(kernel._odd)) <= 50
    assert counter.counts() == reference(posts)


def test_posts_with_a_place_are_told() -> None:
    kernel = HashtagKernel(CANDIDATES.place)
    known = HashtagCounter(kernel).add(kernel.read(array([["cat"], ["zzzq"], [], ["horse"], ["zzzq", "dogs"]])))
    assert known.tolist() == [True, False, False, False, True]
    assert known.dtype == np.bool_
