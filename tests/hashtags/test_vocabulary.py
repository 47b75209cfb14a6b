from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.hashtags.report import DROP_REASONS
from scale_wsl.hashtags.rules import VocabularyRule
from scale_wsl.hashtags.vocabulary import Entry, Vocabulary
from scale_wsl.hashtags.wordnet import WordNet

POSTS = [
    ("brownbear", "ursusarctos"),  # one image, one entry: counts once
    ("brownbear", "bear"),
    ("brownbears", "brownbears"),
    ("cat", "cats"),
    ("cats",),
    ("cats", "selfie"),
    ("selfie",),
    ("follow4follow", "bear"),
    ("dog",),
    (),
]
# Plurals, synonyms, ambiguous, unknown: enough of each for entries to merge and tie.
HASHTAGS = ["brownbear", "ursusarctos", "bruin", "bear", "bears", "cat", "cats", "truecat", "dog", "geese", "goose"]
HASHTAGS += ["axes", "ax", "axis", "selfie", "foobar"]
posts_of = st.lists(st.lists(st.sampled_from(HASHTAGS), max_size=5), max_size=25)
given_posts = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_hashtags_with_the_same_synsets_merge_and_an_image_counts_once(wordnet: WordNet) -> None:
    vocabulary, report = Vocabulary.build(POSTS, wordnet)
    assert [(e.hashtag, e.count, e.raw) for e in vocabulary.entries] == [
        ("brownbear", 3, ("brownbear", "brownbears", "ursusarctos")),
        ("cats", 3, ("cats", "cat")),  # the name is the member on the most images
        ("bear", 2, ("bear",)),
        ("dog", 1, ("dog",)),
    ]
    assert vocabulary.entries[0].synsets == ("n02132136",)
    assert vocabulary.entries[2].synsets == ("n02131653", "n09845191")  # ambiguous: forced to no sense
    assert vocabulary.index("ursusarctos") == vocabulary.index("brownbears") == 0
    assert vocabulary.index("cat") == 1
    assert vocabulary.index("bruin") is None
    assert vocabulary.index_of_synsets({"n02132136"}) == 0
    assert vocabulary.index_of_synsets({"n09845191"}) is None
    assert len(vocabulary) == report.entries == 4
    assert (report.coverage.posts, report.coverage.known, report.ambiguous) == (10, 8, 3)
    assert report.merged == {
        "brownbear": {"brownbear": 2, "brownbears": 1, "ursusarctos": 1},
        "cats": {"cats": 3, "cat": 1},
    }
    assert list(report.dropped) == list(DROP_REASONS)
    assert report.dropped == {
        "stop list": {},
        "no noun synset": {"selfie": 2, "follow4follow": 1},
        "outside the rule": {},
        "below min_count": {},
        "cut by size": {},
    }
    assert json.loads(json.dumps(report.as_json()))["coverage"]["posts"] == 10
    assert "dropped, no noun synset: 2 hashtags (selfie, follow4follow)" in report.summary()


def test_cuts_say_what_they_dropped(wordnet: WordNet) -> None:
    vocabulary, report = Vocabulary.build(POSTS, wordnet, VocabularyRule(stop=("cats",)), min_count=2, size=2)
    assert [e.hashtag for e in vocabulary.entries] == ["brownbear", "bear"]
    assert report.dropped["stop list"] == {"cats": 3}
    assert report.dropped["below min_count"] == {"cat": 1, "dog": 1}  # a stop word takes no other spelling with it
    assert report.dropped["cut by size"] == {}
    assert (vocabulary.min_count, vocabulary.size, vocabulary.stop) == (2, 2, ("cats",))
    vocabulary, report = Vocabulary.build(POSTS, wordnet, size=1)
    assert [e.hashtag for e in vocabulary.entries] == ["brownbear"]
    assert report.dropped["cut by size"] == {"cats": 3, "cat": 1, "bear": 2, "dog": 1}


def test_ties_are_cut_alphabetically(wordnet: WordNet) -> None:
    posts = [("zebra",), ("ant",), ("dog",)]
    vocabulary, _ = Vocabulary.build(posts, wordnet, size=2)
    assert [e.hashtag for e in vocabulary.entries] == ["ant", "dog"]


@given_posts
@given(posts=posts_of, data=st.data(), min_count=st.integers(1, 4), size=st.none() | st.integers(1, 6))
def test_building_is_independent_of_the_order_of_posts_and_of_hashtags(
    wordnet: WordNet, posts: list[list[str]], data: st.DataObject, min_count: int, size: int | None
) -> None:
    shuffled = data.draw(st.permutations([data.draw(st.permutations(post)) for post in posts]))
    built = Vocabulary.build(posts, wordnet, min_count=min_count, size=size)
    assert Vocabulary.build(iter(shuffled), wordnet, min_count=min_count, size=size) == built


@given_posts
@given(posts=posts_of, min_count=st.integers(1, 4), size=st.none() | st.integers(1, 6))
def test_counts_are_those_of_a_plain_recount(
    wordnet: WordNet, posts: list[list[str]], min_count: int, size: int | None
) -> None:
    vocabulary, report = Vocabulary.build(posts, wordnet, min_count=min_count, size=size)
    for index, entry in enumerate(vocabulary.entries):
        synsets = frozenset(entry.synsets)
        assert entry.count == sum(any(wordnet.synsets(tag) == synsets for tag in post) for post in posts)
        assert entry.count >= min_count
        assert all(vocabulary.index(tag) == index for tag in entry.raw)
    assert size is None or len(vocabulary) <= size
    kept = {tag for entry in vocabulary.entries for tag in entry.raw}
    dropped = [tag for hashtags in report.dropped.values() for tag in hashtags]
    assert kept | set(dropped) == {tag for post in posts for tag in post}
    assert len(kept) + len(dropped) == len(kept | set(dropped))


def test_a_users_mistakes(wordnet: WordNet) -> None:
    with pytest.raises(UserError, match="min_count is 0"):
        Vocabulary.build([], wordnet, min_count=0)
    with pytest.raises(UserError, match="size is 0"):
        Vocabulary.build([], wordnet, size=0)
    with pytest.raises(UserError, match="'Brown Bear', which is not in normal form: write 'brownbear'"):
        VocabularyRule(stop=("Brown Bear",))
    with pytest.raises(UserError, match="it is not a hashtag"):
        VocabularyRule(stop=("c++",))
    with pytest.raises(UserError, match=r"size is 7, but the rule noun:8500 keeps 8500"):
        Vocabulary.build([], wordnet, VocabularyRule("noun:8500"), size=7)
    with pytest.raises(ValueError, match="normalize_all"):
        Vocabulary.build([("Brown Bear",)], wordnet)


# --- the hash --------------------------------------------------------------------------------------------------------

ANT = Entry("ant", ("ant", "ants"), ("n02219486",), 5)
BEE = Entry("bee", ("bee",), ("n02206856", "n07975026"), 5)


def test_the_hash_is_as_stated() -> None:
    stated = b"ant\tn02219486\nbee\tn02206856 n07975026\n"
    assert Vocabulary((ANT, BEE)).hash == hashlib.sha256(stated).hexdigest()


def test_the_hash_depends_on_order_names_and_synsets_and_on_nothing_else() -> None:
    change = dataclasses.replace
    reference = Vocabulary((ANT, BEE))
    for entries in [
        (change(BEE, count=6), ANT),
        (ANT,),
        (change(ANT, synsets=("n02219487",)), BEE),
        (change(ANT, hashtag="ants", raw=("ants", "ant"), count=6), BEE),
    ]:
        assert Vocabulary(entries).hash != reference.hash
    same = Vocabulary(
        (change(ANT, raw=("ant",), count=9), BEE), min_count=3, size=2, rule=VocabularyRule(stop=("cat",))
    )
    assert same.hash == reference.hash


@pytest.mark.parametrize(
    "entries",
    [
        (BEE, ANT),
        (ANT, ANT),
        (ANT, dataclasses.replace(BEE, synsets=ANT.synsets)),
        (ANT, dataclasses.replace(BEE, raw=("bee", "ants"))),
        (dataclasses.replace(ANT, raw=("ants", "ant")),),
        (dataclasses.replace(ANT, raw=()),),
        (dataclasses.replace(ANT, raw=("ant", "An Ant")),),
        (dataclasses.replace(ANT, synsets=()),),
        (dataclasses.replace(BEE, synsets=BEE.synsets[::-1]),),
        (dataclasses.replace(ANT, count=0),),
    ],
)
def test_entries_that_contradict_each_other_make_no_vocabulary(entries: tuple[Entry, ...]) -> None:
    with pytest.raises(ValueError, match=r"ent|raw|synsets|count"):
        Vocabulary(entries)


# --- the file --------------------------------------------------------------------------------------------------------


@given_posts
@given(posts=posts_of, min_count=st.integers(1, 3), stop=st.sets(st.sampled_from(HASHTAGS), max_size=3))
def test_a_file_gives_the_vocabulary_back(
    wordnet: WordNet, tmp_path: Path, posts: list[list[str]], min_count: int, stop: set[str]
) -> None:
    vocabulary, _ = Vocabulary.build(posts, wordnet, VocabularyRule(stop=tuple(stop)), min_count=min_count)
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded.hash == vocabulary.hash
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "vocabulary.json").read_bytes()


@pytest.fixture
def saved(wordnet: WordNet, tmp_path: Path) -> Path:
    path = tmp_path / "vocabulary.json"
    Vocabulary.build([*POSTS, ("gruyère",)], wordnet, VocabularyRule(stop=("gruyère",)))[0].save(path)
    return path


def test_a_person_can_read_the_file(saved: Path) -> None:
    lines = saved.read_text("utf-8").splitlines()
    assert (
        '  {"hashtag": "brownbear", "count": 3, "raw": ["brownbear", "brownbears", "ursusarctos"], '
        '"synsets": ["n02132136"]},'
    ) in lines
    rule = ' "rule": {"spec": "noun", "under": [], "stop": ["gruyère"], "sha256": "", "classes": null},'
    assert rule in lines
    assert sum(line.startswith("  {") for line in lines) == 4


V1 = """
{
 "format": "scale_wsl vocabulary",
 "version": 1,
 "hash": "ca8d534409054b5e957f75682cad6092c51bbd8501eceecbfdede5eabcdd9c64",
 "checksum": "165c5690b5cdc06e0b7ef607559bcfe7c6b5794209871c9df8dc11c5ed7856b4",
 "min_count": 1,
 "size": 3,
 "stop": ["dog", "gruyère"],
 "entries": [
  {"hashtag": "bear", "count": 2, "raw": ["bear"], "synsets": ["n02131653", "n09845191"]},
  {"hashtag": "brownbear", "count": 2, "raw": ["brownbear", "brownbears"], "synsets": ["n02132136"]},
  {"hashtag": "geese", "count": 1, "raw": ["geese"], "synsets": ["n01855672", "n07646821", "n10157744"]}
 ]
}
"""
"""As the first release wrote it."""


def test_a_file_of_version_1_is_read_and_keeps_its_hash(wordnet: WordNet, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(V1, "utf-8")
    loaded = Vocabulary.load(path)
    posts = [("brownbear", "bear"), ("brownbears",), ("bear",), ("geese",), ("dog",)]
    rule = VocabularyRule(stop=("gruyère", "dog"))
    assert loaded == Vocabulary.build(posts, wordnet, rule, size=3)[0]
    assert loaded.hash == json.loads(V1)["hash"]
    loaded.save(path)
    assert json.loads(path.read_bytes())["version"] == 2
    assert Vocabulary.load(path) == loaded
    for change, message in [
        (lambda v: v.update(stop=["dog"]), "checksum"),
        (lambda v: v.update(stop=["Dog"]), "normal form"),
        (lambda v: v["entries"][0].update(synsets=[]), "hash"),
        (lambda v: v.pop("stop"), "keys"),
    ]:
        path.write_text(V1, "utf-8")
        _edit(path, change)
        with pytest.raises(UserError, match=message):
            Vocabulary.load(path)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    parsed = json.loads(path.read_text("utf-8"))
    change(parsed)
    path.write_text(json.dumps(parsed), "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="something"), "format"),
        (lambda v: v.pop("format"), "format"),
        (lambda v: v.update(version=3), "version is 3, where this release reads 1 to 2"),
        (lambda v: v.update(version=0), "version is 0"),
        (lambda v: v.update(version=1), "keys"),
        (lambda v: v.update(version=True), "version is True"),
        (lambda v: v.update(extra=1), "keys"),
        (lambda v: v.pop("rule"), "keys"),
        (lambda v: v.update(hash="0" * 64), "hash"),
        (lambda v: v.update(hash=None), "hash"),
        (lambda v: v.update(checksum="0" * 64), "checksum"),
        (lambda v: v.update(min_count="1"), "min_count"),
        (lambda v: v.update(min_count=True), "min_count"),
        (lambda v: v.update(size=0), "size"),
        (lambda v: v.update(size=77), "checksum"),
        (lambda v: v["rule"].update(stop=["gruyere"]), "checksum"),
        (lambda v: v["rule"].update(stop="gruyère"), "stop is not a list of strings"),
        (lambda v: v["rule"].update(stop=["\ud800"]), "damaged"),
        (lambda v: v["rule"].update(stop=["Gruyère"]), "not in normal form"),
        (lambda v: v["rule"].update(extra=1), "its rule's keys"),
        (lambda v: v.update(rule=None), "its rule's keys"),
        (lambda v: v["rule"].update(spec=1), "no text"),
        (lambda v: v["rule"].update(spec="noun\x1b[31m"), "no text"),
        (lambda v: v["rule"].update(spec="verb", sha256="0" * 64), "no vocabulary rule"),
        (lambda v: v["rule"].update(spec="noun:3"), "size"),
        (lambda v: v["rule"].update(spec="list:/etc/passwd"), "hash of the list"),  # is not read
        (lambda v: v["rule"].update(spec="in1k", sha256="0" * 63), "hash of the list"),
        (lambda v: v["rule"].update(spec="in1k", sha256="0" * 64), "first senses"),
        (lambda v: v["rule"].update(spec="in1k", sha256="0" * 64, classes=["n00000001"]), "synsets"),
        (lambda v: v["rule"].update(classes=[]), "first senses"),
        (lambda v: v["rule"].update(classes="n02132136"), "classes is not a list"),
        (lambda v: v["rule"].update(under=["animal.n.01"]), "checksum"),
        (lambda v: v["rule"].update(under=["animal"]), "no synset"),
        (lambda v: v.update(entries={}), "entries are not a list"),
        (lambda v: v["entries"].append(None), "an entry's keys"),
        (lambda v: v["entries"][0].update(extra=1), "an entry's keys"),
        (lambda v: v["entries"][0].update(hashtag=1), "no hashtag"),
        (lambda v: v["entries"][0].update(hashtag="bruin"), "begin its own list"),
        (lambda v: v["entries"][0].update(count=4), "checksum"),
        (lambda v: v["entries"][0].update(count=3.0), "positive count"),
        (lambda v: v["entries"][0].update(count=True), "positive count"),
        (lambda v: v["entries"][0].update(count=-3), "positive count"),
        (lambda v: v["entries"][0].update(raw="brownbear"), "raw is not a list of strings"),
        (lambda v: v["entries"][0].update(raw=["brownbear", 1]), "raw is not a list of strings"),
        (lambda v: v["entries"][0].update(raw=["brownbear"]), "checksum"),
        (lambda v: v["entries"][0].update(raw=["brownbear", "cat"]), "two entries"),
        (lambda v: v["entries"][0].update(synsets=["2132136"]), "WNID"),
        (lambda v: v["entries"][0].update(synsets=[]), "merged into"),
        (lambda v: v["entries"][3].update(synsets=[]), "hash"),
        (lambda v: v["entries"][0].update(synsets=["n02132136\n"]), "WNID"),
        (lambda v: v["entries"][0].update(synsets=["n02132137"]), "hash"),
        (lambda v: v["entries"].reverse(), "ordered"),
        (lambda v: v["entries"].pop(), "hash"),
    ],
)
def test_a_file_that_was_damaged_or_edited_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _edit(saved, lambda _: None)
    Vocabulary.load(saved)  # another layout of the same content is no damage
    _edit(saved, change)
    with pytest.raises(UserError, match=message) as refused:
        Vocabulary.load(saved)
    assert str(saved) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"1", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}"],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vocabulary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Vocabulary.load(tmp_path / "vocabulary.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["format", "version", "hash", "checksum", "min_count", "size", "rule", "entries"]
RULE_KEYS = ["spec", "under", "stop", "sha256", "classes"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(KEYS),
    value=JSON,
    entry_key=st.sampled_from(["hashtag", "count", "raw", "synsets", *RULE_KEYS, None]),
)
def test_any_json_in_any_place_is_refused_cleanly(saved: Path, key: str, value: Any, entry_key: str | None) -> None:
    original = saved.read_bytes()
    parsed = json.loads(original)
    if entry_key is None:
        parsed[key] = value
    elif entry_key in RULE_KEYS:
        parsed["rule"][entry_key] = value
    else:
        parsed["entries"][1][entry_key] = value
    (other := saved.with_name("other.json")).write_text(json.dumps(parsed), "utf-8")
    if parsed == json.loads(original) and type(value) is not bool and type(value) is not float:
        assert Vocabulary.load(other) == Vocabulary.load(saved)
        return
    with pytest.raises(UserError):
        Vocabulary.load(other)


def test_a_failed_save_leaves_the_file_that_was_there(saved: Path, monkeypatch: Any) -> None:
    before = saved.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        Vocabulary(()).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
