"""Every function on bands against sets of cells counted one by one."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from magi_attention.mask import bands as B
from magi_attention.testing.strategies import raw_bands

quick = settings(deadline=None, max_examples=60)

SIZE = 14

small = st.integers(0, SIZE)
pairs = st.tuples(small, small).map(sorted)
any_bands = raw_bands(SIZE)
tight_bands = any_bands.map(lambda rows: B.tighten(rows)[0])


@st.composite
def disjoint_runs(draw: st.DrawFn) -> NDArray[np.int64]:
    """Ascending disjoint runs; some touch, some are empty, some are left out."""
    borders = sorted(draw(st.lists(small, min_size=2, max_size=7)))
    runs = list(pairwise(borders))
    return np.array([r for r in runs if draw(st.booleans())], np.int64).reshape(-1, 2)


def cells(row: NDArray[np.int64]) -> set[tuple[int, int]]:
    q0, q1, k0, k1, lo, hi = row.tolist()
    return {(i, j) for i in range(q0, q1) for j in range(k0, k1) if lo <= j - i <= hi}


def indices(runs: NDArray[np.int64]) -> list[int]:
    return [i for start, end in runs.tolist() for i in range(start, end)]


def assert_tight(bands: NDArray[np.int64]) -> None:
    for row in bands:
        q0, q1, k0, k1, lo, hi = row.tolist()
        found = cells(row)
        assert {i for i, _ in found} == set(range(q0, q1))
        assert {j for _, j in found} == set(range(k0, k1))
        assert (min(j - i for i, j in found), max(j - i for i, j in found)) == (lo, hi)


@given(any_bands)
@quick
def test_tighten(raw: NDArray[np.int64]) -> None:
    before = raw.copy()
    tight, origin = B.tighten(raw)
    assert origin.tolist() == [n for n, row in enumerate(raw) if cells(row)]
    assert [cells(row) for row in tight] == [cells(raw[n]) for n in origin]
    assert_tight(tight)
    assert np.array_equal(raw, before)


@given(tight_bands)
@quick
def test_area_is_the_number_of_cells(tight: NDArray[np.int64]) -> None:
    assert B.area(tight).tolist() == [len(cells(row)) for row in tight]


def test_area_of_a_million_tokens_is_exact() -> None:
    n = 1 << 20
    assert B.area(np.array([[0, n, 0, n, -n, 0]])).tolist() == [n * (n + 1) // 2]


@given(tight_bands, disjoint_runs(), st.sampled_from([B.Q0, B.K0]))
@quick
def test_crop(tight: NDArray[np.int64], runs: NDArray[np.int64], axis: int) -> None:
    pieces, run, source = B.crop(tight, runs[:, 0], runs[:, 1], axis)
    assert_tight(pieces)
    assert sorted(zip(source, run, strict=True)) == list(zip(source, run, strict=True))
    found = {(s, r): cells(p) for p, r, s in zip(pieces, run.tolist(), source.tolist(), strict=True)}
    wanted = {}
    for s, row in enumerate(tight):
        for r, (start, end) in enumerate(runs.tolist()):
            inside = {cell for cell in cells(row) if start <= cell[axis // 2] < end}
            if inside:
                wanted[s, r] = inside
    assert found == wanted and len(found) == len(pieces)


@given(tight_bands, disjoint_runs(), disjoint_runs())
@quick
def test_relocate(tight: NDArray[np.int64], q_runs: NDArray[np.int64], k_runs: NDArray[np.int64]) -> None:
    row_at = {i: n for n, i in enumerate(indices(q_runs))}
    key_at = {j: n for n, j in enumerate(indices(k_runs))}
    # Bands of this test may overlap each other, so cells are counted and not just listed.
    wanted = sorted((row_at[i], key_at[j]) for row in tight for i, j in cells(row) if i in row_at and j in key_at)
    local = B.relocate(tight, q_runs, k_runs)
    assert sorted(cell for row in local for cell in cells(row)) == wanted
    assert_tight(local)


@given(tight_bands, st.integers(0, 9), st.integers(0, 9))
@quick
def test_shift(tight: NDArray[np.int64], rows: int, keys: int) -> None:
    moved = B.shift(tight, rows, keys)
    assert [cells(m) for m in moved] == [{(i + rows, j + keys) for i, j in cells(row)} for row in tight]
    each = np.arange(len(tight))
    assert np.array_equal(
        B.shift(tight, each, 2 * each), np.array([B.shift(tight, n, 2 * n)[n] for n in each]).reshape(-1, 6)
    )


@given(tight_bands)
@quick
def test_row_intervals(tight: NDArray[np.int64]) -> None:
    for row in tight:
        for i in range(row[B.Q0], row[B.Q1]):
            (first,), (end,) = B.row_intervals(row[None], np.array([i]))
            assert list(range(first, end)) == sorted(j for q, j in cells(row) if q == i)


@given(disjoint_runs())
@quick
def test_run_offsets(runs: NDArray[np.int64]) -> None:
    offsets = B.run_offsets(runs).tolist()
    assert offsets == [sum(len(range(*r)) for r in runs[:n].tolist()) for n in range(len(runs) + 1)]


@given(st.lists(st.tuples(small, st.integers(0, 4)), max_size=6))
@quick
def test_ranges_to_indices(ranges: list[tuple[int, int]]) -> None:
    array = np.array(ranges, np.int64).reshape(-1, 2)
    wanted = [i for start, length in ranges for i in range(start, start + length)]
    assert B.ranges_to_indices(array[:, 0], array[:, 1]).tolist() == wanted


@given(st.lists(pairs, max_size=7))
@quick
def test_merge_runs(runs: list[list[int]]) -> None:
    array = np.array(runs, np.int64).reshape(-1, 2)
    merged = B.merge_runs(array)
    assert indices(merged) == sorted(set(indices(array)))
    assert np.all(merged[:, 0] < merged[:, 1]) and np.all(merged[1:, 0] > merged[:-1, 1])


@pytest.mark.parametrize("function", [B.area, lambda b: B.tighten(b)[0], lambda b: B.shift(b, 1, 1)])
def test_no_band_at_all(function: object) -> None:
    assert len(function(np.empty((0, 6), np.int64))) == 0  # type: ignore[operator]
