from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.hashtags.compare import compare, described_rule
from scale_wsl.hashtags.describe import describe, rule_sizes, table
from scale_wsl.hashtags.report import Coverage
from scale_wsl.hashtags.rules import VocabularyRule
from scale_wsl.hashtags.vocabulary import Entry, Vocabulary
from scale_wsl.hashtags.wordnet import WordNet


def vocabulary(*entries: tuple[str, list[int], int], rule: VocabularyRule | None = None) -> Vocabulary:
    """From (hashtags, the canonical one first; numbers of synsets; count)."""
    made = [
        Entry((raw := tuple(names.split()))[0], raw, tuple(f"n{number:08d}" for number in numbers), count)
        for names, numbers, count in entries
    ]
    ordered = tuple(sorted(made, key=lambda entry: (-entry.count, entry.hashtag)))
    return Vocabulary(ordered, rule=rule or VocabularyRule())


FIRST = vocabulary(
    ("dog hound", [1], 90), ("bear ursus", [2], 80), ("axes", [3, 4], 70), ("selfie", [], 60), ("cat", [7], 5)
)
SECOND = vocabulary(
    ("ursus bear", [2], 99), ("axes", [3], 50), ("dog", [1], 40), ("selfie", [], 39), ("zebra", [9], 30)
)


def test_every_difference_is_said() -> None:
    found = compare(FIRST, SECOND)
    assert not found.same_hash
    assert [entry.hashtag for entry in found.added] == ["zebra"]
    assert [entry.hashtag for entry in found.removed] == ["cat"]
    assert [(a.hashtag, b.hashtag) for a, b in found.other_synsets] == [("axes", "axes")]
    assert found.renamed == ((1, 0),)
    assert found.moved == ((0, 2), (1, 0))
    assert found.recounted == ((0, 2), (3, 3), (1, 0))
    assert found.respelled == ((0, 2),)
    assert found.summary().splitlines() == [
        f"hash        {FIRST.hash[:12]} -> {SECOND.hash[:12]}: shards and heads of one are refused by the other",
        "rule        noun",
        "min_count   1",
        "labels      5",
        "added       1: zebra (30)",
        "removed     1: cat (5)",
        "synsets     1: axes (n00000003 n00000004) -> axes (n00000003)",
        "renamed     1: bear -> ursus",
        "rank        2: dog 0 -> 2, ursus 1 -> 0",
        "count       3: dog 90 -> 40, selfie 60 -> 39, ursus 80 -> 99",
        "spellings   1: dog (-hound)",
    ]


def test_to_itself_there_is_no_difference() -> None:
    found = compare(FIRST, FIRST)
    assert found.same_hash
    assert [line.split()[1] for line in found.summary().splitlines()] == ["equal", "noun", "1", "5", *["none"] * 7]


drawn = st.dictionaries(st.integers(0, 7), st.tuples(st.integers(1, 9), st.booleans()), max_size=8).map(
    lambda chosen: vocabulary(
        *((f"tag{'abcdefgh'[one]}", [one, one + 20] if more else [one], count) for one, (count, more) in chosen.items())
    )
)


@given(drawn, drawn)
def test_every_label_is_in_both_or_named_and_the_way_back_mirrors_it(first: Vocabulary, second: Vocabulary) -> None:
    there, back = compare(first, second), compare(second, first)
    both = sum(second.index_of_key(entry.key) is not None for entry in first.entries)
    assert both + len(there.removed) + len(there.other_synsets) == len(first)
    assert both + len(there.added) + len(there.other_synsets) == len(second)
    assert (there.added, there.removed) == (back.removed, back.added)
    assert {(b, a) for a, b in there.other_synsets} == set(back.other_synsets)
    for name in ("renamed", "moved", "recounted", "respelled"):
        assert {(j, i) for i, j in getattr(there, name)} == set(getattr(back, name))
    assert there.same_hash == (first.hash == second.hash)


def test_a_rule_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("cat")
    rule = VocabularyRule(f"list:{tmp_path}/own", ("animal.n.01", "\x1b.n.01"), ("dog",))
    line = described_rule(vocabulary(("cat", [1], 1), rule=rule))
    assert line.isprintable()
    assert f"(list {rule.sha256[:12]}) under \\x1b.n.01, animal.n.01 without 1 stop words" in line
    assert described_rule(Vocabulary((), size=9)) == "noun cut to 9"
    assert described_rule(Vocabulary((), size=9, rule=VocabularyRule("noun:9"))) == "noun:9"


def test_a_vocabulary_on_a_page() -> None:
    lines = describe(FIRST, Coverage(100, 99, 98, 98, 400, 305), top=2).splitlines()
    assert lines[0] == "rule           noun, min_count 1"
    assert lines[1] == "labels         5, of 7 hashtags; 2 of several hashtags, 1 ambiguous, 1 without synsets"
    assert lines[3] == "images         90 for the first label, 5 for the last"
    assert lines[4].startswith("coverage       100 posts, 99 of them (99.0 %)")
    assert lines[6:] == [
        "most frequent:",
        "  #dog  90",
        "  #bear  80",
        "most merged:",
        "  #bear  2: ursus",
        "  #dog  2: hound",
        "most ambiguous:",
        "  #axes  2 synsets",
        "own:",
        "  #selfie  60",
    ]
    assert "coverage       no report beside it" in describe(FIRST)
    assert describe(Vocabulary(())).count("\n") == 3


def test_a_vocabulary_as_a_table() -> None:
    rows = [line.split("\t") for line in table(FIRST).splitlines()]
    assert rows[0] == ["index", "hashtag", "count", "synsets", "spellings"]
    assert rows[1] == ["0", "dog", "90", "n00000001", "dog hound"]
    assert rows[4] == ["3", "selfie", "60", "", "selfie"]
    assert {len(row) for row in rows} == {5}


def test_sizes_of_rules(wordnet: WordNet) -> None:
    rules = [VocabularyRule("in1k", under=("bear.n.01",)), VocabularyRule("noun:3", under=("bear.n.01",))]
    lines = rule_sizes([rule.candidates(wordnet) for rule in rules]).splitlines()
    in1k, noun = (rule.candidates(wordnet).hashtags for rule in rules)
    assert lines[1].split()[:3] == ["in1k", str(len(in1k)), str(len(set(map(wordnet.synsets, in1k))))]
    labels = set(map(wordnet.synsets, noun))
    assert lines[2].split()[:3] == ["noun:3", str(len(noun)), str(len(labels))]
    ambiguous = [sum(len(wordnet.synsets(tag)) > 1 for tag in noun), sum(len(synsets) > 1 for synsets in labels)]
    assert lines[2].endswith(f"{ambiguous[0]} / {ambiguous[1]}  3 are kept")
