from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.show.svg import Curve, count_step, heat_map, heat_step, histogram, rank_frequency, step_begins
from tests.corpus.show.test_markup import Parsed


def elements(markup: str, tag: str, style: str) -> list[dict[str, str | None]]:
    return [a for name, a in Parsed(markup).tags if name == tag and style in (a.get("class") or "").split()]


@pytest.mark.parametrize(
    ("bits", "step"),
    [
        (-math.inf, "p0"),
        (0.0, "p1"),
        (0.49, "p1"),
        (0.5, "p2"),
        (4.1, "p9"),
        (40.0, "p9"),
        (-0.1, "n1"),
        (-1.2, "n3"),
        (-9, "n4"),
    ],
)
def test_steps_of_information(bits: float, step: str) -> None:
    assert heat_step(bits) == step


@given(st.integers(1, 10**9), st.integers(1, 9))
def test_steps_of_counts_begin_where_the_legend_says(largest: int, step: int) -> None:
    least = step_begins(step, largest)
    assert count_step(0, largest) == 0
    assert count_step(largest, largest) == 9
    assert count_step(least, largest) >= step
    assert least == 1 or count_step(least - 1, largest) < step


def test_points_lie_on_straight_lines_where_the_law_is_exact() -> None:
    ranks = np.array([1, 10, 100])
    chart, (places, _) = rank_frequency(
        [Curve("train", ranks, 10_000 // ranks, 10_000 / ranks), Curve("val", ranks[:2], np.array([5, 5]), None)]
    )
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.11)
    assert y3 > y1
    (fit,) = elements(chart, "line", "fit")
    assert [float(fit[key] or "") for key in ("x1", "y1", "x2", "y2")] == pytest.approx([x1, y1, x3, y3], abs=0.11)
    assert len(elements(chart, "path", "curve")) == 2


@pytest.mark.parametrize("count", [1, 7, 10**12])
def test_a_curve_of_one_point_is_drawn(count: int) -> None:
    chart, places = rank_frequency([Curve("train", np.array([1]), np.array([count]), None)])
    assert all(math.isfinite(value) for value in places[0][0])
    assert "nan" not in chart


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=40), min_size=1, max_size=3))
def test_bars_have_the_heights_of_their_shares(tails: list[list[int]]) -> None:
    sides = [np.array([0, 1, *tail]) for tail in tails]
    chart = histogram([f"side{i}" for i in range(len(sides))], sides, 20)
    scale = []
    for series, counts in enumerate(sides):
        bars = elements(chart, "rect", f"s{series}")
        folded = [*counts[1:20], counts[20:].sum()] if max(map(len, sides)) > 20 else [*counts[1:]]
        expected = [count for count in folded if count]
        assert len(bars) == len(expected)
        scale += [(float(bar["height"] or ""), n / counts.sum()) for bar, n in zip(bars, expected, strict=True)]
    height, share = max(scale)
    for other, its in scale:
        assert other == pytest.approx(height * its / share, abs=0.2)
    told = [int(n.replace(",", "")) for n in re.findall(r"side0: ([\d,]+) images", chart)]
    assert sum(told) == sides[0].sum()


def test_cells_of_the_heat_map_stand_in_rows() -> None:
    counts = np.array([[9, 4, 0], [4, 8, 1], [0, 1, 7]])
    bits = np.array([[0, 1.1, -np.inf], [1.1, 0, -0.7], [-np.inf, -0.7, 0]])
    chart = heat_map(["a", "<b>", "c" * 90], counts, bits)
    cells = [a["class"] for name, a in Parsed(chart).tags if name == "rect"]
    assert cells == ["own", "p3 c9", "p0 c0", "p3 c9", "own", "n2 c5", "p0 c0", "n2 c5", "own", "cursor off"]
    assert "&lt;b&gt;" in chart
    assert "c" * 18 not in chart
