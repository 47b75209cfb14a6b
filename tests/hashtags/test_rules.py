from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.hashtags.lists import imagenet_classes
from scale_wsl.hashtags.rules import PLACELESS, Candidates, VocabularyRule, canonical_key
from scale_wsl.hashtags.vocabulary import Vocabulary
from scale_wsl.hashtags.wordnet import WordNet
from tests.hashtags.test_lists import needs_timm

WORDS = ["brownbear", "brownbears", "ursusarctos", "crane", "cranes", "mouse", "mice", "axes", "selfie", "dog", "c"]


def labels(candidates: Candidates) -> int:
    return len(set(map(candidates.key, candidates.hashtags)))


def test_how_many_hashtags_the_rules_of_the_paper_give(wordnet: WordNet) -> None:
    first, some = (VocabularyRule(spec).candidates(wordnet) for spec in ("in1k", "in1k:any"))
    assert len(first.hashtags) == 1442
    assert len(some.hashtags) == 1804
    assert first.hashtags < some.hashtags
    for candidates in (first, some):  # an unambiguous hashtag's only sense is its first
        assert sum(len(wordnet.synsets(hashtag)) == 1 for hashtag in candidates.hashtags) == 1299
    assert (labels(first), labels(some)) == (945, 1284)
    classes, mixed = set(imagenet_classes("in1k")), set()
    for hashtag in wordnet.hashtags:
        firsts = {wordnet._senses[lemma][0] in classes for lemma in wordnet.spellings(hashtag)}
        mixed |= {hashtag} if len(firsts) == 2 else set()
    assert mixed == {"ashcan", "bearcat", "chowchow", "daybed", "walkingstick"}
    assert mixed & first.hashtags == {"bearcat", "chowchow", "daybed"}
    noun = VocabularyRule().candidates(wordnet)
    assert noun.hashtags == wordnet.hashtags
    assert (len(noun.hashtags), labels(noun)) == (116_602, 77_217)


def test_first_and_any_sense_by_nltks_reader(wordnet: WordNet) -> None:
    """The oracle is NLTK's list of senses of each spelling, and the plain definition."""
    classes = set(imagenet_classes("in1k"))
    senses = wordnet.reader._lemma_pos_offset_map
    first, some = (VocabularyRule(spec).candidates(wordnet) for spec in ("in1k", "in1k:any"))
    for hashtag in wordnet.hashtags:
        spelled = [[f"n{offset:08d}" for offset in senses[lemma]["n"]] for lemma in wordnet.spellings(hashtag)]
        assert bool(first.key(hashtag)) == (spelled[0][0] in classes)
        assert bool(some.key(hashtag)) == any(wnid in classes for wnids in spelled for wnid in wnids)


@needs_timm
@pytest.mark.parametrize(
    ("spec", "hashtags", "merged"),
    [("in12k", 18_685, 11_601), ("in21k", 33_625, 21_275), ("in21k:any", 36_400, 23_929), ("in22k", 33_622, 21_272)],
)
def test_larger_lists_of_imagenet(wordnet: WordNet, spec: str, hashtags: int, merged: int) -> None:
    candidates = VocabularyRule(spec).candidates(wordnet)
    assert (len(candidates.hashtags), labels(candidates)) == (hashtags, merged)


def test_an_ambiguous_hashtag_keeps_its_whole_set(wordnet: WordNet) -> None:
    candidates = VocabularyRule("in1k:any").candidates(wordnet)
    key = "n02012849 n03126707 n09295455 n10914331 n10914447"
    assert candidates.key("crane") == candidates.key("cranes") == key
    assert [hashtag for hashtag in wordnet.hashtags if candidates.key(hashtag) == key] == ["crane"]
    assert VocabularyRule("in1k").candidates(wordnet).place("crane") == ("", "outside the rule")  # first: the writer
    assert candidates.key("brownbear") == candidates.key("ursusarctos") == candidates.key("brownbears") == "n02132136"
    assert candidates.place("selfie") == ("", "no noun synset")


def test_inflected_forms_go_with_any_of_their_bases(wordnet: WordNet) -> None:
    """`axes` is of ax and of axis; under ax's own synset it has a place, with the synsets of both."""
    (ax,) = wordnet.synsets("ax")
    candidates = VocabularyRule(under=(ax,)).candidates(wordnet)
    assert candidates.key("axes") == canonical_key("axes", wordnet.synsets("axis") | {ax})
    assert candidates.place("axis") == ("", "outside the rule")
    assert "axes" not in candidates.hashtags


def test_under(wordnet: WordNet) -> None:
    candidates = VocabularyRule(under=("animal.n.01",)).candidates(wordnet)
    animal = wordnet.resolve("animal.n.01")
    assert (len(candidates.hashtags), labels(candidates)) == (7540, 4504)
    for hashtag in ["brownbear", "mouse", "crane", "dog", "animal", "table", "world", "oak", "ourselfies"]:
        above = {above for wnid in wordnet.synsets(hashtag) for above in wordnet.ancestors(wnid) | {wnid}}
        assert bool(candidates.key(hashtag)) == (animal in above)
    both = VocabularyRule("in1k", ("animal.n.01",)).candidates(wordnet)
    assert both.hashtags == candidates.hashtags & VocabularyRule("in1k").candidates(wordnet).hashtags
    assert len(both.hashtags) == 662
    two = VocabularyRule(under=("n00015388", "plant.n.02", "animal.n.01")).candidates(wordnet)
    assert two.hashtags == candidates.hashtags | VocabularyRule(under=("plant.n.02",)).candidates(wordnet).hashtags
    with pytest.raises(UserError, match=r"animal\.n\.77.*animal has 1 noun senses"):
        VocabularyRule(under=("animal.n.77",)).candidates(wordnet)
    with pytest.raises(UserError, match="'animal', which is no synset"):
        VocabularyRule(under=("animal",))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("# mine\nbrown bear\nSelfie\ncrane\n")
    return path


def test_a_list_of_ones_own(wordnet: WordNet, own: Path) -> None:
    candidates = VocabularyRule(f"list:{own}").candidates(wordnet)
    assert candidates.hashtags == {"brownbear", "ursusarctos", "selfie", "crane"}  # by meaning: a synonym is in
    assert candidates.key("brownbears") == "n02132136"
    assert candidates.key("selfie") == "#selfie"
    assert candidates.place("selfies") == ("", "no noun synset")  # nobody knows the plural of an unknown word
    assert candidates.place("dog") == ("", "outside the rule")
    assert candidates.verdict("selfie") == "has a place: it is on the list, as a label of its own"
    assert "neither it nor a hashtag of exactly the same senses" in candidates.verdict("dog")
    below = VocabularyRule(f"list:{own}", under=("animal.n.01",)).candidates(wordnet)
    assert below.hashtags == {"brownbear", "ursusarctos", "crane"}


def test_classes_of_ones_own(wordnet: WordNet, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(reversed(imagenet_classes("in1k"))))
    rule = VocabularyRule(f"wnids:{path}")
    assert rule.sha256 == VocabularyRule("in1k").sha256
    assert rule.candidates(wordnet).hashtags == VocabularyRule("in1k").candidates(wordnet).hashtags
    some = VocabularyRule(f"wnids:any:{path}").candidates(wordnet)
    assert some.hashtags == VocabularyRule("in1k:any").candidates(wordnet).hashtags
    path.write_text("n02132137\n")
    with pytest.raises(UserError, match=r"has n02132137, no noun synset of WordNet 3\.0"):
        VocabularyRule(f"wnids:{path}").candidates(wordnet)


def test_the_stop_list_takes_a_spelling_and_leaves_the_others(wordnet: WordNet, own: Path) -> None:
    candidates = VocabularyRule(f"list:{own}", stop=("selfie", "brownbear", "brownbear")).candidates(wordnet)
    assert candidates.rule.stop == ("brownbear", "selfie")
    assert candidates.place("selfie") == candidates.place("brownbear") == ("", "stop list")
    assert candidates.key("ursusarctos") == "n02132136"
    assert candidates.verdict("selfie") == "no place: it is on the stop list"


def test_a_rule_holds_its_list_and_needs_no_file_any_more(wordnet: WordNet, own: Path) -> None:
    rule = VocabularyRule(f"list:{own}")
    own.write_text("something else")
    copy = pickle.loads(pickle.dumps(rule))  # noqa: S301 (our own bytes)
    assert copy == rule
    assert copy.candidates(wordnet).key("crane") == rule.candidates(wordnet).key("crane") != ""
    more = rule.stopping(["selfie"])
    assert more.candidates(wordnet).hashtags == {"brownbear", "ursusarctos", "crane"}
    assert more.sha256 == rule.sha256
    candidates = pickle.loads(pickle.dumps(rule.candidates(wordnet)))  # noqa: S301
    assert candidates.key("selfie") == "#selfie"
    recorded = VocabularyRule(rule.spec, sha256=rule.sha256)
    assert recorded == rule
    with pytest.raises(UserError, match="has changed since it was recorded"):
        recorded.candidates(wordnet)
    own.unlink()
    with pytest.raises(UserError, match="cannot read"):
        recorded.candidates(wordnet)


@pytest.mark.parametrize(
    ("spec", "size", "first"),
    [
        ("noun", None, False),
        ("noun:8500", 8500, False),
        ("in1k", None, True),
        ("in1k:any:7", 7, False),
        ("in1k:7", 7, True),
    ],
)
def test_what_a_spec_says(spec: str, size: int | None, first: bool) -> None:
    rule = VocabularyRule(spec)
    assert (rule.size, rule.by_first_sense) == (size, first)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nouns", "did you mean noun"),
        ("", "no vocabulary rule"),
        ("in5k", r"no vocabulary rule: there are noun, in1k"),
        ("list:a\x1b[31m", r"'list:a\\x1b\[31m' has characters that cannot be shown"),
        ("noun:0", "keep 0 labels"),
        ("noun:any", "any sense as it is"),
        ("noun:-3", "no vocabulary rule"),
        ("noun:1e3", "no vocabulary rule"),
        ("list:", "no vocabulary rule"),
        ("list:any:x", "all their senses as it is"),
        ("list:/nonexistent/file", "cannot read the list of hashtags"),
        ("wnids:/nonexistent/file", "cannot read the class list"),
    ],
)
def test_a_spec_that_is_none(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VocabularyRule(spec)


@given(st.text(max_size=20) | st.from_regex(r"(noun|in1k|list|wnids)(:any)?:?[0-9]*", fullmatch=True))
def test_any_text_is_a_rule_or_a_users_mistake(spec: str) -> None:
    try:
        rule = VocabularyRule(spec)
    except UserError:
        return
    assert rule.size is None or rule.size >= 1
    assert VocabularyRule(rule.spec, sha256=rule.sha256) == rule


@pytest.mark.parametrize("spec", ["noun", "in1k", "in1k:any"])
@pytest.mark.parametrize("under", [(), ("animal.n.01",)])
def test_a_loaded_vocabulary_labels_every_spelling_as_its_rule_does(
    wordnet: WordNet, tmp_path: Path, spec: str, under: tuple[str, ...]
) -> None:
    """Also those that were never counted: a third of the lemmas is, all of them and their plurals are labelled."""
    rule = VocabularyRule(spec, under, stop=("dogs", "tench"))
    candidates = rule.candidates(wordnet)
    lemmas = sorted(wordnet.hashtags)
    Vocabulary.build([[lemma] for lemma in lemmas[::3]], wordnet, rule)[0].save(tmp_path / "v.json")
    vocabulary = Vocabulary.load(tmp_path / "v.json")
    assert vocabulary.rule == rule
    labelled = 0
    for hashtag in [*lemmas, *(lemma + "s" for lemma in lemmas[::7]), *WORDS, "dogs", "tench"]:
        index = vocabulary.label(hashtag, wordnet)
        assert index == vocabulary.index_of_key(candidates.key(hashtag)), hashtag
        labelled += index is not None and vocabulary.index(hashtag) is None
    assert labelled > 100


def test_a_spelling_that_was_never_counted_must_be_inside_the_rule(wordnet: WordNet, tmp_path: Path) -> None:
    """`prisonhouse` has the synsets of `prison`, a class of ImageNet-1k first of all, in another order."""
    assert wordnet.synsets("prison") == wordnet.synsets("prisonhouse")
    rule = VocabularyRule("in1k")
    Vocabulary.build([["prison"]], wordnet, rule)[0].save(tmp_path / "v.json")
    vocabulary = Vocabulary.load(tmp_path / "v.json")
    assert vocabulary.label("prison", wordnet) == vocabulary.label("prisons", wordnet) == 0
    assert vocabulary.label("prisonhouse", wordnet) is None
    assert rule.candidates(wordnet).place("prisonhouse") == ("", PLACELESS[2])
    assert vocabulary.classes is not None
    assert set(vocabulary.classes) < set(imagenet_classes("in1k"))
    assert "outside the rule: its first sense" in vocabulary.explain("prisonhouse", wordnet)


def test_a_loaded_vocabulary_labels_without_the_list(wordnet: WordNet, own: Path, tmp_path: Path) -> None:
    rule = VocabularyRule(f"list:{own}")
    Vocabulary.build([["selfie"], ["brownbears", "dog"]], wordnet, rule)[0].save(tmp_path / "v.json")
    own.unlink()
    vocabulary = Vocabulary.load(tmp_path / "v.json")
    assert (vocabulary.rule.spec, vocabulary.rule.sha256) == (rule.spec, rule.sha256)
    for hashtag, label in [("ursusarctos", "brownbears"), ("selfie", "selfie"), ("dog", None), ("crane", None)]:
        index = vocabulary.label(hashtag, wordnet)
        assert (None if index is None else vocabulary.entries[index].hashtag) == label
    assert vocabulary.explain("dog", wordnet).endswith("the rule's list, which could tell, is not at hand")
    assert "rule " not in vocabulary.explain("dog", wordnet)
