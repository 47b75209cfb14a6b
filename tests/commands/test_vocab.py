from __future__ import annotations

import json
from pathlib import Path

import pytest

from scale_wsl import cli
from scale_wsl.hashtags import Vocabulary

TAGS = ["#Cat", "cats", "brown bear", "Ursus arctos", "dog", "selfie", "tench", "table", "c++"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with posts.jsonl, of which post i has the first i + 1 tags, and the current one."""
    rows = [json.dumps({"picture": f"{i}.png", "tags": TAGS[: i + 1]}) for i in range(len(TAGS))]
    (tmp_path / "posts.jsonl").write_text("\n".join(rows))
    (tmp_path / "own.txt").write_text("# my words\nselfie\nbrown bear\n")
    (tmp_path / "stop.txt").write_text("table\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


BUILD = ["vocab", "build", "posts.jsonl", "source.image=picture", "source.hashtags=tags"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: ")
    return captured.err


def test_build_show_explain_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *BUILD, "--rule", "noun", "--stop", "stop.txt", "--min-count", "2", "--out", "a.json")
    assert "9 posts, 9 of them (100.0 %) with a hashtag that has a place; 9 (100.0 %) keep a label" in text
    assert "dropped, stop list: 1 hashtags (table)" in text
    assert "a.json: 4 labels" in text
    vocabulary = Vocabulary.load("a.json")
    assert [(entry.hashtag, entry.count) for entry in vocabulary.entries] == [
        ("cat", 9),
        ("brownbear", 7),
        ("dog", 5),
        ("tench", 3),
    ]
    assert vocabulary.rule.stop == ("table",)
    report = json.loads(Path("a.report.json").read_text())
    assert report["vocabulary"] == vocabulary.hash
    assert report["dropped"]["no noun synset"]["most_frequent"] == {"selfie": 4}

    run(capsys, *BUILD, "--rule", "in1k", "--out", "b.json", "--min-count", "1")
    run(capsys, *BUILD, "--rule", "list:own.txt", "--out", "c.json", "--min-count", "1")
    shown = run(capsys, "vocab", "show", "c.json")
    assert "2, of 3 hashtags; 1 of several hashtags, 0 ambiguous, 1 without synsets" in shown
    assert "coverage       9 posts, 7 of them (77.8 %)" in shown
    assert run(capsys, "vocab", "show", "c.json", "--all").splitlines()[2] == "1\tselfie\t4\t\tselfie"
    Path("c.report.json").unlink()
    assert "no report beside it" in run(capsys, "vocab", "show", "c.json")
    Path("c.report.json").write_bytes(Path("b.report.json").read_bytes())
    assert cli.main(["vocab", "show", "c.json"]) == 0
    captured = capsys.readouterr()
    assert "c.report.json is the report of another vocabulary" in captured.err
    assert "#selfie" in captured.out

    told = run(capsys, "vocab", "explain", "dog", "ursusarctos", "--vocabulary", "b.json")
    assert "rule        in1k: outside the rule: its first sense, n02084071, is none of the 1,000 classes" in told
    assert "vocabulary  #brownbear, index 0 of 2" in told
    Path("own.txt").unlink()
    assert "selfie, index 1" in run(capsys, "vocab", "explain", "selfie", "--vocabulary", "c.json")
    assert "rule        noun under animal.n.01: has a place" in run(
        capsys, "vocab", "explain", "mouse", "--under", "animal.n.01"
    )

    changed = run(capsys, "vocab", "diff", "a.json", "b.json")
    assert "removed     2: cat (9), dog (5)" in changed
    assert "rule        noun without 1 stop words -> in1k (list 70002b0ff5de)" in changed
    assert "equal" in run(capsys, "vocab", "diff", "a.json", "a.json")


def test_coverage_is_counted_or_a_range(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*BUILD, "--rule", "noun:2", "--min-count", "1", "--stop", "cats.txt"]
    Path("cats.txt").write_text("cat\ncats\nbrownbear\n")
    text = run(capsys, *arguments, "--one-pass", "--out", "a.json")
    assert "6 of them (66.7 %) with a hashtag that has a place; 6 (66.7 %) keep a label" in text  # nothing to count
    Path("cats.txt").write_text("cat\ncats\nbrownbear\nursusarctos\n")
    Path("more.jsonl").write_text('{"picture": "x.png", "tags": ["table"]}\n' + Path("posts.jsonl").read_text())
    arguments[2] = "more.jsonl"
    text = run(capsys, *arguments, "--one-pass", "--out", "b.json")
    assert "6 of them (60.0 %) with a hashtag that has a place; 5 to 6 (50.0 % to 60.0 %) keep a label" in text
    Path("c.json").write_text("in the way")
    assert "c.json is there already" in mistake(capsys, *arguments, "--out", "c.json")
    text = run(capsys, *arguments, "--overwrite", "--out", "c.json")
    assert "6 (60.0 %) keep a label after the cuts" in text
    assert Path("b.json").read_bytes() == Path("c.json").read_bytes()


def test_posts_under_synsets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    under = ["--under", "bear.n.01", "--under", "dog.n.01"]
    text = run(capsys, *BUILD, "--min-count", "1", *under, "--out", "a.json")
    assert "7 of them (77.8 %) with a hashtag that has a place; 7 (77.8 %) keep a label" in text
    assert [entry.hashtag for entry in Vocabulary.load("a.json").entries] == ["brownbear", "dog"]


def test_equal_posts_give_equal_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        run(capsys, *BUILD, "--rule", "in1k:any", "--min-count", "1", "--out", f"{name}.json")
    for end in ("json", "report.json"):
        assert Path(f"a.{end}").read_bytes() == Path(f"b.{end}").read_bytes()


def test_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "vocab", "rules", "in1k", "in1k:any", "list:own.txt").splitlines()
    assert [line.split()[1:3] for line in lines[1:]] == [["1,442", "945"], ["1,804", "1,284"], ["3", "2"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*BUILD, "--out", "v.json", "--rule", "nouns"], "did you mean noun"),
        ([*BUILD, "--out", "v.json", "--rule", "list:gone.txt"], "cannot read the list of hashtags gone.txt"),
        ([*BUILD, "--out", "v.json", "--under", "anmal.n.01"], "'anmal.n.01' is no noun synset"),
        ([*BUILD, "--out", "v.json", "--stop", "gone.txt"], "cannot read the stop list gone.txt"),
        ([*BUILD, "--out", "v.json", "--min-count", "0"], "--min-count is 0"),
        ([*BUILD, "--out", "v.json", "--min-count", "99"], "is on 99 of the 9 posts or more (--min-count)"),
        ([*BUILD, "--out", "."], "is a folder"),
        ([*BUILD, "--out", "own.txt/v.json"], "cannot write own.txt/v.json: "),
        ([*BUILD, "--out", "v.json", "--rul", "noun"], "--rul means nothing here"),
        ([*BUILD, "--out", "v.json", "source.hashtag=tags"], "source.hashtag"),
        (["vocab", "build", "gone.csv", "--out", "v.json"], "no source"),
        (["vocab", "show", "gone.json"], "0 vocabularies"),
        (["vocab", "show", "posts.jsonl"], "not a vocabulary file"),
        (["vocab", "show", "posts.jsonl", "--top", "0"], "--top is 0"),
        (["vocab", "diff", "posts.jsonl", "posts.jsonl"], "not a vocabulary file"),
        (["vocab", "rules", "in5k"], "no vocabulary rule"),
        (["vocab", "explain", "cat", "--vocabulary", "v.json", "--rule", "noun"], "a rule of its own"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    before = sorted(folder.iterdir())
    assert says in mistake(capsys, *arguments)
    kept = {folder / ".v.json.work"} if "99" in arguments else set()  # what was counted is good for another try
    assert set(folder.iterdir()) == {*before, *kept}
