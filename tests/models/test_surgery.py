from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scale_wsl.hashtags.vocabulary import Entry, Vocabulary
from scale_wsl.models.head import initial_rows
from scale_wsl.models.surgery import OperatedSource, match_rows

_D = 3


class _Tensors:
    """A source that holds whole tensors, and remembers what was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.largest = self.reads = 0

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        assert tuple(self.tensors[name].shape) == tuple(shape)
        self.largest, self.reads = max(self.largest, stop - start), self.reads + 1
        return self.tensors[name].flatten()[start:stop].clone()


def _vocabulary(*entries: tuple[str, list[int], int]) -> Vocabulary:
    """From (hashtags, the canonical one first; numbers of synsets; count)."""
    made = [Entry((raw := tuple(names.split()))[0], raw, _wnids(numbers), count) for names, numbers, count in entries]
    return Vocabulary(tuple(sorted(made, key=lambda entry: (-entry.count, entry.hashtag))))


def _wnids(numbers: list[int]) -> tuple[str, ...]:
    return tuple(f"n{number:08d}" for number in sorted(numbers))


def _tensors(size: int, seed: int = 0) -> _Tensors:
    numbers = torch.Generator().manual_seed(seed)
    shapes = {"head.weight": (size, _D), "head.bias": (size,), "momentum.head.weight": (size, _D)}
    tensors = {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}
    return _Tensors(tensors | {"trunk.conv1.weight": torch.randn(7, generator=numbers)})


def _whole(source: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    read: Tensor = source.read(name, torch.Size(shape), 0, math.prod(shape))
    return read.view(shape)


_OLD = _vocabulary(
    ("dog hound", [1], 90),
    ("brownbear ursusarctos", [2], 80),
    ("axes", [3, 4], 70),
    ("crane", [5, 6], 60),
    ("cat", [7], 5),
)
_NEW = _vocabulary(
    ("ursusarctos brownbear", [2], 99),  # the same class under another name
    ("axes", [3], 50),  # other synsets
    ("dog", [1], 40),
    ("zebra", [9], 30),
    ("bird crane", [5], 20),  # a merged hashtag of its had other synsets
)


def test_rows_go_by_meaning() -> None:
    rows, report = match_rows(_OLD, _NEW)
    assert rows.tolist() == [1, -1, 0, -1, -1]
    assert report.taken_over == 2
    assert report.renamed == {"brownbear": "ursusarctos"}
    assert report.new == ("zebra",)
    assert report.ambiguous == {"axes": ("axes",), "bird": ("crane",)}
    assert report.dropped == ("axes", "crane", "cat")
    taking, report = match_rows(_OLD, _NEW, take_ambiguous=True)
    assert taking.tolist() == [1, 2, 0, -1, 3]
    assert report.dropped == ("cat",)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["taken_over"] == 2


def test_rows_of_hashtags_without_synsets_go_by_their_names() -> None:
    old = _vocabulary(("selfie", [], 9), ("tbt", [], 8), ("crane", [5, 6], 7), ("ootd", [], 6))
    new = _vocabulary(("tbt", [], 90), ("fyp", [], 80), ("selfie", [], 70), ("crane", [], 60), ("ootd look", [8], 50))
    rows, report = match_rows(old, new)
    assert rows.tolist() == [1, -1, 0, -1, -1]
    assert (report.taken_over, report.new, report.dropped) == (2, ("fyp",), ("crane", "ootd"))
    assert report.ambiguous == {"crane": ("crane",), "ootd": ("ootd",)}  # with synsets, and without
    assert match_rows(old, new, take_ambiguous=True)[0].tolist() == [1, -1, 0, 2, 3]


def test_the_summary_says_what_became_of_every_class() -> None:
    assert match_rows(_OLD, _NEW)[1].summary().splitlines() == [
        "2 hashtags taken over, 1 of them under another name",
        "1 new: zebra",
        "2 of other synsets than before, which start anew: axes, bird",
        "3 dropped: axes, crane, cat",
    ]
    assert "take the row" in match_rows(_OLD, _NEW, take_ambiguous=True)[1].summary()


def test_new_rows_start_as_new_rows_do() -> None:
    old, (rows, _) = _tensors(5), match_rows(_OLD, _NEW)
    operated = OperatedSource(old, rows, len(_OLD), seed=4)
    weight, bias, momentum = (
        _whole(operated, name, (5, _D)[: 1 + ("weight" in name)])
        for name in ("head.weight", "head.bias", "momentum.head.weight")
    )
    fresh = initial_rows(4, range(5), _D)
    for row, source in enumerate(rows.tolist()):
        assert torch.equal(weight[row], old.tensors["head.weight"][source] if source >= 0 else fresh[row])
        assert float(bias[row]) == (float(old.tensors["head.bias"][source]) if source >= 0 else 0.0)
        expected = old.tensors["momentum.head.weight"][source] if source >= 0 else torch.zeros(_D)
        assert torch.equal(momentum[row], expected)
    assert torch.equal(_whole(operated, "trunk.conv1.weight", (7,)), old.tensors["trunk.conv1.weight"])
    with pytest.raises(ValueError, match=r"head\.weight has 6 rows, but the new vocabulary has 5 classes"):
        operated.read("head.weight", torch.Size((6, _D)), 0, 1)


def _drawn(data: Any, least: int = 1) -> Vocabulary:
    """Some of twelve synset sets, each with its own hashtags, which of them is commonest and how common left open."""
    chosen = data.draw(st.lists(st.integers(0, 11), min_size=least, max_size=12, unique=True))
    names = [data.draw(st.permutations([f"tag{chr(97 + one)}x", f"tag{chr(97 + one)}y"])) for one in chosen]
    return _vocabulary(
        *(
            (" ".join(two), [one, 20 + one], data.draw(st.integers(1, 50)))
            for one, two in zip(chosen, names, strict=True)
        )
    )


@given(st.data())
def test_to_itself_nothing_changes_by_one_bit(data: Any) -> None:
    vocabulary = _drawn(data)
    rows, report = match_rows(vocabulary, vocabulary)
    assert (report.taken_over, report.new, report.ambiguous, report.dropped) == (len(vocabulary), (), {}, ())
    old = _tensors(len(vocabulary))
    operated = OperatedSource(old, rows, len(vocabulary), seed=1)
    for name, tensor in old.tensors.items():
        assert torch.equal(_whole(operated, name, tuple(tensor.shape)), tensor)


@given(st.data())
def test_there_and_back_again(data: Any) -> None:
    """Every class that both vocabularies have comes back with every bit; the others as new."""
    first, second = _drawn(data), _drawn(data)
    old = _tensors(len(first))
    there, report = match_rows(first, second)
    back, _ = match_rows(second, first)
    assert report.taken_over + len(report.new) + len(report.ambiguous) == len(second)
    assert report.taken_over + len(report.dropped) == len(first)
    once = OperatedSource(old, there, len(first), seed=1)
    twice = OperatedSource(once, back, len(second), seed=2)
    fresh = initial_rows(2, range(len(first)), _D)
    weight = _whole(twice, "head.weight", (len(first), _D))
    for row, entry in enumerate(first.entries):
        both = second.index_of_synsets(entry.synsets) is not None
        assert torch.equal(weight[row], (old.tensors["head.weight"] if both else fresh)[row])


@settings(max_examples=30)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 1000), st.data())
def test_any_part_is_that_part_of_the_whole(old_size: int, new_size: int, seed: int, data: Any) -> None:
    draws = np.random.default_rng(seed)
    rows = draws.integers(-1, old_size, new_size)
    old = _tensors(old_size)
    operated = OperatedSource(old, rows, old_size, seed=3)
    for name, shape in (("head.weight", (new_size, _D)), ("head.bias", (new_size,))):
        whole = _whole(operated, name, shape).flatten()
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
        assert torch.equal(operated.read(name, torch.Size(shape), start, stop), whole[start:stop])


def test_a_rank_reads_little_more_than_its_rows() -> None:
    size = 40_000
    rows = np.random.default_rng(0).permutation(size)
    old = _tensors(size)
    operated = OperatedSource(old, rows, size, seed=0)
    part = operated.read("head.weight", torch.Size((size, _D)), 0, size // 4 * _D)
    assert torch.equal(part.view(-1, _D), old.tensors["head.weight"][torch.from_numpy(rows[: size // 4])])
    assert old.largest <= 4096 * _D
    assert old.reads < size // 4 / 2  # neighbours are read together
