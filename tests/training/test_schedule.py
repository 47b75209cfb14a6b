from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.training.schedule import Duration, LearningRate, OptimConfig, ScheduleConfig


def test_the_papers_schedule() -> None:
    """Batch 8,064 peaks at 3.15 (0.1 x 8,064 / 256); twenty halvings split what follows the warm-up evenly."""
    rate = LearningRate.of(
        OptimConfig(), ScheduleConfig(halvings=20), batch=8064, warm_up=1_000_000, total=7_000_000_000
    )
    assert rate.at(0) == 0.1
    assert rate.at(500_000) == pytest.approx((0.1 + 3.15) / 2)
    assert rate.at(1_000_000) == pytest.approx(3.15)
    after = (7_000_000_000 - 1_000_000) / 21
    for halvings in range(21):
        inside = 1_000_000 + int((halvings + 0.5) * after)
        assert rate.at(inside) == pytest.approx(3.15 * 0.5**halvings)
    assert rate.at(7_000_000_000) == rate.at(8_000_000_000) == pytest.approx(3.15 * 0.5**20)


def test_a_small_batch_never_warms_up_from_above_its_peak() -> None:
    rate = LearningRate.of(OptimConfig(), ScheduleConfig(), batch=64, warm_up=100, total=1000)
    assert rate.at(0) == rate.peak == 0.025


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 30), st.integers(0, 2 * 10**6))
def test_the_rate_is_positive_and_never_above_the_peak(warm_up: int, total: int, halvings: int, samples: int) -> None:
    rate = LearningRate(start=0.01, peak=0.3, warm_up=warm_up, total=total, halvings=halvings)
    assert 0 < rate.at(samples) <= 0.3


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("7e9 images", 7_000_000_000),
        ("500 steps", 4000),
        ("1 step", 8),
        ("2 epochs", 25),
        ("2.5 epochs", 30),
        ("5 %", 50),
    ],
)
def test_durations_in_every_unit(text: str, samples: int) -> None:
    starts = [0, 12, 25, 35]
    assert Duration.parse(text, "x").samples(batch=8, epoch_start=starts.__getitem__, whole=1000) == samples


@given(st.text())
def test_any_text_is_a_duration_or_a_users_mistake(text: str) -> None:
    with contextlib.suppress(UserError):
        assert Duration.parse(text, "schedule.length").count >= 0


@pytest.mark.parametrize("text", ["", "10", "epochs", "-1 epochs", "1e999 images", "ten steps", "5 minutes"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"schedule\.length"):
        ScheduleConfig(length=text)


def test_percent_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="of what"):
        ScheduleConfig(length="50 %")
