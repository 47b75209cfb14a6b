"""The training loop: steps, and between them evaluation, checkpoints and metric lines.

A step is a pure function of the weights, the momentum and the global sample counter; the loop keeps no other state that
matters. Everything that ranks must decide alike (stop, too many corrupt images, skip a step) is decided on numbers that
were reduced over all ranks.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from scale_wsl.checkpoint.saver import Saver
from scale_wsl.engines.base import Engine, clip_coefficient, scale_gradients, square_norm
from scale_wsl.engines.world import World
from scale_wsl.errors import UserError
from scale_wsl.loading.decode import normalize
from scale_wsl.loading.loader import Batch
from scale_wsl.models.head import ShardedHead
from scale_wsl.models.head_optimizer import HeadSGD, check_optimizer
from scale_wsl.randomness import derived_seed
from scale_wsl.training.batchnorm import combine_statistics
from scale_wsl.training.preemption import Preemption
from scale_wsl.training.schedule import LearningRate, OptimConfig

__all__ = ["Counter", "Interval", "Trainer"]

_SEEN_BEFORE_JUDGING = 1000  # images, before the share of corrupt ones can stop a run


@dataclass
class Counter:
    """Where training stands: all of a run's state that is not a tensor."""

    step: int = 0
    samples: int = 0
    updates: int = 0  # steps that changed the weights: those with a finite gradient


@dataclass
class Interval:
    """What happened since the last metric line."""

    losses: list[Tensor] = field(default_factory=list)  # this rank's summed loss of each step, divided by L
    images: int = 0  # over all ranks
    seconds: float = 0.0
    waited: float = 0.0  # seconds without data, this rank
    gradient_norm: float = math.nan
    learning_rate: float = 0.0
    skipped: int = 0


class Trainer:
    """Steps a trunk in its engine and the head beside it through the loader's batches."""

    def __init__(
        self,
        *,
        engine: Engine,
        head: ShardedHead,
        head_optimizer: torch.optim.Optimizer,
        batches: Iterator[Batch],
        accumulation: int,
        world: World,
        optim: OptimConfig,
        learning_rate: LearningRate,
        max_corrupt: float,
        seed: int,
        counter: Counter,
        saver: Saver | None = None,
    ) -> None:
        kind = type(head_optimizer)
        check_optimizer(head.sampled, "sgd" if issubclass(kind, HeadSGD) else f"{kind.__module__}.{kind.__name__}")
        self.engine = engine
        self.head = head
        self.head_optimizer = head_optimizer
        self.batches = batches
        self.accumulation = accumulation
        self.world = world
        self.optim = optim
        self.learning_rate = learning_rate
        self.max_corrupt = max_corrupt
        self.seed = seed
        self.counter = counter
        self.saver = saver
        self.interval = Interval()
        self._skipped_in_a_row = 0
        self._corrupt = self._seen = 0
        # BatchNorm statistics as they were before a step: a forward pass that is not finite spoils them for good,
        # before anything can look at its loss. (copy, statistics), by type: one kernel each.
        buffers = list(engine.trunk.buffers())
        kinds = {buffer.dtype for buffer in buffers}
        self._statistics = [
            ([buffer.clone() for buffer in buffers if buffer.dtype == kind], [b for b in buffers if b.dtype == kind])
            for kind in sorted(kinds, key=str)
        ]

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self, preemption: Preemption) -> bool:
        """Do one optimizer step; returns whether any rank was asked to stop (the step is done all the same)."""
        started = time.perf_counter()
        micro_batches = [next(self.batches) for _ in range(self.accumulation)]
        waited = time.perf_counter() - started
        labelled, stop = self._heartbeat(micro_batches, preemption)
        for kept, statistics in self._statistics:
            torch._foreach_copy_(kept, statistics)

        # For modules that draw from torch's generator (dropout, say): a function of the step, not of history.
        torch.manual_seed(derived_seed("step", self.seed, self.counter.samples, self.world.rank))
        learning_rate = self.learning_rate.at(self.counter.samples)
        loss = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(micro_batches, start=1):
            on_device = batch.to(self.world.device)
            with self.engine.micro_batch(last=number == self.accumulation):
                features = self.engine.forward(normalize(on_device.images))
                share = self.head.loss(
                    features,
                    on_device.ids,
                    on_device.mass,
                    scale=1 / labelled,
                    draw=self.counter.samples + number,  # a step has no fewer images than micro-batches
                ).loss
                self.engine.backward(share)
            loss += share.detach()
        self._update(learning_rate)

        images = sum(len(batch.records) for batch in micro_batches) * self.world.size
        self.counter.step += 1
        self.counter.samples += images
        self.interval.losses.append(loss)
        self.interval.images += images
        self.interval.waited += waited
        self.interval.seconds += time.perf_counter() - started
        self.interval.learning_rate = learning_rate
        return stop

    def _heartbeat(self, micro_batches: list[Batch], preemption: Preemption) -> tuple[float, bool]:
        """One small all-reduce a step: L (labelled images in the global batch), corrupt images, requests to stop.

        And whether a checkpoint that was being written has failed on some rank: then it is raised on all of them.
        """
        labelled = sum(int((batch.mass.sum(1) > 0).sum()) for batch in micro_batches)
        corrupt = sum(batch.corrupt for batch in micro_batches)
        unsaved = self.saver is not None and self.saver.failed
        packed = torch.tensor([labelled, corrupt, preemption.requested, unsaved], dtype=torch.float64)
        dist.all_reduce(packed)  # on the CPU, so that no device has to be waited for
        total, corrupt, stop, unsaved = packed.tolist()
        if self.saver is not None and unsaved:
            self.saver.raise_failure()
        self._corrupt += int(corrupt)
        self._seen += sum(len(batch.records) for batch in micro_batches) * self.world.size
        if self._corrupt > self.max_corrupt * max(self._seen, _SEEN_BEFORE_JUDGING):
            raise UserError(
                f"{self._corrupt} of the {self._seen} images read so far are corrupt, more than data.max_corrupt "
                f"({self.max_corrupt:g}) allows: repair the data set, or raise the limit"
            )
        return max(total, 1.0), stop > 0

    def _update(self, learning_rate: float) -> None:
        """Clip by one norm over trunk and head, and step both; where it is not finite, leave everything as it was."""
        self.head.sync_gradients()
        gradients = self.head.gradients()
        head_square = square_norm(gradients, self.world.device) / self.head.replica_count
        dist.all_reduce(head_square)  # over all ranks, replicas too: every rank sees the same number
        if self.saver is not None:
            self.saver.wait_staged()  # the weights that are being saved are still those of the last step
        result = self.engine.step(learning_rate, head_square, self.optim.clip)
        if result.applied:
            self.counter.updates += 1
            scale_gradients(gradients, clip_coefficient(result.gradient_norm, self.optim.clip))
            for group in self.head_optimizer.param_groups:
                group["lr"] = learning_rate
            self.head_optimizer.step()
        else:
            for kept, statistics in self._statistics:
                torch._foreach_copy_(statistics, kept)
        self.head_optimizer.zero_grad()
        self.interval.gradient_norm = result.gradient_norm
        self._skipped_in_a_row = 0 if result.applied else self._skipped_in_a_row + 1
        self.interval.skipped += not result.applied
        if self._skipped_in_a_row > self.optim.max_skipped:
            raise UserError(
                f"the loss or its gradient was not finite in {self._skipped_in_a_row} steps in a row "
                f"(step {self.counter.step + 1}): lower optim.lr, lengthen schedule.warm_up or set optim.clip"
            )

    # --- between steps -------------------------------------------------------------------------------------------

    def take_interval(self, progress: Callable[[int], float]) -> dict[str, float]:
        """Metrics since the last call (collective); `progress` gives the epochs done at a position.

        Losses are over all ranks, waiting and memory those of the rank that has most of it.
        """
        done, self.interval = self.interval, Interval()
        losses = torch.stack(done.losses).double()
        dist.all_reduce(losses)
        # The rank that waits longest, or needs most, is the one that matters.
        worst = torch.tensor([done.waited / max(done.seconds, 1e-9), _peak_memory(self.world.device) / 2**30])
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return {
            "train/loss": float(losses.mean()),
            "train/loss_last": float(losses[-1]),
            "train/learning_rate": done.learning_rate,
            "train/gradient_norm": done.gradient_norm,
            "train/images_per_second": done.images / max(done.seconds, 1e-9),
            "train/data_wait_share": float(worst[0]),
            "train/corrupt_images": float(self._corrupt),
            "train/skipped_steps": float(done.skipped),
            "train/epoch": progress(self.counter.samples),
            "train/images": float(self.counter.samples),
            "train/memory_gib": float(worst[1]),
        }

    def combine_batchnorm(self, rule: str) -> None:
        """Give every rank the same BatchNorm statistics, before evaluation and saving (collective)."""
        combine_statistics(self.engine.trunk, rule)


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
