from __future__ import annotations

import importlib.util
import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.hashtags.lists import CLASS_LISTS, digest, imagenet_classes, read_classes, read_hashtags
from scale_wsl.hashtags.normalize import normalize
from scale_wsl.hashtags.wordnet import WordNet

SIZES = {
    "in1k": 1000,
    "in12k": 11_821,
    "in21k": 21_843,
    "in22k": 21_841,
    "in22k-ms": 21_842,
    "in21k-miil": 11_221,
    "in21k-miil-w21": 10_450,
}
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs the extra imagenet (timm)")


def test_the_shipped_classes(wordnet: WordNet) -> None:
    classes = imagenet_classes("in1k")
    assert len(classes) == len(set(classes)) == 1000
    assert wordnet.wnids.issuperset(classes)
    assert classes[:2] == ("n01440764", "n01443537")  # tench, goldfish: class indices 0 and 1
    assert classes[-1] == "n15075141"  # toilet tissue


@needs_timm
def test_the_shipped_classes_are_timms() -> None:
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    theirs = Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt"
    assert tuple(theirs.read_text().split()) == imagenet_classes("in1k")


@needs_timm
@pytest.mark.parametrize("name", CLASS_LISTS)
def test_the_lists_of_timm(wordnet: WordNet, name: str) -> None:
    classes = imagenet_classes(name)
    assert len(classes) == len(set(classes)) == SIZES[name]
    assert wordnet.wnids.issuperset(classes)


def test_what_timm_has_is_said_to_need_timm(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"in12k come with timm, which is missing: pip install scale-wsl\[imagenet\]"):
        imagenet_classes("in12k")
    assert len(imagenet_classes("in1k")) == 1000
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise SystemExit('imported')")
    origin = importlib.util.spec_from_file_location("timm", tmp_path / "timm" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: origin)
    with pytest.raises(UserError, match=r"installed timm has no .*imagenet12k_synsets\.txt"):
        imagenet_classes("in12k")


def test_a_list_of_hashtags(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# my own\r\nZebra\n\n  brown bear  # with a comment\nbrownbear\n#\nCafé\n".encode())
    assert read_hashtags(path) == ("brownbear", "café", "zebra")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no hashtag"),
        (b"# nothing\n", "holds no hashtag"),
        (b"cat\n#dog\n", r"line 2 of .* has a # without a space after it: write 'dog' for a hashtag"),
        (b"cat #dog\n", "line 1 of .* write 'dog'"),
        (b"##\n", "line 1 .* has a # without a space"),
        (b"cat # a pet\n!!!\n", "line 2 of .*, '!!!', is not a hashtag: empty"),
        (b"cat\nc++\n", r"line 2 of .*, 'c\+\+', is not a hashtag: symbols"),
        (b"2018\n", "no letter"),
        (b"a\x00b\n", "control characters"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_an_unclear_list_of_hashtags_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_hashtags(path)


def test_a_list_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("# LOC_synset_mapping\nn02132136 brown bear, bruin\n\nn01440764\nn02132136\nn02084071, dog\n")
    assert read_classes(path) == ("n02132136", "n01440764", "n02084071")
    for content, message in [("", "no class"), ("bear\n", "line 1 .* 'bear'"), ("v02132136\n", "no WNID")]:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_classes(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "gone", tmp_path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(UserError, match="cannot read the"):
            read_classes(path)


def test_a_file_that_is_no_list_is_not_read_whole(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(UserError, match="larger than 64 MiB"):
        read_hashtags(tmp_path / "large")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text("# abcdé\n\r\t+", max_size=60).map(str.encode))
def test_any_file_gives_hashtags_in_normal_form_or_a_users_mistake(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    try:
        found = read_hashtags(path)
    except UserError:
        return
    assert found
    assert all(normalize(hashtag) == hashtag for hashtag in found)
    assert list(found) == sorted(set(found))


@given(st.lists(st.text(string.ascii_letters, min_size=1, max_size=5)), st.randoms())
def test_the_digest_is_of_what_the_list_holds(items: list[str], random: Any) -> None:
    shuffled = items * 2
    random.shuffle(shuffled)
    assert digest(items) == digest(shuffled)
    assert digest([*items, "one more"]) != digest(items)
