"""Walks the grid of docs/engines.md: every combination is the float64 process's training, or refused with a reason."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from filelock import FileLock

from tests.engines import grid

_ENGINES = pytest.mark.parametrize("engine", grid.ENGINES)
_Found = dict[grid.Cell, grid.Outcome]


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], _Found]:
    """An engine's part of the grid, walked once, by whichever of the processes that share the tests asks first."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder if worker_id == "master" else folder.parent

    def walked(engine: str) -> _Found:
        path = shared / f"grid-{engine}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(pickle.dumps(grid.walk(engine)))
            found: _Found = pickle.loads(path.read_bytes())  # noqa: S301 - of a moment ago
        return found

    return walked


@_ENGINES
def test_every_combination_is_the_reference_or_is_refused(engine: str, walk: Callable[[str], _Found]) -> None:
    wrong = [
        (cell, outcome)
        for cell, outcome in walk(engine).items()
        if not (outcome.refused or (outcome.equal if cell.precision == "fp32" else outcome.near))
    ]
    assert not wrong


def test_hsdp_in_two_groups_of_two_is_the_reference() -> None:
    found = grid.walk_hsdp_on_four()
    assert len(found) == 48
    wrong = [
        (cell, outcome)
        for cell, outcome in found.items()
        if not (outcome.equal if cell.precision == "fp32" else outcome.near)
    ]
    assert not wrong
    shown = [row[:4] for row in grid.documented() if row[0] == "hsdp 2 x 2"]
    assert shown == [row[:4] for row in grid.rows("hsdp 2 x 2", found)]


@_ENGINES
def test_in_bf16_every_engine_rounds_as_ddp_does(engine: str, walk: Callable[[str], _Found]) -> None:
    """bf16 is far from float64, but alike on all engines: they differ by the order in which fp32 sums are taken."""
    alike = walk("ddp")
    for cell, outcome in walk(engine).items():
        if cell.precision == "bf16" and not outcome.refused:
            same = alike[cell._replace(engine="ddp")]
            assert outcome.direction == pytest.approx(same.direction, rel=1e-3), cell
            assert outcome.loss == pytest.approx(same.loss, rel=1e-3), cell


@_ENGINES
def test_the_document_shows_this_outcome(engine: str, walk: Callable[[str], _Found]) -> None:
    """Which combinations are equal; distances differ in their last digits from machine to machine."""
    shown = [row[:4] for row in grid.documented() if row[0] == engine]
    assert shown == [row[:4] for row in grid.rows(engine, walk(engine))]


def test_nothing_is_refused_today(walk: Callable[[str], _Found]) -> None:
    """All 1,024 combinations run; where that ends, docs/engines.md has to name what is refused."""
    found = {cell: outcome for engine in grid.ENGINES for cell, outcome in walk(engine).items()}
    assert len(found) == 1024
    assert {outcome.refused for outcome in found.values()} == {""}
