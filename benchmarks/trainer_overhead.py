"""What the trainer itself costs: images/s of the real training loop on one rank against a bare PyTorch loop.

    python benchmarks/trainer_overhead.py
    python benchmarks/trainer_overhead.py --depth 50 --image-size 96 --blocks 11

Both sides train the same network from the same initial weights on batches from the same kind of loader: the trainer's
side is `Trainer.step` with everything that a run does between steps (metric lines, MLflow spool); the bare side is a
`torch.optim.SGD` step on trunk, `nn.Linear` and k-hot cross-entropy, as one would write it in a notebook. Blocks of
steps alternate, so that both meet the same noise, and the ratio is taken block by block. Evaluation and checkpoints,
which a bare loop does not have, are outside. The claim is a ratio of at least 0.95.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from scale_wsl.engines.build import build_engine
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.world import joined_world
from scale_wsl.loading.config import DataConfig
from scale_wsl.loading.decode import normalize
from scale_wsl.loading.loader import TrainLoader
from scale_wsl.loading.order import Order
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.resnext import ModelConfig, describe_trunk
from scale_wsl.models.weights import build_trunk, initial_weights
from scale_wsl.training.loop import Counter, Trainer
from scale_wsl.training.preemption import Preemption
from scale_wsl.training.schedule import LearningRate, OptimConfig
from scale_wsl.training.tracking import Tracker, TrackingConfig


@dataclass
class NoiseImages:
    """Records for the loader: PNGs of smooth noise with one to three labels each, kept in memory."""

    count: int
    side: int
    labels_in_all: int
    manifest_hash: str = "noise"
    max_labels: int = 3

    def __post_init__(self) -> None:
        numbers = np.random.default_rng(0)
        self.files = []
        for _ in range(self.count):
            small = Image.fromarray(numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            with io.BytesIO() as buffer:
                small.resize((self.side, self.side), Image.Resampling.BICUBIC).save(buffer, "PNG")
                self.files.append(buffer.getvalue())
        per_image = numbers.integers(1, 4, self.count)
        self.label_start = np.concatenate([[0], np.cumsum(per_image)])
        drawn = [numbers.choice(self.labels_in_all, size, replace=False) for size in per_image]
        self.label_ids = np.concatenate(drawn).astype(np.int32)
        self.keys = [str(index) for index in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def labels(self, i: int, /) -> NDArray[np.int32]:
        """Labels of one image."""
        return self.label_ids[self.label_start[i] : self.label_start[i + 1]]

    def read(self, i: int, /) -> bytes:
        """One image's file."""
        return self.files[i]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=26)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--micro", type=int, default=24)
    parser.add_argument("--labels", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=9, help="blocks of each side")
    arguments = parser.parse_args()

    model = ModelConfig(depth=arguments.depth, groups=arguments.groups, width=arguments.width)
    data = DataConfig(image_size=arguments.image_size, workers=arguments.workers)
    dataset = NoiseImages(512, 2 * arguments.image_size, arguments.labels)
    order = Order.of(dataset, seed=0, resampling="natural", threshold=0.001)
    rate = LearningRate(start=0.01, peak=0.01, warm_up=0, total=10**9, halvings=0)

    images: int = arguments.steps * arguments.micro  # in a block

    def loader() -> TrainLoader:
        return TrainLoader(
            dataset, order, data, micro_batch=arguments.micro, accumulation=1, rank=0, world_size=1, start=0
        )

    with joined_world() as world, tempfile.TemporaryDirectory() as folder, Preemption() as preemption:
        optim = OptimConfig()
        trunk = describe_trunk(model)
        head = ShardedHead(arguments.labels, trunk.num_features, mesh=head_mesh(0, world.device.type)).to(world.device)
        tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
        trainer_loader, bare_loader = loader(), loader()
        trainer = Trainer(
            engine=build_engine(EngineConfig(), trunk, initial_weights(model, 0), optim.settings, world),
            head=head,
            head_optimizer=optim.settings.of_head(head),
            batches=trainer_loader,
            accumulation=1,
            world=world,
            optim=optim,
            learning_rate=rate,
            max_corrupt=0.0,
            seed=0,
            counter=Counter(),
        )
        bare = nn.Sequential(build_trunk(model, 0), nn.Linear(trunk.num_features, arguments.labels)).to(world.device)
        optimizer = optim.settings.of_module(bare)
        for group in optimizer.param_groups:
            group["lr"] = 0.01

        def bare_block() -> None:
            for _ in range(arguments.steps):
                batch = next(bare_loader).to(world.device)
                logits = bare(normalize(batch.images))
                targets = torch.zeros_like(logits).scatter_add_(1, batch.ids.clamp(min=0), batch.mass)
                loss = F.cross_entropy(logits, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            loss.item()

        with Tracker(tracking, Path(folder)) as tracker:
            tracker.start({})

            def trainer_block() -> None:
                for _ in range(arguments.steps):
                    trainer.step(preemption)
                tracker.metrics(trainer.counter.step, trainer.take_interval(lambda samples: samples / len(dataset)))

            def images_per_second(block: Callable[[], None]) -> float:
                started = time.perf_counter()
                block()
                return images / (time.perf_counter() - started)

            for block in (trainer_block, bare_block):  # warm-up
                block()
            pairs = [(images_per_second(trainer_block), images_per_second(bare_block)) for _ in range(arguments.blocks)]
            tracker.finish("FINISHED")
        trainer_loader.close()
        bare_loader.close()

    print(f"{model.name}, {arguments.image_size} px, micro-batch {arguments.micro}, {arguments.labels} labels, 1 rank")
    print(f"{'':24}{'median':>10}{'min':>10}{'max':>10}")
    rows = {
        "trainer, images/s": [ours for ours, _ in pairs],
        "bare loop, images/s": [bare for _, bare in pairs],
        "trainer / bare loop": [ours / bare for ours, bare in pairs],
    }
    for name, values in rows.items():
        print(f"{name:24}{statistics.median(values):10.3f}{min(values):10.3f}{max(values):10.3f}")
    holds = statistics.median(rows["trainer / bare loop"]) >= 0.95
    print("the claim, at least 0.95, holds" if holds else "THE CLAIM, AT LEAST 0.95, DOES NOT HOLD")


if __name__ == "__main__":
    main()
