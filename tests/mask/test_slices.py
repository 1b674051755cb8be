"""Slices against the dense oracle, and slices to bands and back."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings

from magi_attention.mask import AttnMask, AttnMaskType, AttnRange, AttnSlice
from magi_attention.mask.slices import bands_to_slices, parse_mask_types, slices_to_bands
from magi_attention.testing.dense_oracle import dense_mask
from magi_attention.testing.strategies import RawSlices, masks, raw_slices

quick = settings(deadline=None, max_examples=60)


def dense_of_slices(slices: list[AttnSlice], total_q: int, total_k: int) -> np.ndarray:
    q, k = ([getattr(s, name).to_naive_range() for s in slices] for name in ("q_range", "k_range"))
    return dense_mask(q, k, [s.mask_type for s in slices], total_q, total_k)


@given(raw_slices(max_seqlen=24))
@quick
def test_a_slice_has_the_cells_that_its_type_says(raw: RawSlices) -> None:
    q, k = (np.array(r, np.int64).reshape(-1, 2) for r in (raw.q_ranges, raw.k_ranges))
    bands = slices_to_bands(q, k, np.array([t.to_int_type() for t in raw.mask_types], np.int64))
    assert len(bands) == len(raw.mask_types)
    for n, (q0, q1, k0, k1, lo, hi) in enumerate(bands.tolist()):
        i, j = np.indices((raw.total_seqlen_q, raw.total_seqlen_k))
        cells = (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
        oracle = dense_mask(raw.q_ranges[n : n + 1], raw.k_ranges[n : n + 1], raw.mask_types[n : n + 1], *raw[3:])
        assert np.array_equal(cells, oracle)


@given(raw_slices(max_seqlen=24, disjoint=True))
@quick
def test_a_mask_has_the_cells_of_its_slices(raw: RawSlices) -> None:
    assert np.array_equal(AttnMask.from_slices(*raw).to_dense(), dense_mask(*raw))


@given(masks(max_seqlen=24))
@quick
def test_slices_spell_the_same_mask(mask: AttnMask) -> None:
    slices = mask.slices
    assert np.array_equal(dense_of_slices(slices, mask.total_seqlen_q, mask.total_seqlen_k), mask.to_dense())
    again = AttnMask.from_slices(*mask.to_ranges(), mask.total_seqlen_q, mask.total_seqlen_k)  # no cell is doubled
    assert np.array_equal(again.to_dense(), mask.to_dense())
    assert len(slices) <= 3 * len(mask.bands)


@pytest.mark.parametrize("rows, keys", [(2, 3), (5, 6), (5, 12), (4, 4)])
@pytest.mark.parametrize("mask_type", AttnMaskType)
def test_each_type_comes_back_as_itself(mask_type: AttnMaskType, rows: int, keys: int) -> None:
    mask = AttnMask.from_slices([(3, 3 + rows)], [(7, 7 + keys)], mask_type, 20, 20)
    assert mask.slices == [AttnSlice(AttnRange(3, 3 + rows), AttnRange(7, 7 + keys), mask_type)]


@pytest.mark.parametrize("form", [tuple, list, np.array, AttnRange.from_range])
@pytest.mark.parametrize("mask_type", [AttnMaskType.CAUSAL, "causal", 1, np.uint8(1)])
def test_a_slice_is_made_of_any_spelling(form: Callable, mask_type: object) -> None:
    made = AttnSlice(form((0, 2)), form((1, 5)), mask_type)
    assert made == AttnSlice(AttnRange(0, 2), AttnRange(1, 5), AttnMaskType.CAUSAL)
    assert str(made) == "q [0, 2) x k [1, 5) causal" and len({made, AttnSlice((0, 2), (1, 5), "causal")}) == 1


@pytest.mark.parametrize(
    ("q_range", "k_range", "mask_type", "error", "message"),
    [
        (3, (0, 2), "full", ValueError, r"q_range must be an AttnRange or a pair \(start, end\), got 3"),
        ((0, 1), (0, 1, 2), "full", ValueError, r"k_range must be .* got \(0, 1, 2\)"),
        ((0, 1), (0, 1.5), "full", TypeError, r"end must be an integer, got 1\.5"),
        ((0, 1), (3, 1), "full", ValueError, "start 3 and end 1"),
        ((0, 1), (0, 2), "caussal", ValueError, "unknown attn_mask_type 'caussal'"),
    ],
)
def test_what_is_no_slice_is_refused(
    q_range: object, k_range: object, mask_type: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AttnSlice(q_range, k_range, mask_type)


def test_rows_without_a_key_leave_the_slice() -> None:
    (found,) = AttnMask.from_slices([(0, 8)], [(0, 3)], "causal", 8, 3).slices
    assert found == AttnSlice(AttnRange(5, 8), AttnRange(0, 3), AttnMaskType.CAUSAL)


def test_a_window_is_three_slices() -> None:
    window = np.array([[0, 10, 0, 10, -2, 2]])
    assert [str(s) for s in bands_to_slices(window)] == [
        "q [0, 2) x k [0, 4) causal",
        "q [2, 8) x k [0, 10) bi_causal",
        "q [8, 10) x k [6, 10) inv_causal",
    ]


def test_mask_types_are_parsed() -> None:
    for code, member in enumerate(AttnMaskType):
        assert member.to_int_type() == code
        for spelling in (member, member.value, member.value.upper(), code):
            assert AttnMaskType.parse(spelling) is member
        assert AttnMaskType.from_int_type(code) is member
    assert [m.value for m in AttnMaskType] == ["full", "causal", "inv_causal", "bi_causal"]
    assert parse_mask_types("causal", 3).tolist() == [1, 1, 1]
    assert parse_mask_types(["full", AttnMaskType.BICAUSAL, 2], 3).tolist() == [0, 3, 2]


@pytest.mark.parametrize("wrong", ["caussal", 4, -1, True, None, 1.0])
def test_an_unknown_mask_type_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"unknown attn_mask_type .*'full', 'causal', 'inv_causal', 'bi_causal'"):
        AttnMaskType.parse(wrong)  # type: ignore[arg-type]


def test_as_many_mask_types_as_slices() -> None:
    with pytest.raises(ValueError, match="attn_mask_type has 2 entries but there are 3 slices"):
        parse_mask_types(["full", "full"], 3)
