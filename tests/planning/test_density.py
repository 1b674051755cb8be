"""Which ranks have their own keys fill what stages leave: those whose queries attend few of the keys that they meet."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import plan_attention
from magi_attention.planning.density import density
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks


@settings(max_examples=50, deadline=None)
@given(masks(max_seqlen=64, square=True), st.integers(1, 4), st.integers(1, 16))
def test_density_counts_cells(mask: AttnMask, cp_size: int, chunk_size: int) -> None:
    plan = plan_attention(mask, cp_size, chunk_size)
    dense = mask.to_dense()
    for rank, found in enumerate(density(plan.work, plan.dispatch)):
        runs = plan.dispatch.runs(rank)
        rows = np.concatenate([np.arange(*run) for run in runs]) if len(runs) else np.empty(0, int)
        scores = dense[rows[rows < len(dense)]]
        cells = len(scores) * scores.any(axis=0).sum()
        assert found == pytest.approx(scores.sum() / max(cells, 1))


def fills(name: str, config: DistAttnConfig | None = None) -> list[bool]:
    plan = plan_attention(named_masks(4096)[name], 4, 128, config=config)
    assert [plan.rank(rank).own_keys_fill for rank in range(4)] == plan.own_keys_fill.tolist()
    return plan.own_keys_fill.tolist()


def test_short_documents_and_windows_do_and_long_masks_do_not() -> None:
    assert fills("varlen sliding window causal") == fills("sliding window causal") == [True] * 4
    assert fills("causal") == fills("full") == [False] * 4


def test_each_rank_by_itself() -> None:
    """One rank has a long document, and one has short ones."""
    mask = builders.varlen([0, 4096, *range(4096 + 256, 8192 + 1, 256)], causal=True)
    plan = plan_attention(mask, 2, 512, config=DistAttnConfig(dispatch_config=DispatchConfig(order="contiguous")))
    assert density(plan.work, plan.dispatch).round(2).tolist() == [0.5, 0.03]
    assert plan.own_keys_fill.tolist() == [False, True]


def test_a_third_is_too_much() -> None:
    plan = plan_attention(builders.sliding_window([0, 8192], (2000, 0)), 2, 512)
    assert density(plan.work, plan.dispatch).round(2).tolist() == [0.34, 0.27]
    assert plan.own_keys_fill.tolist() == [False, True]


def test_padding_is_no_query() -> None:
    plan = plan_attention(builders.full(600), 2, 512)
    assert density(plan.work, plan.dispatch).tolist() == [1, 1]


def test_none_does_where_rows_are_waited_for_first() -> None:
    assert not any(fills("sliding window causal", DistAttnConfig(overlap_config=OverlapConfig(degree=0))))
