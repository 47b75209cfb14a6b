from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.naming import ROLES, DatasetName, format_count, parse_count, wanted_count
from scale_wsl.errors import UserError

SLUGS = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,39}", fullmatch=True)
COUNTS = st.integers(0, 999 * 10**12) | st.builds(
    lambda digits, power: digits * 10**power, st.integers(0, 10**4), st.just(9)
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (420, "420"),
        (999, "999"),
        (1000, "1k"),
        (1477, "1.5k"),
        (8_500, "8.5k"),
        (9_949, "9.9k"),
        (9_950, "10k"),
        (17_000, "17k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (940_000_000, "940M"),
        (1_000_000_000, "1B"),
        (3_500_000_000, "3.5B"),
    ],
)
def test_counts_are_written_as_the_paper_does(count: int, text: str) -> None:
    assert format_count(count) == text


@given(COUNTS)
def test_a_count_survives_to_the_digits_written(count: int) -> None:
    text = format_count(count)
    assert format_count(parse_count(text)) == text
    assert abs(parse_count(text) - count) <= max(count, 1) * 0.0501  # 1.05 of a unit is rounded the most


@given(COUNTS, COUNTS)
def test_rounding_keeps_the_order(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert parse_count(format_count(low)) <= parse_count(format_count(high))


@given(st.sampled_from(ROLES), SLUGS, COUNTS, COUNTS)
def test_a_name_parses_back(role: str, source: str, images: int, labels: int) -> None:
    text = str(DatasetName(role, source, images, labels))
    parsed = DatasetName.parse(text)
    assert (parsed.role, parsed.source, str(parsed)) == (role, source, text)


def test_the_papers_names_parse() -> None:
    assert DatasetName.parse("train-IG-3.5B-17k") == DatasetName("train", "IG", 3_500_000_000, 17_000)
    assert DatasetName.parse("val-CUB-6k-200") == DatasetName("val", "CUB", 6_000, 200)


@given(st.text(alphabet="train-IG0123456789.kMBT", max_size=20))
def test_any_text_is_a_name_that_is_written_the_same_or_a_users_mistake(text: str) -> None:
    try:
        name = DatasetName.parse(text)
    except UserError:
        return
    assert str(name) == text


@pytest.mark.parametrize(
    "text", ["", "train-IG-1B", "dev-IG-1B-17k", "train-I G-1B-17k", "train-IG-01-17k", "train-IG-1.0k-1"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        DatasetName.parse(text)


@pytest.mark.parametrize("source", ["", "a-b", "1a", "ä", "a" * 41, "a/b"])
def test_what_is_no_source_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="source of a data set"):
        DatasetName("train", source, 1, 1)


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (35_000, 35_000),
        (3.5e6, 3_500_000),
        (1e15, 10**15),
        ("35k", 35_000),
        ("12.75M", 12_750_000),
        ("3.5B", 3_500_000_000),
        ("1_000_000", 1_000_000),
        ("5e6 images", 5_000_000),
        (" 5M images ", 5_000_000),
        ("1 image", 1),
    ],
)
def test_counts_that_users_write(value: float | str, count: int) -> None:
    assert wanted_count(value, "data.images") == count


@given(COUNTS)
def test_what_is_written_in_a_name_is_read_as_wanted(count: int) -> None:
    if count:
        assert wanted_count(format_count(count), "data.images") == parse_count(format_count(count))
        assert wanted_count(min(count, 10**15), "data.images") == min(count, 10**15)


@pytest.mark.parametrize(
    "value", [0, -1, 0.5, 1.5, "0.1k images and more", "1.0005k", "", "k", "1e99", "2e15", "9" * 999]
)
def test_no_count_is_refused_in_a_short_sentence(value: float | str) -> None:
    with pytest.raises(UserError, match=r"data\.images is .* but must be a number of images") as refused:
        wanted_count(value, "data.images")
    assert len(str(refused.value)) < 200
