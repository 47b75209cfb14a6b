from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus import resample
from scale_wsl.corpus.resample import (
    DEFAULT_THRESHOLD,
    MODES,
    choose_threshold,
    expected_epoch,
    expected_epochs,
    hashtag_factors,
    image_factors,
    threshold_for,
)
from scale_wsl.errors import UserError
from scale_wsl.loading.order import Order
from tests.loading.fakes import FakeDataset, zipf_rows


def csr(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = [label for row in rows for label in row]
    return np.array(flat, np.int32), np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


def test_a_worked_example_of_section_3() -> None:
    # 100 images; hashtag 0 on 40 of them, 1 on 10, 2 on one (which carries 0 too), 3 on four; t = 0.1, so t / f is
    # 0.25, 1, 10 and 2.5; its square root 0.5, 1, 3.162 and 1.581; and no factor falls below 1.
    rows = [[0]] * 39 + [[0, 2]] + [[1]] * 10 + [[3]] * 3 + [[1, 3]] * 0 + [[0, 3]] * 0 + [[3]] + [[]] * 46
    labels = csr(rows)
    assert hashtag_factors(np.bincount(labels[0]), 100, "square-root", 0.1).round(3).tolist() == [1, 1, 3.162, 1.581]
    assert hashtag_factors(np.bincount(labels[0]), 100, "uniform", 0.1).tolist() == [1, 1, 10, 2.5]
    assert hashtag_factors(np.bincount(labels[0]), 100, "natural", 0.1).tolist() == [1, 1, 1, 1]
    by_image = image_factors(*labels, "square-root", 0.1).round(3).tolist()
    assert by_image == [1] * 39 + [3.162] + [1] * 10 + [1.581] * 4 + [1] * 46


@given(
    st.lists(st.lists(st.integers(0, 8), unique=True, max_size=4), max_size=30),
    st.sampled_from(MODES),
    st.floats(1e-3, 1.0),
)
def test_equals_the_formula_image_by_image(rows: list[list[int]], mode: str, threshold: float) -> None:
    phi = {"natural": lambda x: 1.0, "square-root": lambda x: x**0.5, "uniform": lambda x: x}[mode]
    share = {h: sum(h in row for row in rows) / len(rows) for row in rows for h in row}
    expected = [max([max(1.0, phi(threshold / share[h])) for h in row], default=1.0) for row in rows]
    np.testing.assert_allclose(image_factors(*csr(rows), mode, threshold), expected, rtol=1e-12)


def test_uniform_evens_out_and_square_root_halves_the_exponent() -> None:
    counts = np.array([6400, 1600, 400, 100, 25])
    rows = [[h] for h, count in enumerate(counts) for _ in range(count)]
    labels = csr(rows)
    share = counts.max() / counts.sum()  # with t at the most common hashtag's share every other one is repeated
    for mode, power in (("natural", 1.0), ("square-root", 0.5), ("uniform", 0.0)):
        drawn = np.bincount(labels[0], weights=image_factors(*labels, mode, share))
        np.testing.assert_allclose(drawn / drawn[0], (counts / counts[0]) ** power, rtol=1e-12)


def test_hashtags_that_no_image_carries_do_no_harm() -> None:
    assert image_factors(*csr([[5], [], [5]]), "uniform", 1.0).tolist() == [1.5, 1.0, 1.5]
    assert image_factors(*csr([[], []]), "uniform", 1.0).tolist() == [1.0, 1.0]
    assert image_factors(*csr([]), "uniform", 1.0).tolist() == []


def test_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="must be one of natural, square-root, uniform"):
        image_factors(*csr([[0]]), "sqrt", 0.1)
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            image_factors(*csr([[0]]), "uniform", threshold)


# --- an epoch of a stated length -------------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.integers(0, 12), unique=True, max_size=4), min_size=1, max_size=40)


def length_of(rows: list[list[int]], mode: str, threshold: float) -> float:
    """By brute force: the sum over images, each by the formula."""
    phi = {"square-root": math.sqrt, "uniform": float}[mode]
    count = {h: sum(h in row for row in rows) for row in rows for h in row}
    return math.fsum(max([max(1.0, phi(threshold * len(rows) / count[h])) for h in row], default=1.0) for row in rows)


@given(ROWS, st.sampled_from(MODES[1:]), st.floats(0.0, 1.0))
def test_the_threshold_gives_the_stated_length(rows: list[list[int]], mode: str, where: float) -> None:
    images, longest = len(rows), length_of(rows, mode, 1.0)
    length = min(images + where * (longest - images), longest)
    threshold = threshold_for(*csr(rows), mode, length)
    assert 0 < threshold <= 1
    assert length_of(rows, mode, threshold) == pytest.approx(length, rel=1e-12)
    assert image_factors(*csr(rows), mode, threshold).sum() == pytest.approx(length, rel=1e-12)
    # the smallest one: a hair's breadth less gives a shorter epoch, unless no image is repeated at all
    if length > images * (1 + 1e-6):
        assert length_of(rows, mode, threshold * (1 - 1e-9)) < length


@given(ROWS, st.sampled_from(MODES[1:]))
def test_the_shortest_epoch_repeats_no_image(rows: list[list[int]], mode: str) -> None:
    threshold = threshold_for(*csr(rows), mode, len(rows))
    assert image_factors(*csr(rows), mode, threshold).tolist() == [1.0] * len(rows)


def test_every_order_of_the_images_gives_the_same_threshold_to_the_last_bit() -> None:
    rows = zipf_rows(500, labels=60)
    expected = threshold_for(*csr(rows), "square-root", 900)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert threshold_for(*csr(rows), "square-root", 900) == expected
    assert expected == 0.079097273972337  # every rank, on every machine


def test_epochs_have_the_stated_length_on_average() -> None:
    dataset = FakeDataset(zipf_rows(300, labels=40))
    threshold = threshold_for(dataset.label_ids, dataset.label_start, "square-root", 450)
    order = Order.of(dataset, seed=3, resampling="square-root", threshold=threshold)
    epochs = 300
    fraction = image_factors(dataset.label_ids, dataset.label_start, "square-root", threshold) % 1
    deviation = math.sqrt((fraction * (1 - fraction)).sum() / epochs)
    assert abs(order.epoch_start(epochs) / epochs - 450) < 4.5 * deviation


@pytest.mark.parametrize("mode", MODES)
def test_a_length_out_of_reach_says_what_is_in_reach(mode: str) -> None:
    rows = [[0]] * 90 + [[1]] * 10
    longest = {"natural": 100, "square-root": 126, "uniform": 200}[mode]  # 90 sqrt(10/9) + 10 sqrt(10) = 126.5
    for length in (99, longest + 1):
        says = f"an epoch of {length} images is wanted, but {mode} .* one of 100 .* {longest} "
        with pytest.raises(UserError, match=says):
            threshold_for(*csr(rows), mode, length)
    threshold = threshold_for(*csr(rows), mode, longest)
    assert image_factors(*csr(rows), mode, threshold).sum() == pytest.approx(longest)


def test_a_threshold_is_given_chosen_or_the_default() -> None:
    rows = [[0]] * 90 + [[1]] * 10
    assert choose_threshold(*csr(rows), "uniform", None, None) == DEFAULT_THRESHOLD
    assert choose_threshold(*csr(rows), "uniform", 0.5, None) == 0.5
    assert choose_threshold(*csr(rows), "uniform", None, 110) == pytest.approx(0.2)  # 10 images twice


# --- what an epoch holds ---------------------------------------------------------------------------------------------


@given(ROWS, st.sampled_from(MODES), st.floats(1e-3, 1.0))
def test_an_expected_epoch_is_the_sum_over_its_images(rows: list[list[int]], mode: str, threshold: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "_BLOCK", 7)
        epoch = expected_epoch(*csr(rows), 15, mode, threshold)
    factors = image_factors(*csr(rows), mode, threshold).tolist()
    held = [sum(f for f, row in zip(factors, rows, strict=True) if h in row) for h in range(15)]
    np.testing.assert_allclose(epoch.hashtags, held, rtol=1e-12)
    assert epoch.length == pytest.approx(sum(factors))
    assert (epoch.images, epoch.repeated, epoch.largest) == (len(rows), sum(f > 1 for f in factors), max(factors))
    assert epoch.threshold == (None if mode == "natural" else threshold)
    there = [x for x in held if x]
    if not there:
        assert (epoch.top_share, epoch.gini, epoch.perplexity) == (0, 0, 0)
        return
    assert epoch.top_share == pytest.approx(max(there) / sum(factors))
    differences = sum(abs(x - y) for x in there for y in there)  # the definition of Gini's coefficient
    assert epoch.gini == pytest.approx(differences / (2 * len(there) * sum(there)), abs=1e-12)
    shares = [x / sum(there) for x in there]
    assert epoch.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_three_rules_side_by_side() -> None:
    rows = [[h] for h, count in enumerate([640, 160, 40, 10]) for _ in range(count)]
    natural, root, uniform = expected_epochs(*csr(rows), 4, length=1300)
    assert [epoch.mode for epoch in (natural, root, uniform)] == list(MODES)
    assert natural.length == 850
    assert root.length == pytest.approx(1300)
    assert uniform.length == pytest.approx(1300)
    at_one = expected_epochs(*csr(rows), 4, threshold=640 / 850)
    assert [epoch.gini for epoch in at_one] == sorted((epoch.gini for epoch in at_one), reverse=True)
    assert at_one[2].gini == pytest.approx(0, abs=1e-12)
    assert at_one[2].perplexity == pytest.approx(4)
    assert expected_epochs(*csr(rows), 4)[1].threshold == DEFAULT_THRESHOLD
