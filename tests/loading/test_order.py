from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.corpus.resample import image_factors
from scale_wsl.loading.order import Order, micro_batch_positions
from tests.loading.fakes import FakeDataset, zipf_rows

FACTORS = np.array([1.0, 2.5, 1.0, 3.0, 1.25, 1.9, 1.0])


def order(seed: int = 0, factors: np.ndarray = FACTORS, manifest_hash: str = "m", resampling: str = "r") -> Order:
    return Order(manifest_hash, factors, seed, resampling=resampling)


def test_the_order_is_pinned() -> None:
    # A checkpoint holds nothing but a counter, so the order behind it must never change: not by an edit here, and not
    # by a NumPy whose shuffle draws otherwise.
    assert order(seed=3).epoch_list(0).tolist() == [3, 3, 6, 4, 0, 2, 3, 5, 5, 1, 1]
    longer = order(seed=3, factors=np.linspace(1, 3, 5000)).epoch_list(7)
    assert hashlib.sha256(longer.astype("<i8").tobytes()).hexdigest()[:16] == "56deb1d0129a5cb8"


def test_every_part_of_the_name_changes_the_order() -> None:
    factors = np.ones(100)
    lists = [
        order(0, factors).epoch_list(0),
        order(0, factors).epoch_list(1),
        order(1, factors).epoch_list(0),
        order(0, factors, manifest_hash="n").epoch_list(0),
        order(0, factors, resampling="s").epoch_list(0),
    ]
    assert len({tuple(one.tolist()) for one in lists}) == len(lists)
    assert all(sorted(one) == list(range(100)) for one in lists)  # natural: each image once, whatever the epoch
    assert order(0, factors).identity != order(1, factors).identity


def test_reading_in_any_manner_gives_the_same_sequence() -> None:
    expected = np.concatenate([order().epoch_list(epoch) for epoch in range(6)])
    read = order()
    for start, stop in ((40, 60), (0, 60), (13, 14), (5, 5), (59, 60), (3, 31)):
        records, epochs, indices = read.records(start, stop)
        assert np.array_equal(records, expected[start:stop])
        for position, epoch, index in zip(range(start, stop), epochs.tolist(), indices.tolist(), strict=True):
            assert read.locate(position) == (epoch, index)
            assert read.epoch_start(epoch) + index == position
            assert read.epoch_list(epoch)[index] == expected[position]


def test_the_epoch_list_cannot_be_changed_by_its_readers() -> None:
    with pytest.raises(ValueError, match="read-only"):
        order().epoch_list(0)[0] = 1


@pytest.mark.parametrize("mode", ["square-root", "uniform"])
def test_images_come_as_often_as_their_factors_say(mode: str) -> None:
    dataset = FakeDataset(zipf_rows(200, labels=30))
    factors = image_factors(dataset.label_ids, dataset.label_start, mode, 0.3)
    assert (factors % 1 > 0).any()
    assert (factors > 2).any()
    drawn = Order.of(dataset, seed=1, resampling=mode, threshold=0.3)
    epochs = 400
    counts = np.stack([np.bincount(drawn.epoch_list(epoch), minlength=200) for epoch in range(epochs)])
    assert (counts >= np.floor(factors)).all()
    assert (counts <= np.ceil(factors)).all()
    deviation = np.sqrt((factors % 1) * (1 - factors % 1) / epochs)
    assert (np.abs(counts.mean(0) - factors) <= 4.5 * deviation + 1e-12).all()
    assert abs(counts.sum(1).mean() - factors.sum()) <= 4.5 * np.sqrt((deviation**2).sum())
    # redrawn each epoch: over two epochs the extras of images do not agree more than chance has it
    assert len({tuple(row.tolist()) for row in counts}) == epochs


def test_of_names_the_rule() -> None:
    dataset = FakeDataset(zipf_rows(50))
    orders = [
        Order.of(dataset, seed=1, resampling=mode, threshold=threshold)
        for mode, threshold in (("natural", 0.1), ("square-root", 0.1), ("square-root", 0.2), ("uniform", 0.1))
    ]
    assert len({one.identity for one in orders}) == 4
    # where nothing is resampled, a threshold that means nothing changes nothing
    assert Order.of(dataset, seed=1, resampling="natural", threshold=0.9).identity == orders[0].identity


@pytest.mark.parametrize("factors", [FACTORS, np.full(7, 2.0)])
def test_a_far_position_is_found_without_building_the_lists_before_it(
    factors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = order(factors=factors)
    expected = [near.locate(position) for position in range(2000)]
    monkeypatch.setattr(Order, "epoch_list", None)
    far = order(factors=factors)
    assert far.locate(1999) == expected[1999]
    assert [far.locate(position) for position in range(2000)] == expected


def test_refuses_what_has_no_order() -> None:
    with pytest.raises(ValueError, match="no order of no images"):
        order(factors=np.ones(0))
    for bad in (0.5, 0.0, -1.0, np.nan, np.inf, 2.0**31):
        with pytest.raises(ValueError, match="at least 1, and finite"):
            order(factors=np.array([1.0, bad]))
    with pytest.raises(ValueError, match="no position -1"):
        order().locate(-1)
    with pytest.raises(ValueError, match="no position -3"):
        order().records(-3, 2)
    good = {"micro_batch": 2, "accumulation": 2, "rank": 0, "world_size": 2}
    for bad_split in ({"rank": 2}, {"rank": -1}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match="there is no micro-batch"):
            micro_batch_positions(0, 0, **(good | bad_split))
    with pytest.raises(ValueError, match="there is no micro-batch"):
        micro_batch_positions(0, 2, **good)
    with pytest.raises(ValueError, match="there is no micro-batch"):
        micro_batch_positions(-4, 0, **good)


splits = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))  # micro-batch, accumulation, world size


@given(splits, st.integers(0, 1000))
def test_a_step_is_dealt_without_gap_or_overlap(split: tuple[int, int, int], counter: int) -> None:
    micro_batch, accumulation, world_size = split
    dealt = [
        position
        for micro_step in range(accumulation)
        for rank in range(world_size)
        for position in micro_batch_positions(
            counter, micro_step, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world_size
        )
    ]
    assert dealt == list(range(counter, counter + micro_batch * accumulation * world_size))


@settings(max_examples=50)
@given(st.lists(st.tuples(splits, st.integers(1, 4)), min_size=1, max_size=6), st.integers(0, 9))
def test_a_run_cut_into_pieces_of_any_shape_sees_every_epoch_whole(
    pieces: list[tuple[tuple[int, int, int], int]], seed: int
) -> None:
    seen: Counter[tuple[int, int]] = Counter()  # (epoch, record), counted on all ranks of all pieces
    counter = 0
    for (micro_batch, accumulation, world_size), steps in pieces:
        shape = {"micro_batch": micro_batch, "accumulation": accumulation, "world_size": world_size}
        for _ in range(steps):
            for rank in range(world_size):
                mine = order(seed)  # each rank of each piece starts with nothing but the counter
                for micro_step in range(accumulation):
                    positions = micro_batch_positions(counter, micro_step, rank=rank, **shape)
                    records, epochs, _ = mine.records(positions.start, positions.stop)
                    seen.update(zip(epochs.tolist(), records.tolist(), strict=True))
            counter += micro_batch * accumulation * world_size
    whole = order(seed)
    last, into = whole.locate(counter)
    expected: Counter[tuple[int, int]] = Counter()
    for epoch in range(last + 1):
        entries = whole.epoch_list(epoch)
        expected.update((epoch, record) for record in (entries if epoch < last else entries[:into]).tolist())
    assert seen == expected
