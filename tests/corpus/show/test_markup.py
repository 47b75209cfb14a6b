from __future__ import annotations

import html
import json
import unicodedata
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.show.markup import Markup, clean, h, json_block, number

ANY_TEXT = st.text(st.characters(exclude_categories=[]))


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(ANY_TEXT, ANY_TEXT)
def test_text_is_text_and_attributes_are_attributes(text: str, attribute: str) -> None:
    markup = h("p", text, h("b", text), title=attribute)
    assert markup == f'<p title="{html.escape(attribute)}">{html.escape(text)}<b>{html.escape(text)}</b></p>'
    parsed = Parsed(markup)
    assert [tag for tag, _ in parsed.tags] == ["p", "b"]
    assert parsed.tags[0][1] == {"title": attribute}


def test_attributes_that_are_none_and_true() -> None:
    assert (
        h("input", checked=True, id=None, hidden=False, class_="a", data_tag=3)
        == '<input checked class="a" data-tag="3">'
    )


def test_markup_joined_with_text_is_escaped_again() -> None:
    assert h("p", Markup("<b></b>") + "<i>") == "<p>&lt;b&gt;&lt;/b&gt;&lt;i&gt;</p>"


@given(st.recursive(ANY_TEXT | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner)))
def test_json_comes_back_and_ends_no_script(value: object) -> None:
    block = json_block("data", value)
    assert block.isascii()
    content = block.removeprefix('<script type="application/json" id="data">').removesuffix("</script>")
    assert not set(content) & set("<>&")
    assert json.loads(content) == value


@given(ANY_TEXT, st.integers(1, 50))
def test_cleaned_text_can_be_written_and_is_short(text: str, most: int) -> None:
    cleaned = clean(text, most)
    assert len(cleaned) <= most
    cleaned.encode()
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in cleaned)
    if text.isprintable() and len(text) <= most:
        assert cleaned == text


def test_numbers_for_reading() -> None:
    assert [number(12345), number(3.8), number(1234.5), number(0.12345, 3)] == ["12,345", "3.80", "1,234", "0.123"]
