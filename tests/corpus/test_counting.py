from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from scale_wsl.corpus.counting import count_covered, count_posts
from scale_wsl.corpus.posts import Source
from scale_wsl.corpus.sources import open_source
from scale_wsl.hashtags import Vocabulary, VocabularyRule, WordNet, normalize_all

TAGS = [["#Cat", "cat", "dog"], ["brown bear", "c++", "selfie"], ["ursus_arctos"], ["2018"], [], ["tench", "goldfish"]]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    rows = [json.dumps({"image": f"{i}.png", "hashtags": tags}) for i, tags in enumerate(TAGS)]
    (tmp_path / "posts.jsonl").write_text("\n".join(rows))
    return open_source(str(tmp_path / "posts.jsonl"))


@pytest.mark.parametrize("spec", ["noun", "in1k"])
def test_posts_are_counted_without_their_images(source: Source, spec: str) -> None:
    rule, wordnet = VocabularyRule(spec, stop=("dog",)), WordNet.load()
    counts = count_posts(source, rule)  # none of the image files is there
    posts = [normalize_all(tags)[0] for tags in TAGS]
    assert counts.posts == 6
    assert counts.dropped_tags == {"repeated": 1, "symbols": 1, "no letter": 1}
    classes = {"brownbear", "ursusarctos", "tench", "goldfish"}
    assert counts.raw.keys() == (classes | {"cat"} if spec == "noun" else classes)
    assert counts.without_place["stop list"].ranked() == {"dog": 1}
    vocabulary, report = Vocabulary.of_counts(counts, rule, min_count=1)
    assert vocabulary == Vocabulary.build(posts, wordnet, rule)[0]
    assert count_covered(source, vocabulary) == counts.known == report.coverage.covered_least
    assert counts.canonical["n02132136"] == 2


def test_posts_that_keep_a_label_are_counted(source: Source) -> None:
    vocabulary, report = Vocabulary.of_counts(count_posts(source, rule := VocabularyRule()), rule, min_count=2)
    assert [entry.hashtag for entry in vocabulary.entries] == ["brownbear"]
    assert report.coverage.counted(count_covered(source, vocabulary)).covered_most == 2
    assert Counter(report.dropped_tags) == {"repeated": 1, "symbols": 1, "no letter": 1}
