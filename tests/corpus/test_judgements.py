from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus import judgements as module
from scale_wsl.corpus.judgements import (
    DUPLICATES,
    FORMAT,
    HOW,
    VERDICTS,
    Duplicates,
    Judgements,
    Pair,
    SetId,
    Verdicts,
    combined,
    dumped_judgements,
    parse_judgements,
    read_duplicates,
    read_judgements,
)
from scale_wsl.errors import UserError

TRAIN, EVALUATION = SetId("train-toy-10-3", "a" * 64), SetId("val-toy-4-3", "b" * 64)
PAIRS = (
    Pair("e1", "t1", 0.99, "duplicate"),
    Pair("e1", "t2", 0.6, "not"),
    Pair("e2", "t1", 0.7, "unsure"),
    Pair("e3", "t9", 0.97, "duplicate", "above threshold"),
)
MADE = Judgements(TRAIN, EVALUATION, "R-MAC", PAIRS)

keys = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=80).filter(
    str.isprintable
)
pairs = st.builds(Pair, keys, keys, st.floats(-1, 1), st.sampled_from(VERDICTS), st.sampled_from(HOW))


@given(st.lists(pairs, max_size=20, unique_by=lambda pair: (pair.evaluation, pair.training)))
def test_what_is_written_is_read(some: list[Pair]) -> None:
    made = dataclasses.replace(MADE, pairs=tuple(some))
    assert parse_judgements(dumped_judgements(made).encode(), "it") == made
    backwards = dataclasses.replace(made, pairs=tuple(some[::-1]))
    assert dumped_judgements(backwards) == dumped_judgements(made)  # equal contents, equal bytes


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="it is no file of judgements"):
        parse_judgements(content, "it")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_wrong_value_anywhere_is_refused(data: st.DataObject) -> None:
    """Any one value of a good file replaced by any JSON: refused by a UserError, or as good as before."""
    content = json.loads(dumped_judgements(MADE))
    places = [(content, key) for key in content]
    places += [(content[name], key) for name in ("train", "evaluation") for key in content[name]]
    places += [(row, index) for row in content["pairs"] for index in range(5)]
    places += [(content["pairs"], index) for index in range(len(content["pairs"]))]
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(json_values)
    try:
        found = parse_judgements(json.dumps(content).encode(), "it")
    except UserError:
        return
    assert parse_judgements(dumped_judgements(found).encode(), "it") == found
    for pair in found.pairs:
        assert pair.verdict in VERDICTS
        assert pair.how in HOW
        assert -2 <= pair.similarity <= 2


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(dumped_judgements(MADE)) | changes).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (changed(version=2), "it has version 2, where this release reads 1"),
        (changed(version=True), "version True"),
        (changed(format="scale_wsl duplicates"), f'"format": "{FORMAT}"'),
        (changed(more=1), "and nothing else"),
        (changed(pairs=[["e", "t", 0.5, "duplicate"]]), "pair 1 is not of the form"),
        (changed(pairs=[["e", "t", 0.5, "maybe", "by hand"]]), "the verdict of pair 1 must be one of duplicate, not"),
        (changed(pairs=[["e", "t", 0.5, ["not"], "by hand"]]), "the verdict of pair 1"),
        (changed(pairs=[["e", "t", 0.5, "not", "by ear"]]), "how pair 1 was judged"),
        (changed(pairs=[["e", "t", 17, "not", "by hand"]]), "the similarity of pair 1 is no number between -2 and 2"),
        (changed(pairs=[["e", "t", True, "not", "by hand"]]), "the similarity of pair 1"),
        (changed(pairs=[["e\n", "t", 0, "not", "by hand"]]), "the evaluation key of pair 1 is no printable text"),
        (changed(pairs=[["e", "t" * 501, 0, "not", "by hand"]]), "the training key of pair 1"),
        (changed(pairs=[["e", "t", 0, "not", "by hand"]] * 2), "a pair comes twice"),
        (changed(train={"name": "x", "sha256": "A" * 64}), "the sha256 of train is none"),
        (changed(train={"name": "x", "sha256": "a" * 64, "path": "/etc"}), "train must have name, sha256, and nothing"),
        (b'{"format": 1, "format": 2}', "a key comes twice"),
        (changed().replace(b"0.99", b"NaN"), "NaN is no number"),
        (changed().replace(b"0.99", b"1e999"), "no number between"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (changed().replace(b"0.99", b"9" * 5000), "it is not valid JSON"),
    ],
)
def test_hostile_files(content: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_judgements(content, "it")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not there, or is no file"):
        read_judgements(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not there, or is no file"):
        read_judgements(tmp_path / "pipe")
    (tmp_path / "large.json").write_text(dumped_judgements(MADE))
    assert read_judgements(tmp_path / "large.json").train == TRAIN
    monkeypatch.setattr(module, "_LARGEST", 100)
    with pytest.raises(UserError, match="is larger than"):
        read_judgements(tmp_path / "large.json")


# --- duplicates.json ---------------------------------------------------------------------------------------------


def test_duplicates_are_kept_beside_their_set_and_refused_beside_another(tmp_path: Path) -> None:
    assert read_duplicates(tmp_path, EVALUATION.sha256) is None
    made = Duplicates(EVALUATION, (Verdicts(MADE, 0.95, "duplicate"),))
    assert made.keys == {"e1", "e2", "e3"}
    path = made.save(tmp_path)
    assert path == tmp_path / DUPLICATES
    again = read_duplicates(tmp_path, EVALUATION.sha256)
    assert again == made
    assert again.covers(TRAIN.sha256)
    assert not again.covers("c" * 64)
    with pytest.raises(UserError, match=r"was made for another set of images .* remove it, and search this one"):
        read_duplicates(tmp_path, "c" * 64)
    content = path.read_bytes()
    made.save(tmp_path)
    assert path.read_bytes() == content
    summary = made.summary()
    assert "3 images have a duplicate" in summary
    assert "1 duplicates by hand, 1 above the threshold 0.95, 1 not, 1 unsure (counted as duplicates)" in summary


def test_unsure_pairs_count_as_one_chooses() -> None:
    assert Verdicts(MADE, None, "not").keys() == {"e1", "e3"}
    assert Verdicts(MADE, None, "duplicate").keys() == {"e1", "e2", "e3"}
    only = dataclasses.replace(MADE, pairs=(Pair("e1", "t1", 0.9, "not"),))
    assert Verdicts(only, None, "duplicate").keys() == frozenset()


def test_searches_of_several_training_sets_add_up_and_a_new_one_takes_the_place_of_its_like() -> None:
    first = Duplicates(EVALUATION, ()).with_search(Verdicts(MADE, None, "not"))
    other = Judgements(SetId("train-b", "c" * 64), EVALUATION, "R-MAC", (Pair("e7", "b1", 0.9, "duplicate"),))
    both = first.with_search(Verdicts(other, None, "not"))
    assert both.keys == {"e1", "e3", "e7"}
    assert both == Duplicates(EVALUATION, ()).with_search(Verdicts(other, None, "not")).with_search(
        Verdicts(MADE, None, "not")
    )
    emptied = both.with_search(Verdicts(dataclasses.replace(MADE, pairs=()), None, "not"))
    assert emptied.keys == {"e7"}
    thumbnails = emptied.with_search(Verdicts(dataclasses.replace(MADE, method="thumbnails"), None, "not"))
    assert thumbnails.keys == {"e1", "e3", "e7"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"searches": {}}, "searches is no list"),
        ({"searches": [3]}, "a search must have"),
        ({"accept_above": "0.5"}, "accept_above is no number"),
        ({"unsure": "perhaps"}, "unsure must be one of duplicate, not"),
        ({"unsure": []}, "unsure must be one of"),
        ({"twice": True}, "a training set comes twice"),
    ],
    ids=str,
)
def test_hostile_duplicates(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = Duplicates(EVALUATION, (Verdicts(MADE, 0.95, "duplicate"),)).save(tmp_path)
    content = json.loads(path.read_text())
    if "searches" in change:
        content |= change
    elif "twice" in change:
        content["searches"] *= 2
    else:
        content["searches"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        read_duplicates(tmp_path, EVALUATION.sha256)


def test_files_that_disagree() -> None:
    one = Judgements(TRAIN, EVALUATION, "R-MAC", PAIRS[:2])
    two = Judgements(TRAIN, EVALUATION, "R-MAC", PAIRS[1:])
    assert set(combined([("a.json", one), ("b.json", two)]).values()) == set(PAIRS)
    against = dataclasses.replace(two, pairs=(dataclasses.replace(PAIRS[0], verdict="not"),))
    with pytest.raises(UserError, match=r"b.json and a.json disagree about e1 and t1 \(not, duplicate\)"):
        combined([("a.json", one), ("b.json", against)])
