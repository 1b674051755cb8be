"""Balance is a hard constraint; rows moved are what is minimised under it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.mask import AttnMask, builders
from magi_attention.planning.chunking import ChunkWork, compute_pad_size
from magi_attention.planning.load_balance import contiguous, imbalance, min_heap, rank_areas, zigzag
from magi_attention.planning.locality import locality
from magi_attention.planning.lower_bound import rows_moved_lower_bound
from magi_attention.testing.strategies import masks

TOLERANCE = 0.02


def work_of(mask: AttnMask, cp_size: int, chunk_size: int) -> ChunkWork:
    padded = mask.total_seqlen_q + compute_pad_size(mask.total_seqlen_q, cp_size, chunk_size)
    return ChunkWork.measure(mask, chunk_size, padded // chunk_size)


def packed_documents(total: int, seed: int) -> np.ndarray:
    """Long-tailed document lengths with a few documents of a quarter of the pack, as real packs have."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        n = total // 4 if rng.random() < 0.03 else int(rng.lognormal(6.5, 1.2)) + 1
        lengths.append(min(n, total // 4, total - sum(lengths)))
    return builders.cu_seqlens_from_lengths(rng.permutation(lengths))


@settings(max_examples=100, deadline=None)
@given(masks(max_seqlen=120, square=True), st.integers(1, 6), st.integers(1, 12))
def test_locality_is_never_worse_than_the_heap(mask: AttnMask, cp_size: int, chunk_size: int) -> None:
    work = work_of(mask, cp_size, chunk_size)
    heap, ours = min_heap(work, cp_size), locality(work, cp_size, TOLERANCE)
    assert set(np.bincount(ours, minlength=cp_size)) == {work.num_chunks // cp_size}
    assert work.rows_moved(ours) <= work.rows_moved(heap)
    mean = work.areas.sum() / cp_size
    assert rank_areas(work, ours, cp_size).max() <= max((1 + TOLERANCE) * mean, rank_areas(work, heap, cp_size).max())


@settings(max_examples=100, deadline=None)
@given(masks(max_seqlen=60, square=True), st.integers(2, 5), st.integers(1, 6), st.randoms())
def test_lower_bound_is_below_every_balanced_assignment(mask: AttnMask, cp_size: int, chunk_size: int, random) -> None:
    work = work_of(mask, cp_size, chunk_size)
    owner = np.repeat(np.arange(cp_size), work.num_chunks // cp_size)
    random.shuffle(shuffled := owner.tolist())
    for candidate in (np.array(shuffled), min_heap(work, cp_size), locality(work, cp_size, TOLERANCE)):
        tolerance = imbalance(work, candidate, cp_size) - 1 + 1e-9
        assert rows_moved_lower_bound(mask, cp_size, chunk_size, tolerance) <= work.rows_moved(candidate)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("total", "cp_size"), [(1 << 17, 8), (1 << 19, 32)])
def test_packed_documents_move_at_most_half_of_the_heaps_rows(total: int, cp_size: int, causal: bool) -> None:
    ratios = []
    for seed in range(4):
        mask = builders.varlen(packed_documents(total, seed), causal=causal)
        work = work_of(mask, cp_size, 512)
        ours = locality(work, cp_size, TOLERANCE)
        assert imbalance(work, ours, cp_size) <= 1 + TOLERANCE
        ratios.append(work.rows_moved(ours) / work.rows_moved(min_heap(work, cp_size)))
    assert np.mean(ratios) <= 0.5


def test_plain_causal_is_as_good_as_zigzag() -> None:
    work = work_of(builders.causal(1 << 16), 8, 512)
    ours = locality(work, 8, TOLERANCE)
    assert work.rows_moved(ours) <= work.rows_moved(zigzag(work, 8))


def test_sliding_window_stays_in_one_piece() -> None:
    work = work_of(builders.sliding_window(1 << 16, (1023, 0)), 8, 512)
    ours = locality(work, 8, TOLERANCE)
    assert work.rows_moved(ours) <= 2 * work.rows_moved(contiguous(work, 8))
    assert work.rows_moved(ours) <= 0.1 * work.rows_moved(min_heap(work, 8))


def test_simple_rules() -> None:
    work = work_of(builders.causal(16), 2, 2)
    np.testing.assert_array_equal(contiguous(work, 2), [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(zigzag(work, 2), [0, 0, 1, 1, 1, 1, 0, 0])
    assert imbalance(work, zigzag(work, 2), 2) == 1.0
    assert imbalance(work, contiguous(work, 2), 2) == pytest.approx((136 - 36) / 68)


@pytest.mark.parametrize(("total", "cp_size", "chunk", "pad"), [(0, 2, 4, 0), (1, 2, 4, 7), (8, 2, 4, 0), (9, 2, 4, 7)])
def test_compute_pad_size(total: int, cp_size: int, chunk: int, pad: int) -> None:
    assert compute_pad_size(total, cp_size, chunk) == pad


def test_compute_pad_size_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        compute_pad_size(8, 2, 0)
    with pytest.raises(TypeError, match="cp_size must be an integer"):
        compute_pad_size(8, 2.0, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [np.uint8, np.uint32, np.int64, np.array, torch.tensor])
def test_compute_pad_size_of_integers_of_any_form(form: Callable) -> None:
    pad_size = compute_pad_size(form(200), form(2), form(48))
    assert pad_size == 88 and type(pad_size) is int
