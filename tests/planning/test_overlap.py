"""Stages chosen by a cost model: what is counted, what is chosen, and that the plan is as it was chosen."""

import itertools
import logging
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import AttnOverlapMode, CostModel, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import AttnPlan, plan_attention, plan_new_mask
from magi_attention.planning.cost_model import PassCosts, StageWork
from magi_attention.planning.overlap import PARTS, estimate_candidates
from magi_attention.planning.routing import Routes
from magi_attention.planning.timeline import predict_timeline
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .loop_simulator import Op, loop_program, simulate
from .test_plan_laws import (
    check_every_cell_is_computed_once,
    check_rows_travel_only_where_attended,
    rows_of,
)

# A network that is slow beside the rest, so that transfers are worth hiding even for a few rows.
SMALL = dict(heads_q=2, heads_kv=2, head_dim=8, forward_tflops=1e-3, backward_tflops=1e-3, hbm_bandwidth=1e9)


def dynamic(min_chunk_size: int = 4, max_degree: int = 4, **costs: float) -> DistAttnConfig:
    model = CostModel(**{**SMALL, "bandwidth": 2e6, "latency": 1e-6, "stage_overhead": 1e-6, **costs})
    return DistAttnConfig(
        overlap_config=OverlapConfig(
            AttnOverlapMode.DYNAMIC, min_chunk_size=min_chunk_size, max_degree=max_degree, cost_model=model
        )
    )


costs = st.fixed_dictionaries(
    {
        "bandwidth": st.sampled_from([1e4, 1e6, 1e8, 1e10]),
        "latency": st.sampled_from([0.0, 1e-5]),
        "stage_overhead": st.sampled_from([0.0, 1e-6, 1e-4]),
        "backward_weight": st.sampled_from([0.0, 1.0]),
    }
)


def measure(plan: AttnPlan, routes: Routes) -> StageWork:
    return StageWork.measure(plan.mask, plan.work, plan.dispatch, routes)


def unsplit(plan: AttnPlan) -> Routes:
    return Routes.plan(plan.work.needs_of(plan.dispatch.owner), plan.dispatch_k, max_stages=1, min_rows=1)


def check_stages_are_as_chosen(plan: AttnPlan) -> None:
    """Each row in one stage is checked by the laws of all plans; here: how many, on every rank, and how large."""
    choice = plan.overlap_choice
    assert choice is not None
    chosen = choice.chosen
    most_rows = max(plan.rank(r).num_recv_rows for r in range(plan.cp_size))
    assert len(chosen.parts) == (max(chosen.degree, 1) if most_rows else 0)
    if len(chosen.parts) > 1:
        overlap = plan.config.overlap_config
        assert len(chosen.parts) <= overlap.max_degree and min(chosen.parts) > 0
        assert most_rows >= sum(chosen.parts) * overlap.min_chunk_size
    for number in range(plan.cp_size):
        rank = plan.rank(number)
        assert len(rank.stages) == len(chosen.parts) == plan.routes.num_stages
        assert rank.blocking == plan.blocking == (chosen.degree == 0)
        from_each = np.sum([stage.collective.recv_counts for stage in rank.stages], axis=0)
        for stage, part in zip(rank.stages, chosen.parts, strict=True):
            shares = from_each * part / sum(chosen.parts)
            assert (np.abs(np.array(stage.collective.recv_counts) - shares) <= 1).all(), "a share of each rank's rows"


@settings(max_examples=60, deadline=None)
@given(masks(max_seqlen=96, square=True), st.integers(1, 6), st.integers(1, 16), st.integers(1, 8), costs)
def test_laws_hold_for_chosen_stages(
    mask: AttnMask, cp_size: int, chunk_size: int, min_chunk_size: int, costs: dict[str, float]
) -> None:
    plan = plan_attention(mask, cp_size, chunk_size, config=dynamic(min_chunk_size, **costs))
    ranks = [plan.rank(r) for r in range(cp_size)]
    check_every_cell_is_computed_once(mask, plan, ranks)
    check_rows_travel_only_where_attended(mask, plan, ranks)
    check_stages_are_as_chosen(plan)


@settings(max_examples=60, deadline=None)
@given(masks(max_seqlen=96, square=True), st.integers(1, 6), st.integers(1, 16), st.integers(1, 6), st.integers(1, 8))
def test_work_is_counted_exactly(
    mask: AttnMask, cp_size: int, chunk_size: int, degree: int, min_chunk_size: int
) -> None:
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=min_chunk_size))
    plan = plan_attention(mask, cp_size, chunk_size, config=config)
    work = measure(plan, plan.routes)
    dense = np.zeros((plan.dispatch.padded_seqlen,) * 2, bool)
    dense[: mask.total_seqlen_q, : mask.total_seqlen_k] = mask.to_dense()
    for rank in map(plan.rank, range(cp_size)):
        own = rows_of(plan.dispatch.runs(rank.rank))
        assert work.local_areas[rank.rank] == dense[np.ix_(own, own)].sum()
        for n, stage in enumerate(rank.stages):
            cells = dense[np.ix_(own, rows_of(stage.runs))]
            assert work.areas[n, rank.rank] == cells.sum()
            assert cells.any(axis=1).sum() <= work.queries[n, rank.rank] <= len(own)
            assert work.received[n, rank.rank] == stage.collective.num_recv_rows
            assert work.sent[n, rank.rank] == stage.collective.num_send_rows


@pytest.mark.parametrize("name", ["full", "causal", "varlen causal", "sliding window causal", "block causal"])
def test_queries_of_one_band_are_counted_once(name: str) -> None:
    plan = plan_attention(named_masks(211)[name], 4, 4, config=dynamic())
    work = measure(plan, plan.routes)
    for rank in map(plan.rank, range(4)):
        for n, stage in enumerate(rank.stages):
            attending = {row for q0, q1, *_ in stage.bands.tolist() for row in range(q0, q1)}
            assert work.queries[n, rank.rank] == len(attending)


@settings(max_examples=60, deadline=None)
@given(
    masks(max_seqlen=96, square=True),
    st.integers(1, 6),
    st.integers(1, 16),
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
)
def test_split_keeps_every_row_once(mask: AttnMask, cp_size: int, chunk_size: int, parts: list[int]) -> None:
    whole = unsplit(plan_attention(mask, cp_size, chunk_size))
    if not whole.num_stages:
        return
    split = whole.split(np.array(parts))

    def rows(routes: Routes) -> list[tuple[int, int, int]]:
        runs = zip(
            routes.receiver.tolist(), routes.owner.tolist(), routes.start.tolist(), routes.end.tolist(), strict=True
        )
        return [(receiver, row, owner) for receiver, owner, start, end in runs for row in range(start, end)]

    assert rows(split) == rows(whole), "sorted by receiver and row"
    assert (split.rows > 0).all() and split.num_stages == len(parts)


@pytest.mark.parametrize("name", ["full", "causal"])
def test_shares_are_exact_where_all_queries_attend_what_arrives(name: str) -> None:
    plan = plan_attention(named_masks(512)[name], 4, 16)
    parts = np.array([2, 1, 1])
    split = measure(plan, unsplit(plan).split(parts))
    shares = measure(plan, unsplit(plan)).split(parts, 4)
    for work in ("areas", "received", "sent", "queries"):
        np.testing.assert_array_equal(getattr(shares, work), getattr(split, work), err_msg=work)


def slow_seconds(work: StageWork, config: DistAttnConfig, blocking: bool = False) -> float:
    """What the stages take, priced and simulated one by one."""
    model = config.overlap_config.cost_model
    total = 0.0
    for backward, weight in ((False, model.forward_weight), (True, model.backward_weight)):
        per_cell = (10e-12 / model.backward_tflops if backward else 4e-12 / model.forward_tflops) * 16

        def seconds(op: Op, rank: int | None, backward: bool = backward, per_cell: float = per_cell) -> float:
            kind, n = op
            waiting = could_wait = 0.0
            if kind == "attend" and not backward and len(work.areas):
                meanwhile = 0 if blocking else 2 * seconds(("cast", 0), None)
                own, could_wait = work.local_areas[rank] * per_cell, work.could_wait[rank] * per_cell
                waiting = min(could_wait, max(0, own - meanwhile))
            if n is None:
                return work.local_areas[rank] * per_cell - waiting
            if kind == "attend":
                area = work.areas[n, rank]
                merging = 0 if backward else work.queries[n, rank] * 16 * 4 * 2 / model.hbm_bandwidth
                if n == 0:
                    merging *= 1 - waiting / could_wait if could_wait else 0
                    merging += waiting
                return area * per_cell + merging + (area > 0) * model.stage_overhead
            rows = max(work.received[n].max(), work.sent[n].max())
            row_bytes = 2 * 16 * (4 if kind == "reduce" else 2)
            return (model.latency + rows * row_bytes / model.bandwidth) * (rows > 0)

        fills = work.own_keys_fill & backward
        programs = [loop_program(len(work.areas), blocking, backward, fill) for fill in fills.tolist()]
        total += weight * max(simulate(programs, seconds).ends)
    return total


@settings(max_examples=25, deadline=None)
@given(masks(max_seqlen=64, square=True), st.integers(2, 4), st.integers(1, 16), costs)
def test_estimates_are_the_best_shares(mask: AttnMask, cp_size: int, chunk_size: int, costs: dict[str, float]) -> None:
    config = dynamic(min_chunk_size=8, max_degree=3, **costs)
    plan = plan_attention(mask, cp_size, chunk_size)
    work = measure(plan, unsplit(plan))
    candidates = estimate_candidates(work, config)
    best = {0: slow_seconds(work, config, blocking=True)}
    most_rows = int(work.received.max(initial=0))
    num_parts = min(PARTS, max(1, most_rows // 8)) if most_rows else 0
    for degree in range(1, min(3, num_parts) + 1):
        ways = (np.diff((0, *cut, num_parts)) for cut in itertools.combinations(range(1, num_parts), degree - 1))
        best[degree] = min(slow_seconds(work.split(way, num_parts), config) for way in ways)
    assert {c.degree: c.cost for c in candidates} == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(masks(max_seqlen=96, square=True), st.integers(2, 5), st.integers(1, 16), costs)
def test_the_least_is_chosen_and_counted_exactly(
    mask: AttnMask, cp_size: int, chunk_size: int, costs: dict[str, float]
) -> None:
    config = dynamic(min_chunk_size=4, **costs)
    plan = plan_attention(mask, cp_size, chunk_size, config=config)
    choice = plan.overlap_choice
    assert choice is not None
    chosen = choice.chosen
    assert chosen.cost == pytest.approx(slow_seconds(measure(plan, plan.routes), config, plan.blocking))
    assert chosen == choice.candidates[chosen.degree]
    assert [c.degree for c in choice.candidates] == list(range(len(choice.candidates)))
    assert all((chosen.cost, chosen.degree) <= (c.cost, c.degree) for c in choice.candidates)


def test_predicted_times_are_those_of_the_timeline() -> None:
    for mask in named_masks(512).values():
        plan = plan_attention(mask, 4, 8, config=dynamic())
        assert plan.overlap_choice is not None
        timeline = predict_timeline(plan)
        assert timeline.forward.seconds == plan.overlap_choice.chosen.forward_seconds
        assert timeline.backward.seconds == plan.overlap_choice.chosen.backward_seconds


def chosen_degree(mask: AttnMask, cp_size: int, **costs: float) -> int:
    choice = plan_attention(mask, cp_size, 16, config=dynamic(**costs)).overlap_choice
    assert choice is not None
    return choice.chosen.degree


def test_few_stages_where_little_travels_and_more_where_much_can_be_hidden() -> None:
    causal = builders.causal(2048)
    assert chosen_degree(builders.varlen([0, 512, 1024, 1536, 2048]), 4) == 0, "nothing travels"
    assert chosen_degree(causal, 1) == 0
    assert chosen_degree(causal, 4, bandwidth=1e15, latency=0) <= 1, "transfers take no time"
    assert chosen_degree(causal, 4, latency=1.0) <= 1, "each stage costs a second"
    assert chosen_degree(causal, 4, stage_overhead=1.0) <= 1
    assert chosen_degree(causal, 4, bandwidth=1e7) >= 2, "much travels, and takes less than computing"


def test_the_passes_count_as_their_weights_say() -> None:
    """Forward, the rank's own keys hide one stage; backward, they do not hide both a cast and a reduce of it."""
    causal = builders.causal(2048)
    assert chosen_degree(causal, 2, bandwidth=2e6, backward_weight=0) == 1
    assert chosen_degree(causal, 2, bandwidth=2e6, forward_weight=0) > 1


def test_max_degree_limits_the_choice() -> None:
    for most in (1, 2, 3, 6):
        choice = plan_attention(
            builders.causal(2048), 4, 16, config=dynamic(max_degree=most, bandwidth=3e7)
        ).overlap_choice
        assert choice is not None
        assert [c.degree for c in choice.candidates] == list(range(most + 1))


def test_a_new_mask_gets_stages_of_its_own() -> None:
    config = dynamic(bandwidth=3e7)
    plan = plan_attention(builders.causal(2048), 4, 16, config=config)
    other = plan_new_mask(builders.sliding_window(2048, (31, 0)), plan)
    check_stages_are_as_chosen(other)
    assert other.overlap_choice != plan.overlap_choice


def test_a_static_plan_has_no_choice() -> None:
    plan = plan_attention(builders.causal(256), 4, 16)
    assert plan.overlap_choice is None and plan.rank(0).overlap_choice is None


def test_the_choice_travels_with_the_plan_and_explains_itself(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="magi_attention"):
        plan = plan_attention(builders.causal(2048), 4, 16, config=dynamic(bandwidth=3e7))
    choice = plan.overlap_choice
    assert choice is not None
    assert pickle.loads(pickle.dumps(plan.rank(1))).overlap_choice == choice
    lines = str(choice).splitlines()[1:]
    assert len(lines) == 5
    assert [line.startswith("chosen") for line in lines] == [c == choice.chosen for c in choice.candidates]
    assert "waited for first" in lines[0]
    assert str(choice) in caplog.text


@pytest.mark.parametrize(
    ("total", "cp_size", "documents", "milliseconds"), [(64 << 10, 8, 60, 5), (1 << 20, 64, 1000, 50)]
)
def test_planning_time(total: int, cp_size: int, documents: int, milliseconds: float) -> None:
    """The budget is for a core that nobody else uses; here, ten times that."""
    cuts = np.random.default_rng(0).choice(np.arange(1, total), documents - 1, replace=False)
    mask = builders.varlen([0, *sorted(cuts.tolist()), total], causal=True)
    config = DistAttnConfig(overlap_config=OverlapConfig(AttnOverlapMode.DYNAMIC))

    def once() -> float:
        start = time.perf_counter()
        plan_attention(mask, cp_size, 512, config=config).rank(cp_size // 2)
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) * 1e3 < 10 * milliseconds


def test_costs_of_the_forward_pass_count_merging() -> None:
    plan = plan_attention(builders.causal(2048), 4, 16, config=dynamic())
    work = measure(plan, plan.routes)
    model = plan.config.overlap_config.cost_model
    slow_memory = CostModel(**{**SMALL, "hbm_bandwidth": 1e3})
    fast, slow = (PassCosts.forward(work, costs).joined(blocking=False) for costs in (model, slow_memory))
    assert (slow.stages > fast.stages).all()


def test_queries_that_wait_for_the_first_stage_are_merged_into_nothing() -> None:
    """But where rows travel for so long that own keys are all needed meanwhile, and where nothing waits."""
    plan = plan_attention(builders.causal(2048), 4, 16, config=dynamic())
    work = measure(plan, plan.routes)
    fast, slow = (CostModel(**{**SMALL, "bandwidth": bandwidth, "latency": 0.0}) for bandwidth in (1e30, 1.0))
    costs = PassCosts.forward(work, fast)
    joined = costs.joined(blocking=False)
    np.testing.assert_allclose(joined.local, costs.local - costs.could_wait, atol=1e-20)
    np.testing.assert_allclose(joined.stages[0], costs.stages[0] + costs.could_wait, atol=1e-20)
    costs = PassCosts.forward(work, slow)
    joined = costs.joined(blocking=False)
    np.testing.assert_allclose(joined.local, costs.local)
    np.testing.assert_allclose(joined.stages, costs.stages + costs.merging)
    np.testing.assert_allclose(costs.joined(blocking=True).local, costs.local - costs.could_wait)
