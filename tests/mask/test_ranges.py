"""AttnRange and AttnRanges against Python sets of positions."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention import common
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.range import AttnRange
from magi_attention.common.ranges import AttnRanges

quick = settings(deadline=None, max_examples=60)

ranges = st.tuples(st.integers(0, 20), st.integers(0, 8)).map(lambda t: AttnRange(t[0], t[0] + t[1]))
range_lists = st.lists(ranges, max_size=6).map(AttnRanges.from_ranges)


def positions(*items: AttnRange) -> set[int]:
    return {i for r in items for i in range(r.start, r.end)}


# ---------------------------------------------------------------------------------------------------- one range


def test_a_range_is_a_value() -> None:
    r = AttnRange(np.int32(2), np.int64(5))
    assert (r.start, r.end, r.seqlen, len(r), str(r)) == (2, 5, 3, 3, "[2, 5)")
    assert type(r.start) is int and type(r.end) is int
    assert r == AttnRange(2, 5) and hash(r) == hash(AttnRange(2, 5)) and r != AttnRange(2, 6)
    assert pickle.loads(pickle.dumps(r)) == r
    assert r.to_naive_range() == (2, 5)
    with pytest.raises(AttributeError):
        r.start = 3  # type: ignore[misc]


@pytest.mark.parametrize("start, end", [(3, 2), (-1, 2), (-3, -2)])
def test_a_reversed_or_negative_range_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"0 <= start <= end, got start {start} and end {end}"):
        AttnRange(start, end)


@pytest.mark.parametrize("start, end, name", [(0.0, 2, "start"), (0, "2", "end"), (0, True, "end"), (None, 1, "start")])
def test_borders_must_be_integers(start: object, end: object, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        AttnRange(start, end)  # type: ignore[arg-type]


def test_from_range() -> None:
    r = AttnRange(1, 4)
    assert AttnRange.from_range(r) is r
    assert AttnRange.from_range((1, 4)) == AttnRange.from_range([1, 4]) == AttnRange.from_range(np.array([1, 4])) == r
    for wrong in (5, (1, 2, 3)):
        with pytest.raises(ValueError, match="a pair"):
            AttnRange.from_range(wrong)  # type: ignore[arg-type]


def test_offset() -> None:
    assert AttnRange(3, 5).offset(4) == AttnRange(7, 9)
    assert AttnRange(3, 5).offset(-3) == AttnRange(0, 2)
    with pytest.raises(ValueError, match="start -1"):
        AttnRange(3, 5).offset(-4)


@given(ranges, st.none() | st.integers(0, 30), st.none() | st.integers(0, 30))
@quick
def test_truncate(r: AttnRange, start: int | None, end: int | None) -> None:
    kept = {i for i in positions(r) if (start is None or start <= i) and (end is None or i < end)}
    assert positions(r.truncate(start, end)) == kept


@given(ranges, ranges)
@quick
def test_a_range_is_the_set_of_its_positions(a: AttnRange, b: AttnRange) -> None:
    x, y = positions(a), positions(b)
    assert positions(a.intersect(b)) == x & y
    assert a.intersect_size(b) == len(x & y)
    assert positions(*a.union(b)) == x | y
    assert a.union_size(b) == len(x | y)
    assert positions(*a.diff_by(b)) == y - x
    assert a.is_subrange_of(b) == (x <= y)
    assert a.is_overlap_with(b) == bool(x & y)
    assert a.is_empty() == (not x)
    for parts in (a.union(b), a.diff_by(b)):
        assert all(not p.is_empty() for p in parts)
        assert all(p.end < q.start for p, q in pairwise(parts))  # sorted, and none touch


def test_union_and_diff_by_example() -> None:
    assert AttnRange(0, 3).union(AttnRange(3, 5)) == [AttnRange(0, 5)]
    assert AttnRange(6, 8).union(AttnRange(0, 3)) == [AttnRange(0, 3), AttnRange(6, 8)]
    assert AttnRange(3, 5).diff_by(AttnRange(0, 9)) == [AttnRange(0, 3), AttnRange(5, 9)]


# ----------------------------------------------------------------------------------------------- a list of ranges


def test_a_list_of_ranges_behaves_like_a_list() -> None:
    r = AttnRanges()
    assert len(r) == r.size == 0 and not r and str(r) == "[]"
    r.append((4, 6))
    r.append(AttnRange(0, 3))
    r.extend([(1, 2)])
    assert list(r) == [AttnRange(4, 6), AttnRange(0, 3), AttnRange(1, 2)]
    assert r[1] == r[-2] == AttnRange(0, 3) and r[:2] == AttnRanges.from_ranges([(4, 6), (0, 3)])
    assert str(r) == "[[4, 6), [0, 3), [1, 2)]" and repr(r) == "AttnRanges([[4, 6), [0, 3), [1, 2)])"
    assert (r.start, r.end, r.size, r.total_seqlen, r.max_seqlen) == (0, 6, 3, 6, 3)
    assert r.points == [0, 1, 2, 3, 4, 6]
    assert r.to_naive_ranges() == [(4, 6), (0, 3), (1, 2)]
    assert pickle.loads(pickle.dumps(r)) == r
    with pytest.raises(TypeError, match="unhashable"):
        hash(r)


def test_lists_are_equal_by_value_and_in_order() -> None:
    a = AttnRanges.from_ranges([(0, 3), (5, 6)])
    assert a == AttnRanges.from_ranges(a) and a != AttnRanges.from_ranges([(5, 6), (0, 3)]) and a != [(0, 3), (5, 6)]


def test_from_ranges_makes_a_list_of_its_own() -> None:
    a = AttnRanges.from_ranges([(0, 3)])
    b, c = AttnRanges.from_ranges(a), copy.deepcopy(a)
    a.append((5, 6))
    assert b == c == AttnRanges.from_ranges([(0, 3)])


def test_a_list_extends_itself() -> None:
    a = AttnRanges.from_ranges([(0, 3)])
    a.extend(a)
    assert a == AttnRanges.from_ranges([(0, 3), (0, 3)])


def test_an_empty_list_has_no_start_or_end() -> None:
    assert AttnRanges().max_seqlen == AttnRanges().total_seqlen == AttnRanges().union_size() == 0
    with pytest.raises(ValueError, match="no start"):
        _ = AttnRanges().start
    with pytest.raises(ValueError, match="no end"):
        _ = AttnRanges().end


@given(range_lists)
@quick
def test_sort_and_merge(r: AttnRanges) -> None:
    before = r[:]
    in_order, merged = r.sort(), r.merge()
    assert list(in_order) == sorted(r, key=lambda x: (x.start, x.end)) and in_order.is_sorted()
    assert r.is_sorted() == (r == in_order)
    assert positions(*merged) == positions(*r)
    assert all(a.end < b.start for a, b in pairwise(merged))
    assert all(not x.is_empty() for x in merged)
    assert merged.is_merged() and merged.is_non_overlap()
    assert r.is_merged() == (r == merged)
    assert r == before


@given(range_lists, range_lists)
@quick
def test_set_operations(a: AttnRanges, b: AttnRanges) -> None:
    x, y = positions(*a), positions(*b)
    assert a.total_seqlen == sum(len(r) for r in a)
    assert a.union_size() == len(x)
    assert a.intersect_size() == a.total_seqlen - len(x)
    assert a.is_non_overlap() == (a.total_seqlen == len(x))
    assert a.union_size_with(b) == len(x | y)
    assert a.intersect_size_with(b) == len(x & y)
    for found, wanted in ((a.find_hole_ranges(b), x - y), (a.find_overlap_ranges(b), x & y)):
        assert positions(*found) == wanted
        assert found.is_merged()


@given(range_lists, ranges)
@quick
def test_make_range_local_is_the_place_in_the_buffer(a: AttnRanges, r: AttnRange) -> None:
    held = sorted(positions(*a))
    inside = any(r.start >= run.start and r.end <= run.end for run in a.merge())
    if not inside:
        with pytest.raises(ValueError, match="not inside one of the merged ranges"):
            a.make_range_local(r)
        return
    local = a.make_range_local(r)
    assert held[local.start : local.end] == list(range(r.start, r.end))
    assert a.make_ranges_local([r, r]) == AttnRanges.from_ranges([local, local])


def test_make_range_local_by_example() -> None:
    held = AttnRanges.from_ranges([(10, 20), (0, 4)])
    assert held.make_range_local((12, 15)) == AttnRange(6, 9)
    assert held.make_ranges_local([(1, 3), (10, 20)]) == AttnRanges.from_ranges([(1, 3), (4, 14)])
    with pytest.raises(ValueError, match=r"\[3, 11\)"):
        held.make_range_local((3, 11))


# ------------------------------------------------------------------------------------------------------ cu_seqlens


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_cu_seqlens_round_trip(make: object) -> None:
    r = AttnRanges.from_cu_seqlens(make([0, 3, 3, 7]), 7)  # type: ignore[operator]
    assert r == AttnRanges.from_ranges([(0, 3), (3, 3), (3, 7)])
    assert r.is_cu_seqlens(7) and not r.is_cu_seqlens(8)
    assert r.to_cu_seqlens(7) == [0, 3, 3, 7]


def test_cu_seqlens_of_no_document() -> None:
    r = AttnRanges.from_cu_seqlens([0])
    assert len(r) == 0 and r.is_cu_seqlens(0) and r.to_cu_seqlens(0) == [0]


@pytest.mark.parametrize("pairs", [[(1, 3)], [(0, 3), (4, 7)], [(0, 3), (2, 7)], [(3, 7), (0, 3)], []])
def test_to_cu_seqlens_refuses_what_is_not_consecutive(pairs: list[tuple[int, int]]) -> None:
    r = AttnRanges.from_ranges(pairs)
    assert not r.is_cu_seqlens(7)
    with pytest.raises(ValueError, match="consecutive"):
        r.to_cu_seqlens(7)


@pytest.mark.parametrize(
    "cu_seqlens, error, message",
    [
        ([1, 3], ValueError, r"begin at 0, got cu_seqlens\[0\] = 1"),
        ([0, 5, 3], ValueError, r"must not decrease, got cu_seqlens\[1\] = 5, cu_seqlens\[2\] = 3"),
        ([], ValueError, "shape"),
        ([[0, 3]], ValueError, "shape"),
        ([0.0, 3.0], TypeError, "must hold integers, got float64"),
        ([0, 6], ValueError, "ends at 6, not at seqlen 7"),
    ],
)
def test_from_cu_seqlens_refuses(cu_seqlens: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttnRanges.from_cu_seqlens(cu_seqlens, 7)


# --------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    "ranges",
    [
        AttnRanges.from_ranges([(0, 3), (5, 5)]),
        [(0, 3), (5, 5)],
        [[0, 3], AttnRange(5, 5)],
        (AttnRange(0, 3), AttnRange(5, 5)),
        np.array([[0, 3], [5, 5]], np.int32),
        np.array([[0, 3], [5, 5]], np.uint8),
        torch.tensor([[0, 3], [5, 5]], dtype=torch.int32),
    ],
    ids=["AttnRanges", "pairs", "mixed", "AttnRange", "int32", "uint8", "torch"],
)
def test_as_array_takes_any_form(ranges: object) -> None:
    array = AttnRanges.as_array(ranges, "q_ranges")  # type: ignore[arg-type]
    assert array.dtype == np.int64 and array.tolist() == [[0, 3], [5, 5]]


@pytest.mark.parametrize(
    "ranges", [[], (), AttnRanges(), np.empty((0, 2), np.int32), torch.empty(0, 2, dtype=torch.int)]
)
def test_as_array_of_nothing(ranges: object) -> None:
    array = AttnRanges.as_array(ranges, "q_ranges")  # type: ignore[arg-type]
    assert array.dtype == np.int64 and array.shape == (0, 2)


@pytest.mark.parametrize(
    "ranges, error, message",
    [
        ([(0, 3), (4, 2)], ValueError, r"k_ranges\[1\] = \[4, 2\): a range needs 0 <= start <= end"),
        ([(-1, 3)], ValueError, r"k_ranges\[0\] = \[-1, 3\)"),
        ([(0, 1, 2)], ValueError, r"k_ranges must be pairs .* shape \(1, 3\)"),
        ([0, 1], ValueError, r"k_ranges must be pairs .* shape \(2,\)"),
        (np.empty((0, 3), np.int64), ValueError, "k_ranges must be pairs"),
        ([(0, 1), (2,)], ValueError, "k_ranges must be rectangular"),
        ([(0.0, 1.0)], TypeError, "k_ranges must hold integers, got float64"),
        (torch.zeros(2, 2), TypeError, "k_ranges must hold integers"),
        ([("a", "b")], TypeError, "k_ranges must hold integers"),
        ({(0, 1), (1, 3)}, TypeError, "k_ranges must be AttnRanges, or a sequence"),
        ({(0, 1): "full"}, TypeError, "k_ranges must be AttnRanges, or a sequence"),
    ],
)
def test_as_array_refuses(ranges: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttnRanges.as_array(ranges, "k_ranges")  # type: ignore[arg-type]


def test_to_tensor() -> None:
    tensor = AttnRanges.from_ranges([(0, 3), (5, 9)]).to_tensor()
    assert tensor.dtype == torch.int32 and tensor.tolist() == [[0, 3], [5, 9]]
    assert AttnRanges().to_tensor().shape == (0, 2)


def test_common_holds_the_same_classes() -> None:
    from magi_attention import mask

    assert common.AttnRange is AttnRange is mask.AttnRange
    assert common.AttnRanges is AttnRanges is mask.AttnRanges
    assert common.AttnMaskType is AttnMaskType is mask.AttnMaskType
