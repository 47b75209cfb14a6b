from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.checkpoint.pieces import boxes, owned_pieces, owned_ranges
from scale_wsl.shards import FlatShard


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_boxes_of_a_range_are_its_elements_in_order_and_few(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    stop = data.draw(st.integers(0, count))
    start = data.draw(st.integers(0, stop))
    whole = torch.arange(count).view(shape)
    found, reached, number = [], start, 0
    for first, last, (offsets, sizes) in boxes(tuple(shape), start, stop):
        assert first == reached
        box = whole[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]
        assert box.numel() == last - first
        found += box.flatten().tolist()
        reached, number = last, number + 1
    assert found == list(range(start, stop))
    assert number <= max(1, 2 * len(shape) - 1)


@given(
    st.lists(st.sampled_from([1, 2, 3, 700, 2000]), max_size=3).filter(lambda shape: math.prod(shape) < 10_000_000),
    st.integers(1, 7),
    st.text(max_size=3),
    st.data(),
)
def test_all_holders_together_write_each_element_once(
    shape: list[int], copies: int, name: str, data: st.DataObject
) -> None:
    count = math.prod(shape)
    stop = data.draw(st.integers(0, count))
    start = data.draw(st.integers(0, stop))
    local = torch.empty(stop - start)
    ranges = sorted(
        found
        for copy in range(copies)
        for found in owned_ranges(name, FlatShard(local, torch.Size(shape), start, copies, copy))
    )
    reached = start
    for first, last in ranges:
        assert first == reached < last
        reached = last
    assert reached == stop


def test_a_large_replicated_tensor_is_shared_out_by_rows_and_a_small_one_is_not() -> None:
    large, small = torch.zeros(64, 3, 100, 1000), torch.zeros(64, 3, 7, 7)
    shares = [list(owned_pieces("large", FlatShard.whole(large, 4, copy))) for copy in range(4)]
    assert [len(share) for share in shares] == [1, 1, 1, 1]  # one box each
    assert {share[0][1][1] for share in shares} == {(16, 3, 100, 1000)}
    shares = [list(owned_pieces("small", FlatShard.whole(small, 4, copy))) for copy in range(4)]
    assert sorted(len(share) for share in shares) == [0, 0, 0, 1]


def test_small_tensors_do_not_all_go_to_one_rank() -> None:
    tensor = torch.zeros(8)
    written = [
        sum(len(owned_ranges(f"trunk.layer{n}.weight", FlatShard.whole(tensor, 4, copy))) for n in range(400))
        for copy in range(4)
    ]
    assert sum(written) == 400
    assert min(written) > 50


def test_no_piece_is_so_large_that_ranks_could_not_share_its_check() -> None:
    tensor = torch.empty(1, device="meta").expand(1 << 14, 1 << 14)  # a GiB that is not there
    shard = FlatShard(torch.empty(1, device="meta").expand(tensor.numel()), tensor.shape)
    pieces = [piece for piece, _ in owned_pieces("large", shard)]
    assert max(piece.nbytes for piece in pieces) <= 64 << 20
    assert sum(piece.nbytes for piece in pieces) == 1 << 30
    assert len(pieces) == 16
