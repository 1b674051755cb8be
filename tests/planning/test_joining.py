"""Which queries wait for the first stage: every cell stays in one call, and enough is left to do meanwhile."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import CostModel, DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import area, attending_rows
from magi_attention.planning import RankPlan, plan_attention
from magi_attention.planning import joining as joining_module
from magi_attention.planning.joining import choose_waiting, join_first_stage
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .test_plan_laws import cells_of, configs

FAST = CostModel(bandwidth=1e30, latency=0.0)


def with_costs(config: DistAttnConfig, model: CostModel) -> DistAttnConfig:
    return replace(config, overlap_config=replace(config.overlap_config, cost_model=model))


def cells(bands: np.ndarray, num_rows: int, num_keys: int) -> np.ndarray:
    return cells_of(bands, np.arange(num_rows), np.arange(num_keys), (num_rows, num_keys))


def check(plan: RankPlan, one_host: bool = True) -> np.ndarray:
    """The laws for a rank; which queries wait."""
    rows, keys = plan.local_seqlen_q, plan.local_seqlen_k
    own = cells(plan.local_bands, rows, keys)
    joined = join_first_stage(plan, one_host)
    if joined is None:
        return np.zeros(rows, np.bool_)
    stage = plan.stages[0]
    received = cells(stage.bands, rows, stage.collective.num_recv_rows)
    assert (np.diff(joined.ahead) > 0).all() and joined.ahead[0] >= 0 and joined.ahead[-1] < keys
    together = cells(joined.bands, rows, len(joined.ahead) + received.shape[1])
    np.testing.assert_array_equal(together[:, len(joined.ahead) :], received)
    ahead = np.zeros_like(own)
    ahead[:, joined.ahead] = together[:, : len(joined.ahead)]
    early = cells(joined.early, rows, keys)
    np.testing.assert_array_equal(early + ahead, own)
    assert not (early.any(1) & ahead.any(1)).any(), "a query's own keys are in one call"
    assert (ahead.any(0) == np.isin(np.arange(keys), joined.ahead)).all(), "keys that are copied are attended"
    waits = ahead.any(1)
    for first in range(0, rows, joining_module.GRAIN):
        grain = slice(first, first + joining_module.GRAIN)
        assert not waits[grain].any() or received[grain].any(), "nobody waits for nothing"
        assert not (early[grain].any() and waits[grain].any()), "neighbours wait together"
    return waits


@settings(max_examples=150, deadline=None)
@given(
    masks(max_seqlen=64, square=True),
    st.integers(1, 5),
    st.integers(1, 16),
    configs,
    st.sampled_from([FAST, CostModel(), CostModel(latency=1e-13), CostModel(latency=1e-12)]),
    st.sampled_from([1, 5, 128]),
)
def test_every_cell_is_in_one_call(
    mask: AttnMask, cp_size: int, chunk_size: int, config: DistAttnConfig, model: CostModel, grain: int
) -> None:
    plan = plan_attention(mask, cp_size, chunk_size, config=with_costs(config, model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining_module, "GRAIN", grain)
        for rank in map(plan.rank, range(cp_size)):
            check(rank)


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_with_nothing_to_hide_all_wait_that_can(name: str) -> None:
    blocking = DistAttnConfig(overlap_config=OverlapConfig(degree=0))
    plan = plan_attention(named_masks(64)[name], 2, 8, config=blocking)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining_module, "GRAIN", 1)
        for rank in map(plan.rank, range(2)):
            bands = [rank.local_bands, *(stage.bands for stage in rank.stages)]
            could = [attending_rows(x, rank.local_seqlen_q) for x in bands]
            np.testing.assert_array_equal(check(rank), len(could) > 1 and np.logical_and.reduce(could))


def test_where_rows_travel_for_long_nobody_waits() -> None:
    slow = with_costs(DistAttnConfig(), CostModel(bandwidth=1.0))
    assert not check(plan_attention(builders.causal(64), 2, 8, config=slow).rank(0)).any()
    waits = with_costs(DistAttnConfig(overlap_config=OverlapConfig(degree=0)), CostModel(bandwidth=1.0))
    assert check(plan_attention(builders.causal(64), 2, 8, config=waits).rank(1)).any(), "with degree 0 rows are there"


def test_between_hosts_more_is_kept() -> None:
    config = DistAttnConfig(DispatchConfig(order="zigzag"))
    plan = plan_attention(builders.causal(1 << 15), 2, 512, config=config).rank(0)
    near, far = (check_runs(plan, one_host) for one_host in (True, False))
    assert 0 < far < near
    slow_card = replace(plan, config=with_costs(config, CostModel(bandwidth=40e9)))
    assert check_runs(slow_card, one_host=True) == check_runs(slow_card, one_host=False) < far


def check_runs(plan: RankPlan, one_host: bool) -> int:
    """Cells of own keys that wait, where a dense form would be too large."""
    joined = join_first_stage(plan, one_host)
    assert joined is not None
    early, received = int(area(joined.early).sum()), int(area(plan.stages[0].bands).sum())
    assert early + int(area(joined.bands).sum()) == int(area(plan.local_bands).sum()) + received
    return int(area(plan.local_bands).sum()) - early


def test_those_with_most_own_keys_do_not_wait() -> None:
    own = builders.causal(1024).bands
    total = int(area(own).sum())
    everyone, half = np.ones(1024, np.bool_), np.arange(1024) < 512
    assert choose_waiting(own, everyone, 0).tolist() == [[0, 1024]]
    assert choose_waiting(own, everyone, 1).tolist() == [[0, 896]]
    last = sum(range(897, 1025))
    assert choose_waiting(own, everyone, last).tolist() == [[0, 896]]
    assert choose_waiting(own, everyone, last + 1).tolist() == [[0, 768]]
    assert choose_waiting(own, everyone, total).tolist() == []
    assert choose_waiting(own, half, total - 512 * 513 // 2).tolist() == [[0, 512]]


def test_neighbours_wait_with_those_that_do() -> None:
    own = builders.causal(1000).bands
    scattered = np.isin(np.arange(1000), [130, 200, 999])
    assert choose_waiting(own, scattered, 0).tolist() == [[128, 256], [896, 1000]]
