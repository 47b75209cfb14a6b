from __future__ import annotations

import shutil
import webbrowser
from pathlib import Path

import pytest

from scale_wsl import cli
from tests.corpus.show.data import rows, vocabulary, write


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write(tmp_path / "toy" / "a", rows(20), vocabulary())
    return tmp_path / "toy"


def test_the_page_is_written_beside_the_data(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["corpus", "show", str(toy), "--samples", "4"]) == 0
    captured = capsys.readouterr()
    page = toy.with_name("toy.html")
    assert captured.out == f"{page}: {page.stat().st_size / 1e6:.1f} MB\n"
    assert sorted(path.name for path in toy.iterdir()) == ["train-toy-20-3"]
    before = page.read_bytes()
    monkeypatch.chdir(toy)
    assert cli.main(["corpus", "show", ".", "--samples", "4"]) == 0
    assert page.read_bytes() == before
    assert cli.main(["corpus", "show", ".", "--samples", "4", "--seed", "9", "--out", "other.html"]) == 0
    assert (toy / "other.html").read_bytes() != before


@pytest.mark.parametrize("there", [True, False])
def test_the_page_is_opened(
    toy: Path, there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or there)
    assert cli.main(["corpus", "show", str(toy), "--samples", "1", "--open"]) == 0
    assert opened == [toy.with_name("toy.html").as_uri()]
    assert ("no browser was found" in capsys.readouterr().out) != there


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "there is no data set in nowhere"),
        (["toy", "--samples", "100000"], "must be 0 to 1,000"),
        (["toy", "--out", "page.txt"], "must end in .html"),
        (["toy", "--sample", "3"], "--sample means nothing here"),
    ],
)
def test_a_mistake_is_one_sentence(
    toy: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy.parent)
    assert cli.main(["corpus", "show", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert list(toy.parent.iterdir()) == [toy]


def test_a_damaged_data_set_is_named(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(toy / "train-toy-20-3" / "manifest.json", toy / "train-toy-20-3" / "000000.tar")
    assert cli.main(["corpus", "show", str(toy)]) == 2
    assert "000000.tar has" in capsys.readouterr().err
