"""Pieces that the page's sections are made of.

Must never word a figure of a data set, only lay out what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from scale_wsl.corpus.show.markup import Markup, h, number

__all__ = ["bar", "bars", "choice", "definitions", "keys", "legend", "section", "size", "table", "tag", "two"]


def section(identity: str, title: str, *children: str, style: str | None = None) -> Markup:
    """A card with a heading, which the navigation can name."""
    return h("section", h("h2", title), *children, id=identity, class_=style)


def tag(label: int, text: str) -> Markup:
    """A button that shows the images of a label."""
    return h("button", h("bdi", text), type="button", class_="tag", data_tag=label)


def choice(name: str, options: Sequence[tuple[str, str]]) -> Markup:
    """Radio buttons that look like one switch; the first one is chosen."""
    radios = (
        h("label", h("input", type="radio", name=name, value=value, checked=place == 0), h("span", text))
        for place, (value, text) in enumerate(options)
    )
    return h("span", *radios, class_="switch", role="radiogroup", aria_label=name)


def legend(names: Iterable[str]) -> Markup:
    """What the colours of a chart mean."""
    return h("figcaption", *(h("span", name, class_=f"key s{place}") for place, name in enumerate(names)))


def keys(text: str) -> Markup:
    """What the keyboard does in a chart."""
    return h("p", text, class_="quiet keys")


def two(chart: Markup, beside: Markup) -> Markup:
    """Side by side where there is room."""
    return h("div", chart, beside, class_="two")


def table(
    heads: Sequence[str], rows: Iterable[Markup], *, identity: str | None = None, style: str | None = None
) -> Markup:
    """Rows under column heads; scrolls by itself where it is too wide."""
    head = h("thead", h("tr", *(h("th", text, scope="col") for text in heads)))
    return h("div", h("table", head, h("tbody", *rows), id=identity, class_=style), class_="wide")


def definitions(facts: Iterable[tuple[str, str]], style: str = "figures") -> Markup:
    """Names and what they are."""
    return h("dl", *(h("div", h("dt", name), h("dd", h("bdi", value))) for name, value in facts), class_=style)


def bars(counts: Mapping[str, int]) -> Markup:
    """Counts by name, with bars in proportion to the largest."""
    largest = max([*counts.values(), 1])
    return h("ul", *(bar(reason, count, largest) for reason, count in counts.items()), class_="bars")


def bar(name: str, count: int | None, largest: int, more: str = "") -> Markup:
    """One of them; `count` is None where it is not known."""
    length = 0 if count is None else max(0.4 if count else 0, 100 * count / largest)
    drawn = h(
        "svg",
        h("rect", width=f"{length:.1f}", height=6, rx=1),
        viewBox="0 0 100 6",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    figure = "" if count is None else number(count)
    return h("li", h("span", h("bdi", name)), h("span", figure, class_="n"), drawn, more)


def size(count: int) -> str:
    """Bytes for reading: 99.9 MB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = next(power for power in range(len(units)) if count < 1000 ** (power + 1) or power == len(units) - 1)
    return f"{count:,} B" if not power else f"{count / 1000**power:,.1f} {units[power]}"
