from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scale_wsl.corpus.prepare import prepare
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.corpus.show import write_page
from scale_wsl.corpus.show.markup import clean
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Entry, Vocabulary, WordNet
from tests.corpus.show.data import BEAR, HOSTILE, hostile, rows, vocabulary, write
from tests.corpus.toy import CONFIG, ToySource

VOID = {"meta", "link", "input", "img"}
TAGS = """
    html head title style body header main nav section footer div span p a h1 h2 h3 dl dt dd ul li table thead tbody tr
    th td code bdi small sup button label datalist figure figcaption details summary dialog noscript script svg g path
    circle line rect text clippath meta link input
"""


class Page(HTMLParser):
    """A page taken apart by Python's parser; refuses tags that are not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.within: dict[str, list[str]] = {}
        self.words: list[str] = []
        self.open: list[str] = []
        self.comments: list[str] = []
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.within.setdefault(self.open[-1], []).append(data)
        else:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.within["script"][0])

    def attributes(self, name: str) -> Iterator[str | None]:
        return (attributes[name] for _, attributes in self.elements if name in attributes)


@pytest.fixture(autouse=True)
def wordnet(monkeypatch: pytest.MonkeyPatch, opened: list[WordNet] = []) -> None:  # noqa: B006 - opened once for all
    opened[:] = opened or [WordNet.load()]
    monkeypatch.setattr(WordNet, "load", lambda: opened[0])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets without a report."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    write(folder / "a", rows(60), vocabulary())
    write(folder / "b", rows(30, seed=1), vocabulary(), role="val")
    return folder


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile(tmp_path_factory.mktemp("data") / "evil")


def shown(folder: Path, tmp_path: Path, **options: int) -> Page:
    return Page(write_page(folder, tmp_path / "page.html", **options))


def assert_harmless(page: Page) -> None:
    """Nothing is fetched, nothing runs but the page's own script, and the policy says so."""
    assert {tag for tag, _ in page.elements} <= set(TAGS.split())
    assert page.comments == []
    attributes = [item for _, some in page.elements for item in some.items()]
    forbidden = {"style", "src", "srcdoc", "action", "xlink:href"}
    assert not [name for name, _ in attributes if name.startswith("on") or name in forbidden]
    assert all(value == "data:," or (value or "").startswith("#") for value in page.attributes("href"))
    assert not [name for name, value in attributes if "http" in (value or "")]
    style, (data, script) = page.within["style"], page.within["script"]
    assert len(style) == 1
    assert "http" not in style[0] + script
    assert not re.search(
        r"url\(|@import|eval|innerHTML|outerHTML|insertAdjacent|document\.write|Function\(", style[0] + script
    )
    assert not set(data) & set("<>&")
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind, text in (("style", style[0]), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_page_of_ordinary_data(toy: Path, tmp_path: Path) -> None:
    page = shown(toy, tmp_path, samples=20)
    assert_harmless(page)
    words = " ".join(page.words)
    for told in (
        "train-toy-60-3",
        "val-toy-30-3",
        "brownbear",
        "ursusarctos",
        BEAR,
        "brown bear, bruin, Ursus arctos",
        "CC0-1.0",
    ):
        assert told in words
    assert "No report of the preparation" in words


def test_pictures_and_labels_are_those_of_the_data_set(toy: Path, tmp_path: Path) -> None:
    page = shown(toy, tmp_path, samples=20)
    sets = {role: Dataset.open(find_dataset(toy, role)) for role in ("train", "val")}
    at = {str(key): (role, index) for role, dataset in sets.items() for index, key in enumerate(dataset.keys)}
    pictures = page.data["pictures"]
    assert [sum(p["sample"] for p in pictures if p["side"] == role) for role in sets] == [20, 20]
    for picture in pictures:
        role, index = at[picture["key"]]
        assert picture["side"] == role
        assert picture["labels"] == sets[role].labels(index).tolist()
        assert bool(picture["source"]) != bool(picture["refused"])
    counts = [np.bincount(dataset.label_ids, minlength=3).tolist() for dataset in sets.values()]
    words = vocabulary()
    assert page.data["tags"] == {str(i): [words.entries[i].hashtag, counts[0][i], counts[1][i]] for i in range(3)}


def test_heat_map_and_curve_are_those_of_counting_by_hand(toy: Path, tmp_path: Path) -> None:
    page, dataset = shown(toy, tmp_path), Dataset.open(find_dataset(toy, "train"))
    heat, labels = page.data["heat"], [set(dataset.labels(i).tolist()) for i in range(60)]
    assert sorted(heat["labels"]) == [0, 1, 2]
    assert heat["counts"] == [[sum({a, b} <= some for some in labels) for b in heat["labels"]] for a in heat["labels"]]
    counts = [sum(label in some for some in labels) for label in range(3)]
    curve = page.data["curves"][0]
    assert [point[2] for point in curve] == [1, 2, 3]
    assert [point[3] for point in curve] == sorted(range(3), key=lambda label: -counts[label])
    x, y = [point[0] for point in curve], [point[1] for point in curve]
    assert x == sorted(x)
    assert y == sorted(y)  # down the page, as counts fall


def test_hostile_data_is_only_text(evil: Path, tmp_path: Path) -> None:
    page = shown(evil, tmp_path)
    assert_harmless(page)
    words = "".join(page.words)
    for text in HOSTILE[:-1]:
        assert clean(text, 240) in words
    assert max(len(word) for word in page.words) <= 2000
    keys = {picture["key"] for picture in page.data["pictures"]}
    assert clean("</script><script>alert(1)</script>", 120) in keys
    assert max(map(len, keys)) == 120
    assert len(page.text) < 2_000_000


def test_the_same_data_and_seed_give_the_same_bytes(evil: Path, tmp_path: Path) -> None:
    first = write_page(evil, tmp_path / "a.html", samples=10).read_bytes()
    assert write_page(evil, tmp_path / "b.html", samples=10).read_bytes() == first
    assert write_page(evil, tmp_path / "c.html", samples=10, seed=1).read_bytes() != first
    changed = json.loads((evil / "prepared.json").read_text()) | {"created": "another day"}
    (evil / "prepared.json").write_text(json.dumps(changed))
    assert write_page(evil, tmp_path / "d.html", samples=10).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "c.html", "d.html"]


def test_one_data_set_and_no_pictures(toy: Path, tmp_path: Path) -> None:
    page = shown(find_dataset(toy, "val"), tmp_path, samples=0)
    assert_harmless(page)
    assert page.data["pictures"] == []
    assert page.data["sides"] == [{"role": "val", "samples": 0}]
    assert "gallery" not in page.attributes("id")


def test_one_image_with_one_label(tmp_path: Path) -> None:
    folder = write(tmp_path / "x" / "a", [[1]], vocabulary())
    page = shown(folder, tmp_path)
    assert_harmless(page)
    assert "Fewer than two hashtags occur." in page.words


def test_what_was_left_out_is_told(emoji_corpus: Path, tmp_path: Path) -> None:
    page = shown(emoji_corpus, tmp_path)
    assert_harmless(page)
    report = json.loads((emoji_corpus / "prepared.json").read_text())["report"]
    words = "|".join(page.words)
    assert f"no label in the vocabulary|{report['dropped']['no label in the vocabulary']}" in words
    for example in report["examples"]["no label in the vocabulary"]:
        assert example in page.words
    for reason, count in report["dropped_hashtags"].items():
        assert f"{reason}|{count:,}" in words
    assert f"no noun synset| {report['vocabulary']['dropped_hashtags']['no noun synset']:,} distinct" in words
    assert "OpenMoji" in words
    assert len(page.text) < 5_000_000


def test_the_stop_list_is_that_of_the_vocabulary(tmp_path: Path) -> None:
    made = prepare(ToySource(), tmp_path / "out", CONFIG)
    words = shown(made.train, tmp_path, samples=0).words
    assert words[words.index("stop list") + 1] == "horse"


def test_coverage_and_hashtags_without_a_place_are_worded(toy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy, tmp_path / "toy")
    coverage = {"posts": 200, "known": 150, "covered_least": 100, "covered_most": 120, "pairs": 400, "kept_pairs": 300}
    dropped = {"no noun synset": {"hashtags": 70, "pairs": 500, "error": 2, "most_frequent": {"zzz": 30}}}
    (folder / "vocabulary.report.json").write_text(
        json.dumps({"coverage": coverage | {"x_y": 0.5}, "dropped": dropped})
    )
    report = {"near_identical": {"near_validation": 4}}
    (folder / "prepared.json").write_text(json.dumps({"format": "scale_wsl preparation", "report": report}))
    words = "|".join(shown(folder, tmp_path, samples=0).words)
    for told in (
        "posts with a hashtag that has a place|150 (75.0%)",
        "posts that keep a label|100 (50.0%) to 120 (60.0%)",
        "(post, label) pairs that are kept|300 (75.0%)",
        "x y|0.500",
        "no noun synset| more than 70 distinct, 500 times|zzz| 30|1 of 70 are listed",
        "left out of training, near a validation image|4",
    ):
        assert told in words


def test_a_large_vocabulary_and_many_labels_stay_within_the_bounds(tmp_path: Path) -> None:
    nouns = sorted(WordNet.load().hashtags)[2000:8000]
    wordnet, seen, entries = WordNet.load(), set(), []
    for noun in nouns:
        synsets = tuple(sorted(wordnet.synsets(noun)))
        if synsets not in seen:
            seen.add(synsets)
            entries.append(Entry(noun, (noun,), synsets, 5))
    words = Vocabulary(tuple(entries))
    rng = np.random.default_rng(0)
    many = [sorted(rng.choice(len(words), 40, replace=False).tolist()) for _ in range(900)]
    write(tmp_path / "in" / "a", many, words)
    page = shown(tmp_path / "in", tmp_path)
    assert len(page.text) < 5_000_000
    pictures = page.data["pictures"]
    assert 48 < len(pictures) <= 48 + 480
    assert all(len(picture["labels"]) == 32 and picture["more"] == 8 for picture in pictures)
    assert len(page.data["heat"]["labels"]) == 40
    assert len(page.data["curves"][0]) <= 300
    assert sum("data-name" in a and a["data-name"] == "label" for _, a in page.elements) <= 240


@pytest.mark.parametrize(
    ("options", "says"),
    [({"samples": -1}, "must be 0 to 1,000"), ({"samples": 1001}, "must be 0 to 1,000"), ({"seed": -1}, "seed")],
)
def test_settings_out_of_range(toy: Path, tmp_path: Path, options: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        write_page(toy, tmp_path / "page.html", **options)


def test_places_that_are_none(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    for out, says in (
        (tmp_path / "page.pdf", "must end in .html"),
        (tmp_path / "folder.html", "is a folder"),
        (tmp_path / "file" / "page.html", "cannot write"),
    ):
        with pytest.raises(UserError, match=says):
            write_page(toy, out, samples=1)
    for data in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="no data set in"):
            write_page(data, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_different_vocabularies_are_not_shown_together(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a", rows(5), vocabulary())
    write(tmp_path / "in" / "b", rows(5), vocabulary(("bruin", "cat", "seal")), role="val")
    with pytest.raises(UserError, match="different vocabularies"):
        write_page(tmp_path / "in", tmp_path / "page.html")


def test_a_synset_that_wordnet_lacks_is_told(tmp_path: Path) -> None:
    words = Vocabulary((Entry("a", ("a",), ("n00000003",), 9), Entry("b", ("b",), (BEAR,), 8)))
    page = shown(write(tmp_path / "in" / "a", rows(6, 2), words), tmp_path)
    assert " is no synset of WordNet 3.0" in page.words
