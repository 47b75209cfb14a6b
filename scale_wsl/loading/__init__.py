"""How batches arrive: the order of samples, decoding and cropping, and the loaders that hand them to the trainer."""

from __future__ import annotations

from scale_wsl.loading.config import DataConfig
from scale_wsl.loading.decode import MEAN, STD, CorruptImage, normalize
from scale_wsl.loading.loader import Batch, EvalLoader, TrainLoader
from scale_wsl.loading.order import Order, micro_batch_positions

__all__ = [
    "MEAN",
    "STD",
    "Batch",
    "CorruptImage",
    "DataConfig",
    "EvalLoader",
    "Order",
    "TrainLoader",
    "micro_batch_positions",
    "normalize",
]
