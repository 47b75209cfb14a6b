"""Properties that hold for every one of the 116,602 hashtags that are noun lemmas, not for a sample of them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from scale_wsl.hashtags.explain import explain
from scale_wsl.hashtags.normalize import normalize
from scale_wsl.hashtags.rules import Candidates, VocabularyRule
from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.hashtags.wordnet import WordNet


@pytest.fixture(scope="module")
def words(wordnet: WordNet) -> dict[str, frozenset[str]]:
    """WNID -> normal forms of its words, of data.noun by an own reading (wndb(5WN)), not by index.noun or NLTK."""
    found = {}
    for line in (wordnet.corpus / "data.noun").read_text("ascii").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            forms = (normalize(word) for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
            found[f"n{fields[0]}"] = frozenset(form for form in forms if form is not None)
    return found


@pytest.fixture(scope="module")
def candidates(wordnet: WordNet) -> Candidates:
    return VocabularyRule().candidates(wordnet)


@pytest.fixture(scope="module")
def saved(wordnet: WordNet, candidates: Candidates, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary for which every lemma was counted once."""
    path = tmp_path_factory.mktemp("all") / "vocabulary.json"
    Vocabulary.build(([lemma] for lemma in wordnet.hashtags), wordnet)[0].save(path)
    return path


def test_a_key_is_the_set_of_synsets_that_list_the_hashtag(
    candidates: Candidates, words: dict[str, frozenset[str]], wordnet: WordNet
) -> None:
    synsets = defaultdict(set)
    for wnid, forms in words.items():
        for form in forms:
            synsets[form].add(wnid)
    assert synsets.keys() == wordnet.hashtags
    for hashtag, wnids in synsets.items():
        assert candidates.place(hashtag) == (" ".join(sorted(wnids)), "")
        for spelling in wordnet.spellings(hashtag):
            assert normalize(spelling) == normalize(f"#{spelling.upper()}") == hashtag


def test_an_entry_is_found_by_hashtag_and_by_synsets_also_after_loading(
    candidates: Candidates, saved: Path, tmp_path: Path
) -> None:
    loaded = Vocabulary.load(saved)
    assert len(loaded) == 77_217
    assert sum(len(entry.raw) for entry in loaded.entries) == 116_602
    for index, entry in enumerate(loaded.entries):
        assert loaded.index_of_synsets(entry.synsets) == loaded.index_of_key(entry.key) == index
        for hashtag in entry.raw:
            assert candidates.key(hashtag) == entry.key
            assert loaded.index(hashtag) == index
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()


def test_every_hashtag_is_explained(wordnet: WordNet, candidates: Candidates, saved: Path) -> None:
    vocabulary = Vocabulary.load(saved)
    for index, entry in enumerate(vocabulary.entries):
        for hashtag in entry.raw:
            lines = explain(hashtag, wordnet, vocabulary, candidates).splitlines()
            assert lines[-1].startswith(f"vocabulary  #{entry.hashtag}, index {index} of 77217")
            assert lines[-2] == "rule        noun: has a place"
            assert [line.split()[0] for line in lines if line.startswith("  n")] == list(entry.synsets)
