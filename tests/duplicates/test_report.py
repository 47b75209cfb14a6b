"""The page in a browser, what it saves, and what is made of it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scale_wsl.corpus.judgements import parse_judgements, read_duplicates
from scale_wsl.duplicates import report as report_module
from scale_wsl.duplicates.apply import apply, show
from scale_wsl.duplicates.find import FindConfig, find
from scale_wsl.duplicates.methods import ThumbnailMethod
from scale_wsl.duplicates.report import Report, neighbours, read_report
from scale_wsl.duplicates.sets import open_images
from scale_wsl.errors import UserError
from tests.duplicates.toy import TAGS, evaluation_images, training_images, write

HOSTILE = '</script><img src=x onerror="document.title=1">'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Of a folder of images, whose tags are hostile, against a data set."""
    train = write(tmp_path / "train", "train", training_images())
    evaluation = tmp_path / "photos"
    evaluation.mkdir()
    for key, data in evaluation_images().items():
        (evaluation / f"{key}.png").write_bytes(data)
        (evaluation / f"{key}.json").write_text(json.dumps({"hashtags": [HOSTILE, "two\u2028words", "\ud800"]}))
    return search(train, evaluation, tmp_path / "report", tmp_path)


def search(train: Path, evaluation: Path, out: Path, folder: Path, **settings: Any) -> Report:
    found = find(
        open_images(train, "train"),
        open_images(evaluation, "val"),
        ThumbnailMethod(),
        out,
        folder / "features",
        FindConfig(neighbours=5, workers=1, **settings),
    )
    assert found.report is not None
    return found.report


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_page_is_self_contained_and_escapes_everything(report: Report) -> None:
    page = (report.folder / "page-0001.html").read_text("utf-8")
    assert page.count("</script>") == 2
    assert "onerror" in page
    assert "<img" not in page
    assert not re.search(r"(?:src|href)\s*=|https?:|url\(|@import", page.split("<script", 1)[0])
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|innerHTML|eval\(", page)
    policy = re.search(r"script-src 'sha256-([^']+)'", page)
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts] == [policy[1]]
    assert "default-src 'none'" in page


def test_a_page_shows_the_most_similar_first(report: Report) -> None:
    data = data_of((report.folder / "page-0001.html").read_text("utf-8"))
    best = [row["neighbours"][0][1] for row in data["rows"]]
    assert best == sorted(best, reverse=True)
    assert len(data["rows"]) == 11  # one cannot be read
    assert all("copy" in row["key"] for row in data["rows"][:6])
    table = neighbours(report)
    for row in data["rows"]:
        for key, similarity, labels, preview in row["neighbours"]:
            assert table[row["key"], key] == pytest.approx(similarity, abs=1e-6)
            assert labels.removeprefix("#") in TAGS
            assert Image.open(io.BytesIO(base64.b64decode(data["previews"][preview]))).format == "JPEG"
    assert data["rows"][0]["labels"] == f"#{HOSTILE} #two\u2028words #?"
    assert report.near == 6


def test_pages_of_so_many_images_and_those_that_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write(tmp_path / "train", "train", training_images())
    evaluation = write(tmp_path / "val", "val", evaluation_images())
    monkeypatch.setattr(report_module, "ON_A_PAGE", 4)
    whole = search(train, evaluation, tmp_path / "whole", tmp_path)
    pages = [data_of(path.read_text("utf-8")) for path in sorted(whole.folder.glob("page-*.html"))]
    assert [len(page["rows"]) for page in pages] == [4, 4, 3]
    assert [(page["page"], page["pages"]) for page in pages] == [(1, 3), (2, 3), (3, 3)]
    assert len({page["id"] for page in pages}) == 1  # one set of judgements for all
    some = search(train, evaluation, tmp_path / "some", tmp_path, show_above=0.97)
    pages = [data_of(path.read_text("utf-8")) for path in sorted(some.folder.glob("page-*.html"))]
    assert [len(page["rows"]) for page in pages] == [4, 2]
    assert neighbours(some) == neighbours(whole)
    none = search(train, evaluation, tmp_path / "none", tmp_path, show_above=2.0)
    assert none.pages == 1
    assert read_report(none.folder) == none


# --- in a browser ------------------------------------------------------------------------------------------------


def dom_after(page: Path, script: str, folder: Path) -> str:
    """The document after a script of the test's has acted on the page, which is given time to follow."""
    assert CHROMIUM is not None
    text = page.read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace("script-src 'sha256-", f"script-src 'sha256-{digest}' 'sha256-")
    acted = folder / f"acted-{digest[:6].replace('/', '_')}.html"
    acted.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=3000",
            "--window-size=1400,900",
            "--dump-dom",
            acted.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


# What "save" hands to the browser for download is kept in the document.
_CAPTURE = """
const real = URL.createObjectURL;
URL.createObjectURL = blob => { blob.text().then(text => { document.body.dataset.saved = text; }); return real(blob); };
const press = (key, more) => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
"""


def saved(dom: str) -> bytes:
    (text,) = re.findall(r'data-saved="(.*?)"', dom, re.DOTALL)
    return html.unescape(text).encode()


@browser
def test_judging_by_mouse_and_keys_and_applying_what_was_saved(report: Report, tmp_path: Path) -> None:
    page = report.folder / "page-0001.html"
    keys = [(row["key"], [entry[0] for entry in row["neighbours"]]) for row in data_of(page.read_text("utf-8"))["rows"]]
    script = (
        _CAPTURE
        + """
setTimeout(() => {
  const row = number => document.querySelectorAll(".row")[number];
  row(0).querySelector(".answers .duplicate").click();
  row(1).querySelector(".answers .not").click();
  row(1).querySelector(".answers .not").click();     // taken back
  row(1).querySelector(".answers .unsure").click();
  press("ArrowDown");                                 // from row 1 to 2
  press("d");
  press("ArrowDown");
  press("n");
  press("x");                                         // taken back, too
  press("ArrowDown");
  press("N", {shiftKey: true});                       // none of row 4's that are shown
  press("s");
}, 500);
"""
    )
    dom = dom_after(page, script, tmp_path)
    found = parse_judgements(saved(dom), "what the page saved")
    assert {(pair.evaluation, pair.training): pair.verdict for pair in found.pairs} == {
        (keys[0][0], keys[0][1][0]): "duplicate",
        (keys[1][0], keys[1][1][0]): "unsure",
        (keys[2][0], keys[2][1][0]): "duplicate",
        (keys[4][0], keys[4][1][0]): "not",
    }
    assert "<title>1</title>" not in dom  # no hashtag ran
    assert html.escape(HOSTILE[:20], quote=False) in dom
    assert re.search(r'<b class="duplicate">2</b>', dom)

    (tmp_path / "judgements.json").write_bytes(saved(dom))
    path, duplicates = apply(report.folder, [tmp_path / "judgements.json"])
    assert duplicates.keys == {keys[0][0], keys[1][0], keys[2][0]}
    assert path == tmp_path / "photos" / "duplicates.json"

    # Another visit of the same browser finds what was judged, and a file that was saved can be loaded.
    again = dom_after(page, "setTimeout(() => document.body.dataset.late = 1, 500);", tmp_path)
    assert re.search(r'<b class="duplicate">2</b>', again)
    assert 'class="tile duplicate"' in again


@browser
def test_the_slider_hides_what_is_less_similar(report: Report, tmp_path: Path) -> None:
    page = report.folder / "page-0001.html"

    def shown(threshold: float) -> int:
        script = (
            f'const slider = document.getElementById("threshold"); slider.value = {threshold};'
            'slider.dispatchEvent(new Event("input"));'
            'document.body.dataset.rows = document.querySelectorAll(".row:not([hidden])").length;'
        )
        (count,) = re.findall(r'data-rows="(\d+)"', dom_after(page, script, tmp_path))
        return int(count)

    best = [row["neighbours"][0][1] for row in data_of(page.read_text("utf-8"))["rows"]]
    for threshold in (0.0, 0.9, 0.97):
        assert shown(threshold) == sum(similarity >= threshold for similarity in best)
    assert shown(0.97) == 6


# --- applying ----------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Report, Callable[..., Path]]:
    train = write(tmp_path / "train", "train", training_images())
    evaluation = write(tmp_path / "val", "val", evaluation_images())
    report = search(train, evaluation, tmp_path / "report", tmp_path)

    def file(name: str, *pairs: list[Any], **changes: Any) -> Path:
        content = {
            "format": "scale_wsl judgements",
            "version": 1,
            "train": vars(report.train),
            "evaluation": vars(report.evaluation),
            "method": report.method,
            "pairs": list(pairs),
            **changes,
        }
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return report, file


def test_hand_goes_before_threshold(judged: tuple[Report, Callable[..., Path]]) -> None:
    report, file = judged
    one = file("one.json", ["copy0", "t0", 0.0, "not", "by hand"], ["copy1", "t1", 0.9, "unsure", "by hand"])
    nearest = dict(reversed(neighbours(report)))
    stranger = file("two.json", ["stranger0", nearest["stranger0"], 0.5, "duplicate", "by hand"])
    path, duplicates = apply(report.folder, [one, stranger], accept_above=0.97)
    assert path == report.evaluation_folder / "duplicates.json"
    assert duplicates.keys == {"stranger0", "copy1", "copy2", "copy3", "copy4", "copy5"}
    (verdicts,) = duplicates.searches
    # What counts is the report's similarity, not the file's.
    assert all(
        pair.similarity == neighbours(report)[pair.evaluation, pair.training] for pair in verdicts.judgements.pairs
    )
    _, without = apply(report.folder, [one, stranger], accept_above=0.97, unsure="not")
    assert without.keys == duplicates.keys - {"copy1"}
    assert read_duplicates(report.evaluation_folder, report.evaluation.sha256) == without
    text = show(report.evaluation_folder)
    assert "5 images have a duplicate" in text
    assert "41.67% of 12 images" in text
    assert "copy2  t2" in text
    assert open_images(report.evaluation_folder, "val").identity == report.evaluation.sha256  # the set is as it was
    assert "nothing is known about duplicates" in show(report.evaluation_folder.parent / "train")


def test_what_cannot_be_applied(judged: tuple[Report, Callable[..., Path]], tmp_path: Path) -> None:
    report, file = judged
    good = ["copy0", "t0", 0.9, "duplicate", "by hand"]
    with pytest.raises(UserError, match="there is nothing to apply"):
        apply(report.folder, [])
    with pytest.raises(UserError, match="a similarity is between -1 and 1"):
        apply(report.folder, [], accept_above=95)
    for changes, says in (
        ({"train": {"name": "x", "sha256": "0" * 64}}, "another training set"),
        ({"evaluation": {"name": "x", "sha256": "0" * 64}}, "another evaluation set"),
        ({"method": "R-MAC"}, "another method"),
    ):
        with pytest.raises(UserError, match=says):
            apply(report.folder, [file("other.json", good, **changes)])
    with pytest.raises(UserError, match="has no pair copy0 and t99"):
        apply(report.folder, [file("unknown.json", ["copy0", "t99", 0.9, "not", "by hand"])])
    against = file("against.json", ["copy0", "t0", 0.9, "not", "by hand"])
    with pytest.raises(UserError, match="disagree about copy0 and t0"):
        apply(report.folder, [file("good.json", good), against])
    assert not (report.evaluation_folder / "duplicates.json").exists()
    changed = write(tmp_path / "changed", "val", evaluation_images(strangers=2))
    with pytest.raises(UserError, match="is another set of images than the report's"):
        apply(report.folder, [file("good.json", good)], evaluation_folder=changed)
    shutil.move(report.evaluation_folder, tmp_path / "moved")
    with pytest.raises(UserError, match="is no folder"):
        apply(report.folder, [file("good.json", good)])
    path, _ = apply(report.folder, [file("good.json", good)], evaluation_folder=tmp_path / "moved")
    assert path == tmp_path / "moved" / "duplicates.json"
    table = pq.read_table(report.folder / "neighbours.parquet")
    for column, value in ((0, "esc\x1b[2J"), (1, None), (2, 17.0), (2, float("nan"))):
        columns = [
            pa.array([value, *whole.to_pylist()[1:]], whole.type) if number == column else whole
            for number, whole in enumerate(table.columns)
        ]
        pq.write_table(pa.table(columns, names=table.column_names), report.folder / "neighbours.parquet")
        with pytest.raises(UserError, match="its cells are no keys and similarities"):
            apply(report.folder, [file("good.json", good)])
    (report.folder / "neighbours.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        apply(report.folder, [file("good.json", good)])
    content = json.loads((report.folder / "report.json").read_text())
    for damaged in ({}, [], content | {"method": "\x1b"}, content | {"train": {"name": "a", "sha256": "b"}}):
        (report.folder / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="is no report"):
            apply(report.folder, [file("good.json", good)])
