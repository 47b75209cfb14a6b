"""Walks the grid of docs/engines.md: every combination is the float64 process's training, or refused with a reason."""

from __future__ import annotations

import pytest

from tests.engines import grid

# Where several processes share the tests, one of them walks an engine's part.
_ENGINES = pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=pytest.mark.xdist_group(f"grid of {engine}")) for engine in grid.ENGINES]
)


@_ENGINES
def test_every_combination_is_the_reference_or_is_refused(engine: str) -> None:
    wrong = [
        (cell, outcome)
        for cell, outcome in grid.walk(engine).items()
        if not (outcome.refused or (outcome.equal if cell.precision == "fp32" else outcome.near))
    ]
    assert not wrong


def test_hsdp_in_two_groups_of_two_is_the_reference() -> None:
    found = grid.walk_hsdp_on_four()
    assert len(found) == 96
    wrong = [
        (cell, outcome)
        for cell, outcome in found.items()
        if not (outcome.equal if cell.precision == "fp32" else outcome.near)
    ]
    assert not wrong
    assert [row[:4] for row in grid.documented() if row[0] == "hsdp 2 x 2"] == [row[:4] for row in grid.rows_on_four()]


@_ENGINES
def test_in_bf16_every_engine_rounds_as_ddp_does(engine: str) -> None:
    """bf16 is far from float64, but alike on all engines: they differ by the order in which fp32 sums are taken."""
    alike = grid.walk("ddp")
    for cell, outcome in grid.walk(engine).items():
        if cell.precision == "bf16" and not outcome.refused:
            same = alike[cell._replace(engine="ddp")]
            assert outcome.direction == pytest.approx(same.direction, rel=1e-3), cell
            assert outcome.loss == pytest.approx(same.loss, rel=1e-3), cell


@_ENGINES
def test_the_document_shows_this_outcome(engine: str) -> None:
    """Which combinations are equal; distances differ in their last digits from machine to machine."""
    shown = [row[:4] for row in grid.documented() if row[0] == engine]
    assert shown == [row[:4] for row in grid.rows(engine)]


@_ENGINES
def test_nothing_is_refused_today(engine: str) -> None:
    """All 1,024 combinations run; where that ends, docs/engines.md has to name what is refused."""
    assert {outcome.refused for outcome in grid.walk(engine).values()} == {""}
