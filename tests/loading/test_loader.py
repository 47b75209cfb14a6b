from __future__ import annotations

import dataclasses
import logging
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.loading import Batch, DataConfig, EvalLoader, TrainLoader, normalize
from scale_wsl.loading.decode import decode, eval_crop, mean_colour
from tests.loading.batches import ALONE, CONFIG, order_of, take
from tests.loading.fakes import FakeDataset, colour_of, encode, zipf_rows


def same(first: Batch, second: Batch) -> bool:
    return (first.corrupt, first.errors) == (second.corrupt, second.errors) and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("images", "ids", "mass", "records")
    )


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_row_is_its_record() -> None:
    dataset = FakeDataset([[3], [0, 2, 7], [1, 2], [], [5, 6]])
    batches = take(dataset, 4)
    seen = set()
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((4, 3, 16, 16), torch.uint8)
        assert (batch.ids.shape, batch.ids.dtype) == ((4, 3), torch.int64)
        assert (batch.mass.shape, batch.mass.dtype) == ((4, 3), torch.float32)
        assert (batch.records.shape, batch.records.dtype) == ((4,), torch.int64)
        assert (batch.corrupt, batch.errors) == (0, ())
        for row, record in enumerate(batch.records.tolist()):
            seen.add(record)
            assert batch.images[row].flatten(1).unique(dim=1).flatten().tolist() == list(colour_of(record))
            labels = dataset.rows[record].tolist()
            assert batch.ids[row].tolist() == labels + [-1] * (3 - len(labels))
            mass = [1 / len(labels)] * len(labels) if labels else []
            assert batch.mass[row].tolist() == pytest.approx(mass + [0.0] * (3 - len(labels)))
    assert seen == set(range(5))


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_bits_for_any_number_of_workers(workers: int) -> None:
    dataset = FakeDataset(zipf_rows(23), files={4: b"no image"}, noise=True)
    alone = take(dataset, 12)
    assert sum(batch.corrupt for batch in alone) >= 1
    config = dataclasses.replace(CONFIG, workers=workers, prefetch=2)
    for first, second in zip(alone, take(dataset, 12, config), strict=True):
        assert same(first, second)
    assert not any(same(first, second) for first, second in pairwise(alone))


def test_augmentation_is_drawn_anew_for_each_position() -> None:
    square = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    dataset = FakeDataset([[0]], files={0: encode(square)})

    def crops(config: DataConfig) -> torch.Tensor:
        return torch.cat([batch.images for batch in take(dataset, 5, config)]).flatten(1).unique(dim=0)

    assert len(crops(CONFIG)) == 20
    # Of a square, no part with the whole area and another aspect ratio fits: only mirroring is left to draw.
    whole = dataclasses.replace(CONFIG, min_scale=1.0)
    expected = torch.from_numpy(np.asarray(Image.fromarray(square).resize((16, 16), Image.Resampling.BILINEAR)).copy())
    expected = expected.permute(2, 0, 1)
    assert torch.equal(crops(dataclasses.replace(whole, flip=False)), expected.reshape(1, -1))
    both = torch.stack([expected, expected.flip(2)]).flatten(1).unique(dim=0)
    assert torch.equal(crops(whole), both)


def test_iterating_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(FakeDataset(zipf_rows(9)), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_to_moves_every_tensor() -> None:
    (batch,) = take(FakeDataset(zipf_rows(9), files=dict.fromkeys(range(9), b"")), 1)
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in ("images", "ids", "mass", "records")} == {"meta"}
    assert (moved.corrupt, moved.errors) == (4, batch.errors)


# --- the contract ----------------------------------------------------------------------------------------------------

# micro-batch, accumulation, world size, workers, steps; 264 samples over 23 images: seven epochs or so
PIECES = [
    (4, 3, 1, 0, 2),
    (3, 2, 2, 2, 3),
    (1, 5, 3, 0, 2),
    (2, 2, 3, 1, 4),
    (3, 1, 4, 0, 5),
    (5, 1, 1, 2, 3),
    (7, 1, 3, 0, 3),
]


def test_a_run_resumed_in_other_shapes_loses_and_repeats_nothing() -> None:
    dataset = FakeDataset(zipf_rows(23), noise=True)
    order = order_of(dataset)
    counter = 0
    images, records = [], []
    for micro_batch, accumulation, world_size, workers, steps in PIECES:
        config = dataclasses.replace(CONFIG, workers=workers)
        split = {"micro_batch": micro_batch, "accumulation": accumulation, "world_size": world_size, "start": counter}
        ranks = [take(dataset, steps * accumulation, config, rank=rank, **split) for rank in range(world_size)]
        for batches in zip(*ranks, strict=True):  # each micro-step, its ranks in order: the order of positions
            images.extend(batch.images for batch in batches)
            records.extend(batch.records for batch in batches)
        counter += steps * accumulation * micro_batch * world_size
    assert counter == sum(len(one) for one in records)
    seen = torch.cat(records).numpy()

    # Counted by epoch, without any rule of where a sample comes: each image floor(r) or ceil(r) times.
    epochs, _ = order.locate(counter)
    assert epochs >= 5
    lengths = {len(order.epoch_list(epoch)) for epoch in range(epochs)}
    assert len(lengths) > 1
    for epoch in range(epochs):
        part = seen[order.epoch_start(epoch) : order.epoch_start(epoch + 1)]
        assert sorted(part) == sorted(order.epoch_list(epoch))

    # And the same samples, cropped the same way, as one uninterrupted process sees.
    whole = take(dataset, counter // 4)
    assert np.array_equal(torch.cat([batch.records for batch in whole]), seen)
    assert torch.equal(torch.cat([batch.images for batch in whole]), torch.cat(images))


@pytest.mark.parametrize("shape", [(12, 1, 1), (1, 12, 1), (2, 3, 2), (3, 1, 4), (4, 1, 3), (1, 4, 3)])
def test_a_step_has_the_same_samples_however_it_is_dealt(shape: tuple[int, int, int]) -> None:
    dataset = FakeDataset(zipf_rows(23))
    micro_batch, accumulation, world_size = shape
    for step in range(3):
        start = 100 + 12 * step
        expected = sorted(order_of(dataset).records(start, start + 12)[0].tolist())
        split = {"micro_batch": micro_batch, "accumulation": accumulation, "world_size": world_size, "start": start}
        drawn = [take(dataset, accumulation, rank=rank, **split) for rank in range(world_size)]
        assert sorted(record for rank in drawn for batch in rank for record in batch.records.tolist()) == expected


def test_refuses_an_order_of_other_images_and_an_impossible_split() -> None:
    dataset = FakeDataset(zipf_rows(9))
    with pytest.raises(ValueError, match="the order is one of 10 images, but the data set has 9"):
        TrainLoader(dataset, order_of(FakeDataset(zipf_rows(10))), CONFIG, **ALONE)
    with pytest.raises(ValueError, match="there is no micro-batch"):
        TrainLoader(dataset, order_of(dataset), CONFIG, **(ALONE | {"rank": 1}))
    with pytest.raises(ValueError, match="no batch of 4 for rank 2 of 2"):
        EvalLoader(dataset, CONFIG, micro_batch=4, rank=2, world_size=2)


# --- a prepared data set ---------------------------------------------------------------------------------------------


def test_workers_read_a_prepared_data_set_as_the_trainer_does(emoji_corpus: Path) -> None:
    train, validation = (Dataset.open(find_dataset(emoji_corpus, role)) for role in ("train", "val"))
    assert len(train.manifest["shards"]) > 1
    with_workers = dataclasses.replace(CONFIG, workers=2)
    pairs = list(zip(take(train, 30, micro_batch=16), take(train, 30, with_workers, micro_batch=16), strict=True))
    assert all(same(alone, together) for alone, together in pairs)
    records = torch.cat([alone.records for alone, _ in pairs])
    assert set(train.shard[records].tolist()) == set(range(len(train.manifest["shards"])))

    loaders = [
        [EvalLoader(validation, config, micro_batch=4, rank=rank, world_size=2) for rank in range(2)]
        for config in (CONFIG, with_workers)
    ]
    alone, together = ([batch for loader in ranks for batch in loader] for ranks in loaders)
    assert all(same(first, second) for first, second in zip(alone, together, strict=True))
    records = torch.cat([batch.records for batch in together])
    assert sorted(records[records >= 0].tolist()) == list(range(len(validation)))
    assert not any(batch.corrupt for batch in together)
    for batch in together:
        for record, ids in zip(batch.records.tolist(), batch.ids.tolist(), strict=True):
            assert [i for i in ids if i >= 0] == (validation.labels(record).tolist() if record >= 0 else [])


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [1, 12, 13])
def test_evaluation_sees_each_record_once_in_as_many_batches_on_each_rank(world_size: int, images: int) -> None:
    dataset = FakeDataset(zipf_rows(images))
    loaders = [
        EvalLoader(dataset, CONFIG, micro_batch=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    ranks = [list(loader) for loader in loaders]
    assert (
        {len(batches) for batches in ranks} == {len(loader) for loader in loaders} == {-(-images // (3 * world_size))}
    )
    rows = torch.cat([batch.records for batches in ranks for batch in batches])
    assert sorted(rows[rows >= 0].tolist()) == list(range(images))
    for batch in (batch for batches in ranks for batch in batches):
        padding = batch.records < 0
        assert len(batch.records) == 3
        assert batch.corrupt == 0
        assert (batch.ids[padding] == -1).all()
        assert (batch.mass[padding] == 0).all()
        assert (normalize(batch.images)[padding].abs() < 0.01).all()


def test_an_evaluation_pass_repeats_with_and_without_workers() -> None:
    dataset = FakeDataset(zipf_rows(10), noise=True)
    loader = EvalLoader(dataset, dataclasses.replace(CONFIG, workers=2), micro_batch=3, rank=0, world_size=1)
    first, again = list(loader), list(loader)
    alone = list(EvalLoader(dataset, CONFIG, micro_batch=3, rank=0, world_size=1))
    assert all(same(a, b) and same(a, c) for a, b, c in zip(first, again, alone, strict=True))
    assert torch.equal(alone[0].images[1], eval_crop(decode(dataset.read(1), 10**6), 18, 16))  # 18 = 16 * 256 / 224
    for _ in loader:
        break
    assert active_children() == []


# --- corrupt images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_keeps_its_place_without_labels(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    rows = zipf_rows(12)
    whole, bad = FakeDataset(rows), FakeDataset(rows, files={3: b"", 8: FakeDataset(rows, noise=True).read(8)[:-40]})
    config = dataclasses.replace(CONFIG, workers=workers)
    with caplog.at_level(logging.WARNING, "scale_wsl.loading"):
        pairs = list(zip(take(whole, 6), take(bad, 6, config), strict=True))
    found = 0
    for expected, got in pairs:
        assert torch.equal(expected.records, got.records)
        corrupt = torch.isin(got.records, torch.tensor([3, 8]))
        found += got.corrupt
        assert got.corrupt == corrupt.sum() == len(got.errors)
        assert (got.ids[corrupt] == -1).all()
        assert (got.mass[corrupt] == 0).all()
        assert (got.images[corrupt] == mean_colour(16)).all()
        for name in ("images", "ids", "mass"):
            assert torch.equal(getattr(expected, name)[~corrupt], getattr(got, name)[~corrupt])
    assert found >= 2
    assert len(caplog.messages) == found
    assert any("key3 (record 3): 0 bytes that are no image" in message for message in caplog.messages)
    assert any("key8 (record 8): OSError: image file is truncated" in message for message in caplog.messages)


def test_an_image_above_the_pixel_limit_is_corrupt() -> None:
    small = dataclasses.replace(CONFIG, max_pixels=107)  # the images are 9 x 12
    assert [batch.corrupt for batch in take(FakeDataset(zipf_rows(9)), 2, small)] == [4, 4]
    assert [
        batch.corrupt for batch in EvalLoader(FakeDataset(zipf_rows(6)), small, micro_batch=4, rank=0, world_size=1)
    ] == [4, 2]


def test_the_log_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    dataset = FakeDataset([[0]] * 50, files=dict.fromkeys(range(50), b""))
    with caplog.at_level(logging.WARNING, "scale_wsl.loading"):
        batches = take(dataset, 525)
    assert sum(batch.corrupt for batch in batches) == 2100
    assert len(caplog.messages) == 12
    assert caplog.messages[9].endswith("from now on every thousandth is reported")
    assert [message.split(":")[0] for message in caplog.messages[10:]] == [
        "corrupt image 1000 skipped",
        "corrupt image 2000 skipped",
    ]
