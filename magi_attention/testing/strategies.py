"""Hypothesis strategies that generate masks, awkward ones on purpose."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from magi_attention.mask import AttnMask, AttnMaskType
from magi_attention.mask.bands import IntArray
from magi_attention.testing.dense_oracle import dense_mask
from magi_attention.testing.mask_zoo import named_masks


class RawSlices(NamedTuple):
    """The arguments of ``dense_mask`` and of ``AttnMask.from_slices``, in their order."""

    q_ranges: list[tuple[int, int]]
    k_ranges: list[tuple[int, int]]
    mask_types: list[AttnMaskType]
    total_seqlen_q: int
    total_seqlen_k: int


@st.composite
def raw_slices(
    draw: st.DrawFn, max_seqlen: int = 64, max_slices: int = 8, disjoint: bool = False, square: bool = False
) -> RawSlices:
    """Slices of all four types: empty ones, slices without a cell, and overlapping ones unless ``disjoint``.

    Args:
        draw: Supplied by hypothesis.
        max_seqlen: Most queries, and most keys.
        max_slices: Most slices.
        disjoint: Whether to leave out slices that share a cell with an earlier one.
        square: Whether there are as many keys as queries.
    """
    total_q = draw(st.integers(1, max_seqlen))
    total_k = total_q if square else draw(st.integers(1, max_seqlen))
    slices = RawSlices([], [], [], total_q, total_k)
    taken = np.zeros((total_q, total_k), np.bool_)
    for _ in range(draw(st.integers(0, max_slices))):
        q_range, k_range = draw(_ranges(total_q)), draw(_ranges(total_k))
        mask_type = draw(st.sampled_from(AttnMaskType))
        cells = dense_mask([q_range], [k_range], [mask_type], total_q, total_k)
        if disjoint and np.any(taken & cells):
            continue
        taken |= cells
        slices.q_ranges.append(q_range)
        slices.k_ranges.append(k_range)
        slices.mask_types.append(mask_type)
    return slices


def masks(max_seqlen: int = 64, square: bool = False) -> st.SearchStrategy[AttnMask]:
    """Masks of disjoint slices, with holes and with several intervals a row, and masks that models use.

    Args:
        max_seqlen: Most queries, and most keys.
        square: Whether there are as many keys as queries.
    """
    generated = raw_slices(max_seqlen, disjoint=True, square=square).map(lambda s: AttnMask.from_slices(*s))
    named = st.builds(
        lambda name, seqlen: named_masks(seqlen)[name],
        st.sampled_from(sorted(named_masks(8))),
        st.integers(1, max_seqlen),
    )
    return generated | named


def raw_bands(max_seqlen: int = 16, max_bands: int = 6) -> st.SearchStrategy[IntArray]:
    """Arrays of bands, shape ``(n, 6)``: not tight, some without a cell, some sharing cells."""
    distance = st.integers(-max_seqlen - 2, max_seqlen + 2)
    band = st.tuples(_ranges(max_seqlen), _ranges(max_seqlen), distance, distance).map(lambda t: [*t[0], *t[1], *t[2:]])
    return st.lists(band, max_size=max_bands).map(lambda rows: np.array(rows, np.int64).reshape(-1, 6))


def _ranges(total: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, total), st.integers(0, total)).map(lambda pair: (min(pair), max(pair)))
