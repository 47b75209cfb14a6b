from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.labels import label_ids
from scale_wsl.hashtags import Vocabulary, VocabularyRule, WordNet

POSTS: list[Collection[str]] = [("brownbear", "cat"), ("ursusarctos", "brownbear"), ("cat",), ("dog", "cats")]
WORDNET = WordNet.load()
VOCABULARY, _ = Vocabulary.build(POSTS, WORDNET)


def test_spellings_of_one_canonical_hashtag_are_one_label() -> None:
    bear = VOCABULARY.index("brownbear")
    assert label_ids(["brownbear", "ursusarctos"], VOCABULARY, WORDNET).tolist() == [bear]


def test_what_has_no_place_gives_no_label() -> None:
    found = label_ids(["zzz", "table"], VOCABULARY, WORDNET)
    assert found.dtype == np.int32
    assert found.shape == (0,)


@given(st.lists(st.sampled_from(["brownbear", "ursusarctos", "cat", "cats", "dog", "zzz", ""])))
def test_labels_are_ascending_distinct_and_do_not_depend_on_the_order(hashtags: list[str]) -> None:
    found = label_ids(hashtags, VOCABULARY, WORDNET)
    assert (np.diff(found) > 0).all()
    assert set(found.tolist()) == {VOCABULARY.index(tag) for tag in hashtags} - {None}
    assert np.array_equal(found, label_ids(reversed(hashtags), VOCABULARY, WORDNET))


@pytest.mark.parametrize("training", ["world", "worlds"])
def test_labels_do_not_depend_on_the_spellings_that_training_had(training: str) -> None:
    """The oracle is NLTK's own lookup: the entry whose set of senses is that of the word, unless it is stopped."""
    vocabulary, _ = Vocabulary.build([(training, "goose", "table", "auto")], WORDNET, VocabularyRule(stop=("tables",)))
    entries = [set(entry.synsets) for entry in vocabulary.entries]
    labelled = 0
    for word in ("world", "worlds", "goose", "geese", "automobile", "table", "tables", "cat", "zzz"):
        senses = {f"n{synset.offset():08d}" for synset in WORDNET.reader.synsets(word, pos="n")}
        expected = [i for i, entry in enumerate(entries) if entry == senses and word != "tables"]
        assert label_ids([word], vocabulary, WORDNET).tolist() == expected, word
        labelled += len(expected)
    assert labelled == 6
