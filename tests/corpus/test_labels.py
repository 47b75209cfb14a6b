from __future__ import annotations

from collections.abc import Collection

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.labels import label_ids
from scale_wsl.hashtags import Vocabulary, WordNet

POSTS: list[Collection[str]] = [("brownbear", "cat"), ("ursusarctos", "brownbear"), ("cat",), ("dog", "cats")]
VOCABULARY, _ = Vocabulary.build(POSTS, WordNet.load())


def test_spellings_of_one_canonical_hashtag_are_one_label() -> None:
    bear = VOCABULARY.index("brownbear")
    assert label_ids(["brownbear", "ursusarctos"], VOCABULARY).tolist() == [bear]


def test_what_has_no_place_gives_no_label() -> None:
    found = label_ids(["zzz", "table"], VOCABULARY)
    assert found.dtype == np.int32
    assert found.shape == (0,)


@given(st.lists(st.sampled_from(["brownbear", "ursusarctos", "cat", "cats", "dog", "zzz", ""])))
def test_labels_are_ascending_distinct_and_do_not_depend_on_the_order(hashtags: list[str]) -> None:
    found = label_ids(hashtags, VOCABULARY)
    assert (np.diff(found) > 0).all()
    assert set(found.tolist()) == {VOCABULARY.index(tag) for tag in hashtags} - {None}
    assert np.array_equal(found, label_ids(reversed(hashtags), VOCABULARY))
