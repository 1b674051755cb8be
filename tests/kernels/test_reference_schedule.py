"""The reference engine's tile schedule holds exactly the mask."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels.reference_schedule import TileSchedule, build_tile_schedule
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks


def check(mask: AttnMask, block_q: int, block_k: int) -> TileSchedule:
    dense = mask.to_dense()
    schedule = build_tile_schedule(mask.bands, *dense.shape, block_q, block_k)
    bounds, offsets = schedule.q_bounds, schedule.offsets

    keys = np.arange(dense.shape[1])
    by_layer = (keys >= schedule.starts[..., None]) & (keys < schedule.ends[..., None])
    assert (by_layer.sum(axis=0) == dense).all(), "the layers of a row are disjoint and hold what it attends"
    for upper, lower in zip(by_layer[1:], by_layer[:-1], strict=True):
        assert not (upper.any(axis=1) & ~lower.any(axis=1)).any(), "a row's intervals fill the first layers"

    assert bounds[0] == 0 and bounds[-1] == len(dense) and (np.diff(bounds) >= 0).all()
    assert (np.diff(bounds) <= block_q).all() and (schedule.key_ends - schedule.key_starts <= block_k).all()
    covered = np.zeros_like(dense)
    for tile in range(len(bounds) - 1):
        rows = slice(bounds[tile], bounds[tile + 1])
        reached = 0
        for n in range(offsets[tile], offsets[tile + 1]):
            cut = slice(schedule.key_starts[n], schedule.key_ends[n])
            assert cut.start >= reached, "key tiles ascend and do not overlap"
            reached = cut.stop
            assert dense[rows, cut].any(), "a tile that no row attends is absent"
            assert schedule.full[n] == dense[rows, cut].all()
            covered[rows, cut] = True
    assert not (dense & ~covered).any(), "every attended cell lies in a tile"
    return schedule


@pytest.mark.parametrize("blocks", [(16, 16), (7, 32), (128, 8), (1, 1)])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks(name: str, blocks: tuple[int, int]) -> None:
    check(named_masks(103)[name], *blocks)


@settings(max_examples=200, deadline=None)
@given(masks(max_seqlen=60), st.integers(1, 20), st.integers(1, 20))
def test_generated_masks(mask: AttnMask, block_q: int, block_k: int) -> None:
    check(mask, block_q, block_k)


def test_short_documents_share_tiles() -> None:
    mask = builders.varlen(builders.cu_seqlens_from_lengths([3] * 40), causal=True)
    schedule = check(mask, 60, 60)
    assert len(schedule.q_bounds) - 1 == 2 and len(schedule.starts) == 1


def test_documents_begin_tiles() -> None:
    schedule = check(builders.varlen([0, 70, 150], causal=True), 64, 64)
    assert {0, 70} <= set(schedule.q_bounds.tolist())


def test_small_gaps_between_keys_share_tiles() -> None:
    starts = [*range(0, 40, 5), 80]
    mask = AttnMask.from_slices([(0, 4)] * 9, [(k, k + 2) for k in starts], "full", 4, 90)
    schedule = check(mask, 4, 20)
    assert schedule.key_starts.tolist() == [0, 20, 80] and schedule.key_ends.tolist() == [20, 37, 82]


def test_survives_pickling() -> None:
    schedule = check(named_masks(50)["prefix tree"], 8, 8)
    copy = pickle.loads(pickle.dumps(schedule))
    np.testing.assert_array_equal(copy.key_starts, schedule.key_starts)


def test_empty() -> None:
    nothing = np.empty((0, 6), np.int64)
    for rows, keys in ((0, 0), (0, 5), (5, 0), (5, 5)):
        schedule = build_tile_schedule(nothing, rows, keys, 4, 4)
        assert len(schedule.key_starts) == 0 and schedule.q_bounds[-1] == rows
