"""Overlap detection against counting cells."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings

from magi_attention.mask import AttnMask
from magi_attention.mask.bands import IntArray
from magi_attention.mask.overlap import find_overlap
from magi_attention.testing.dense_oracle import dense_mask
from magi_attention.testing.strategies import RawSlices, masks, raw_bands, raw_slices

quick = settings(deadline=None, max_examples=150)


def cells(row: list[int]) -> set[tuple[int, int]]:
    q0, q1, k0, k1, lo, hi = row
    return {(i, j) for i in range(q0, q1) for j in range(k0, k1) if lo <= j - i <= hi}


def overlapping_pairs(sets: list[set[tuple[int, int]]]) -> set[tuple[int, int]]:
    return {(a, b) for a, b in combinations(range(len(sets)), 2) if sets[a] & sets[b]}


@given(raw_bands(max_seqlen=10))
@quick
def test_overlap_is_found_exactly_when_there_is_one(bands: IntArray) -> None:
    pairs = overlapping_pairs([cells(row) for row in bands.tolist()])
    found = find_overlap(bands)
    assert (found in pairs) if pairs else (found is None)


@given(raw_slices(max_seqlen=12, max_slices=4))
@quick
def test_the_error_names_two_slices_that_do_overlap(raw: RawSlices) -> None:
    one = [dense_mask([q], [k], [t], *raw[3:]) for q, k, t in zip(*raw[:3], strict=True)]
    pairs = overlapping_pairs([set(zip(*(x.tolist() for x in np.nonzero(d)), strict=True)) for d in one])
    if not pairs:
        AttnMask.from_slices(*raw)
        return
    with pytest.raises(ValueError, match="overlap") as error:
        AttnMask.from_slices(*raw)

    def name(n: int) -> str:
        (q0, q1), (k0, k1) = raw.q_ranges[n], raw.k_ranges[n]
        return f"slice {n} (q [{q0}, {q1}) x k [{k0}, {k1}) {raw.mask_types[n].value})"

    assert any(str(error.value).startswith(f"{name(a)} and {name(b)} overlap") for a, b in pairs)


@given(masks(max_seqlen=40))
@quick
def test_masks_do_not_overlap(mask: AttnMask) -> None:
    assert find_overlap(mask.bands) is None
    assert mask.area == mask.to_dense().sum()


def test_neighbours_along_a_diagonal_may_touch() -> None:
    below, above = [0, 8, 0, 8, -8, 0], [0, 8, 0, 8, 1, 8]
    assert find_overlap(np.array([below, above])) is None
    assert find_overlap(np.array([above, below, [3, 4, 4, 5, 1, 1]])) == (0, 2)
    assert find_overlap(np.empty((0, 6), np.int64)) is None
