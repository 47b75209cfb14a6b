"""What the page does in a browser; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scale_wsl.corpus.show import write_page
from tests.corpus.show.browser import NAMES, Browser, installed
from tests.corpus.show.data import hostile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(installed() is None, reason=f"there is no browser ({', '.join(NAMES)}) or no bash here"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = installed()
    assert executable
    with Browser(executable, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def emoji(emoji_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(emoji_corpus, tmp_path_factory.mktemp("page") / "emoji.html", samples=20)


def test_it_runs_without_an_error_and_fetches_nothing(browser: Browser, emoji: Path) -> None:
    browser.open(emoji)
    assert browser.run("document.documentElement.dataset.error") is None
    assert browser.run("document.documentElement.dataset.ready") == "yes"
    assert browser.fetched() == [emoji.as_uri()]
    assert browser.errors() == []
    assert browser.run("document.querySelectorAll('.tile').length") == 28
    browser.run("Promise.all([...document.images].map((image) => image.decode())).then(() => true)")
    assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
    browser.click("#more")
    assert browser.run("document.querySelectorAll('.tile').length") == 40


def test_hostile_data_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    page = write_page(hostile(tmp_path / "evil"), tmp_path / "page.html")
    browser.open(page)
    assert browser.run("document.documentElement.dataset.error") is None
    assert browser.run("document.documentElement.dataset.ready") == "yes"
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('[onerror], [onload], iframe, object').length") == 0
    for _ in range(3):
        browser.run("document.getElementById('more').click()")
    browser.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    browser.run("document.querySelector('.tile button').click()")
    assert browser.errors() == []
    assert browser.fetched() == [page.as_uri()]
    assert not [event for event in browser.events if event.get("method") == "Page.javascriptDialogOpening"]


def test_a_script_that_gets_in_would_not_run(browser: Browser, emoji: Path, tmp_path: Path) -> None:
    """The policy holds even if escaping did not: it allows the one script that it has the hash of."""
    text = emoji.read_text("utf-8")
    for number, evil in enumerate(("<script>window.evil = 1</script>", "<img src=x onerror='window.evil = 1'>")):
        broken = tmp_path / f"broken{number}.html"
        broken.write_text(text.replace("</main>", f"{evil}</main>"), "utf-8")
        browser.open(broken)
        assert browser.run("window.evil") is None
        assert browser.errors()


def test_a_hashtag_that_is_clicked_shows_its_images(browser: Browser, emoji: Path) -> None:
    browser.open(emoji)
    browser.click("#labels-table tbody tr:nth-child(2) .tag")
    name = browser.run("document.querySelector('#labels-table tbody tr:nth-child(2) .tag').textContent")
    assert browser.run("location.hash") == f"#hashtag={name}"
    assert browser.run("document.getElementById('filter').value") == name
    counts = browser.run(
        "[...document.querySelectorAll('#labels-table tbody tr:nth-child(2) td.n')].map((c) => c.textContent)"
    )
    told = browser.run("document.getElementById('told').textContent")
    assert told.startswith(f"#{name}: ")
    assert f"of {counts[1]} training and {counts[2]} validation images" in told
    script = "[...document.querySelectorAll('.tile')].every((tile) => tile.querySelector('.tag.chosen'))"
    assert browser.run(script)
    assert browser.run("document.querySelectorAll('.tile').length") >= 4
    browser.click("#clear")
    assert browser.run("document.getElementById('told').textContent") == "40 pictures of the sample."
    browser.open(emoji, f"#hashtag={name}")
    assert browser.run("document.getElementById('told').textContent") == told
    browser.open(emoji, "#hashtag=%E0%A4%A")  # no address that the page makes
    assert browser.run("document.documentElement.dataset.ready") == "yes"


def test_typing_filters_and_the_split_is_chosen(browser: Browser, emoji: Path) -> None:
    browser.open(emoji)
    browser.run("document.getElementById('filter').focus()")
    browser.send("Input.insertText", text="#fac")
    assert "contains “fac”" in browser.run("document.getElementById('told').textContent")
    browser.send("Input.insertText", text="e")
    assert browser.run("document.getElementById('told').textContent").startswith("#face: ")
    browser.click("#clear")
    browser.click("input[name=side][value=val] + span")
    assert browser.run("document.getElementById('told').textContent") == "20 pictures of the sample."
    assert browser.run("document.querySelectorAll('.tile .side.first').length") == 0


def test_an_image_opens_and_escape_closes_it(browser: Browser, emoji: Path) -> None:
    browser.open(emoji)
    browser.run("document.querySelector('.tile button').focus()")
    browser.key("Enter")
    assert browser.run("document.getElementById('picture').open")
    assert browser.run("document.querySelectorAll('#large img').length") == 1
    browser.key("Escape")
    browser.wait("!document.getElementById('picture').open")
    assert browser.run("document.activeElement === document.querySelector('.tile button')")


def test_charts_answer_the_keyboard_and_the_pointer(browser: Browser, emoji: Path) -> None:
    browser.open(emoji)
    tip = "document.getElementById('tip').textContent"
    browser.run("document.getElementById('curve-chart').focus()")
    browser.key("ArrowRight")
    assert "· rank 2 ·" in browser.run(tip)
    browser.key("ArrowDown")
    assert browser.run(tip).endswith("(val)")
    browser.key("Enter")
    assert browser.run("location.hash").startswith("#hashtag=")
    browser.run("document.getElementById('heat-chart').focus()")
    browser.key("ArrowRight")
    first = browser.run("JSON.parse(document.getElementById('data').textContent).heat")
    assert f": {first['counts'][0][2]} image" in browser.run(tip)
    browser.key("Enter")
    told = browser.run("document.getElementById('told').textContent")
    assert f"{first['counts'][0][2]} image" in told
    browser.click("#heat-chart rect:nth-of-type(2)")
    assert f"{first['counts'][0][1]} image" in browser.run("document.getElementById('told').textContent")


def test_the_measure_and_the_kind_of_label_are_chosen(browser: Browser, emoji: Path) -> None:
    browser.open(emoji)
    colour = "getComputedStyle(document.querySelector('#heat-chart rect.c0')).fill"
    before = browser.run(colour)
    visible = "[...document.querySelectorAll('#together .halves')].map((table) => table.offsetHeight > 0)"
    assert browser.run(visible) == [True, False]
    browser.click("input[name=measure][value=images] + span")
    assert browser.run(visible) == [False, True]
    assert browser.run(colour) == before  # no shared image looks the same
    browser.click("input[name=kind][value=merged] + span")
    rows = "[...document.querySelectorAll('#labels-table tbody tr')].filter((row) => row.offsetHeight > 0)"
    assert browser.run(f"{rows}.every((row) => row.dataset.kinds.includes('merged'))")
    browser.run("document.getElementById('find').focus()")
    browser.send("Input.insertText", text="zzz no such label")
    assert browser.run(f"{rows}.length") == 0


@pytest.mark.parametrize("pixels", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Browser, emoji: Path, pixels: int) -> None:
    browser.width(pixels, phone=pixels < 700)
    try:
        browser.open(emoji)
        assert browser.run("document.documentElement.scrollWidth") <= pixels  # less a scroll bar
    finally:
        browser.send("Emulation.clearDeviceMetricsOverride")


def test_light_and_dark_are_readable(browser: Browser, emoji: Path) -> None:
    """Contrast of text on its ground by WCAG 2, 4.5 to 1."""
    script = """(() => {
      const parts = (text) => text.match(/[0-9.]+/g).slice(0, 3).map((v) => v / (text.startsWith("color") ? 1 : 255));
      const light = (text) => {
        const [r, g, b] = parts(text).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
      const of = (selector) => getComputedStyle(document.querySelector(selector));
      const card = of("section").backgroundColor, page = of("body").backgroundColor;
      return [
        ratio(of("body").color, page), ratio(of(".over").color, page), ratio(of("section").color, card),
        ratio(of(".quiet").color, card), ratio(of("#more").color, card),
        ratio(of(".swatch").color, card), ratio(of(".tag").color, of(".tag").backgroundColor),
      ];
    })()"""
    for scheme in ("light", "dark"):
        browser.open(emoji, scheme=scheme)
        ratios = browser.run(script)
        assert len(ratios) == 7
        assert min(ratios) >= 4.5, (scheme, ratios)
