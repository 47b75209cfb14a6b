from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from scale_wsl.errors import UserError
from scale_wsl.hashtags.counts import HashtagCounts
from scale_wsl.hashtags.report import DROP_REASONS, Coverage, VocabularyReport, report_path
from scale_wsl.hashtags.rules import VocabularyRule
from scale_wsl.hashtags.tally import Tally
from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.hashtags.wordnet import WordNet

POSTS = [
    ("brownbear", "cat"),
    ("ursusarctos", "dog"),
    ("cat", "selfie", "tench"),
    ("cat",),
    ("dog", "foobar"),
    ("selfie",),
    ("tench", "me"),
    (),
]


@pytest.fixture(scope="module")
def made(wordnet: WordNet) -> tuple[Vocabulary, VocabularyReport]:
    return Vocabulary.build(POSTS, wordnet, VocabularyRule(stop=("me",)), min_count=2, size=3)


def test_what_became_of_everything(made: tuple[Vocabulary, VocabularyReport]) -> None:
    vocabulary, report = made
    assert [entry.hashtag for entry in vocabulary.entries] == ["cat", "brownbear", "dog"]
    assert report.coverage == Coverage(posts=8, known=6, covered_least=4, covered_most=6, pairs=9, kept_pairs=7)
    assert (report.hashtags, report.labels, report.entries) == (5, 4, 3)
    assert report.dropped == {
        "stop list": {"me": 1},
        "no noun synset": {"selfie": 2, "foobar": 1},
        "outside the rule": {},
        "below min_count": {},
        "cut by size": {"tench": 2},
    }
    assert report.dropped_pairs == dict(zip(DROP_REASONS, (1, 3, 0, 0, 2), strict=True))
    assert not any(report.dropped_error.values())
    assert report.merged == {"brownbear": {"brownbear": 1, "ursusarctos": 1}}
    assert report.summary().splitlines()[:3] == [
        "8 posts, 6 of them (75.0 %) with a hashtag that has a place; 4 to 6 (50.0 % to 75.0 %) keep a label after the "
        "cuts",
        "9 pairs of a post and a label, 7 of them (77.8 %) after the cuts",
        "5 hashtags with a place merge into 4 labels, 3 of them kept",
    ]


def test_a_second_look_at_the_posts_settles_the_range(made: tuple[Vocabulary, VocabularyReport]) -> None:
    coverage = made[1].coverage
    exact = coverage.counted(5)
    assert "5 (62.5 %) keep a label" in exact.lines()[0]
    for other in (3, 7):
        with pytest.raises(UserError, match="the posts have changed"):
            coverage.counted(other)
    assert "none" in Coverage(0, 0, 0, 0, 0, 0).lines()[0]


def test_a_tally_that_forgot_says_so(wordnet: WordNet) -> None:
    rule = VocabularyRule()
    counts = HashtagCounts.of_posts(POSTS, rule.candidates(wordnet))
    tally = Tally(4)
    for word in ("selfie", "selfie", "a", "b", "c", "d", "selfie"):
        tally.add(word)
    counts.without_place["no noun synset"] = tally
    report = Vocabulary.of_counts(counts, rule, min_count=1, wordnet=wordnet)[1]
    assert report.dropped_pairs["no noun synset"] == 7
    assert report.dropped_error["no noun synset"] == tally.error > 0
    assert "dropped, no noun synset: more than 1 hashtags (selfie)" in report.summary()


def test_the_file_beside_the_vocabulary(made: tuple[Vocabulary, VocabularyReport], tmp_path: Path) -> None:
    vocabulary, report = made
    path = report_path(tmp_path / "vocab.json")
    assert path == tmp_path / "vocab.report.json"
    report.save(path, vocabulary.hash)
    parsed = json.loads(path.read_bytes())
    assert parsed["vocabulary"] == vocabulary.hash
    assert parsed["coverage"] == dataclasses.asdict(report.coverage)
    assert parsed["dropped"]["no noun synset"] == {
        "hashtags": 2,
        "pairs": 3,
        "error": 0,
        "most_frequent": {"selfie": 2, "foobar": 1},
    }
    assert VocabularyReport.load_coverage(path, vocabulary.hash) == report.coverage
    before = path.read_bytes()
    report.save(path, vocabulary.hash)
    assert path.read_bytes() == before


def test_no_more_than_a_thousand_dropped_hashtags_are_named(wordnet: WordNet) -> None:
    posts = [[f"x{i}x" for i in range(3000)]]
    report = Vocabulary.build([*posts, ["cat"]], wordnet)[1]
    dropped = report.as_json()["dropped"]["no noun synset"]
    assert (dropped["hashtags"], dropped["pairs"], len(dropped["most_frequent"])) == (3000, 3000, 1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="x"), "no report"),
        (lambda r: r.update(version=2), "no report"),
        (lambda r: r.update(vocabulary="0"), "another vocabulary"),
        (lambda r: r.update(coverage=None), "coverage"),
        (lambda r: r["coverage"].update(posts=True), "coverage"),
        (lambda r: r["coverage"].update(posts=-1), "coverage"),
        (lambda r: r["coverage"].update(more=1), "coverage"),
        (lambda r: r["coverage"].pop("known"), "coverage"),
    ],
)
def test_a_report_that_is_none_is_refused(
    made: tuple[Vocabulary, VocabularyReport], tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "r.json"
    made[1].save(path, "abc")
    parsed = json.loads(path.read_bytes())
    change(parsed)
    path.write_text(json.dumps(parsed))
    with pytest.raises(UserError, match=message):
        VocabularyReport.load_coverage(path, "abc")
    for content in (b"", b"[]", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no report"):
            VocabularyReport.load_coverage(path, "abc")
    with pytest.raises(UserError, match="cannot read"):
        VocabularyReport.load_coverage(tmp_path / "gone", "abc")
