"""Which ranks have their own keys fill what stages leave: those whose queries attend few of the keys that they meet."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import DistAttnConfig, OverlapConfig
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
        cells = plan.dispatch.local_seqlens[rank] * scores.any(axis=0).sum()
        assert found == pytest.approx(scores.sum() / max(cells, 1))


def fills(name: str, config: DistAttnConfig | None = None) -> list[bool]:
    plan = plan_attention(named_masks(4096)[name], 4, 128, config=config)
    assert [plan.rank(rank).own_keys_fill for rank in range(4)] == plan.own_keys_fill.tolist()
    return plan.own_keys_fill.tolist()


def test_short_documents_and_windows_do_and_long_masks_do_not() -> None:
    assert fills("varlen sliding window causal") == fills("sliding window causal") == [True] * 4
    assert fills("causal") == fills("full") == [False] * 4


def test_each_rank_by_itself() -> None:
    """Half of the sequence is one document, whose rows are dense; the other half is of short ones."""
    half = builders.varlen([0, 4096, *range(4096 + 256, 8192 + 1, 256)], causal=True)
    plan = plan_attention(half, 2, 512, config=DistAttnConfig())
    found = density(plan.work, plan.dispatch)
    assert plan.own_keys_fill.tolist() == (found < 1 / 3).tolist()


def test_none_does_where_rows_are_waited_for_first() -> None:
    assert not any(fills("sliding window causal", DistAttnConfig(overlap_config=OverlapConfig(degree=0))))
