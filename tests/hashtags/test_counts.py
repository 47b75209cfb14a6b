from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.hashtags.counts import HashtagCounts
from scale_wsl.hashtags.rules import Candidates, VocabularyRule
from scale_wsl.hashtags.tally import Tally
from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.hashtags.wordnet import WordNet

HASHTAGS = [
    "brownbear",
    "ursusarctos",
    "bear",
    "bears",
    "cats",
    "cat",
    "tench",
    "crane",
    "axes",
    "selfie",
    "foobar",
    "me",
]
posts_of = st.lists(st.lists(st.sampled_from(HASHTAGS), max_size=5), max_size=25)
given_posts = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[VocabularyRule(stop=("me",)), VocabularyRule("in1k", stop=("cats",))])
def candidates(wordnet: WordNet, request: pytest.FixtureRequest) -> Candidates:
    rule: VocabularyRule = request.param
    return rule.candidates(wordnet)


@given_posts
@given(posts=posts_of)
def test_counts_are_those_of_the_plain_definition(candidates: Candidates, posts: list[list[str]]) -> None:
    counts = HashtagCounts.of_posts(posts, candidates)
    with_place = [{tag for tag in post if candidates.key(tag)} for post in posts]
    assert counts.posts == len(posts)
    assert counts.known == sum(map(bool, with_place))
    assert counts.raw == Counter(tag for post in with_place for tag in post)
    assert counts.canonical == Counter(key for post in with_place for key in {candidates.key(tag) for tag in post})
    placeless = Counter((candidates.reason(tag), tag) for post in posts for tag in set(post) if not candidates.key(tag))
    assert placeless == {(r, tag): tally.count(tag) for r, tally in counts.without_place.items() for tag in tally}
    assert all(tally.error == 0 for tally in counts.without_place.values())


@given_posts
@given(posts=posts_of, data=st.data())
def test_any_dealing_of_the_posts_gives_the_same_counts_and_bytes(
    candidates: Candidates, tmp_path: Path, posts: list[list[str]], data: st.DataObject
) -> None:
    whole = HashtagCounts.of_posts(posts, candidates)
    parts: list[list[list[str]]] = [[] for _ in range(4)]
    for post in data.draw(st.permutations(posts)):
        parts[data.draw(st.integers(0, 3))].append(post)
    counted = [HashtagCounts.of_posts(part, candidates) for part in parts]
    merged, right = HashtagCounts(), HashtagCounts()
    right.merge(counted[2])
    right.merge(counted[3])
    for other in data.draw(st.permutations([counted[0], counted[1], right])):
        merged.merge(other)
    assert merged == whole
    merged.save(tmp_path / "merged")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    assert HashtagCounts.load(tmp_path / "merged") == whole


@given_posts
@given(posts=posts_of, min_count=st.integers(1, 3), size=st.none() | st.integers(1, 4))
def test_a_vocabulary_of_counts_is_that_of_the_posts(
    candidates: Candidates, tmp_path: Path, posts: list[list[str]], min_count: int, size: int | None
) -> None:
    HashtagCounts.of_posts(posts, candidates).save(tmp_path / "counts")
    counts = HashtagCounts.load(tmp_path / "counts")
    rule, wordnet = candidates.rule, candidates.wordnet
    made = Vocabulary.of_counts(counts, rule, min_count=min_count, size=size, wordnet=wordnet)
    assert made == Vocabulary.build(posts, wordnet, rule, min_count=min_count, size=size)
    covered = sum(any(made[0].label(tag, wordnet) is not None for tag in post) for post in posts)
    coverage = made[1].coverage
    assert coverage.covered_least <= covered <= coverage.covered_most <= coverage.known
    if len(made[0]) == made[1].labels:
        assert coverage.covered_least == covered == coverage.covered_most == coverage.known


def test_a_merged_copy_does_not_go_on_counting(candidates: Candidates) -> None:
    first, second = HashtagCounts(), HashtagCounts.of_posts([["selfie"]], candidates)
    first.merge(second)
    second.merge(HashtagCounts.of_posts([["selfie"]], candidates))
    assert first.without_place["no noun synset"].count("selfie") == 1
    assert second.without_place["no noun synset"].count("selfie") == 2


def test_counts_of_another_rule_are_refused(wordnet: WordNet) -> None:
    noun, in1k = VocabularyRule(), VocabularyRule("in1k")
    posts = [["brownbear", "cat"]]
    for made, asked in ((noun, in1k), (noun, VocabularyRule(stop=("cat",)))):
        counts = HashtagCounts.of_posts(posts, made.candidates(wordnet))
        with pytest.raises(UserError, match="not made under the rule"):
            Vocabulary.of_counts(counts, asked, min_count=1, wordnet=wordnet)
    counts = HashtagCounts.of_posts(posts, noun.candidates(wordnet))
    del counts.raw["cat"]
    with pytest.raises(UserError, match="not made under the rule"):
        Vocabulary.of_counts(counts, noun, min_count=1, wordnet=wordnet)


# --- the file --------------------------------------------------------------------------------------------------------

HEAD = {
    "format": "scale_wsl hashtag counts",
    "version": 1,
    "posts": 9,
    "known": 5,
    "tallies": {"no noun synset": [10, 7, 2]},
}
ROWS = [
    ("canonical", "n02132136", 4, 0),
    ("dropped tags", "symbols", 8, 0),
    ("no noun synset", "selfie", 3, 1),
    ("raw", "brownbear", 4, 0),
]


KINDS = ("string", "string", "int64", "int64")


def write(path: Path, head: Any, rows: list[tuple[Any, ...]], kinds: tuple[str, ...] = KINDS) -> None:
    columns = list(zip(*rows, strict=True)) or [()] * 4
    arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    table = pyarrow.table(arrays, names=["part", "name", "count", "missed"])
    content = head if isinstance(head, bytes) else json.dumps(head).encode()
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"scale_wsl": content}), path)


def test_a_file_as_it_should_be(tmp_path: Path) -> None:
    write(tmp_path / "counts", HEAD, ROWS)
    counts = HashtagCounts.load(tmp_path / "counts")
    tally = Tally.restored(10, 7, 2, {"selfie": 3}, {"selfie": 1})
    expected = HashtagCounts(
        9, 5, Counter(brownbear=4), Counter(n02132136=4), Counter(symbols=8), {"no noun synset": tally}
    )
    assert counts == expected


@pytest.mark.parametrize(
    "head",
    [
        b"{",
        b"\xff",
        b"[" * 100_000,
        None,
        [],
        HEAD | {"format": "x"},
        HEAD | {"version": 2},
        HEAD | {"version": True},
        HEAD | {"posts": 4},
        HEAD | {"posts": "9"},
        HEAD | {"known": -1},
        HEAD | {"known": 3},
        HEAD | {"known": 0},
        HEAD | {"tallies": []},
        HEAD | {"tallies": {}},
        HEAD | {"tallies": {"other": [10, 0, 0]}},
        HEAD | {"tallies": {"no noun synset": [10, 7]}},
        HEAD | {"tallies": {"no noun synset": [10, 7, True]}},
        HEAD | {"tallies": {"no noun synset": [0, 7, 2]}},
        HEAD | {"tallies": {"no noun synset": [10, 2, 2]}},
        HEAD | {"tallies": {"no noun synset": [10, 7, 0]}},
    ],
)
def test_a_head_that_is_none_is_refused(tmp_path: Path, head: Any) -> None:
    write(tmp_path / "counts", head, ROWS)
    with pytest.raises(UserError, match="holds no hashtag counts, or is damaged") as refused:
        HashtagCounts.load(tmp_path / "counts")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "row",
    [
        ("raw", "brownbear", 4, 0),  # twice
        ("raw", "Brown Bear", 1, 0),
        ("raw", "c++", 1, 0),
        ("raw", None, 1, 0),
        ("raw", "cat", None, 0),
        ("raw", "cat", 0, 0),
        ("raw", "cat", -1, 0),
        ("raw", "cat", 1, 1),
        ("raw", "cat", 6, 0),  # of 5 posts
        ("canonical", "n1", 6, 0),
        ("cooked", "cat", 1, 0),
        (None, "cat", 1, 0),
        ("stop list", "cat", 1, 0),  # of which the head says nothing
        ("no noun synset", "cat", 5, 0),
        ("no noun synset", "cat", 1, 9),
    ],
)
def test_a_row_that_is_none_is_refused(tmp_path: Path, row: tuple[Any, ...]) -> None:
    write(tmp_path / "counts", HEAD, [*ROWS, row])
    with pytest.raises(UserError, match="holds no hashtag counts, or is damaged"):
        HashtagCounts.load(tmp_path / "counts")


def test_files_that_hold_no_counts(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    with pytest.raises(UserError, match=r"cannot read the counts"):
        HashtagCounts.load(path)
    path.write_bytes(b"PAR1 or not")
    with pytest.raises(UserError, match="holds no hashtag counts"):
        HashtagCounts.load(path)
    write(path, HEAD, ROWS, kinds=("string", "string", "int32", "int64"))
    with pytest.raises(UserError, match="columns"):
        HashtagCounts.load(path)
    pyarrow.parquet.write_table(pyarrow.table({"part": ["raw"]}), path)
    with pytest.raises(UserError, match="columns"):
        HashtagCounts.load(path)
    write(path, HEAD, ROWS)
    content = path.read_bytes()
    for cut in range(4, len(content), 97):
        path.write_bytes(content[:cut] + b"\0\0\0\0" + content[cut + 4 :])
        try:
            HashtagCounts.load(path)  # bytes that nobody reads may differ
        except UserError as error:
            assert "counts" in str(error)  # noqa: PT017 (not all of them raise)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(OSError, match="disk full"):
        HashtagCounts().save(tmp_path / "counts")
    assert list(tmp_path.iterdir()) == []
