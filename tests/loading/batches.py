"""Batches of a data set, with settings that suit the made-up ones."""

from __future__ import annotations

from itertools import islice

from scale_wsl.corpus.shards import Dataset
from scale_wsl.loading import Batch, DataConfig, Order, TrainLoader
from tests.loading.fakes import FakeDataset

CONFIG = DataConfig(image_size=16, resampling="square-root", threshold=0.3, workers=0)
ALONE = {"micro_batch": 4, "accumulation": 1, "rank": 0, "world_size": 1, "start": 0}


def order_of(dataset: FakeDataset | Dataset, config: DataConfig = CONFIG) -> Order:
    return Order.of(dataset, seed=5, resampling=config.resampling, threshold=config.threshold)


def take(dataset: FakeDataset | Dataset, batches: int, config: DataConfig = CONFIG, **split: int) -> list[Batch]:
    with TrainLoader(dataset, order_of(dataset), config, **(ALONE | split)) as loader:
        return list(islice(loader, batches))
