"""Ranks of different numbers of rows: the laws hold, and the difference is one chunk at most."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from magi_attention.config import DispatchConfig, DistAttnConfig, LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import plan_attention
from magi_attention.planning.chunking import ChunkWork
from magi_attention.planning.load_balance import imbalance, min_heap, rank_areas
from magi_attention.planning.locality import locality
from magi_attention.planning.lower_bound import rows_moved_lower_bound
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .test_assignment import TOLERANCE, packed_documents
from .test_plan_laws import check_laws, configs

UNEVEN = DistAttnConfig(DispatchConfig(uneven=True))


@settings(max_examples=150, deadline=None)
@given(masks(max_seqlen=96, square=True), st.integers(1, 6), st.integers(1, 16), configs, st.integers(0, 20))
def test_laws_hold_for_generated_masks(
    mask: AttnMask, cp_size: int, chunk_size: int, config: DistAttnConfig, pad_size: int
) -> None:
    assume(mask.total_seqlen_q + pad_size > chunk_size * (cp_size - 1))
    config = replace(config, dispatch_config=replace(config.dispatch_config, uneven=True))
    plan = check_laws(mask, cp_size, chunk_size, config, pad_size)
    chunks = np.bincount(plan.dispatch.owner, minlength=cp_size)
    assert chunks.max() - chunks.min() <= 1 and chunks[plan.dispatch.owner[-1]] == chunks.max()
    assert plan.dispatch.padded_seqlen == mask.total_seqlen_q + pad_size


@settings(max_examples=100, deadline=None)
@given(masks(max_seqlen=120, square=True), st.integers(1, 6), st.integers(1, 12))
def test_locality_is_never_worse_than_the_heap(mask: AttnMask, cp_size: int, chunk_size: int) -> None:
    num_chunks = -(-mask.total_seqlen_q // chunk_size)
    assume(num_chunks >= cp_size)
    work = ChunkWork.measure(mask, chunk_size, num_chunks)
    heap, ours = min_heap(work, cp_size), locality(work, cp_size, TOLERANCE)
    np.testing.assert_array_equal(np.sort(np.bincount(ours)), np.sort(np.bincount(heap)))
    assert work.rows_moved(ours) <= work.rows_moved(heap)
    mean = work.areas.sum() / cp_size
    assert rank_areas(work, ours, cp_size).max() <= max((1 + TOLERANCE) * mean, rank_areas(work, heap, cp_size).max())
    for owner in (heap, ours):
        tolerance = imbalance(work, owner, cp_size) - 1 + 1e-9
        assert rows_moved_lower_bound(mask, cp_size, chunk_size, tolerance) <= work.rows_moved(owner)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_as_balanced_and_as_local_as_with_padding(causal: bool) -> None:
    ratios = []
    for seed, missing in enumerate((1, 700, 2000, 4095)):  # from almost no short chunk to almost no padding
        mask = builders.varlen(packed_documents((1 << 17) - missing, seed), causal=causal)
        uneven, padded = (plan_attention(mask, 8, 512, config=config) for config in (UNEVEN, None))
        assert imbalance(uneven.work, uneven.dispatch.owner, 8) <= 1 + TOLERANCE
        ratios.append(uneven.routes.rows.sum() / padded.routes.rows.sum())
    assert np.mean(ratios) <= 1.1


@pytest.mark.parametrize(
    ("order", "owner"),
    [("contiguous", [0, 0, 1, 1, 1, 2, 2, 2]), ("zigzag", [0, 0, 1, 2, 2, 1, 1, 0]), ("balanced", None)],
)
def test_the_short_chunk_is_on_a_rank_that_has_most(order: str, owner: list[int] | None) -> None:
    config = DistAttnConfig(DispatchConfig(order=order, uneven=True))  # type: ignore[arg-type]
    dispatch = plan_attention(builders.causal(29), 3, 4, config=config).dispatch
    assert owner is None or dispatch.owner.tolist() == owner
    assert sorted(dispatch.local_seqlens) == [8, 9, 12]


@pytest.mark.parametrize("alg", [LocalityDispatchAlg(), LocalityDispatchAlg(0.0), MinHeapDispatchAlg()])
def test_also_when_it_is_the_heaviest_or_unwanted(alg: LocalityDispatchAlg | MinHeapDispatchAlg) -> None:
    """27 rows are 6 chunks of 4 and one of 3; with areas at random, every step of the rules gets to move chunks."""
    rng = np.random.default_rng(0)
    starts = np.arange(7) * 4
    q_ranges = np.stack((starts, np.minimum(starts + 4, 27)), axis=1)
    for _ in range(300):
        first = rng.integers(0, 27, 7) * (rng.random(7) < 0.7)
        k_ranges = np.stack((first, np.minimum(first + rng.integers(1, 27, 7), 27)), axis=1)
        mask = AttnMask.from_slices(q_ranges, k_ranges, "full", 27, 27)
        dispatch = plan_attention(mask, 3, 4, config=DistAttnConfig(DispatchConfig(alg, uneven=True))).dispatch
        assert sorted(dispatch.local_seqlens) == [8, 8, 11]


def test_without_padding_nothing_is_padded() -> None:
    for total in (1, 37, 1003):
        dispatch = plan_attention(builders.causal(total), 1, 16, config=UNEVEN).dispatch
        assert dispatch.pad_size == 0 and dispatch.local_seqlens == (total,)
    dispatch = plan_attention(builders.causal(1000), 2, 512, config=UNEVEN).dispatch
    assert sorted(dispatch.local_seqlens) == [488, 512]


def test_a_sequence_that_divides_is_cut_as_ever() -> None:
    for name, mask in named_masks(128).items():
        for alg in (DispatchConfig(), DispatchConfig(MinHeapDispatchAlg()), DispatchConfig(order="zigzag")):
            even, uneven = (
                plan_attention(mask, 4, 8, config=DistAttnConfig(replace(alg, uneven=uneven)))
                for uneven in (False, True)
            )
            np.testing.assert_array_equal(even.dispatch.owner, uneven.dispatch.owner, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(pad_size=-1), "pad_size must not be negative, got -1"),
        (dict(cp_size=3, chunk_size=8), "makes 2 chunks of chunk_size 8, but each of 3 ranks needs one"),
        (dict(cp_size=17, chunk_size=1), "makes 16 chunks of chunk_size 1, but each of 17 ranks needs one"),
    ],
)
def test_what_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_attention(builders.causal(16), config=UNEVEN, **{"cp_size": 2, "chunk_size": 4, **arguments})


def test_it_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"pad_size 0 does not fit.*use 3.*or DispatchConfig\(uneven=True\)"):
        plan_attention(builders.causal(13), 2, 4, 0)
    with pytest.raises(TypeError, match="uneven must be True or False, not 1"):
        DispatchConfig(uneven=1)  # type: ignore[arg-type]
