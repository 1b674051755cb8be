"""Keys of another source than the queries: the laws hold, keys are shared equally and lie where they are attended."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import (
    AttnOverlapMode,
    DispatchConfig,
    DistAttnConfig,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import Sources, plan_attention, plan_new_mask
from magi_attention.planning.key_dispatch import dispatch_keys
from magi_attention.planning.load_balance import imbalance, min_heap
from magi_attention.planning.lower_bound import rows_moved_lower_bound
from magi_attention.planning.runs import GroupedRuns
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .test_assignment import packed_documents
from .test_plan_laws import (
    check_every_cell_is_computed_once,
    check_laws,
    check_plan,
    check_rows_travel_only_where_attended,
    configs,
)

CROSS = Sources(is_same_source=False)
permutable = st.builds(Sources, st.just(False), st.booleans(), st.booleans())


def asks_for_an_order(config: DispatchConfig) -> bool:
    return config not in (DispatchConfig(), DispatchConfig(order="contiguous"))


@settings(max_examples=200, deadline=None)
@given(masks(max_seqlen=96), st.integers(1, 6), st.integers(1, 16), configs, permutable)
def test_laws_hold_for_generated_masks(
    mask: AttnMask, cp_size: int, chunk_size: int, config: DistAttnConfig, sources: Sources
) -> None:
    if not sources.is_q_permutable and asks_for_an_order(config.dispatch_config):
        with pytest.raises(ValueError, match="is_q_permutable=False needs the default DispatchConfig or order='contig"):
            plan_attention(mask, cp_size, chunk_size, config=config, sources=sources)
        return
    plan = check_laws(mask, cp_size, chunk_size, config, sources=sources)
    assert plan.dispatch_k.pad_size == 0
    assert max(plan.dispatch_k.local_seqlens) - min(plan.dispatch_k.local_seqlens) <= min(
        chunk_size if sources.is_k_permutable else cp_size, max(mask.total_seqlen_k // cp_size, 1)
    )
    tolerance = imbalance(plan.work, plan.dispatch.owner, cp_size) - 1 + 1e-9
    assert rows_moved_lower_bound(mask, cp_size, chunk_size, tolerance) <= plan.routes.rows.sum()


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_laws_hold_when_the_stages_are_chosen_by_cost(name: str) -> None:
    mask = named_masks(211)[name]
    config = DistAttnConfig(overlap_config=OverlapConfig(AttnOverlapMode.DYNAMIC, min_chunk_size=4))
    plan = plan_attention(mask, 4, 4, config=config, sources=CROSS)
    assert plan.overlap_choice is not None and plan.routes.num_stages <= config.overlap_config.max_degree
    ranks = [plan.rank(rank) for rank in range(4)]
    check_every_cell_is_computed_once(mask, plan, ranks)
    check_rows_travel_only_where_attended(mask, plan, ranks)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("queries", "keys"), [(300, 77), (77, 300), (64, 5), (16, 4096)])
def test_few_and_many_keys_are_shared_equally(queries: int, keys: int, cp_size: int) -> None:
    for is_k_permutable in (True, False):
        sources = Sources(False, True, is_k_permutable)
        plan = plan_attention(builders.full(queries, keys), cp_size, 16, sources=sources)
        rows = plan.dispatch_k.local_seqlens
        assert max(rows) - min(rows) <= 16
        if not is_k_permutable:
            assert [plan.dispatch_k.runs(r).tolist() for r in range(cp_size) if rows[r]] == [
                [[sum(rows[:r]), sum(rows[: r + 1])]] for r in range(cp_size) if rows[r]
            ]


def cross_documents(seed: int) -> AttnMask:
    """Documents whose queries attend a source of another length each, as in translation."""
    cu_seqlens = packed_documents(1 << 15, seed)
    lengths = np.random.default_rng(seed).permutation(np.diff(cu_seqlens) // 2 + 1)
    return builders.varlen(cu_seqlens, builders.cu_seqlens_from_lengths(lengths))


@pytest.mark.parametrize("seed", range(3))
def test_keys_lie_where_they_are_attended(seed: int) -> None:
    """Most keys need not travel to one of the ranks that attend them; fewer do when they keep their order, yet many."""
    mask = cross_documents(seed)
    free, in_order = (plan_attention(mask, 8, 128, sources=Sources(False, True, f)) for f in (True, False))
    assert imbalance(free.work, free.dispatch.owner, 8) <= 1.02
    np.testing.assert_array_equal(free.dispatch.owner, in_order.dispatch.owner)
    needed = free.work.rows_moved(free.dispatch.owner)
    saved, saved_in_order = needed - free.routes.rows.sum(), needed - in_order.routes.rows.sum()
    assert saved >= 0.8 * mask.total_seqlen_k
    assert 0.25 * mask.total_seqlen_k <= saved_in_order <= 0.5 * mask.total_seqlen_k
    assert needed <= 0.6 * free.work.rows_moved(min_heap(free.work, 8))


def test_keys_are_assigned_nearly_as_well_as_possible() -> None:
    """Held against the best of all assignments of as many chunks each, which small numbers can be searched for."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        cp_size, num_keys = int(rng.integers(2, 5)), int(rng.integers(1, 7))
        attended = rng.random((cp_size, num_keys)) < 0.4
        rank, key = np.nonzero(attended)
        needs = GroupedRuns.merge(rank, key, key + 1, num_keys + 1)
        owner = dispatch_keys(needs, num_keys, 1, cp_size, permutable=True).owner
        equal = [
            candidate
            for candidate in itertools.product(range(cp_size), repeat=num_keys)
            if np.ptp(np.bincount(candidate, minlength=cp_size)) <= 1
        ]
        best = max(attended[list(candidate), np.arange(num_keys)].sum() for candidate in equal)
        shares.append(attended[owner, np.arange(num_keys)].sum() / max(best, 1) if best else 1.0)
    assert np.mean(shares) > 0.97 and min(shares) >= 0.5


def test_self_attention_in_order() -> None:
    """Queries and keys of one source go together, so one flag is enough to keep the order of both."""
    for flag in (Sources(is_q_permutable=False), Sources(is_k_permutable=False)):
        plan = check_laws(builders.causal(61), 3, 4, DistAttnConfig(), sources=flag)
        expected = plan_attention(builders.causal(61), 3, 4, config=DistAttnConfig(DispatchConfig(order="contiguous")))
        np.testing.assert_array_equal(plan.dispatch.owner, expected.dispatch.owner)
    for config in (
        DispatchConfig(order="zigzag"),
        DispatchConfig(MinHeapDispatchAlg()),
        DispatchConfig(LocalityDispatchAlg(0.5)),
    ):
        with pytest.raises(ValueError, match="is_k_permutable=False needs the default DispatchConfig or order="):
            plan_attention(
                builders.causal(8), 1, 4, config=DistAttnConfig(config), sources=Sources(is_k_permutable=False)
            )


# --- Queries that were dispatched for self-attention -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(masks(max_seqlen=60), st.integers(1, 5), st.integers(1, 9), permutable)
def test_laws_hold_for_queries_dispatched_before(
    mask: AttnMask, cp_size: int, chunk_size: int, sources: Sources
) -> None:
    base = plan_attention(builders.causal(mask.total_seqlen_q), cp_size, chunk_size)
    plan = plan_new_mask(mask, base.rank(0), sources=sources)
    assert plan.dispatch is base.dispatch and plan.dispatch_of == base.mask
    check_plan(mask, plan)


def test_the_same_mask_of_another_source_is_another_plan() -> None:
    mask = named_masks(61)["varlen causal"]
    base = plan_attention(mask, 3, 4)
    cross = plan_new_mask(mask, base, sources=CROSS)
    assert cross.dispatch_of == mask and cross.dispatch_k is not base.dispatch
    assert cross.sources == CROSS != plan_new_mask(mask, base).sources
    assert plan_new_mask(mask, base).dispatch_of is None


def test_what_is_refused() -> None:
    wide = builders.full(8, 12)
    with pytest.raises(ValueError, match=r"total_seqlen_q == total_seqlen_k, not 8 and 12.*is_same_source=False"):
        plan_attention(wide, 2, 2)
    cross = plan_attention(wide, 2, 2, sources=CROSS)
    with pytest.raises(ValueError, match="dispatched for cross-attention"):
        plan_new_mask(wide, cross)
    with pytest.raises(
        ValueError, match="over 8 queries and 12 keys, but the rows were dispatched for a sequence of 8"
    ):
        plan_new_mask(wide, plan_attention(builders.full(8), 2, 2))
    for mask, name in (
        (AttnMask.from_slices([], [], "full", 8, 0), "k"),
        (AttnMask.from_slices([], [], "full", 0, 8), "q"),
    ):
        with pytest.raises(ValueError, match=f"total_seqlen_{name} must be at least 1"):
            plan_attention(mask, 2, 2, sources=CROSS)
    with pytest.raises(ValueError, match="total_seqlen_k must be at least 1"):
        plan_new_mask(AttnMask.from_slices([], [], "full", 8, 0), plan_attention(builders.full(8), 2, 2), sources=CROSS)
    with pytest.raises(TypeError, match="is_same_source must be True or False, got None"):
        Sources(is_same_source=None)  # type: ignore[arg-type]


def test_plans_survive_pickling() -> None:
    plan = plan_attention(cross_documents(0), 4, 128, sources=CROSS)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.sources == plan.sources and pickle.loads(pickle.dumps(Sources())) == Sources()
    ours, theirs = plan.rank(3), pickle.loads(pickle.dumps(copy.rank(3)))
    np.testing.assert_array_equal(ours.dispatch_k.owner, theirs.dispatch_k.owner)
    np.testing.assert_array_equal(ours.local_bands, theirs.local_bands)
