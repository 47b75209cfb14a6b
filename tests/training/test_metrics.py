from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

import scale_wsl.training.metrics as module
from scale_wsl.models.head import ShardedHead
from scale_wsl.randomness import generator
from scale_wsl.training.metrics import (
    Calibration,
    EvaluationResult,
    Measure,
    average_precision,
    bootstrap_interval,
    expected_calibration_error,
    frequency_baseline,
    frequency_loss,
    hits,
    prevalence,
)


def reference(scores: Any, positives: Any) -> list[float]:
    return [
        average_precision_score(truth, column) if truth.any() else math.nan
        for truth, column in zip(positives.T, scores.T, strict=True)
    ]


@given(images=st.integers(1, 40), labels=st.integers(1, 6), levels=st.integers(1, 8), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_average_precision_is_scikit_learns_with_ties(images: int, labels: int, levels: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    scores = draws.integers(levels, size=(images, labels)) / levels - 0.5  # few levels: many ties
    positives = draws.random((images, labels)) < draws.random(labels)
    np.testing.assert_allclose(average_precision(scores, positives), reference(scores, positives), atol=1e-12, rtol=0)


def test_average_precision_in_chunks_of_columns_and_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = generator("test", 1)
    scores, positives = draws.standard_normal((300, 50)).astype(np.float32), draws.random((300, 50)) < 0.1
    whole = average_precision(scores, positives)
    np.testing.assert_allclose(whole, reference(scores, positives), atol=1e-12, rtol=0)
    monkeypatch.setattr(module, "_AT_ONCE", 300 * 7)
    np.testing.assert_allclose(average_precision(scores, positives), whole, atol=1e-15, rtol=0)


def test_average_precision_at_its_ends() -> None:
    truth = np.array([[True, False], [False, False], [True, False]])
    perfect = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0]])
    result = average_precision(perfect, truth)
    assert result[0] == 1.0
    assert math.isnan(result[1])  # nobody has it
    assert np.isnan(average_precision(np.zeros((0, 3)), np.zeros((0, 3), dtype=bool))).all()
    # A score that is no number is worth no more than the lowest.
    broken = np.array([[np.nan], [-5.0], [-np.inf], [np.inf]])
    positives = np.array([[True], [False], [False], [True]])
    expected = average_precision_score(positives[:, 0], [-9.0, -5.0, -9.0, 9.0])
    assert average_precision(broken, positives)[0] == pytest.approx(expected, abs=1e-12)


def test_prevalence_is_the_average_precision_of_a_constant_score() -> None:
    ids = np.array([[0, 2], [2, -1], [-1, -1], [2, 3]])
    positives = np.zeros((4, 5), dtype=bool)
    for image, row in enumerate(ids):
        positives[image, row[row >= 0]] = True
    share = prevalence(ids, 5)
    np.testing.assert_array_equal(share, [0.25, 0, 0.75, 0.25, 0])
    constant = np.broadcast_to(np.array([0.5, 0.1, 0.9, 0.2, 0.3]), (4, 5))
    there = share > 0
    np.testing.assert_allclose(np.array(reference(constant, positives))[there], share[there], atol=1e-12)


def test_hits_count_any_hashtag_and_never_the_padding() -> None:
    ids = np.array([[4, -1], [1, 3], [0, 2], [-1, -1]])
    top = np.array([[4, 0], [0, 2], [1, 2], [-1, 0]])
    np.testing.assert_array_equal(hits(top, ids), [True, False, True, False])
    counts = np.array([5, 9, 5, 1, 0])
    np.testing.assert_array_equal(frequency_baseline(counts, ids, 1), [False, True, False, False])
    np.testing.assert_array_equal(frequency_baseline(counts, ids, 2), [False, True, True, False])  # 1, then 0
    np.testing.assert_array_equal(frequency_baseline(counts, ids, 99), [True, True, True, False])


def test_frequency_loss_is_the_cross_entropy_of_smoothed_counts() -> None:
    counts = np.array([3, 0, 1])
    loss = frequency_loss(counts, np.array([[0, -1], [1, 2], [-1, -1]]))
    np.testing.assert_allclose(loss, [-math.log(4 / 7), -(math.log(1 / 7) + math.log(2 / 7)) / 2, 0.0])


def test_bootstrap_interval_is_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    values = generator("test", 2).exponential(size=200)
    ours = bootstrap_interval(values, resamples=20_000, seed=1)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.01)
    narrower = bootstrap_interval(values, resamples=20_000, seed=1, level=0.5)
    assert ours[0] < narrower[0] < values.mean() < narrower[1] < ours[1]
    assert bootstrap_interval(values, resamples=100, seed=1) != bootstrap_interval(values, resamples=100, seed=2)
    assert all(math.isnan(end) for end in bootstrap_interval(np.zeros(0)))
    median = bootstrap_interval(values, lambda rows: np.median(rows, axis=1), seed=1)
    assert median[0] < np.median(values) < median[1] < values.mean()
    at_once = bootstrap_interval(values, resamples=100, seed=1)
    monkeypatch.setattr(module, "_AT_ONCE", 1000)
    assert bootstrap_interval(values, resamples=100, seed=1) == at_once


def test_paired_intervals_are_narrower_than_those_of_the_parts() -> None:
    draws = generator("test", 3)
    difficulty = draws.random(400)
    model, baseline = difficulty < 0.5, difficulty < 0.45
    measure = Measure.difference(model, baseline, resamples=1000, seed=0)
    assert measure.gain == pytest.approx(model.mean() - baseline.mean())
    assert measure.gain_interval[0] > 0  # though the intervals of the two overlap:
    assert measure.interval[0] < measure.baseline + 0.05
    assert measure.gain_interval[1] - measure.gain_interval[0] < 0.6 * (measure.interval[1] - measure.interval[0])


def result(with_precision: bool = True) -> EvaluationResult:
    draws = generator("test", 4)
    images, size = 200, 12
    ids = np.full((images, 2), -1)
    ids[:, 0] = draws.integers(10, size=images)  # hashtags 10 and 11 are on no image
    scores = draws.standard_normal((images, size))
    scores[np.arange(images), ids[:, 0]] += 2.0
    positives = np.zeros((images, size), dtype=bool)
    positives[np.arange(images), ids[:, 0]] = True
    return EvaluationResult.of(
        row_loss=draws.random(images),
        confidence=draws.random(images),
        target_probability=draws.random(images),
        top_ids=np.argsort(-scores, axis=1)[:, :5],
        ids=ids,
        average_precision=average_precision(scores, positives) if with_precision else None,
        train_counts=np.arange(size)[::-1] + 1,
        resamples=300,
        seed=0,
    )


def test_the_result_compares_the_model_with_the_baseline() -> None:
    found = result()
    assert (found.images, found.hashtags) == (200, 10)
    assert found.macro_ap is not None
    assert found.macro_ap.baseline == pytest.approx(0.1)  # ten hashtags, each on one image in ten on average
    assert found.macro_ap.gain == pytest.approx(found.macro_ap.model / found.macro_ap.baseline)
    assert 3 < found.macro_ap.gain_interval[0] < found.macro_ap.gain < found.macro_ap.gain_interval[1]
    assert found.top5.gain_interval[0] > 0
    metrics = found.as_metrics()
    assert metrics["validation/top5"] == found.top5.model
    assert metrics["validation/top5_baseline"] == found.top5.baseline
    assert metrics["validation/top5_gain_low"] == found.top5.gain_interval[0]
    assert metrics["validation/macro_ap_ratio"] == found.macro_ap.gain
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_table_is_aligned_and_complete() -> None:
    found = result()
    header, *rows = found.table().splitlines()[:5]
    assert len({len(line) for line in (header, *rows)}) == 1
    assert [row.split("  ")[0] for row in rows] == [
        "loss",
        "top-1 hit rate",
        "top-5 hit rate",
        "macro mean average precision",
    ]
    assert f"{found.top5.model:.3f}" in rows[2]
    assert f"{found.top5.gain:+.3f}" in rows[2]
    without = result(with_precision=False)
    assert "average precision" not in without.table()
    assert not [name for name in without.as_metrics() if "macro" in name]


def test_no_images_give_no_figures() -> None:
    empty = EvaluationResult.of(
        row_loss=np.zeros(0),
        confidence=np.zeros(0),
        target_probability=np.zeros(0),
        top_ids=np.zeros((0, 5), dtype=np.int64),
        ids=np.zeros((0, 3), dtype=np.int64),
        average_precision=np.full(4, np.nan),
        train_counts=np.ones(4, dtype=np.int64),
    )
    assert math.isnan(empty.top5.model)
    assert math.isnan(empty.calibration.error)
    assert "nan" in empty.table()


# --- calibration -------------------------------------------------------------------------------------------------


def test_calibration_error_is_its_formula() -> None:
    draws = generator("test", 5)
    confidence, correct = draws.random(103) ** 3, draws.random(103) < 0.3
    expected, order = 0.0, sorted(range(103), key=lambda image: confidence[image])
    for number in range(15):
        chosen = order[number * 103 // 15 : (number + 1) * 103 // 15]
        assert len(chosen) in (6, 7)
        expected += len(chosen) / 103 * abs(np.mean(confidence[chosen]) - np.mean(correct[chosen]))
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, rel=1e-12)


def test_calibration_error_of_models_that_know_and_do_not_know_how_sure_they_are() -> None:
    confidence = generator("test", 6).random(20_000)
    correct = generator("test", 7).random(20_000) < confidence
    assert expected_calibration_error(confidence, correct) < 0.02
    assert expected_calibration_error(np.sqrt(confidence), correct) == pytest.approx(1 / 6, abs=0.01)  # 2/3 - 1/2
    assert expected_calibration_error(np.full(10, 0.7), np.arange(10) < 2) > 0.5
    assert expected_calibration_error(np.array([0.25]), np.array([True])) == 0.75  # fewer images than bins


def test_calibration_of_dense_probabilities() -> None:
    """From what the head says of an image, in float64, against all of its probabilities."""
    head = ShardedHead(50, 4, dtype=torch.float64)
    numbers = torch.Generator().manual_seed(0)
    features = 100 * torch.randn(64, 4, dtype=torch.float64, generator=numbers)
    ids = torch.stack([torch.randperm(50, generator=numbers)[:3] for _ in range(64)])
    mass = torch.full((64, 3), 1 / 3)
    with torch.no_grad():
        output, (best, top) = head.loss(features, ids, mass), head.top_k(features, 5)
        p = (features @ head.weight.t() + head.bias).softmax(1).numpy()
    assert output.target_probability is not None
    found = EvaluationResult.of(
        row_loss=output.row_loss.numpy(),
        confidence=best[:, 0].exp().numpy(),
        target_probability=output.target_probability.numpy(),
        top_ids=top.numpy(),
        ids=ids.numpy(),
        average_precision=None,
        train_counts=np.ones(50, dtype=np.int64),
        resamples=100,
    )
    targets = np.zeros_like(p)
    np.put_along_axis(targets, ids.numpy(), 1.0, axis=1)
    correct = targets[np.arange(64), p.argmax(1)] > 0
    assert found.calibration == Calibration(
        confidence=pytest.approx(p.max(1).mean(), rel=1e-12),
        accuracy=correct.mean(),
        error=pytest.approx(expected_calibration_error(p.max(1), correct), rel=1e-12),
        target_probability=pytest.approx((p * targets).sum(1).mean(), rel=1e-12),
        perplexity=pytest.approx(np.exp(-(targets / 3 * np.log(p)).sum(1).mean()), rel=1e-6),  # 1/3 is fp32
    )
    metrics = found.as_metrics()
    assert metrics["validation/calibration_error"] == found.calibration.error
    assert metrics["validation/perplexity"] == found.calibration.perplexity
    assert f"expected calibration error {found.calibration.error:.3f}" in found.table()
