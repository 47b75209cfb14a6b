"""Evaluation metrics as pure functions of arrays, in float64, and the table that shows them beside the baseline.

The baseline knows no image: it ranks hashtags by how often the training set has them. This module must never see a
model, a process group or a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.randomness import generator

__all__ = [
    "Calibration",
    "EvaluationResult",
    "LowerBound",
    "Measure",
    "average_precision",
    "bootstrap_interval",
    "expected_calibration_error",
    "frequency_baseline",
    "frequency_loss",
    "hits",
    "prevalence",
]

_BINS = 15  # Guo et al. 2017, table 1
_AT_ONCE = 1 << 22  # elements of a temporary array: tens of MiB, whatever the size of the problem

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def average_precision(scores: NDArray[np.floating[Any]], positives: NDArray[np.bool_]) -> Floats:
    """Average precision of every label: the sum over distinct scores of (recall gained) x (precision there).

    Images with equal scores count as one step, whatever their order, as in scikit-learn's `average_precision_score`.
    A score that is NaN ranks below all others.

    Args:
        scores: `[N, V]`, larger means more likely.
        positives: `[N, V]`, whether the image has the label.

    Returns:
        `[V]`; NaN for a label that no image has: it has no average precision, and is left out of a macro mean.
    """
    images, labels = scores.shape
    result = np.full(labels, np.nan)
    ranks = np.arange(1, images + 1, dtype=np.float64)[:, None]
    step = max(1, _AT_ONCE // max(1, images))
    for first in range(0, labels if images else 0, step):
        some = slice(first, first + step)
        columns = np.nan_to_num(scores[:, some], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        order = np.argsort(-columns, axis=0, kind="stable")
        columns = np.take_along_axis(columns, order, axis=0)
        found = np.cumsum(np.take_along_axis(positives[:, some], order, axis=0), axis=0, dtype=np.float64)
        last = np.ones(columns.shape, dtype=bool)  # of the images with its score
        last[:-1] = columns[:-1] != columns[1:]
        found_until = np.maximum.accumulate(np.where(last, found, 0.0), axis=0)
        gained = np.diff(found_until, axis=0, prepend=0.0)  # zero but where `last`
        with np.errstate(invalid="ignore"):
            result[some] = (gained * found / ranks).sum(axis=0) / found[-1]
    return result


def prevalence(ids: NDArray[np.integer[Any]], size: int) -> Floats:
    """Share of images that have each label, `[V]`; `ids` is `[N, K]`, padded with -1, without repetitions in a row.

    It is the average precision of any score that is the same for all images: the one distinct score gains all the
    recall, at precision (positives / N). So its mean over labels with a positive is the frequency baseline's macro
    mean average precision.
    """
    return np.bincount(ids[ids >= 0], minlength=size) / max(1, len(ids))


def hits(top: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Whether any of an image's labels is among its top k, `[N]`.

    Args:
        top: `[N, k]` or, the same for all images, `[k]`.
        ids: `[N, K]`, padded with -1.
    """
    top = np.broadcast_to(top, (len(ids), top.shape[-1]))
    return np.asarray(((top[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]).any(axis=(1, 2)))


def frequency_baseline(
    train_counts: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]], k: int
) -> NDArray[np.bool_]:
    """Hits `[N]` of always predicting the k most common labels of the training set (ties: the lower index)."""
    return hits(np.argsort(-train_counts, kind="stable")[:k], ids)


def frequency_loss(train_counts: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]]) -> Floats:
    """Loss `[N]` of always predicting the training frequencies: `-(1/k) sum log p` over an image's k labels.

    `p = (count + 1) / (total + V)`, so that a label that training never saw costs much, but not infinitely much. Zero
    for an image without labels.
    """
    log_p = np.log(train_counts + 1.0) - np.log(train_counts.sum() + len(train_counts))
    there = ids >= 0
    return np.asarray(-np.where(there, log_p[ids], 0.0).sum(1) / np.maximum(there.sum(1), 1))


def expected_calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = _BINS) -> float:
    """By how much confidence and accuracy differ, on average over images, within bins of equally many images.

    `sum over bins of (images in it / N) * |mean confidence - mean accuracy|` (Guo et al. 2017, equation 3), with bins
    of equal mass instead of equal width: with thousands of classes most confidences crowd near zero, where bins of
    equal width would average everything away (Nixon et al. 2019, section 4).

    Args:
        confidence: `[N]`, the probability that the model gives its prediction.
        correct: `[N]`, whether the prediction is right.
        bins: how many; each holds N/bins images, up to one, in the order of confidence (ties: as they come).

    Returns:
        Between 0 and 1; NaN without images.
    """
    if not len(confidence):
        return math.nan
    order = np.argsort(confidence, kind="stable")
    apart = np.asarray(confidence, dtype=np.float64)[order] - np.asarray(correct, dtype=np.float64)[order]
    bounds = np.arange(bins + 1) * len(apart) // bins
    sums = np.diff(np.concatenate([[0.0], np.cumsum(apart)])[bounds])
    return float(np.abs(sums).sum() / len(apart))


@dataclass(frozen=True)
class Calibration:
    """Whether the model's probabilities mean what they say.

    An image's target is 1/k on each of its k hashtags, but its prediction is counted as right if it is any of them. So
    a model that fits its targets is less confident than it is right, by as much as images have several hashtags."""

    confidence: float  # mean probability of the most probable hashtag
    accuracy: float  # share of images that have that hashtag
    error: float  # expected calibration error between the two
    target_probability: float  # mean probability that an image's hashtags get together
    perplexity: float  # exp of the mean loss

    @classmethod
    def of(
        cls, *, confidence: Floats, correct: NDArray[np.bool_], target_probability: Floats, row_loss: Floats
    ) -> Calibration:
        """From each of N images: all `[N]`."""
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(_mean_of(row_loss)))
        return cls(
            _mean_of(confidence),
            _mean_of(correct),
            expected_calibration_error(confidence, correct),
            _mean_of(target_probability),
            perplexity,
        )

    def as_metrics(self) -> dict[str, float]:
        """Flat metrics, all under `validation/`; accuracy is there as top1."""
        return {
            "validation/confidence": self.confidence,
            "validation/calibration_error": self.error,
            "validation/target_probability": self.target_probability,
            "validation/perplexity": self.perplexity,
        }

    def line(self) -> str:
        """For people, under the table."""
        return (
            f"Calibration: first guess {self.confidence:.3f} probable, {self.accuracy:.3f} right; "
            f"expected calibration error {self.error:.3f} ({_BINS} bins of equal mass). An image's hashtags together "
            f"{self.target_probability:.3f} probable; perplexity {self.perplexity:.4g}."
        )


def _mean(resampled: Floats) -> Floats:
    return np.asarray(resampled.mean(axis=1))


def bootstrap_interval(
    values: NDArray[Any],
    statistic: Callable[[Floats], Floats] = _mean,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a statistic: rows are drawn with replacement, as many as there are.

    For the difference of two predictors on the same images, pass their differences: what one image makes easy or hard
    for both then cancels.

    Args:
        values: `[N]` or `[N, m]`, one row per image (or whatever is resampled).
        statistic: takes resampled rows, `[R, N]` or `[R, N, m]`, and returns one number each, `[R]`.
        resamples: how many resamples.
        seed: of the draws.
        level: share of the resamples inside the interval.

    Returns:
        (low, high); NaN without rows.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return math.nan, math.nan
    draws, results = generator("bootstrap", seed), []
    step = max(1, _AT_ONCE // values.size)
    for first in range(0, resamples, step):
        chosen = draws.integers(len(values), size=(min(step, resamples - first), len(values)))
        results.append(statistic(values[chosen]))
    low, high = np.quantile(np.concatenate(results), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- the result of an evaluation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """One figure of the model beside the baseline's, and how much of the distance is chance."""

    model: float
    interval: Interval  # 95 %, of `model`
    baseline: float
    gain: float  # model - baseline, or model / baseline where `ratio`
    gain_interval: Interval  # 95 %, paired: both figures on the same resample
    ratio: bool = False

    @classmethod
    def difference(cls, model: NDArray[Any], baseline: NDArray[Any], **bootstrap: Any) -> Measure:
        """Means of two arrays `[N]`, and their difference."""
        model, baseline = np.asarray(model, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
        apart = model - baseline
        return cls(
            _mean_of(model),
            bootstrap_interval(model, **bootstrap),
            _mean_of(baseline),
            _mean_of(apart),
            bootstrap_interval(apart, **bootstrap),
        )

    @classmethod
    def ratio_of(cls, model: Floats, baseline: Floats, **bootstrap: Any) -> Measure:
        """Means of two positive arrays `[N]`, and their ratio."""

        def ratio(pairs: Floats) -> Floats:
            return np.asarray(pairs[..., 0].sum(1) / pairs[..., 1].sum(1))

        return cls(
            _mean_of(model),
            bootstrap_interval(model, **bootstrap),
            _mean_of(baseline),
            _mean_of(model) / _mean_of(baseline) if len(model) else math.nan,
            bootstrap_interval(np.stack([model, baseline], axis=1), ratio, **bootstrap),
            ratio=True,
        )

    def as_metrics(self, name: str) -> dict[str, float]:
        """Flat metrics, all under `validation/`."""
        gain = f"validation/{name}_{'ratio' if self.ratio else 'gain'}"
        return {
            f"validation/{name}": self.model,
            f"validation/{name}_low": self.interval[0],
            f"validation/{name}_high": self.interval[1],
            f"validation/{name}_baseline": self.baseline,
            gain: self.gain,
            f"{gain}_low": self.gain_interval[0],
            f"{gain}_high": self.gain_interval[1],
        }

    def row(self) -> list[str]:
        """Cells of the table: model, interval, baseline, gain, interval."""
        places = 3 if max(abs(self.model), abs(self.baseline)) >= 0.1 else 4  # small shares need another digit
        sign, unit, gain_places = ("", "x", 2) if self.ratio else ("+", "", places)
        return [
            f"{self.model:.{places}f}",
            f"{self.interval[0]:.{places}f} to {self.interval[1]:.{places}f}",
            f"{self.baseline:.{places}f}",
            f"{self.gain:{sign}.{gain_places}f}{unit}",
            f"{self.gain_interval[0]:{sign}.{gain_places}f} to {self.gain_interval[1]:{sign}.{gain_places}f}",
        ]


@dataclass(frozen=True)
class LowerBound:
    """Hit rates if every validation image that the training set has too were predicted wrongly.

    As in the supplement of Mahajan et al. 2018: whatever of these was learned by heart, the network would hit at least
    so often without.
    """

    duplicates: int  # of the images that were evaluated
    top1: float
    top1_interval: Interval  # 95 %
    top5: float
    top5_interval: Interval

    @classmethod
    def of(
        cls, top1: NDArray[np.bool_], top5: NDArray[np.bool_], duplicate: NDArray[np.bool_], **bootstrap: Any
    ) -> LowerBound:
        """From each of N images: its hits, and whether it is a duplicate, all `[N]`."""
        first, five = top1 & ~duplicate, top5 & ~duplicate
        return cls(
            int(duplicate.sum()),
            _mean_of(first),
            bootstrap_interval(first, **bootstrap),
            _mean_of(five),
            bootstrap_interval(five, **bootstrap),
        )

    def as_metrics(self) -> dict[str, float]:
        """Flat metrics, all under `validation/`."""
        metrics = {"validation/duplicates": float(self.duplicates)}
        for name, value, interval in (
            ("top1", self.top1, self.top1_interval),
            ("top5", self.top5, self.top5_interval),
        ):
            metrics[f"validation/{name}_lower_bound"] = value
            metrics[f"validation/{name}_lower_bound_low"], metrics[f"validation/{name}_lower_bound_high"] = interval
        return metrics

    def lines(self, images: int) -> list[str]:
        """For people, under the table; `images` were evaluated."""
        share = f" ({self.duplicates / images:.2%})" if images else ""
        return [
            f"Duplicates: the training set has {self.duplicates:,} of the images too{share}. Counting each as wrong, "
            "hit rates are at least:",
            *(
                f"  {name}  {value:.3f}  ({low:.3f} to {high:.3f})"
                for name, value, (low, high) in (
                    ("top-1", self.top1, self.top1_interval),
                    ("top-5", self.top5, self.top5_interval),
                )
            ),
        ]


@dataclass(frozen=True)
class EvaluationResult:
    """How well a model predicts the hashtags of the validation images, beside the frequency baseline."""

    images: int  # with at least one hashtag, and readable
    hashtags: int  # that at least one of these images has
    loss: Measure
    top1: Measure
    top5: Measure
    macro_ap: Measure | None  # None where there was no room for the scores
    calibration: Calibration
    bound: LowerBound | None = None  # None where nothing is known about duplicates

    @classmethod
    def of(
        cls,
        *,
        row_loss: Floats,
        confidence: Floats,
        target_probability: Floats,
        top_ids: NDArray[np.integer[Any]],
        ids: NDArray[np.integer[Any]],
        average_precision: Floats | None,
        train_counts: NDArray[np.integer[Any]],
        duplicate: NDArray[np.bool_] | None = None,
        resamples: int = 2000,
        seed: int = 0,
    ) -> EvaluationResult:
        """From what the model says about N images.

        Intervals of loss and hits come from resampling images. That of the macro mean average precision comes from
        resampling hashtags, for the given images: it says how far the mean depends on which hashtags there are.

        Args:
            row_loss: `[N]`.
            confidence: `[N]`, the probability of the model's best hashtag.
            target_probability: `[N]`, the probability of the true hashtags together.
            top_ids: `[N, k]`, the model's best hashtags, best first, k >= 5 (or the whole vocabulary).
            ids: `[N, K]`, true hashtags, padded with -1.
            average_precision: `[V]`, NaN for hashtags that no image has; None where it was not computed.
            train_counts: `[V]`, images of the training set with each hashtag.
            duplicate: `[N]`, images that a training set has too; None where nothing is known about that.
            resamples: of the bootstrap.
            seed: of the bootstrap.
        """
        bootstrap = {"resamples": resamples, "seed": seed}
        share = prevalence(ids, len(train_counts))
        there = share > 0
        first_hits, five_hits = hits(top_ids[:, :1], ids), hits(top_ids[:, :5], ids)
        return cls(
            images=len(ids),
            hashtags=int(there.sum()),
            loss=Measure.difference(row_loss, frequency_loss(train_counts, ids), **bootstrap),
            top1=Measure.difference(first_hits, frequency_baseline(train_counts, ids, 1), **bootstrap),
            top5=Measure.difference(five_hits, frequency_baseline(train_counts, ids, 5), **bootstrap),
            macro_ap=None
            if average_precision is None
            else Measure.ratio_of(average_precision[there], share[there], **bootstrap),
            calibration=Calibration.of(
                confidence=confidence, correct=first_hits, target_probability=target_probability, row_loss=row_loss
            ),
            bound=None if duplicate is None else LowerBound.of(first_hits, five_hits, duplicate, **bootstrap),
        )

    def as_metrics(self) -> dict[str, float]:
        """Flat `{"validation/...": value}`, for a tracker."""
        metrics = {"validation/images": float(self.images), "validation/hashtags": float(self.hashtags)}
        metrics |= self.loss.as_metrics("loss") | self.top1.as_metrics("top1") | self.top5.as_metrics("top5")
        metrics |= self.calibration.as_metrics() | (self.bound.as_metrics() if self.bound else {})
        return metrics | (self.macro_ap.as_metrics("macro_ap") if self.macro_ap else {})

    def table(self) -> str:
        """The figures side by side, for people."""
        rows = [["", "model", "(95 % interval)", "baseline", "gain", "(95 % interval)"]]
        rows += [["loss", *self.loss.row()], ["top-1 hit rate", *self.top1.row()], ["top-5 hit rate", *self.top5.row()]]
        if self.macro_ap:
            rows.append(["macro mean average precision", *self.macro_ap.row()])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        lines.append(
            f"{self.images:,} images, {self.hashtags:,} hashtags. Baseline: the training set's most common hashtags, "
            "for every image."
        )
        resampled = "images (average precision: hashtags)" if self.macro_ap else "images"
        lines.append(f"Intervals: bootstrap over {resampled}.")
        lines.append(self.calibration.line())
        if self.bound:
            lines += self.bound.lines(self.images)
        return "\n".join(lines)


def _mean_of(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan
