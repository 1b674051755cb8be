"""AttnMask as a value: errors, equality, pickling, and what it tells about itself."""

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from magi_attention.mask import AttnMask, AttnMaskType, AttnRanges, builders
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

quick = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize(
    "q_ranges, k_ranges, mask_type, message",
    [
        ([(0, 4)], [], "full", "q_ranges has 1 ranges but k_ranges has 0"),
        ([(0, 4), (4, 9)], [(0, 4), (0, 4)], "full", r"q_ranges\[1\] = \[4, 9\) is out of bounds: total_seqlen_q is 8"),
        ([(0, 4)], [(0, 11)], "full", r"k_ranges\[0\] = \[0, 11\) is out of bounds: total_seqlen_k is 10"),
        ([(4, 2)], [(0, 4)], "full", r"q_ranges\[0\] = \[4, 2\)"),
        ([(0, 4)], [(-1, 4)], "full", r"k_ranges\[0\] = \[-1, 4\)"),
        ([(0, 4)], [(0, 4)], "fool", "unknown attn_mask_type 'fool'"),
        ([(0, 4)], [(0, 4)], ["full", "causal"], "attn_mask_type has 2 entries but there are 1 slices"),
        (
            [(0, 4), (6, 8), (2, 6)],
            [(0, 4), (0, 4), (3, 5)],
            ["full", "causal", "inv_causal"],
            r"slice 0 \(q \[0, 4\) x k \[0, 4\) full\) and slice 2 \(q \[2, 6\) x k \[3, 5\) inv_causal\) overlap",
        ),
    ],
)
def test_a_mistake_is_named(q_ranges: list, k_ranges: list, mask_type: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttnMask.from_slices(q_ranges, k_ranges, mask_type, 8, 10)  # type: ignore[arg-type]


def test_any_spelling_of_the_slices_gives_the_same_mask() -> None:
    pairs = [(0, 3), (3, 8)]
    wanted = AttnMask.from_slices(pairs, pairs, [AttnMaskType.FULL, AttnMaskType.CAUSAL], 8, 8)
    for make in (AttnRanges.from_ranges, np.array, torch.tensor):
        assert AttnMask.from_slices(make(pairs), make(pairs), ["full", 1], 8, 8) == wanted


def test_equal_when_made_of_the_same_bands() -> None:
    a = AttnMask.from_slices([(0, 3), (3, 8)], [(0, 3), (3, 8)], ["full", "causal"], 8, 8)
    b = AttnMask.from_slices([(3, 8), (0, 3), (5, 5)], [(3, 8), (0, 3), (0, 8)], ["causal", "full", "full"], 8, 8)
    assert a == b and hash(a) == hash(b) and a.digest == b.digest and len({a, b}) == 1
    others = [
        AttnMask.from_slices([(0, 3), (3, 8)], [(0, 3), (3, 8)], "full", 8, 8),
        AttnMask.from_slices([(0, 3), (3, 8)], [(0, 3), (3, 8)], ["full", "causal"], 8, 9),
        AttnMask.from_slices([(0, 3), (3, 8)], [(0, 3), (3, 8)], ["full", "causal"], 9, 8),
        AttnMask.from_slices([(0, 3)], [(0, 3)], "full", 8, 8),
    ]
    assert len({a, *others}) == 5
    assert a != "a mask"


def test_a_mask_made_of_bands_keeps_its_own() -> None:
    bands = builders.causal(4).bands.copy()
    mask = AttnMask(np.uint8(4), torch.tensor(4), bands)
    bands[0] = 0
    assert mask == builders.causal(4) and type(mask.total_seqlen_q) is type(mask.total_seqlen_k) is int
    assert not mask.bands.flags.writeable and mask == AttnMask.from_bands(mask.bands.tolist(), 4, 4)


@pytest.mark.parametrize("make", [lambda *args: AttnMask(*args), lambda q, k, bands: AttnMask.from_bands(bands, q, k)])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 4, [[0, 4, 0, 4]]), ValueError, r"bands must have shape \(n, 6\), .* got shape \(1, 4\)"),
        ((4, 4, [0, 4, 0, 4, -3, 0]), ValueError, r"bands must have shape .* got shape \(6,\)"),
        ((4, 4, [[0, 4, 0, 4, -3, 0.5]]), TypeError, "bands must hold integers, got float64"),
        ((4, 4, None), TypeError, "bands must hold integers"),
        ((4.0, 4, [[0, 4, 0, 4, -3, 0]]), TypeError, r"total_seqlen_q must be an integer, got 4\.0"),
        ((4, -4, [[0, 4, 0, 4, -3, 0]]), ValueError, "total_seqlen_k must not be negative, got -4"),
    ],
)
def test_what_no_mask_is_made_of(make: Callable, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(*arguments)


def test_the_digest_is_the_same_in_every_process() -> None:
    assert builders.causal(5).digest.hex() == "d7ae9d959db3f3f8508b2ea1856088d0"


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_a_copy_is_equal_and_still_read_only(duplicate: object) -> None:
    mask = builders.varlen([0, 3, 8], causal=True)
    again = duplicate(mask)  # type: ignore[operator]
    assert again == mask and again.area == mask.area
    for m in (mask, again):
        with pytest.raises(ValueError, match="read-only"):
            m.bands[0, 0] = 1
        with pytest.raises(AttributeError):
            m.total_seqlen_q = 9


def test_the_mask_does_not_see_later_changes_of_its_arguments() -> None:
    q, k = AttnRanges.from_ranges([(0, 4)]), np.array([[0, 4]])
    mask = AttnMask.from_slices(q, k, "full", 8, 8)
    q.append((4, 8))
    k[0] = 2, 3
    assert mask == AttnMask.from_slices([(0, 4)], [(0, 4)], "full", 8, 8)


@given(masks(max_seqlen=24))
@quick
def test_row_intervals_are_the_runs_of_a_row(mask: AttnMask) -> None:
    dense = mask.to_dense()
    for row in range(mask.total_seqlen_q):
        intervals = mask.row_intervals(row)
        assert [j for start, end in intervals for j in range(start, end)] == np.flatnonzero(dense[row]).tolist()
        assert all(a[1] < b[0] for a, b in pairwise(intervals))


@pytest.mark.parametrize("row", [-1, 8])
def test_row_intervals_of_no_row(row: int) -> None:
    with pytest.raises(ValueError, match=f"row {row} is out of bounds: the mask has queries 0 to 7"):
        builders.causal(8).row_intervals(row)


@given(masks(max_seqlen=24))
@quick
def test_area_is_the_number_of_cells(mask: AttnMask) -> None:
    assert mask.area == mask.to_dense().sum()


@pytest.mark.parametrize("name", sorted(named_masks(8)))
def test_ranges_round_trip(name: str) -> None:
    mask = named_masks(37)[name]
    q_ranges, k_ranges, mask_types = mask.to_ranges()
    assert len(q_ranges) == len(k_ranges) == len(mask_types) == len(mask.slices)
    again = AttnMask.from_slices(q_ranges, k_ranges, mask_types, 37, 37)
    assert np.array_equal(again.to_dense(), mask.to_dense())


def test_a_mask_shows_itself() -> None:
    mask = builders.causal(3)
    assert str(mask) == mask.draw()
    assert repr(mask) == "AttnMask(3 x 3, 1 bands, area 6)"


@pytest.mark.parametrize("seqlen", range(1, 20))
def test_the_zoo_has_a_mask_of_every_kind_at_any_length(seqlen: int) -> None:
    for mask in named_masks(seqlen).values():
        assert (mask.total_seqlen_q, mask.total_seqlen_k) == (seqlen, seqlen)
        assert mask.area == mask.to_dense().sum()
