"""Evaluation on the validation set: loss, top-k hits, calibration and average precision per hashtag, beside a baseline.

Logits stay where they are: each rank scores its own rows of the vocabulary, and what ranks exchange are features, a few
candidates per image and one average precision per hashtag. Every record is counted once, whatever the world size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scale_wsl.collectives import all_gather_rows, all_reduce
from scale_wsl.corpus.judgements import Duplicates
from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.views import Images
from scale_wsl.engines.base import Engine
from scale_wsl.engines.world import World
from scale_wsl.errors import UserError
from scale_wsl.loading.config import DataConfig
from scale_wsl.loading.decode import CorruptImage, decode, eval_crop, normalize
from scale_wsl.loading.loader import EvalLoader
from scale_wsl.models.head import ShardedHead
from scale_wsl.randomness import generator
from scale_wsl.recipe import setting
from scale_wsl.training.metrics import EvaluationResult, average_precision
from scale_wsl.training.picture import prediction_sheet

__all__ = ["EvaluateConfig", "Evaluator"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Section `evaluate`: what is measured on the validation set."""

    micro: int = setting(0, "images per micro-batch and rank; 0: batch.micro")
    resamples: int = setting(2000, "bootstrap resamples behind each 95 % interval")
    pictures: int = setting(12, "validation images in the picture of predictions; 0: no picture")
    max_score_gib: float = setting(
        4.0, "memory that a rank may use for average precision (3 x validation images x own hashtags x 4 bytes)"
    )

    def __post_init__(self) -> None:
        for name, least in (("micro", 0), ("resamples", 100), ("pictures", 0), ("max_score_gib", 0)):
            if getattr(self, name) < least:
                raise UserError(f"evaluate.{name} is {getattr(self, name)}, but must be {least} or more")


class Evaluator:
    """Evaluates a trunk and its head on a validation set; every rank calls its methods together."""

    def __init__(
        self,
        engine: Engine,
        head: ShardedHead,
        train: Images,
        validation: Dataset,
        *,
        config: EvaluateConfig,
        data: DataConfig,
        micro_batch: int,
        world: World,
        seed: int,
        duplicates: Duplicates | None = None,
    ) -> None:
        self.engine, self.head, self.dataset, self.world = engine, head, validation, world
        self.config, self.data, self.seed = config, data, seed
        self.micro_batch = config.micro or micro_batch
        self.loader = EvalLoader(validation, data, micro_batch=self.micro_batch, rank=world.rank, world_size=world.size)
        # What the baseline knows: how often each hashtag is in the training set.
        self.train_counts = np.bincount(train.label_ids, minlength=len(train.vocabulary))
        # Which images are counted as wrong by the lower bound; None where nothing is known about duplicates.
        self.duplicate: NDArray[np.bool_] | None = None
        if duplicates is not None:
            known = duplicates.keys
            self.duplicate = np.array([key in known for key in validation.keys], np.bool_)

    @torch.no_grad()
    def evaluate(self) -> tuple[EvaluationResult, int] | None:
        """Go through the whole validation set once.

        Returns:
            On rank 0, the result and how many images could not be read; None on the others.
        """
        self.engine.train(False)
        keeps_scores = self._scores_fit()
        records, figures, hashtags, scores = [], [], [], []
        corrupt = 0
        for batch in self.loader:
            on_device = batch.to(self.world.device)
            features = self.engine.forward(normalize(on_device.images))
            records.append(torch.where(batch.mass.sum(1) > 0, batch.records, -1))
            found = self.head.loss(features, on_device.ids, on_device.mass)
            assert found.target_probability is not None
            best, predicted = self.head.top_k(features, 5)
            figures.append(torch.stack([found.row_loss, found.target_probability, best[:, 0].exp()]).float().cpu())
            hashtags.append(predicted.cpu())
            if keeps_scores:
                scores.append(self.head.local_log_probabilities(features).float().cpu())
            corrupt += batch.corrupt
        self.engine.train(True)
        unreadable = torch.tensor(corrupt)
        all_reduce(unreadable)

        order = all_gather_rows(torch.stack(records)[None])  # [ranks, batches, b]
        precision = self._average_precision(torch.cat(scores), order) if keeps_scores else None
        of_images = all_gather_rows(torch.cat(figures, dim=1).t())  # [ranks * batches * b, 3]
        top = all_gather_rows(torch.cat(hashtags))
        if not self.world.is_main:
            return None
        seen = order.flatten()
        kept = seen >= 0
        by_record = torch.argsort(seen[kept])
        row_loss, target_probability, confidence = of_images[kept][by_record].double().numpy().T
        result = EvaluationResult.of(
            row_loss=row_loss,
            confidence=confidence,
            target_probability=target_probability,
            top_ids=top[kept][by_record].numpy(),
            ids=self._padded_ids(seen[kept][by_record].tolist()),
            average_precision=precision,
            train_counts=self.train_counts,
            duplicate=None if self.duplicate is None else self.duplicate[seen[kept][by_record].numpy()],
            resamples=self.config.resamples,
            seed=self.seed,
        )
        return result, int(unreadable)

    # --- average precision, each rank its own hashtags -----------------------------------------------------------

    def _scores_fit(self) -> bool:
        largest = -(-self.head.vocabulary_size // self.head.group_size)  # the same decision on every rank
        needed = 3 * 4 * len(self.loader) * self.micro_batch * self.world.size * largest
        return needed <= self.config.max_score_gib * 2**30

    def _average_precision(self, scores: Tensor, order: Tensor) -> NDArray[np.float64]:
        """Average precision of every hashtag `[V]`, NaN where no validation image has it.

        Args:
            scores: `[batches * g * b, v]`, this rank's hashtags for the images of its head group.
            order: `[ranks, batches, b]`, whose records these are; -1 for rows that do not count.
        """
        ranks, batches, b = order.shape
        group = self.head.group_size
        # Replicas have seen other images: everybody's, in the same order as `order` groups them.
        everyone = all_gather_rows(scores, self.head.replicas)
        seen = order.view(ranks // group, group, batches, b).transpose(1, 2).flatten()
        kept = seen >= 0
        positives = np.zeros((int(kept.sum()), len(self.head.rows)), dtype=bool)
        for row, record in enumerate(seen[kept].tolist()):
            labels = self.dataset.labels(record)
            own = labels[(labels >= self.head.rows.start) & (labels < self.head.rows.stop)]
            positives[row, own - self.head.rows.start] = True
        own_precision = average_precision(everyone[kept].numpy(), positives)
        padded = torch.full((-(-self.head.vocabulary_size // group),), torch.nan, dtype=torch.float64)
        padded[: len(own_precision)] = torch.from_numpy(own_precision)
        whole = all_gather_rows(padded, self.head.shard.group)
        return whole[: self.head.vocabulary_size].numpy()

    def _padded_ids(self, records: list[int]) -> NDArray[np.int64]:
        ids = np.full((len(records), self.dataset.max_labels), -1, dtype=np.int64)
        for row, record in enumerate(records):
            labels = self.dataset.labels(record)
            ids[row, : len(labels)] = labels
        return ids

    # --- the picture ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def picture(self, path: Path, title: str) -> Path | None:
        """Draw sampled validation images with predicted and true hashtags; the path on rank 0, None on the others.

        The same images at every step, so that pictures of one run can be compared. Every rank predicts them all, since
        every rank holds other hashtags.
        """
        if not self.config.pictures:
            return None
        chosen = generator("picture", self.seed).permutation(len(self.dataset))
        images, records = [], []
        for record in chosen.tolist():
            try:
                image = decode(self.dataset.read(record), self.data.max_pixels)
            except CorruptImage:  # counted where the whole set is evaluated
                continue
            images.append(eval_crop(image, self.data.short_side, self.data.image_size))
            records.append(record)
            if len(records) == self.config.pictures:
                break
        if not images:
            return None
        self.engine.train(False)
        pixels = torch.stack(images)
        log_probabilities, ids = self.head.top_k(self.engine.forward(normalize(pixels.to(self.world.device))), 5)
        self.engine.train(True)
        if not self.world.is_main:
            return None
        names = [entry.hashtag for entry in self.dataset.vocabulary.entries]
        probabilities = log_probabilities.exp().tolist()
        try:
            prediction_sheet(
                pixels,
                true=[[names[label] for label in self.dataset.labels(record)] for record in records],
                predicted=[
                    [(names[label], share) for label, share in zip(row, shares, strict=True)]
                    for row, shares in zip(ids.tolist(), probabilities, strict=True)
                ],
                path=path,
                title=title,
            )
        except OSError as error:  # a full disk, say: no reason to stop training
            _log.warning("cannot draw %s: %s", path, error)
            return None
        return path
