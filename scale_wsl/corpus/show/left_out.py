"""The sections on what a preparation left out, and where the data set is from.

Must never compute a figure: it only words what `report` holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scale_wsl.corpus.show.contents import Contents
from scale_wsl.corpus.show.markup import Markup, clean, h, number
from scale_wsl.corpus.show.parts import bar, bars, definitions, section
from scale_wsl.corpus.show.report import Unplaced

__all__ = ["left_out", "origin"]

_STOPPED = 100  # hashtags of the stop list that are named
_NEAR = {
    "images": "images in clusters",
    "largest": "images in the largest",
    "near_validation": "left out of training, near a validation image",
}


def left_out(contents: Contents) -> Markup:
    """What did not come into the data sets, and why."""
    report = contents.report
    parts: list[Markup] = []
    if report.dropped or report.posts is not None:
        parts += [h("h3", "Posts"), _posts(contents)]
    if report.near_identical:
        near = [(_NEAR.get(key, key.replace("_", " ")), number(value)) for key, value in report.near_identical.items()]
        parts += [h("h3", "Near-identical images"), definitions(near)]
    if report.dropped_tags:
        parts += [h("h3", "Tags that are no hashtags"), bars(report.dropped_tags)]
    if report.unplaced:
        parts.append(h("h3", "Hashtags that are no labels"))
        parts += [_unplaced(reason, some) for reason, some in report.unplaced.items()]
    if report.coverage:
        parts += [h("h3", "Coverage of the vocabulary"), definitions(_coverage(report.coverage))]
    if not parts:
        parts.append(h("p", "No report of the preparation is beside the data set.", class_="quiet"))
    return section("left-out", "What was left out", *parts)


def origin(contents: Contents) -> Markup:
    """Licence, attribution, hashes and settings."""
    report, facts = contents.report, []
    for key in ("licence", "attribution"):
        told = dict.fromkeys(_text_of(side.dataset.manifest.get(key)) for side in contents.sides)
        facts.append((key, " / ".join(told)))
    for side in contents.sides:
        facts.append((f"manifest of {side.role}, SHA-256", side.dataset.manifest_hash))
    facts.append(("vocabulary", contents.sides[0].dataset.vocabulary_hash))
    rule = contents.vocabulary
    size = "" if rule.size is None else f", the {rule.size:,} most frequent"
    facts.append(("labels are", f"on {rule.min_count:,} training images or more{size}"))
    facts += [(f"setting {key}", value) for key, value in report.settings.items()]
    if report.rule:
        facts.append(("vocabulary's rule", report.rule))
    if rule.stop:
        named = ", ".join(clean(hashtag, 100) for hashtag in rule.stop[:_STOPPED])
        facts.append(("stop list", named + (", …" if len(rule.stop) > _STOPPED else "")))
    if report.fingerprint:
        facts.append(("source", report.fingerprint))
    return section("origin", "Where it is from", definitions(facts, style="facts"))


def _posts(contents: Contents) -> Markup:
    report = contents.report
    kept = sum(side.figures.images for side in contents.sides)
    told = [] if report.posts is None else [("posts read", report.posts)]
    told += [] if report.copies is None else [("merged into an exact copy", report.copies)]
    told.append(("images kept", kept))
    reasons = []
    for reason in dict.fromkeys((*report.dropped, *report.examples)):
        found = report.examples.get(reason, [])
        items = (
            h("li", h("code", h("bdi", key)), *([" ", h("bdi", detail)] if detail else [])) for key, detail in found
        )
        named = h("details", h("summary", "examples"), h("ul", *items)) if found else ""
        reasons.append((reason, report.dropped.get(reason), named))
    largest = max([count for _, count, _ in reasons if count], default=1)
    bars = (bar(reason, count, largest, named) for reason, count, named in reasons)
    figures = definitions((name, number(count)) for name, count in told)
    return Markup(figures + (h("ul", *bars, class_="bars") if reasons else h("p", "None was dropped.", class_="quiet")))


def _unplaced(reason: str, some: Unplaced) -> Markup:
    pairs = "" if some.pairs is None else f", {some.pairs:,} times"
    title = (h("bdi", reason), h("small", f" {'more than ' * some.at_least}{some.distinct:,} distinct{pairs}"))
    if not some.most_frequent:
        return h("p", *title, class_="reason")
    chips = (
        h("span", h("bdi", hashtag), h("small", f" {posts:,}"), class_="member")
        for hashtag, posts in some.most_frequent
    )
    listed = len(some.most_frequent)
    rest = h("p", f"{listed:,} of {some.distinct:,} are listed, the most frequent", class_="quiet")
    parts = (h("p", *chips, class_="members"), *([rest] if some.distinct > listed else []))
    return h("details", h("summary", *title), *parts, open=True)


def _coverage(figures: Mapping[str, int | float]) -> list[tuple[str, str]]:
    """Those of `hashtags.report.Coverage` in words, any others by their names."""
    left, told = dict(figures), []

    def share(name: str, parts: Sequence[str], whole: str) -> None:
        if all(part in left for part in parts) and left.get(whole):
            values = dict.fromkeys(left.pop(part) for part in parts)  # one where the ends of a range are equal
            shares = (f"{number(value)} ({value / left[whole]:.1%})" for value in values)
            told.append((name, " to ".join(shares)))

    share("posts with a hashtag that has a place", ["known"], "posts")
    share("posts that keep a label", ["covered_least", "covered_most"], "posts")
    share("(post, label) pairs that are kept", ["kept_pairs"], "pairs")
    return told + [(key.replace("_", " "), number(value, 3)) for key, value in left.items()]


def _text_of(value: object) -> str:
    return clean(value, 2000) if isinstance(value, str) and value else "not said"
