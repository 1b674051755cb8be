"""The laws that hold for every plan, checked for all ranks at once, in one process."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import (
    DispatchConfig,
    DistAttnConfig,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.mask import AttnMask
from magi_attention.planning import AttnPlan, RankPlan, Sources, compute_pad_size, plan_attention, plan_new_mask
from magi_attention.planning.load_balance import imbalance, min_heap
from magi_attention.planning.sources import SELF_ATTENTION
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

DISPATCH_CONFIGS = [
    DispatchConfig(LocalityDispatchAlg()),
    DispatchConfig(LocalityDispatchAlg(tolerance=0.0)),
    DispatchConfig(MinHeapDispatchAlg()),
    DispatchConfig(order="contiguous"),
    DispatchConfig(order="zigzag"),
]

configs = st.builds(
    lambda dispatch_config, degree, min_chunk_size: DistAttnConfig(
        dispatch_config, OverlapConfig(degree=degree, min_chunk_size=min_chunk_size)
    ),
    st.sampled_from(DISPATCH_CONFIGS),
    st.integers(0, 4),
    st.integers(1, 16),
)


def rows_of(runs: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(a, b) for a, b in runs.tolist()] or [np.empty(0, int)])


def cells_of(bands: np.ndarray, rows: np.ndarray, keys: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How often a rank computes each global cell, from bands over buffers that hold global ``rows`` and ``keys``."""
    count = np.zeros(shape, np.int64)
    for q0, q1, k0, k1, lo, hi in bands.tolist():
        assert 0 <= q0 < q1 <= len(rows)
        assert 0 <= k0 < k1 <= len(keys)
        i, j = np.arange(q0, q1)[:, None], np.arange(k0, k1)
        inside = (j - i >= lo) & (j - i <= hi)
        count[np.ix_(rows[q0:q1], keys[k0:k1])] += inside
    return count


def check_every_cell_is_computed_once(mask: AttnMask, plan: AttnPlan, ranks: list[RankPlan]) -> None:
    total = np.zeros((plan.dispatch.padded_seqlen, plan.dispatch_k.padded_seqlen), np.int64)
    for rank in ranks:
        queries, keys = rows_of(plan.dispatch.runs(rank.rank)), rows_of(plan.dispatch_k.runs(rank.rank))
        assert (len(queries), len(keys)) == (rank.local_seqlen_q, rank.local_seqlen_k)
        mine = cells_of(rank.local_bands, queries, keys, total.shape)
        for stage in rank.stages:
            mine += cells_of(stage.bands, queries, rows_of(stage.runs), total.shape)
        assert rank.area == mine.sum()
        total += mine
    expected = np.zeros_like(total)
    expected[: mask.total_seqlen_q, : mask.total_seqlen_k] = mask.to_dense()
    np.testing.assert_array_equal(total, expected)


def check_rows_travel_only_where_attended(mask: AttnMask, plan: AttnPlan, ranks: list[RankPlan]) -> None:
    """A row is received iff the rank attends it and does not own it, in one stage, and it is that row that arrives."""
    attended = np.zeros((plan.dispatch.padded_seqlen, plan.dispatch_k.padded_seqlen), bool)
    attended[: mask.total_seqlen_q, : mask.total_seqlen_k] = mask.to_dense()
    own = [rows_of(plan.dispatch_k.runs(r.rank)) for r in ranks]
    for rank in ranks:
        queries = rows_of(plan.dispatch.runs(rank.rank))
        wanted = np.setdiff1d(np.flatnonzero(attended[queries].any(axis=0)), own[rank.rank])
        received = [rows_of(stage.runs) for stage in rank.stages]
        np.testing.assert_array_equal(np.sort(np.concatenate([*received, np.empty(0, int)])), wanted)
        assert rank.num_recv_rows == len(wanted) == plan.routes.rows_received(plan.cp_size)[rank.rank]
        assert rank.num_send_rows == plan.routes.rows[plan.routes.owner == rank.rank].sum()
        for number, stage in enumerate(rank.stages):
            wire = []
            for sender in ranks:
                collective = sender.stages[number].collective
                assert collective.send_counts[rank.rank] == stage.collective.recv_counts[sender.rank]
                assert ((collective.send_rows >= 0) & (collective.send_rows < sender.local_seqlen_k)).all()
                first = sum(collective.send_counts[: rank.rank])
                sent = collective.send_rows[first : first + collective.send_counts[rank.rank]]
                wire.append(own[sender.rank][sent])
            arrived = np.concatenate(wire)
            order = stage.collective.recv_order
            buffer = arrived if order is None else arrived[order]
            np.testing.assert_array_equal(buffer, received[number])
            if order is not None:
                np.testing.assert_array_equal(buffer[stage.collective.wire_order], arrived)


def check_dispatch_is_a_permutation(plan: AttnPlan) -> None:
    for dispatch in (plan.dispatch, plan.dispatch_k):
        local = [rows_of(dispatch.runs(r)) for r in range(plan.cp_size)]
        assert tuple(map(len, local)) == dispatch.local_seqlens
        assert max(dispatch.local_seqlens) - min(dispatch.local_seqlens) <= dispatch.chunk_size
        gathered = np.concatenate(local)
        np.testing.assert_array_equal(np.sort(gathered), np.arange(dispatch.padded_seqlen))
        np.testing.assert_array_equal(gathered[dispatch.places], np.arange(dispatch.total_seqlen))
        positions = np.minimum(gathered, dispatch.total_seqlen - 1)
        np.testing.assert_array_equal(dispatch.gathered_positions, positions)
        np.testing.assert_array_equal(
            np.concatenate([dispatch.position_ids(r) for r in range(plan.cp_size)]), positions
        )
        for rank, rows in enumerate(local):
            np.testing.assert_array_equal(dispatch.local_start(rows), np.arange(len(rows)))
            assert dispatch.real_seqlens[rank] == (rows < dispatch.total_seqlen).sum()


def check_rows_are_shared_equally(plan: AttnPlan) -> None:
    """Queries: the same number on each rank, unless uneven. Where order is kept, ranks follow each other."""
    sources, config = plan.sources, plan.config.dispatch_config
    assert config.uneven or len(set(plan.dispatch.local_seqlens)) == 1
    assert (plan.dispatch is plan.dispatch_k) == sources.is_same_source
    in_order = [config.order == "contiguous" or not sources.is_q_permutable, not sources.is_k_permutable]
    if sources.is_same_source:
        in_order = [any(in_order)] * 2
    for keeps_order, dispatch in zip(in_order, (plan.dispatch, plan.dispatch_k), strict=True):
        assert not keeps_order or (np.diff(dispatch.owner) >= 0).all()


def check_stages(plan: AttnPlan, ranks: list[RankPlan]) -> None:
    overlap = plan.config.overlap_config
    assert all(len(r.stages) == plan.routes.num_stages for r in ranks)
    assert plan.routes.num_stages <= max(overlap.degree, 1)
    for rank in ranks:
        sizes = [stage.collective.num_recv_rows for stage in rank.stages]
        filled = [size for size in sizes if size]
        assert sizes[: len(filled)] == filled, "stages are filled from the first"
        if len(filled) > 1:
            assert min(filled[:-1]) >= overlap.min_chunk_size
            assert max(filled) - min(filled) <= len(filled), "stages are of equal size"


def check_laws(
    mask: AttnMask,
    cp_size: int,
    chunk_size: int,
    config: DistAttnConfig,
    pad_size: int | None = None,
    sources: Sources = SELF_ATTENTION,
) -> AttnPlan:
    plan = plan_attention(mask, cp_size, chunk_size, pad_size, config, sources=sources)
    check_plan(mask, plan)
    return plan


def check_plan(mask: AttnMask, plan: AttnPlan) -> None:
    ranks = [plan.rank(r) for r in range(plan.cp_size)]
    check_dispatch_is_a_permutation(plan)
    check_rows_are_shared_equally(plan)
    check_every_cell_is_computed_once(mask, plan, ranks)
    check_rows_travel_only_where_attended(mask, plan, ranks)
    check_stages(plan, ranks)


@settings(max_examples=150, deadline=None)
@given(masks(max_seqlen=96, square=True), st.integers(1, 6), st.integers(1, 16), configs, st.integers(0, 1))
def test_laws_hold_for_generated_masks(
    mask: AttnMask, cp_size: int, chunk_size: int, config: DistAttnConfig, extra_pad: int
) -> None:
    fitting = compute_pad_size(mask.total_seqlen_q, cp_size, chunk_size)
    check_laws(mask, cp_size, chunk_size, config, fitting + extra_pad * cp_size * chunk_size)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_laws_hold_for_named_masks(name: str, cp_size: int) -> None:
    mask = named_masks(211)[name]
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=2, min_chunk_size=8))
    plan = check_laws(mask, cp_size, 4, config)
    work = plan.work
    heap = min_heap(work, cp_size)
    assert work.rows_moved(plan.dispatch.owner) <= work.rows_moved(heap)
    limit = max(1.02, imbalance(work, heap, cp_size))
    assert imbalance(work, plan.dispatch.owner, cp_size) <= limit + 1e-12


def test_rows_moved_counts_the_routes() -> None:
    for mask in named_masks(203).values():
        plan = plan_attention(mask, 4, 4)
        assert plan.work.rows_moved(plan.dispatch.owner) == plan.routes.rows.sum()


def test_plans_are_deterministic_and_survive_pickling() -> None:
    mask = named_masks(203)["varlen causal"]
    first, second = plan_attention(mask, 3, 8), pickle.loads(pickle.dumps(plan_attention(mask, 3, 8)))
    assert first.mask == second.mask and first.config == second.config
    for rank in range(3):
        a, b = first.rank(rank), pickle.loads(pickle.dumps(second.rank(rank)))
        np.testing.assert_array_equal(a.local_bands, b.local_bands)
        for x, y in zip(a.stages, b.stages, strict=True):
            np.testing.assert_array_equal(x.collective.send_rows, y.collective.send_rows)
            np.testing.assert_array_equal(x.bands, y.bands)


def test_what_holds_arrays_is_compared_by_identity() -> None:
    plan, again = (plan_attention(named_masks(64)["causal"], 2, 8) for _ in range(2))
    for some in ("work", "routes", "dispatch"):
        assert getattr(plan, some) == getattr(plan, some) != getattr(again, some)
    assert plan == plan != again and plan.work.needs != again.work.needs and len({plan, again, plan.work}) == 3


def test_a_rank_has_what_it_shares_with_the_plan() -> None:
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=0))
    plan = plan_attention(named_masks(203)["varlen causal"], 4, 8, config=config).on_mesh((2, 2))
    part = plan.rank(2)
    assert set(plan.shared()) == set(part.shared()) and plan.mesh_shape == (2, 2)
    assert all(getattr(part, name) is getattr(plan, name) for name in plan.shared())
    assert part.blocking and plan.blocking and part.cp_size == plan.cp_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(cp_size=3, chunk_size=8, pad_size=5), "pad_size 5 does not fit.*use 8"),
        (dict(cp_size=3, chunk_size=8, pad_size=-16), "pad_size -16 does not fit"),
        (dict(cp_size=0, chunk_size=8), "cp_size must be at least 1"),
        (dict(cp_size=2, chunk_size=0), "chunk_size must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_attention(named_masks(64)["causal"], **arguments)


@pytest.mark.parametrize("form", [np.uint8, np.uint32, np.int64, np.array, torch.tensor])
def test_sizes_and_ranks_of_any_form(form: Callable) -> None:
    mask = named_masks(203)["varlen causal"]
    plan, usual = plan_attention(mask, form(3), form(32), form(85)), plan_attention(mask, 3, 32, 85)
    for name in ("total_seqlen", "pad_size", "chunk_size", "cp_size"):
        size = getattr(plan.dispatch, name)
        assert size == getattr(usual.dispatch, name) and type(size) is int
    np.testing.assert_array_equal(plan.dispatch.owner, usual.dispatch.owner)
    rank_plan = plan.rank(form(1))
    assert type(rank_plan.rank) is int and rank_plan.area == usual.rank(1).area
    with pytest.raises(TypeError, match=r"rank must be an integer, got 1\.0"):
        plan.rank(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mask="x"), "mask must be an AttnMask, as the builders make, not 'x'"),
        (dict(config=DispatchConfig()), r"config must be a DistAttnConfig, not DispatchConfig\("),
        (dict(sources=False), "sources must be Sources, such as .* not False"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, object], message: str) -> None:
    mask = named_masks(64)["causal"]
    plan = plan_attention(mask, 2, 8)
    with pytest.raises(TypeError, match=message):
        plan_attention(**{"mask": mask, "cp_size": 2, "chunk_size": 8, **arguments})
    with pytest.raises(TypeError, match=message):
        plan_new_mask(**{"mask": mask, "plan": plan, **arguments})
    with pytest.raises(TypeError, match="plan must be what plan_attention returns"):
        plan_new_mask(mask, plan.dispatch)


def test_rank_out_of_bounds() -> None:
    plan = plan_attention(named_masks(64)["causal"], 2, 8)
    with pytest.raises(ValueError, match="rank 2 is out of bounds: the plan has ranks 0 to 1"):
        plan.rank(2)


def test_masks_that_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="total_seqlen_q == total_seqlen_k, not 4 and 6"):
        plan_attention(AttnMask.from_slices([[0, 4]], [[0, 6]], "full", 4, 6), 2, 2)
    with pytest.raises(ValueError, match="no rows"):
        plan_attention(AttnMask.from_slices([], [], "full", 0, 0), 2, 2)
