from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus import keyhash
from scale_wsl.corpus.keyhash import LONGEST, drawn_for, mixed, text_hashes, uniform

MASK = (1 << 64) - 1
PINNED = [
    "e220a8397b1dcdaf",
    "da392e041ecc1abe",
    "db6da569f3d2c667",
    "82177327e1e4daac",
    "2f6afd7d5a80fcd6",
    "bc9e1a44934564c0",
    "1b421669d293a0ec",
]


def mix(h: int) -> int:
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & MASK
    h = (h ^ h >> 27) * 0x94D049BB133111EB & MASK
    return h ^ h >> 31


def reference(text: str) -> int:
    """The definition, in whole numbers of any size."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > LONGEST:
        data = hashlib.sha256(data).hexdigest().encode()
    h = mix(len(data) ^ 0x9E3779B97F4A7C15)
    for start in range(0, len(data), 8):
        h = mix(h ^ int.from_bytes(data[start : start + 8], "little"))
    return h


def test_the_hashes_are_pinned() -> None:
    # Subsets of a published study follow from these: they must never change, here or on another machine.
    texts = ["", "a", "photo-1", "12345678", "0123456789_abcdefghij", "größe", "x" * 97]
    assert [f"{h:016x}" for h in text_hashes(texts).tolist()] == PINNED
    drawn = drawn_for(text_hashes(["photo-1"]), "subset", 0)
    assert f"{int(drawn[0]):016x}" == "cc2c8772419f2496"


def test_mix_is_splitmix64s() -> None:
    # The first outputs of SplitMix64 seeded with 0: mix of the increment, of twice the increment, ...
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mixed(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.text(max_size=40) | st.text(min_size=90, max_size=110), max_size=20))
def test_equals_the_definition_whatever_stands_beside_it(texts: list[str]) -> None:
    assert text_hashes(texts).tolist() == [reference(text) for text in texts]


@pytest.mark.parametrize("text", ["a\0", "a\0\0\0\0\0\0\0\0", "\0", "\ud800", "ü" * 48, "ü" * 49])
def test_odd_texts(text: str) -> None:
    assert text_hashes(["a", text]).tolist() == [reference("a"), reference(text)]


def test_arrays_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"key-{i}" * (1 + i % 5) for i in range(100)]
    whole = text_hashes(np.array(keys, np.dtypes.StringDType()))
    monkeypatch.setattr(keyhash, "_BLOCK", 7)
    assert text_hashes(keys).tolist() == whole.tolist()


def test_a_monstrous_key_does_not_widen_the_others() -> None:
    # As columns of the longest key, 60,000 rows of 10 MB would be 600 GB.
    assert text_hashes(["k"] * 60_000 + ["x" * 10_000_000])[-1] == reference("x" * 10_000_000)


def test_hashes_of_counted_keys_look_like_draws() -> None:
    n, bins = 200_000, 256
    values = drawn_for(text_hashes([f"{i:09d}" for i in range(n)]), "subset", 1)
    for part in (values >> np.uint64(56), values & np.uint64(255), (uniform(values) * bins).astype(np.uint64)):
        counts = np.bincount(part.astype(np.int64), minlength=bins)
        chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum()
        assert abs(chi2 - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))
    assert len(np.unique(values)) == n
    assert uniform(values).min() >= 0
    assert uniform(np.array([MASK], np.uint64))[0] < 1


def test_one_other_letter_or_seed_changes_half_of_the_bits() -> None:
    keys = [f"photo{i}-a" for i in range(20_000)]
    others = [key[:-1] + "b" for key in keys]
    for first, second in (
        (text_hashes(keys), text_hashes(others)),
        (drawn_for(text_hashes(keys), "subset", 0), drawn_for(text_hashes(keys), "subset", 1)),
        (drawn_for(text_hashes(keys), "subset", 0), drawn_for(text_hashes(keys), "label noise", 0)),
    ):
        flipped = np.bitwise_count(first ^ second)
        assert abs(flipped.mean() - 32) < 5 * 4 / np.sqrt(len(keys))
