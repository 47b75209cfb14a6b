from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.hashtags.explain import explain
from scale_wsl.hashtags.rules import VocabularyRule
from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.hashtags.wordnet import WordNet

POSTS = [("brownbear", "ursusarctos"), ("brownbear",), ("cat",), ("cat",), ("bear",), ("dog",), ("brownbear",)]


@pytest.fixture(scope="module")
def vocabulary(wordnet: WordNet) -> Vocabulary:
    return Vocabulary.build(POSTS, wordnet, VocabularyRule(stop=("dog",)), min_count=2)[0]


def test_a_hashtag_with_a_place(wordnet: WordNet, vocabulary: Vocabulary) -> None:
    assert vocabulary.explain("#Brown_Bear", wordnet) == (
        "'#Brown_Bear' -> brownbear\n"
        "WordNet     a lemma, written brown bear; one sense\n"
        "  n02132136 brown bear, bruin, Ursus arctos  (a kind of bear)\n"
        "merges with ursusarctos (exactly the same senses)\n"
        "rule        noun: has a place\n"
        "vocabulary  #brownbear, index 0 of 2, on 3 images; merged there: brownbear, ursusarctos"
    )


def test_by_wordnet_alone(wordnet: WordNet) -> None:
    text = explain("geese", wordnet)
    assert "an irregular form of goose; ambiguous: 3 senses, and it stands for all of them" in text
    assert "n01855672 goose  (a kind of anseriform bird)" in text
    assert "merges with goose" in text
    assert "vocabulary" not in text
    assert "an irregular form of ax and axis" in explain("axes", wordnet)
    assert "an inflected form of brownbear" in explain("#brown bears", wordnet)
    assert "a lemma, written ice cream, icecream" in explain("ice cream", wordnet)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dog", "no place: it is on the stop list"),
        ("dogs", "no place: it is on fewer than 2 images (min_count)"),
        ("selfie", "no place: no noun synset"),
        ("bear", "no place: it is on fewer than 2 images (min_count)"),
        ("zebra", "no place: it is on fewer than 2 images (min_count)"),
        ("cats", "no place: no image had it in this spelling; the same senses are #cat, index 1"),
    ],
)
def test_a_hashtag_without_a_place(wordnet: WordNet, vocabulary: Vocabulary, text: str, reason: str) -> None:
    assert explain(text, wordnet, vocabulary).splitlines()[-1] == f"vocabulary  {reason}"


def test_without_a_place_in_other_vocabularies(wordnet: WordNet) -> None:
    cut = Vocabulary.build(POSTS, wordnet, size=1)[0]
    last = explain("dog", wordnet, cut).splitlines()[-1]
    assert last == "vocabulary  no place: it ranks below the last of the 1 hashtags kept, #brownbear on 3 images"
    everything = Vocabulary.build(POSTS, wordnet, size=50)[0]
    assert explain("zebra", wordnet, everything).endswith("no place: no image has it")


def test_what_is_no_hashtag(wordnet: WordNet) -> None:
    assert explain("c++", wordnet) == "'c++' is not a hashtag: symbols"
    assert explain("\x1b[31mbear", wordnet) == r"'\x1b[31mbear' is not a hashtag: control characters"
    assert "no noun: neither a lemma nor a form of one" in explain("selfie", wordnet)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_explained_and_sends_nothing_to_the_terminal(
    wordnet: WordNet, vocabulary: Vocabulary, text: str
) -> None:
    assert explain(text, wordnet, vocabulary).replace("\n", "").isprintable()
