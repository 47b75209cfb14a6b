"""The pretraining recipe, and everything that can be known - or refused - before any rank talks to another.

`prepare_job` opens the data, resolves the ds_config and reads the checkpoint's meta without one collective, so a
mistake is found in a second and every rank can stop with the same sentence.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from scale_wsl.checkpoint.layout import Meta, read_meta
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.corpus.judgements import Duplicates, read_duplicates
from scale_wsl.corpus.resample import choose_threshold
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.corpus.views import Images, view_of
from scale_wsl.engines import ds_config
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.ds_zero import Offloading, disk_folders
from scale_wsl.engines.fairscale import require_fairscale
from scale_wsl.engines.world import World, agree, same_everywhere
from scale_wsl.errors import UserError
from scale_wsl.loading.config import DataConfig
from scale_wsl.loading.order import Order
from scale_wsl.models.head import HeadConfig
from scale_wsl.models.head_group import check_group_size, ranks_per_node
from scale_wsl.models.head_optimizer import check_optimizer
from scale_wsl.models.resnext import ModelConfig, describe_trunk
from scale_wsl.recipe import recipe_yaml, section, setting
from scale_wsl.training import failure
from scale_wsl.training.evaluate import EvaluateConfig
from scale_wsl.training.resume import CheckpointConfig, resume_from
from scale_wsl.training.schedule import BatchConfig, Duration, LearningRate, OptimConfig, ScheduleConfig
from scale_wsl.training.start import Start
from scale_wsl.training.tracking import TrackingConfig

__all__ = ["Job", "PretrainRecipe", "RunConfig", "prepare_job", "with_intact_checkpoint"]

_log = logging.getLogger(__name__)

_OFFLOADED = "offloaded"  # in the run folder: what DeepSpeed keeps on disk while it trains


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Section `run`: what this run is called and where it lives."""

    name: str = setting("pretrain", "name of the run, in MLflow too")
    folder: str = setting("", "folder of the run (checkpoints, pictures, spool); empty: runs/<run.name>")
    seed: int = setting(0, "seed of weights, order and augmentation")


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """A pretraining run."""

    run: RunConfig = section(RunConfig)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    head: HeadConfig = section(HeadConfig)
    engine: EngineConfig = section(EngineConfig)
    batch: BatchConfig = section(BatchConfig)
    optim: OptimConfig = section(OptimConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    tracking: TrackingConfig = section(TrackingConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.folder or f"runs/{self.run.name}")


@dataclass(frozen=True)
class Job:
    """A recipe that has been checked against the data, the world and the checkpoint that it resumes from."""

    recipe: PretrainRecipe
    train: Images
    validation: Dataset
    threshold: float  # of resampling, as the recipe has it or as the stated length of an epoch needs it
    order: Order
    batch: ds_config.BatchSizes
    total: int  # samples to process in all
    learning_rate: LearningRate
    deepspeed: dict[str, Any] | None
    resume: tuple[Path, Meta] | None
    start: Start | None  # of a new run, from another run's weights
    duplicates: Duplicates | None  # what is known about the validation set's; None: nothing
    lock: FileLock | None  # rank 0's hold on the run folder, until this process ends

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.folder

    @property
    def disk_folders(self) -> set[Path]:
        """The folders, of this run alone, to which DeepSpeed offloads; none where it does not."""
        return disk_folders(self.deepspeed["zero_optimization"]) if self.deepspeed else set()

    def facts(self) -> dict[str, str]:
        """What must be the same on every rank; hosts may see different files."""
        path, meta = self.resume or ("nothing", None)
        return {
            "recipe": recipe_yaml(self.recipe),
            "training set": self.train.manifest_hash,
            "validation set": self.validation.manifest_hash,
            "order of images": self.order.identity,
            "file of known duplicates": self.duplicates.digest if self.duplicates else "none",
            "ds_config": json.dumps(self.deepspeed),
            "number of ranks on its host": str(ranks_per_node()) if self.recipe.head.group_size == "auto" else "",
            "checkpoint to go on from": f"{path} at {meta.samples} images" if meta else str(path),
            "checkpoint to start from": str(self.start.checkpoint.meta) if self.start else "",
        }

    def samples(self, duration: str, key: str) -> int:
        """A duration of the recipe as a position of the global sample counter."""
        parsed = Duration.parse(duration, key)
        return parsed.samples(batch=self.batch.total, epoch_start=self.order.epoch_start, whole=self.total)

    def epochs(self, samples: int) -> float:
        """Epochs done at a position; epochs differ in length under resampling."""
        epoch, index = self.order.locate(samples)
        start = self.order.epoch_start(epoch)
        return epoch + index / (self.order.epoch_start(epoch + 1) - start)

    def crossed(self, duration: str, key: str, before: int, after: int) -> bool:
        """Whether a multiple of a duration lies in (before, after]."""
        parsed = Duration.parse(duration, key)
        if parsed.count <= 0:
            return False
        if parsed.unit == "epoch":
            return int(self.epochs(after) / parsed.count) > int(self.epochs(before) / parsed.count)
        interval = max(1, self.samples(duration, key))
        return after // interval > before // interval


def prepare_job(recipe: PretrainRecipe, world: World) -> Job:
    """Check a recipe against its surroundings; uses no collective.

    Raises:
        UserError: data that is missing, damaged or of two vocabularies; a ds_config that contradicts the recipe; a
            checkpoint that does not fit; a run folder that cannot be written.
    """
    train = view_of(_open(recipe.data.train, "data.train", "train"), recipe.data.view, progress=world.is_main)
    validation = _open(recipe.data.validation, "data.validation", "val")
    if train.vocabulary_hash != validation.vocabulary_hash:
        raise UserError(
            f"{recipe.data.train} and {recipe.data.validation} have different vocabularies "
            f"({train.vocabulary_hash[:12]} and {validation.vocabulary_hash[:12]}): prepare them together"
        )
    duplicates = read_duplicates(validation.folder, validation.manifest_hash)
    check_group_size(recipe.head.group_size, world.size)
    check_optimizer(recipe.head.sampled, recipe.optim.name)
    recipe.engine.check_groups(world.size)
    recipe.engine.check_norm(recipe.model.norm)
    if recipe.engine.name == "fairscale":
        require_fairscale(world.device)
    data = recipe.data
    threshold = choose_threshold(
        train.label_ids, train.label_start, data.resampling, data.threshold, data.stated_length
    )
    order = Order.of(train, seed=recipe.run.seed, resampling=data.resampling, threshold=threshold)
    batch = ds_config.BatchSizes(recipe.batch.micro, recipe.batch.accumulation, world.size)
    length = Duration.parse(recipe.schedule.length, "schedule.length")
    total = length.samples(batch=batch.total, epoch_start=order.epoch_start)
    if total < 1:
        raise UserError(f"schedule.length is {recipe.schedule.length!r}, which is no training at all")
    warm_up = Duration.parse(recipe.schedule.warm_up, "schedule.warm_up").samples(
        batch=batch.total, epoch_start=order.epoch_start, whole=total
    )
    if warm_up > total:
        raise UserError(
            f"schedule.warm_up is {recipe.schedule.warm_up!r}, {warm_up:,} images, but the whole training has {total:,}"
        )
    resume = _resume(recipe, train, order)
    learning_rate = LearningRate.of(recipe.optim, recipe.schedule, batch=batch.total, warm_up=warm_up, total=total)
    return Job(
        recipe=recipe,
        train=train,
        validation=validation,
        threshold=threshold,
        order=order,
        batch=batch,
        total=total,
        learning_rate=learning_rate,
        deepspeed=_deepspeed(recipe, batch, learning_rate.peak, world),
        resume=resume,
        start=_start(recipe, train) if resume is None else None,
        duplicates=duplicates,
        lock=_take(recipe.folder) if world.is_main else None,
    )


def with_intact_checkpoint(job: Job, world: World) -> Job:
    """The job, resuming from a checkpoint all of whose bytes have been checked (collective): each rank checks a share.

    With `--resume auto`, a damaged one is named in a warning and the one before it is taken.

    Raises:
        UserError: the checkpoint that was named is damaged; on every rank alike.
    """
    damaged: frozenset[Path] = frozenset()
    while job.resume is not None:
        path, _ = job.resume
        try:
            with agree(world):
                _verify(path, world)
            return job
        except UserError as error:
            if job.recipe.checkpoint.resume != "auto":
                raise
            if world.is_main:
                _log.warning("passing over a damaged checkpoint: %s", error)
            damaged |= {path}
        with agree(world):
            resume = _resume(job.recipe, job.train, job.order, damaged)
            job = replace(job, resume=resume, start=_start(job.recipe, job.train) if resume is None else None)
        same_everywhere(world, job.facts())
    if job.start is not None:
        with agree(world):
            _verify(job.start.checkpoint.path, world)
    return job


def _start(recipe: PretrainRecipe, train: Images) -> Start | None:
    config, seed, bias = recipe.checkpoint, recipe.run.seed, recipe.head.bias
    if not config.start_from:
        return None
    return Start.open(config.start_from, train, seed=seed, bias=bias, take_ambiguous=config.take_ambiguous)


def _verify(path: Path, world: World) -> None:
    opened = Checkpoint.open(path)
    share = sum(tensor.nbytes for tensor in opened.tensors.values()) // world.size
    hidden = None if world.is_main else True
    with tqdm(total=share, desc="checking the checkpoint", unit="B", unit_scale=True, delay=2, disable=hidden) as bar:
        opened.verify(world.rank, world.size, bar.update)


def _take(folder: Path) -> FileLock:
    """Make the run folder and hold it against a second run, which would mix its checkpoints with ours."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        failure.clear(folder)
    except Timeout:
        raise UserError(f"another run is at work in {folder}: wait for its end, or choose another run.folder") from None
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from None
    return lock


def _open(folder: str, key: str, role: str) -> Dataset:
    """A data set by its own folder, or by that of a preparation, which holds one of each role."""
    if not folder:
        raise UserError(f"{key} is empty, but must be the folder of a prepared data set (scale-wsl prepare --help)")
    try:
        is_data_set = (Path(folder) / "manifest.json").is_file()
        return Dataset.open(folder if is_data_set else find_dataset(folder, role))
    except OSError as error:
        raise UserError(f"cannot read {key}, {folder}: {error.strerror}") from None


def _deepspeed(recipe: PretrainRecipe, batch: ds_config.BatchSizes, peak: float, world: World) -> dict[str, Any] | None:
    if recipe.engine.name != "deepspeed":
        if recipe.engine.ds_config:
            raise UserError(
                f"engine.ds_config is set, but engine.name is {recipe.engine.name}: set engine.name=deepspeed"
            )
        return None
    if not recipe.engine.ds_config:
        raise UserError("engine.name=deepspeed needs a ds_config: pass --ds_config zero2.json, or set engine.ds_config")
    path = ds_config.find(recipe.engine.ds_config)
    optim = recipe.optim
    return ds_config.resolve(
        ds_config.read(path),
        str(path),
        batch=batch,
        optimizer=optim.settings,
        learning_rate=peak,
        clip=optim.clip,
        precision=recipe.engine.precision,
        offloading=Offloading.of(recipe.folder / _OFFLOADED, describe_trunk(recipe.model), world),
    )


def _resume(
    recipe: PretrainRecipe, train: Images, order: Order, damaged: frozenset[Path] = frozenset()
) -> tuple[Path, Meta] | None:
    path = resume_from(recipe.checkpoint, recipe.folder / "checkpoints", damaged)
    if path is None:
        return None
    meta = read_meta(path)
    if meta.vocabulary_hash != train.vocabulary_hash:
        raise UserError(
            f"{path} was trained with the vocabulary {meta.vocabulary_hash[:12]}, but {train.folder} has "
            f"{train.vocabulary_hash[:12]}: its head's rows mean other hashtags; use the data set it was trained on"
        )
    if meta.order != order.identity:
        raise UserError(
            f"{path} stopped in the middle of another sequence of images ({meta.order}) than this recipe's "
            f"({order.identity}): keep run.seed, data.train, what is taken of it (data.images, data.subset_seed, "
            "data.label_noise, data.noise_seed) and how it is resampled (data.resampling, data.threshold, "
            "data.epoch_length)"
        )
    return path, meta
