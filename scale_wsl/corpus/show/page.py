"""One HTML file that shows a data set and needs nothing else: no network, no other file, no server.

Must never let anything from the data become markup or script, and never write when or where it was made: the same
data sets and seed give the same bytes (with the same version of Pillow, which encodes the pictures).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from scale_wsl.corpus.show import sections
from scale_wsl.corpus.show.contents import Contents, Side, gather_contents
from scale_wsl.corpus.show.left_out import left_out, origin
from scale_wsl.corpus.show.markup import Markup, clean, h, json_block
from scale_wsl.corpus.show.numbers import ranked, spread_ranks
from scale_wsl.corpus.show.svg import CELL, LABELS, Curve, rank_frequency
from scale_wsl.errors import UserError
from scale_wsl.files import published_file

__all__ = ["page_of", "write_page"]

_POINTS = 300  # of each curve
_LABELS = 32  # of an image that are listed
_LONGEST_KEY = 120


def write_page(data: str | Path, out: str | Path, *, samples: int = 48, seed: int = 0) -> Path:
    """Make the page of a data set, or of all data sets in a folder that `prepare` has made.

    Bounded whatever the size of the data: about 5 MB, most of it pictures, with the default number of samples.

    Args:
        data: The folder.
        out: The file to write, `.html`; one that is there is replaced.
        samples: Images drawn at random from each data set. At most 480 others are added so that the
            hashtags in the charts and tables have some to show; with 0, there are no pictures.
        seed: Of these draws.

    Returns:
        `out`.

    Raises:
        UserError: There is no data set, or something in the folder is damaged; `out` cannot be written or is no name of
            a page; `samples` or `seed` is out of range.
    """
    data, out = Path(data), Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} is no name for the page: it must end in .html")
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file for the page")
    page = page_of(gather_contents(data, samples, seed)).encode()
    try:
        with published_file(out) as aside:
            aside.write_bytes(page)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return out


def page_of(contents: Contents) -> str:
    """The whole page."""
    style, script = (resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    curves, tags = _curves(contents.sides), _Tags(contents)
    chart, places = rank_frequency(curves)
    embedded = {
        "sides": [{"role": side.role, "samples": side.samples} for side in contents.sides],
        "pictures": [_picture(side, place, tags) for side in contents.sides for place in range(len(side.pictures))],
        "curves": _curve_points(contents.sides, curves, places, tags),
        "heat": {
            "labels": [tags.add(label) for label in contents.shared.order],
            "images": contents.sides[0].figures.images,
            "counts": contents.shared.counts.tolist(),
            "cell": CELL,
            "room": LABELS,
        },
    }
    pairs = (*contents.shared.by_bits, *contents.shared.by_images)
    for label in (*contents.rows, *(pair.first for pair in pairs), *(pair.second for pair in pairs)):
        tags.add(label)
    embedded["tags"] = tags.found
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_allowed(style)}",
            f"script-src {_allowed(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    names = [str(side.dataset.name) for side in contents.sides]
    links = [
        (section, text) for section, text in _SECTIONS if section != "images" or any(s.pictures for s in contents.sides)
    ]
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="referrer", content="no-referrer"),
        h("meta", name="color-scheme", content="light dark"),
        h("title", " · ".join(names)),
        h("link", rel="icon", href="data:,"),
        h("style", Markup(style)),
    )
    body = h(
        "body",
        h("a", "to the contents", href="#main", class_="skip"),
        h("div", sections.header(contents), class_="hero"),
        h("nav", h("div", *(h("a", text, href=f"#{section}") for section, text in links)), aria_label="sections"),
        h(
            "main",
            h("noscript", h("p", "Without JavaScript the charts and tables stand, and the pictures are missing.")),
            *([sections.gallery(contents)] if any(side.pictures for side in contents.sides) else []),
            sections.frequency(contents, chart),
            sections.per_image(contents),
            sections.cooccurrence(contents),
            sections.vocabulary(contents),
            left_out(contents),
            origin(contents),
            id="main",
        ),
        h("footer", h("p", sections.PICTURES_NOTE)),
        h("div", id="tip", class_="off", role="status"),
        h(
            "dialog",
            h("div", id="large"),
            h("button", "close", type="button", id="close", class_="plain"),
            id="picture",
        ),
        json_block("data", embedded),
        h("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{h('html', head, body, lang='en')}\n"


_SECTIONS = (
    ("images", "Images"),
    ("frequency", "Frequency"),
    ("labels", "Labels an image"),
    ("together", "Together"),
    ("vocabulary", "Labels"),
    ("left-out", "Left out"),
    ("origin", "Origin"),
)


def _allowed(text: str) -> str:
    """What a policy calls the one inline element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Tags:
    """Labels that the page's script has to know: `found` is label -> name and images in each data set."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self.found: dict[int, list[Any]] = {}

    def add(self, label: int) -> int:
        if label not in self.found:
            counts = [int(side.figures.counts[label]) for side in self._contents.sides]
            self.found[label] = [self._contents.vocabulary.entries[label].hashtag, *counts]
        return label


def _picture(side: Side, place: int, tags: _Tags) -> dict[str, Any]:
    picture = side.pictures[place]
    labels = side.dataset.labels(picture.index).tolist()
    return {
        "side": side.role,
        "sample": place < side.samples,
        "key": clean(str(side.dataset.keys[picture.index]), _LONGEST_KEY),
        "labels": [tags.add(label) for label in labels[:_LABELS]],
        "more": max(0, len(labels) - _LABELS),
        "source": picture.source,
        "refused": clean(picture.refused, 200),
    }


def _curves(sides: Iterable[Side]) -> list[Curve]:
    curves = []
    for side in sides:
        order = ranked(side.figures.counts)
        ranks = spread_ranks(len(order), _POINTS)
        law = side.figures.zipf
        counts = side.figures.counts[order[ranks - 1]]
        curves.append(Curve(side.role, ranks, counts, None if law is None else law.expected(ranks)))
    return curves


def _curve_points(sides: Iterable[Side], curves: Iterable[Curve], places: Iterable[Any], tags: _Tags) -> list[Any]:
    """Of each curve: x, y, rank, label of each point."""
    found = []
    for side, curve, points in zip(sides, curves, places, strict=True):
        labels = ranked(side.figures.counts)[np.asarray(curve.ranks) - 1].tolist()
        rows = zip(points, curve.ranks.tolist(), labels, strict=True)
        found.append([[*point, rank, tags.add(label)] for point, rank, label in rows])
    return found
