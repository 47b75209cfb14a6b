"""The sections of the page, as markup; what moves in them is page.js's.

Must never compute a figure: it only words what `contents` holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from scale_wsl.corpus.show.contents import Contents, Side
from scale_wsl.corpus.show.markup import Markup, clean, h, number
from scale_wsl.corpus.show.pairs import Pair
from scale_wsl.corpus.show.parts import choice, keys, legend, section, size, table, tag, two
from scale_wsl.corpus.show.pictures import SIDE
from scale_wsl.corpus.show.svg import heat_map, histogram, largest_shared, step_begins
from scale_wsl.hashtags import normalize

__all__ = ["cooccurrence", "frequency", "gallery", "header", "per_image", "vocabulary"]

_SENSES = 16  # of a hashtag that are listed
_MEMBERS = 24
_NAMES = {"train": "training", "val": "validation", "test": "test"}


def header(contents: Contents) -> Markup:
    """The names, and the figures that say the most."""
    first, report = contents.sides[0], contents.report
    ambiguous = sum(len(entry.synsets) > 1 for entry in contents.vocabulary.entries)
    members = sum(len(entry.raw) for entry in contents.vocabulary.entries)
    tiles = [(f"{_NAMES[side.role]} images", number(side.figures.images)) for side in contents.sides]
    tiles += [
        ("labels", number(len(contents.vocabulary))),
        ("labels an image", number(first.figures.mean)),
        ("ambiguous labels", f"{ambiguous / max(1, len(contents.vocabulary)):.0%}"),
        ("hashtags in them", number(members)),
    ]
    if report.posts is not None:
        tiles.append(("posts read", number(report.posts)))
    return h(
        "header",
        h("p", "Hashtagged images", class_="over"),
        h("h1", h("bdi", first.dataset.name.source)),
        h("p", *(h("code", str(side.dataset.name)) for side in contents.sides), class_="names"),
        h("dl", *(h("div", h("dt", name), h("dd", figure)) for name, figure in tiles), class_="tiles"),
    )


def gallery(contents: Contents) -> Markup:
    """The toolbar over the pictures; they themselves are in the page's JSON."""
    roles = [side.role for side in contents.sides]
    parts = [choice("side", [("all", "all"), *((role, role) for role in roles)])] if len(roles) > 1 else []
    drawn = " and ".join(f"{side.samples:,} {_NAMES[side.role]}" for side in contents.sides)
    return section(
        "images",
        "Images",
        h(
            "p",
            f"{drawn} images, drawn at random. Choose a hashtag anywhere on this page to see its images.",
        ),
        h(
            "div",
            h(
                "label",
                h("span", "hashtag", class_="hidden"),
                h("input", type="search", id="filter", list="hashtags", placeholder="Filter by hashtag", maxlength=120),
            ),
            *parts,
            h("button", "show the sample", type="button", id="clear", class_="plain"),
            class_="toolbar",
        ),
        h("datalist", id="hashtags"),
        h("p", id="told", role="status", class_="quiet"),
        h("div", id="gallery"),
        h("button", "show more", type="button", id="more", class_="plain"),
    )


def frequency(contents: Contents, chart: Markup) -> Markup:
    """The rank-frequency chart, the fitted law, and the data sets side by side."""
    laws = [(side.role, side.figures.zipf) for side in contents.sides if side.figures.zipf is not None]
    exponents = ", ".join(f"{law.exponent:.3f} ({role})" for role, law in laws)
    law = h(
        "p",
        "Dashed: Zipf's law, p(r) ∝ r",
        h("sup", "−s"),
        f", with s = {exponents}, fitted by maximum likelihood over the hashtags that occur, so that every "
        "(image, hashtag) pair has the same say.",
    )
    keyboard = keys("← → move along the curve, Enter shows the images")
    return section(
        "frequency",
        "How frequent hashtags are",
        law if laws else "",
        two(
            h("figure", legend(str(side.dataset.name) for side in contents.sides), chart, keyboard),
            _comparison(contents.sides, _frequency_rows(contents.sides)),
        ),
    )


def per_image(contents: Contents) -> Markup:
    """The histogram of labels."""
    chart = histogram([side.role for side in contents.sides], [side.figures.per_image for side in contents.sides])
    return section(
        "labels",
        "Labels of an image",
        two(
            h("figure", legend(str(side.dataset.name) for side in contents.sides), chart),
            _comparison(contents.sides, _label_rows(contents.sides)),
        ),
    )


def cooccurrence(contents: Contents) -> Markup:
    """The heat map and the strongest pairs."""
    shared = contents.shared
    names = [contents.vocabulary.entries[label].hashtag for label in shared.order]
    if len(names) < 2:
        return section(
            "together", "Hashtags on the same images", h("p", "Fewer than two hashtags occur.", class_="quiet")
        )
    scale = [("n4", "below −1.5"), ("n2", "−1 to −0.5"), ("n1", "−0.5 to 0"), ("p1", "0 to 0.5"), ("p3", "1 to 1.5")]
    scale += [("p5", "2 to 2.5"), ("p7", "3 to 3.5"), ("p9", "above 4 bits")]
    shares = h("span", "no shared image", class_="swatch p0")
    by_bits = h("p", shares, *(h("span", text, class_=f"swatch {style}") for style, text in scale), class_="scale bits")
    largest = largest_shared(shared.counts)
    least = {step_begins(step, largest): step for step in (1, 3, 5, 7, 9)}
    steps = (h("span", f"from {images:,}", class_=f"swatch c{step}") for images, step in least.items())
    by_images = h("p", h("span", "none", class_="swatch c0"), *steps, class_="scale images")
    measure = choice("measure", [("bits", "information"), ("images", "images")])
    return section(
        "together",
        "Hashtags on the same images",
        h(
            "p",
            f"The {len(names)} most frequent hashtags of {contents.sides[0].dataset.name}, ordered by average-linkage "
            "clustering so that blocks show. Information is pointwise mutual information: 0 bits is what chance would "
            "give, 1 twice, −1 half as many shared images.",
        ),
        h("div", measure, class_="toolbar"),
        h(
            "figure",
            h("div", heat_map(names, shared.counts, shared.bits), class_="wide"),
            by_bits,
            by_images,
            keys("arrow keys move, Enter shows the images that have both"),
        ),
        h("h3", "Strongest pairs"),
        h(
            "p",
            f"Among the {shared.counted:,} most frequent hashtags",
            h("span", f", of those on {shared.least} images or more", class_="bits"),
            ".",
            class_="quiet",
        ),
        _pairs(contents, shared.by_bits, "bits"),
        _pairs(contents, shared.by_images, "images"),
        style="bits",
    )


def vocabulary(contents: Contents) -> Markup:
    """Labels with the hashtags merged into them and their senses."""
    entries = contents.vocabulary.entries
    merged, ambiguous = (
        sum(len(parts) > 1 for parts in some) for some in ([e.raw for e in entries], [e.synsets for e in entries])
    )
    kinds = [
        ("all", f"all ({len(entries):,})"),
        ("merged", f"merged ({merged:,})"),
        ("ambiguous", f"ambiguous ({ambiguous:,})"),
    ]
    heads = (
        "rank",
        "label",
        *(side.role for side in contents.sides),
        "hashtags merged into it",
        "synsets of WordNet 3.0",
    )
    rows = len(contents.rows)
    shown = f" Listed here: {rows:,}, the most frequent of each kind." if rows < len(entries) else ""
    return section(
        "vocabulary",
        "Labels",
        h(
            "p",
            "A label is a set of synsets: hashtags with the same set are one label, and an ambiguous one is forced to "
            f"no sense.{shown}",
        ),
        h(
            "div",
            h(
                "label",
                h("span", "text", class_="hidden"),
                h("input", type="search", id="find", placeholder="Find a label, spelling or sense", maxlength=120),
            ),
            choice("kind", kinds),
            class_="toolbar",
        ),
        h("p", id="found", role="status", class_="quiet"),
        table(
            heads, (_label_row(contents, label) for label in contents.rows), identity="labels-table", style="stacked"
        ),
        h("button", "show all", type="button", id="all", class_="plain off"),
    )


# --- parts ---------------------------------------------------------------------------------------------------------


_Row = tuple[str, list[str]]


def _comparison(sides: Sequence[Side], rows: Iterable[_Row]) -> Markup:
    """Figures in rows, data sets in columns."""
    body = (h("tr", h("th", name, scope="row"), *(h("td", cell, class_="n") for cell in cells)) for name, cells in rows)
    return table(["", *(side.role for side in sides)], body, style="side-by-side")


def _frequency_rows(sides: Sequence[Side]) -> list[_Row]:
    said = [side.figures for side in sides]
    shards = [sum(shard["tar"]["bytes"] for shard in side.dataset.manifest["shards"]) for side in sides]
    return [
        ("images", [number(f.images) for f in said]),
        ("labels that occur", [number(f.occurring) for f in said]),
        ("on fewer than 10 images", [number(f.rarer_than(10)) for f in said]),
        ("share of the 10 most frequent", [f"{f.share_of_first(10):.1%}" for f in said]),
        ("share of the 100 most frequent", [f"{f.share_of_first(100):.1%}" for f in said]),
        ("Zipf exponent s", ["–" if f.zipf is None else f"{f.zipf.exponent:.3f}" for f in said]),
        ("distance from the law", ["–" if f.zipf is None else f"{f.zipf.distance:.3f}" for f in said]),
        ("size of the shards", [size(count) for count in shards]),
    ]


def _label_rows(sides: Sequence[Side]) -> list[_Row]:
    said = [side.figures for side in sides]
    return [
        ("(image, label) pairs", [number(f.pairs) for f in said]),
        ("mean", [number(f.mean) for f in said]),
        ("median", [number(f.median) for f in said]),
        ("most", [number(len(f.per_image) - 1) for f in said]),
        ("images with one label", [f"{f.per_image[1] / f.images:.1%}" for f in said]),
    ]


def _pairs(contents: Contents, pairs: Sequence[Pair], style: str) -> Markup:
    if not pairs:
        return h("p", "None.", class_=f"quiet {style}")
    entries = contents.vocabulary.entries

    def row(pair: Pair) -> Markup:
        names = (tag(label, entries[label].hashtag) for label in (pair.first, pair.second))
        both = h("button", number(pair.images), type="button", class_="plain", data_tag=f"{pair.first} {pair.second}")
        return h("tr", h("td", *names), h("td", both, class_="n"), h("td", f"{pair.bits:+.2f}", class_="n"))

    half = math.ceil(len(pairs) / 2)
    tables = (table(("hashtags", "images", "bits"), map(row, some)) for some in (pairs[:half], pairs[half:]) if some)
    return h("div", *tables, class_=f"halves {style}")


def _label_row(contents: Contents, label: int) -> Markup:
    entry = contents.vocabulary.entries[label]
    images = contents.report.members.get(entry.hashtag, {})
    members = [
        h(
            "span",
            h("bdi", member),
            *([h("small", f" {images[member]:,}")] if member in images else []),
            class_="member",
        )
        for member in entry.raw[:_MEMBERS]
    ]
    if len(entry.raw) > _MEMBERS:
        members.append(h("span", f"and {len(entry.raw) - _MEMBERS:,} more", class_="quiet"))
    senses = [h("li", h("code", wnid), " ", _lemmas(contents.lemmas.get(wnid))) for wnid in entry.synsets[:_SENSES]]
    if len(entry.synsets) > _SENSES:
        senses.append(h("li", f"and {len(entry.synsets) - _SENSES:,} more", class_="quiet"))
    many = len(entry.synsets) > 1
    listed = h("ul", *senses) if senses else h("span", "none: the user's own", class_="quiet")
    if many:
        hint = h("small", f" {_hint(entry.hashtag, [contents.lemmas.get(wnid) for wnid in entry.synsets])}")
        listed = h("details", h("summary", f"{len(entry.synsets)} senses", hint), listed)
    kinds = " ".join(kind for kind, is_one in (("merged", len(entry.raw) > 1), ("ambiguous", many)) if is_one)
    return h(
        "tr",
        h("td", number(label + 1), class_="n rank", data_name="rank"),
        h("td", tag(label, entry.hashtag), data_name="label"),
        *(h("td", number(int(s.figures.counts[label])), class_="n", data_name=s.role) for s in contents.sides),
        h("td", *(members if len(entry.raw) > 1 else ()), data_name="merged"),
        h("td", listed, data_name="synsets"),
        data_kinds=kinds or None,
    )


def _lemmas(words: Sequence[str] | None) -> str:
    if words is None:
        return "is no synset of WordNet 3.0"
    return clean(", ".join(words).replace("_", " "), 160)


def _hint(hashtag: str, senses: Iterable[Sequence[str] | None]) -> str:
    """A word for each sense, another than the hashtag where there is one."""
    words = (next((word for word in words if normalize(word) != hashtag), words[0]) for words in senses if words)
    return clean(", ".join(dict.fromkeys(words)).replace("_", " "), 64)


PICTURES_NOTE = f"Pictures are shrunk to {SIDE} px and re-encoded; the data set holds the original files."
