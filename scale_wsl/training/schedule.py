"""How long, how fast: batch sizes, durations counted in images, and the learning rate as a function of images seen.

Everything here is a pure function of the recipe and the global sample counter, so a resumed run needs no state of it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.errors import UserError
from scale_wsl.recipe import setting

__all__ = ["BatchConfig", "Duration", "LearningRate", "OptimConfig", "ScheduleConfig"]


_LARGEST = {"image": 1e15, "step": 1e12, "epoch": 1e5, "%": 1e4}


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Section `batch`: the global batch is micro x accumulation x ranks."""

    micro: int = setting(24, "images per micro-batch and rank (the paper's 24; BatchNorm sees this many)")
    accumulation: int = setting(1, "micro-batches per optimizer step")

    def __post_init__(self) -> None:
        for name in ("micro", "accumulation"):
            if getattr(self, name) < 1:
                raise UserError(f"batch.{name} is {getattr(self, name)}, but must be 1 or more")


_OF_SGD, _OF_ADAM = ("momentum", "nesterov"), ("beta1", "beta2", "eps")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Section `optim`: synchronous SGD with the linear scaling rule (the paper's recipe), or Adam."""

    name: str = setting(
        "sgd",
        "sgd (the paper); adam: weight decay added to the gradient; adamw: decoupled from it",
        choices=("sgd", "adam", "adamw"),
    )
    lr: float = setting(0.1, "peak learning rate for a global batch of 256; scaled linearly with the batch")
    momentum: float = setting(0.9, "sgd: momentum")
    nesterov: bool = setting(True, "sgd: Nesterov momentum")
    beta1: float = setting(0.9, "adam, adamw: decay of the mean of gradients")
    beta2: float = setting(0.999, "adam, adamw: decay of the mean of their squares")
    eps: float = setting(1e-8, "adam, adamw: added to the root of that mean")
    weight_decay: float = setting(1e-4, "weight decay of kernels and matrices; none on biases and normalisation")
    warm_up_from: float = setting(0.1, "learning rate at which the linear warm-up starts, never above the peak")
    clip: float = setting(0.0, "largest gradient norm over trunk and head together; 0 clips nothing (the paper)")
    max_skipped: int = setting(20, "consecutive steps with a loss or gradient that is not finite before the run stops")

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optim.lr is {self.lr}, but must be above 0")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} is {getattr(self, name)}, but must be at least 0 and below 1")
        if self.nesterov and self.momentum == 0:
            raise UserError("optim.nesterov needs optim.momentum above 0; set optim.nesterov=false for plain SGD")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _OF_ADAM if self.name == "sgd" else _OF_SGD:
            if getattr(self, name) != fields[name]:
                raise UserError(f"optim.{name} is set, but optim.name is {self.name}, which has none: take it out")
        for name in ("eps", "weight_decay", "clip", "warm_up_from", "max_skipped"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}, but must not be negative")

    @property
    def settings(self) -> OptimizerSettings:
        """What the engines build their optimizers from."""
        names = [field.name for field in dataclasses.fields(OptimizerSettings)]
        return OptimizerSettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Section `schedule`: durations are written as '7e9 images', '500 steps', '20 epochs' or '5 %' (of the length)."""

    length: str = setting("2 epochs", "how much to train (the paper: 2 epochs of 3.5e9 images)")
    warm_up: str = setting("5 %", "length of the linear warm-up (the paper leaves it open)")
    halvings: int = setting(10, "how often the learning rate is halved, at equally spaced points (the paper: 10 to 20)")
    evaluate_every: str = setting("1 epoch", "how often to evaluate; '0 steps': only at the end, which always is")

    def __post_init__(self) -> None:
        if self.halvings < 0:
            raise UserError(f"schedule.halvings is {self.halvings}, but must not be negative")
        for name in ("length", "warm_up", "evaluate_every"):
            Duration.parse(getattr(self, name), f"schedule.{name}")
        if Duration.parse(self.length, "schedule.length").unit == "%":
            raise UserError("schedule.length is given in %, but of what? use images, steps or epochs")


@dataclass(frozen=True)
class Duration:
    """A length of training, in the unit that the user wrote."""

    count: float
    unit: str

    @classmethod
    def parse(cls, text: str, key: str) -> Duration:
        """Read '7e9 images', '500 steps', '20 epochs' (or their singular) or '5 %'.

        Raises:
            UserError: anything else; the message names `key`.
        """
        match = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*(images?|steps?|epochs?|%)\s*", text, re.I)
        count = float(match[1]) if match else math.inf
        if match is None or not math.isfinite(count):
            raise UserError(f"{key} is {text!r}, but must be like '7e9 images', '500 steps', '20 epochs' or '5 %'")
        unit = match[2].lower().removesuffix("s")
        if count > _LARGEST[unit]:
            raise UserError(f"{key} is {text!r}, which is longer than any training")
        return cls(count, unit)

    def samples(self, *, batch: int, epoch_start: Callable[[int], int], whole: int | None = None) -> int:
        """The position of the global sample counter after this duration.

        Args:
            batch: images per step.
            epoch_start: position at which the n-th epoch starts; with resampling, epochs differ in length.
            whole: the samples that '%' refers to.
        """
        if self.unit == "image":
            return round(self.count)
        if self.unit == "step":
            return round(self.count) * batch
        if self.unit == "%":
            assert whole is not None
            return round(whole * self.count / 100)
        epoch = int(self.count)
        start = epoch_start(epoch)
        return start + round((self.count - epoch) * (epoch_start(epoch + 1) - start)) if self.count > epoch else start


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from `start` to `peak`, then `halvings` halvings at equally spaced points until `total`."""

    start: float
    peak: float
    warm_up: int
    total: int
    halvings: int

    @classmethod
    def of(cls, optim: OptimConfig, schedule: ScheduleConfig, *, batch: int, warm_up: int, total: int) -> LearningRate:
        """The paper's schedule: peak = lr x batch / 256 (Goyal et al. 2017), warm-up and total in images."""
        peak = optim.lr * batch / 256
        return cls(min(optim.warm_up_from, peak), peak, warm_up, total, schedule.halvings)

    def at(self, samples: int) -> float:
        """The learning rate of the step that starts after `samples` images."""
        if samples < self.warm_up:
            return self.start + (self.peak - self.start) * samples / self.warm_up
        if self.total <= self.warm_up:
            return self.peak
        share = (samples - self.warm_up) / (self.total - self.warm_up)
        return float(self.peak * 0.5 ** min(self.halvings, int(share * (self.halvings + 1))))
