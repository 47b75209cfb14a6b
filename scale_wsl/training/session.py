"""One pretraining run on one rank: the live objects, and what happens from the first step to the last checkpoint."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed as dist
from tqdm import tqdm

from scale_wsl.checkpoint.layout import VOCABULARY, Meta, newest
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.checkpoint.saver import Saver
from scale_wsl.corpus.figures import draw_epochs
from scale_wsl.corpus.resample import expected_epochs
from scale_wsl.corpus.views import View
from scale_wsl.engines.build import build_engine
from scale_wsl.engines.world import World
from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.loading.loader import TrainLoader
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.models.head_group import choose_group_size, ranks_per_node
from scale_wsl.models.resnext import describe_trunk, multiply_adds, parameter_count
from scale_wsl.models.weights import initial_weights
from scale_wsl.recipe import recipe_dict, recipe_yaml
from scale_wsl.shards import Source
from scale_wsl.training import state
from scale_wsl.training.environment import environment
from scale_wsl.training.evaluate import Evaluator
from scale_wsl.training.job import Job
from scale_wsl.training.loop import Counter, Trainer
from scale_wsl.training.preemption import Preemption
from scale_wsl.training.sender import masked
from scale_wsl.training.tracking import Tracker

__all__ = ["Session", "run"]

_log = logging.getLogger(__name__)


def run(job: Job, world: World) -> None:
    """Train to the end of the schedule, or until a preemption; every rank calls this together."""
    with Preemption(job.folder) as preemption, _offloaded(job, world):
        session = Session(job, world)
        config, name = job.recipe.tracking, job.recipe.run.name
        tracker = Tracker(config, job.folder, name=name, run_id=session.run_id) if world.is_main else Tracker.null()
        with tracker, session.saver:  # leaving the tracker by an error says FAILED
            session.announce(tracker)
            tracker.finish(session.train(preemption, tracker))
        session.close(tracker)


@contextmanager
def _offloaded(job: Job, world: World) -> Iterator[None]:
    """Room on each host's disk for what is offloaded there (collective): free of what a killed run left, and freed."""
    folders = job.disk_folders

    def clear() -> None:
        for folder in folders if world.local_rank == 0 else ():
            shutil.rmtree(folder, ignore_errors=True)

    clear()
    if folders:
        dist.barrier()  # before other ranks of this host write
    try:
        yield
    finally:
        clear()


class Session:
    """The live objects of one run, and what happens between its steps."""

    def __init__(self, job: Job, world: World) -> None:
        recipe = job.recipe
        self.job, self.world, self.recipe = job, world, recipe
        self.recipe_text = masked(recipe_yaml(recipe))
        trunk = describe_trunk(recipe.model)
        source: Source = initial_weights(recipe.model, recipe.run.seed)
        self.head = ShardedHead(
            len(job.train.vocabulary),
            trunk.num_features,
            mesh=head_mesh(self._head_group(trunk.num_features), world.device.type),
            seed=recipe.run.seed,
            bias=recipe.head.bias,
            chunk_rows=recipe.head.chunk_rows,
            smoothing=recipe.head.smoothing,
            sampled=recipe.head.sampled,
        ).to(world.device)
        resumed = Checkpoint.open(job.resume[0]) if job.resume else None
        if resumed:
            source = state.weights_of(resumed, trunk)
            state.load_head(resumed, self.head)
        elif job.start:
            source = state.weights_of(job.start.checkpoint, trunk)
            state.fill_head(job.start.source, self.head)
        settings = recipe.optim.settings
        self.engine = build_engine(recipe.engine, trunk, source, settings, world, job.deepspeed)
        self.head_optimizer = settings.of_head(self.head)
        counter, self.run_id = Counter(), ""
        if resumed:
            meta = resumed.meta
            counter, self.run_id = Counter(meta.step, meta.samples, meta.updates), meta.run_id
            state.load_optimizer_state(resumed, self.engine, self.head, self.head_optimizer)
        self.saver = Saver(
            job.folder / "checkpoints",
            keep=recipe.checkpoint.keep,
            # What is on disk is there because memory has no room for it, nor for a copy.
            asynchronous=recipe.checkpoint.asynchronous and not job.disk_folders,
            device=world.device,
        )
        held = parameter_count(recipe.model) + len(job.train.vocabulary) * (trunk.num_features + recipe.head.bias)
        self.saver.reserve((1 + len(settings.states)) * 4 * held // world.size)  # weights and momentum in fp32
        self.vocabulary = (job.train.folder / VOCABULARY).read_bytes()
        self.loader = TrainLoader(
            job.train,
            job.order,
            recipe.data,
            micro_batch=recipe.batch.micro,
            accumulation=recipe.batch.accumulation,
            rank=world.rank,
            world_size=world.size,
            start=counter.samples,
        )
        self.trainer = Trainer(
            engine=self.engine,
            head=self.head,
            head_optimizer=self.head_optimizer,
            batches=self.loader,
            accumulation=recipe.batch.accumulation,
            world=world,
            optim=recipe.optim,
            learning_rate=job.learning_rate,
            max_corrupt=recipe.data.max_corrupt,
            seed=recipe.run.seed,
            counter=counter,
            saver=self.saver,
        )
        self.evaluator = Evaluator(
            self.engine,
            self.head,
            job.train,
            job.validation,
            config=recipe.evaluate,
            data=recipe.data,
            micro_batch=recipe.batch.micro,
            world=world,
            seed=recipe.run.seed,
            duplicates=job.duplicates,
        )

    def _head_group(self, features: int) -> int:
        return choose_group_size(
            self.recipe.head.group_size,
            ranks=self.world.size,
            ranks_per_node=ranks_per_node(),
            images=self.recipe.batch.micro,
            classes=len(self.job.train.vocabulary),
            features=features,
        )

    def _save(self, tracker: Tracker) -> None:
        self.trainer.combine_batchnorm(self.recipe.engine.batchnorm)
        meta = Meta(
            step=self.trainer.counter.step,
            updates=self.trainer.counter.updates,
            samples=self.trainer.counter.samples,
            seed=self.recipe.run.seed,
            vocabulary_hash=self.job.train.vocabulary_hash,
            order=self.job.order.identity,
            run_id=tracker.run_id or "",
            engine=self.recipe.engine.name,
            world_size=self.world.size,
            recipe=self.recipe_text,
        )
        tensors = state.shards(self.engine, self.head, self.head_optimizer)
        self.saver.start(tensors, meta, {VOCABULARY: self.vocabulary})

    # --- the run -------------------------------------------------------------------------------------------------

    def train(self, preemption: Preemption, tracker: Tracker) -> Literal["FINISHED", "KILLED"]:
        """Steps until the schedule ends or some rank is asked to stop; saves either way."""
        job, recipe, trainer = self.job, self.recipe, self.trainer
        counter = trainer.counter
        steps = -(-job.total // job.batch.total)
        bar = tqdm(
            total=steps, initial=counter.step, unit="step", disable=None if self.world.is_main else True, smoothing=0.05
        )
        with self.loader, bar:
            while counter.samples < job.total:
                before = counter.samples
                stop = trainer.step(preemption)
                bar.update()
                done = counter.samples >= job.total
                if counter.step % recipe.tracking.every == 0 or done or stop:
                    self._report(tracker, bar, steps)
                if stop and not done:
                    self._save(tracker)
                    self.saver.wait()
                    return "KILLED"
                if not done and job.crossed(
                    recipe.schedule.evaluate_every, "schedule.evaluate_every", before, counter.samples
                ):
                    self._evaluate(tracker, bar)
                if not done and job.crossed(recipe.checkpoint.every, "checkpoint.every", before, counter.samples):
                    self._save(tracker)
            self._evaluate(tracker, bar)
            self._save(tracker)
            self.saver.wait()
        return "FINISHED"

    def _report(self, tracker: Tracker, bar: tqdm[Any], steps: int) -> None:
        metrics = self.trainer.take_interval(self.job.epochs)
        tracker.metrics(self.trainer.counter.step, metrics)
        loss, speed = metrics["train/loss"], metrics["train/images_per_second"]
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} images/s", refresh=False)
        if self.world.is_main and bar.disable:
            print(
                f"step {self.trainer.counter.step}/{steps}  epoch {metrics['train/epoch']:.2f}  loss {loss:.4f}  "
                f"lr {metrics['train/learning_rate']:.4g}  |g| {metrics['train/gradient_norm']:.3g}  "
                f"{speed:.0f} images/s  waiting {metrics['train/data_wait_share']:.0%}  "
                f"memory {metrics['train/memory_gib']:.1f} GiB",
                flush=True,
            )

    def _evaluate(self, tracker: Tracker, bar: tqdm[Any]) -> None:
        self.trainer.combine_batchnorm(self.recipe.engine.batchnorm)
        step = self.trainer.counter.step
        evaluated = self.evaluator.evaluate()
        title = f"{self.recipe.run.name}, step {step}: predicted hashtags (probability), and the true ones"
        picture = self.evaluator.picture(self.job.folder / "pictures" / f"step-{step:08d}.png", title)
        if self.world.is_main:
            assert evaluated is not None
            result, unreadable = evaluated
            metrics = result.as_metrics() | {"validation/corrupt_images": float(unreadable)}
            tracker.metrics(step, metrics)
            self._write_evaluation(step, metrics)
            if picture is not None:
                tracker.artifact(picture, "pictures")
            left_out = f" ({unreadable} corrupt images left out)" if unreadable else ""
            bar.write(f"validation after step {step}{left_out}:\n{result.table()}")

    def _write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Leave the newest evaluation's figures in the run folder, as evaluation.json; null: no number."""
        job = self.job
        content = {
            "step": step,
            "train": {"name": str(job.train.name), "sha256": job.train.manifest_hash},
            "validation": {"name": str(job.validation.name), "sha256": job.validation.manifest_hash},
            "metrics": {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())},
        }
        try:
            with published_file(job.folder / "evaluation.json") as aside:
                aside.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:  # a full disk, say: no reason to stop training
            _log.warning("cannot write %s: %s", job.folder / "evaluation.json", error)

    def announce(self, tracker: Tracker) -> None:
        """Say what is about to run, and record it."""
        if not self.world.is_main:
            return
        job, recipe = self.job, self.recipe
        (job.folder / "recipe.yaml").write_text(self.recipe_text, encoding="utf-8")
        model, labels = recipe.model, len(job.train.vocabulary)
        trunk = parameter_count(model)
        head = labels * (self.head.num_features + recipe.head.bias)
        sizes = job.batch
        lines = [
            f"{model.name} ({trunk / 1e6:.1f}M parameters, {multiply_adds(model, recipe.data.image_size) / 1e9:.2f}G "
            f"multiply-adds at {recipe.data.image_size} px) + head of {labels:,} hashtags ({head / 1e6:.1f}M)",
            f"{job.train.name}: {len(job.train):,} images; {job.validation.name}: {len(job.validation):,} images",
            f"{self.world.size} ranks on {self.world.device.type}: {self._sharding()}; head over "
            f"{self.head.group_size} ranks; global batch {sizes.total} = {sizes.micro} x {sizes.accumulation} x "
            f"{sizes.world}",
            f"{job.total:,} images = {job.epochs(job.total):.1f} epochs, "
            f"learning rate up to {job.learning_rate.peak:.4g}",
        ]
        tags = {
            "data_set": str(job.train.name),
            "vocabulary": job.train.vocabulary_hash,
            "resampling": job.order.resampling,
        }
        if isinstance(job.train, View):
            tags["data_view"] = job.train.summary()
            lines.append(tags["data_view"])
        epochs = expected_epochs(job.train.label_ids, job.train.label_start, labels, threshold=job.threshold)
        (epoch,) = (epoch for epoch in epochs if epoch.mode == recipe.data.resampling)
        if epoch.threshold is not None:
            lines.append(
                f"{epoch.mode} resampling with t = {epoch.threshold:.6g}: {epoch.length:,.0f} images an epoch on "
                f"average, {epoch.repeated:,} of {epoch.images:,} come more than once"
            )
        if job.duplicates:
            lines.append(
                f"{len(job.duplicates.keys):,} validation images are known to be in a training set (duplicates.json): "
                "evaluations give a lower bound too"
                + ("" if job.duplicates.covers(job.train.manifest_hash) else "; this training set was not searched")
            )
        if job.start:
            lines.append(f"starting from {job.start.checkpoint.path}: {job.start.report.summary()}")
            job.start.write_report(job.folder)
        if job.disk_folders and recipe.checkpoint.asynchronous:
            lines.append("state is on disk, and memory holds no copy of it to save: training waits for each checkpoint")
        if job.resume:
            lines.append(f"going on from {job.resume[0]} ({self.trainer.counter.samples:,} images done)")
        print("\n".join(lines), flush=True)
        tracker.start(recipe_dict(recipe), tags)
        tracker.text("recipe.yaml", self.recipe_text)
        tracker.text("environment.json", json.dumps(environment(), indent=2))
        tracker.artifact(job.train.folder / "vocabulary.json")
        figure = job.folder / "resampling.png"
        try:
            draw_epochs(
                epochs, f"Hashtags in an epoch of {job.train.name}, trained with {epoch.mode} resampling", [figure]
            )
        except UserError as error:  # a full disk, say: no reason to stop training
            _log.warning("%s", error)
        else:
            tracker.artifact(figure, "pictures")

    def _sharding(self) -> str:
        """How the trunk is sharded, in words."""
        config = self.recipe.engine
        text = config.name
        if config.name == "fairscale":
            text += " (a legacy engine, kept for comparison: engine.name=fsdp is its successor)"
        elif config.shard_group:
            text += f" in groups of {config.shard_group}"
        elif self.job.deepspeed:
            zero = self.job.deepspeed["zero_optimization"]
            text += f" ZeRO-{zero['stage']}"
            offloaded = {block["device"] for key, block in zero.items() if key.startswith("offload_")}
            text += "".join(f", offloading to {device}" for device in sorted(offloaded))
        if config.offload != "none":
            text += f", offloading to {config.offload}"
        if config.checkpointing != "none":
            text += f", recomputing {config.checkpointing}"
        return f"{text}, {config.precision}"

    def close(self, tracker: Tracker) -> None:
        """Tell where everything is."""
        if not self.world.is_main:
            return
        folder = self.job.folder
        path = newest(folder / "checkpoints")
        pictures = sorted((folder / "pictures").glob("*.png"))
        print(f"checkpoint  {path}")
        if pictures:
            print(f"picture     {pictures[-1]}")
        if self.recipe.tracking.enabled:
            print(f"MLflow run  {tracker.run_id or 'not created yet: see the warning above'}")
            uri = masked(self.recipe.tracking.uri)
            print(f"look at it  {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {uri}'}")
