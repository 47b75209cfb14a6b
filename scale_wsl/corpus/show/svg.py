"""Draws the page's charts as SVG that stands in the page itself.

Must never name a colour or a font: those are the style sheet's, in light and dark. Says nothing that is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.show.markup import Markup, clean, h, number

__all__ = [
    "Curve",
    "Point",
    "count_step",
    "heat_map",
    "heat_step",
    "histogram",
    "largest_shared",
    "rank_frequency",
    "step_begins",
]

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 18, 16, 58
_MOST_DOTS = 120
CELL, LABELS = 16, 132
"""Of the heat map: a cell's side, and the room for the names."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One data set's hashtags by rank."""

    name: str
    ranks: NDArray[np.int64]
    counts: NDArray[np.int64]
    fit: NDArray[np.float64] | None
    """What the fitted law gives these ranks."""


def rank_frequency(curves: Sequence[Curve]) -> tuple[Markup, list[list[Point]]]:
    """Images against rank on two logarithmic axes, and where each curve's points are in the drawing."""
    top = max(int(curve.counts.max()) for curve in curves)
    bottom = min(int(curve.counts.min()) for curve in curves)
    last = max(int(curve.ranks.max()) for curve in curves)
    low, high = math.floor(math.log10(bottom)), max(math.log10(top) + 0.08, math.log10(bottom) + 0.5)
    right = max(math.log10(last), 0.3)

    def x(rank: float) -> float:
        return _LEFT + math.log10(rank) / right * (_WIDTH - _LEFT - _RIGHT)

    def y(count: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(count) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    axes, lines = [], []
    for value in _ticks(0, right):
        axes.append(_line(x(value), _TOP, x(value), _HEIGHT - _BOTTOM, "grid"))
        axes.append(_text(x(value), _HEIGHT - _BOTTOM + 22, _short(value), "middle"))
    for value in _ticks(low, high):
        axes.append(_line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), "grid"))
        axes.append(_text(_LEFT - 10, y(value) + 5, _short(value), "end"))
    axes.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, "rank of the hashtag", "middle", "axis"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    axes.append(_text(16, middle, "images", "middle", "axis", transform=f"rotate(-90 16 {middle:g})"))
    places = []
    for series, curve in enumerate(curves):
        points = [(x(rank), y(count)) for rank, count in zip(curve.ranks, curve.counts, strict=True)]
        places.append([(round(across, 1), round(down, 1)) for across, down in points])
        if curve.fit is not None:
            ends = zip(curve.ranks[[0, -1]].tolist(), curve.fit[[0, -1]].tolist(), strict=True)
            (x1, y1), (x2, y2) = ((x(rank), y(count)) for rank, count in ends)
            lines.append(_line(x1, y1, x2, y2, f"fit s{series}"))
        lines.append(h("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points), class_=f"curve s{series}"))
        if len(points) <= _MOST_DOTS:
            lines += [h("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=2.4, class_=f"dot s{series}") for a, b in points]
    frame = h("rect", x=_LEFT, y=_TOP, width=_WIDTH - _LEFT - _RIGHT, height=_HEIGHT - _TOP - _BOTTOM)
    inside = h("g", *lines, clip_path="url(#plot)")  # a fit may leave the plot
    parts = (h("clipPath", frame, id="plot"), *axes, inside, h("circle", r=6, class_="marker off"))
    return _svg(_WIDTH, _HEIGHT, "curve-chart", "Rank and frequency of the hashtags", *parts), places


def histogram(names: Sequence[str], per_image: Sequence[NDArray[np.int64]], most: int = 20) -> Markup:
    """Shares of the images with 1, 2, 3, ... labels, side by side; those with `most` and more in one bar."""
    last = max(len(counts) for counts in per_image) - 1
    bins = list(range(1, min(last, most) + 1))
    shares = []
    for counts in per_image:
        padded = np.zeros(max(len(counts), len(bins) + 1), np.int64)
        padded[: len(counts)] = counts
        folded = padded[1 : len(bins) + 1].copy()
        folded[-1] += padded[len(bins) + 1 :].sum()
        shares.append((folded, folded / counts.sum()))
    top = max(float(share.max()) for _, share in shares)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if top / step <= 5 or step == 0.25)
    height = math.ceil(top / step - 1e-9) * step
    room = (_WIDTH - _LEFT - _RIGHT) / len(bins)
    bar = min(30.0, 0.78 * room / len(names))

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / height * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in range(round(height / step) + 1):
        parts.append(_line(_LEFT, y(tick * step), _WIDTH - _RIGHT, y(tick * step), "grid"))
        parts.append(_text(_LEFT - 10, y(tick * step) + 5, f"{tick * step:.0%}", "end"))
    for place, labels in enumerate(bins):
        centre = _LEFT + (place + 0.5) * room
        text = f"{labels}+" if labels == most < last else str(labels)
        parts.append(_text(centre, _HEIGHT - _BOTTOM + 22, text, "middle"))
        for series, (name, (counts, share)) in enumerate(zip(names, shares, strict=True)):
            if counts[place]:
                left = centre + (series - len(names) / 2) * bar
                told = f"{name}: {number(int(counts[place]))} images with {text} labels, {share[place]:.1%}"
                upper, tall = y(share[place]), _HEIGHT - _BOTTOM - y(share[place])
                box = {"x": left, "y": upper, "width": bar - 1.5, "height": tall}
                shape = {name: f"{value:.1f}" for name, value in box.items()}
                parts.append(h("rect", h("title", told), class_=f"bar s{series}", rx=2, **shape))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, "labels of an image", "middle", "axis"))
    return _svg(_WIDTH, _HEIGHT, "histogram", "Labels per image", *parts)


def heat_step(bits: float) -> str:
    """The style of a cell: p1 to p9 for every half bit above chance, n1 to n4 below, none for no shared image."""
    if bits == -math.inf:
        return "p0"
    if bits >= 0:
        return f"p{min(9, 1 + int(bits / 0.5))}"
    return f"n{min(4, 1 + int(-bits / 0.5))}"


def count_step(images: int, largest: int) -> int:
    """0 for no shared image, 1 to 9 for up to `largest`, even in the square root: counts are far apart."""
    return min(9, 1 + math.isqrt(81 * images // largest)) if images else 0


def step_begins(step: int, largest: int) -> int:
    """The fewest images that `count_step` gives this step, 1 to 9, or a higher one."""
    return max(1, -(-((step - 1) ** 2) * largest // 81))


def largest_shared(counts: NDArray[np.int64]) -> int:
    """The largest count outside the diagonal, at least 1."""
    return int(counts[~np.eye(len(counts), dtype=np.bool_)].max(initial=1))


def heat_map(names: Sequence[str], counts: NDArray[np.int64], bits: NDArray[np.float64]) -> Markup:
    """Two measures of how often hashtags share images; the style sheet shows one: classes p or n, and c.

    Args:
        names: `[M]`
        counts: `[M, M]`, images that have both.
        bits: `[M, M]`, pointwise mutual information.
    """
    size = len(names)
    largest = largest_shared(counts)
    side = LABELS + size * CELL + 2
    parts = []
    for place, name in enumerate(names):
        short, middle = clean(name, 17), LABELS + (place + 0.5) * CELL
        parts.append(_text(LABELS - 6, middle + 4, short, "end", data_row=place))
        turn = f"translate({middle + 4:g} {LABELS - 6}) rotate(-90)"
        parts.append(h("text", short, transform=turn, data_column=place))
    for row in range(size):
        for column in range(size):
            if row == column:
                style = "own"
            else:
                step = count_step(int(counts[row, column]), largest)
                style = f"{heat_step(float(bits[row, column]))} c{step}"
            x, y = LABELS + column * CELL, LABELS + row * CELL
            parts.append(h("rect", x=x, y=y, width=CELL - 1, height=CELL - 1, class_=style))
    parts.append(h("rect", class_="cursor off", width=CELL + 1, height=CELL + 1))
    return _svg(side + 4, side, "heat-chart", "Hashtags on the same images", *parts)


def _svg(width: int, height: int, identity: str, label: str, *parts: Markup) -> Markup:
    return h("svg", *parts, viewBox=f"0 0 {width} {height}", id=identity, role="img", aria_label=label)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return h("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=style)


def _text(x: float, y: float, text: str, anchor: str, style: str | None = None, **more: str | int) -> Markup:
    return h("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=style, **more)


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms, and 2 and 5 times those where there are few."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    values = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]


def _short(value: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
