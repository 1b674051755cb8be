"""The predicted timeline: by hand, and against a slow simulation of ranks that run the loop."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import AttnOverlapMode, CostModel, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.planning import plan_attention
from magi_attention.planning.cost_model import PassCosts
from magi_attention.planning.replay import replay
from magi_attention.planning.report import report_times
from magi_attention.planning.timeline import PassTimeline, Timeline, chrome_trace, predict_timeline
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .loop_simulator import Op, loop_program, simulate

# Two ranks, two stages. Rank 0 has much of its own, rank 1 little.
BY_HAND = PassCosts(
    local=np.array([6.0, 1.0]),
    stages=np.array([[2.0, 4.0], [1.0, 3.0]]),
    casts=np.array([2.0, 5.0]),
    reduces=np.array([3.0, 2.0]),
    own_keys_fill=True,
)


def extents(timeline: PassTimeline, rank: int) -> dict[str, tuple[float, float]]:
    return {span.name: (span.start, span.end) for span in timeline.spans if span.rank == rank}


def pieces(timeline: PassTimeline, rank: int) -> list[tuple[str, float, float]]:
    found = [(span.name, span.start, span.end) for span in timeline.spans if span.rank == rank]
    return sorted(found, key=lambda piece: (piece[1:], piece[0]))


def test_forward_by_hand() -> None:
    costs = PassCosts(BY_HAND.local, BY_HAND.stages, BY_HAND.casts, None)
    timeline = PassTimeline.of(replay(costs, blocking=False))
    # cast 2 is posted behind the local keys, which rank 0 has done at 6; so both ranks wait for it until 11.
    assert extents(timeline, 0) == {
        "cast 1": (0, 2), "own keys": (0, 6), "cast 2": (6, 11), "stage 1": (6, 8), "stage 2": (11, 12),
    }  # fmt: skip
    assert extents(timeline, 1) == {
        "cast 1": (0, 2), "own keys": (0, 1), "cast 2": (6, 11), "stage 1": (2, 6), "stage 2": (11, 14),
    }  # fmt: skip
    assert timeline.seconds == 14
    rank0, rank1 = report_times(timeline)
    assert (rank0.compute, rank0.exposed, rank0.idle) == (9, 3, 2)  # waits from 8 to 11, and for rank 1 from 12 on
    assert (rank1.compute, rank1.exposed, rank1.idle) == (8, 1 + 5, 0)


def test_backward_by_hand() -> None:
    timeline = PassTimeline.of(replay(BY_HAND, blocking=False))
    # Own keys fill the time until cast 1 has arrived. Then rank 0 has four seconds of them left.
    assert pieces(timeline, 0) == [
        ("cast 1", 0, 2), ("own keys", 0, 2), ("stage 1", 2, 4), ("cast 2", 2, 7), ("own keys", 4, 7),
        ("stage 2", 7, 8), ("reduce 1", 7, 10), ("own keys", 8, 9), ("reduce 2", 10, 12),
    ]  # fmt: skip
    assert pieces(timeline, 1) == [
        ("own keys", 0, 1), ("cast 1", 0, 2), ("stage 1", 2, 6), ("cast 2", 2, 7), ("reduce 1", 7, 10),
        ("stage 2", 7, 10), ("reduce 2", 10, 12),
    ]  # fmt: skip
    assert timeline.seconds == 12
    rank0, rank1 = report_times(timeline)
    assert (rank0.compute, rank0.exposed, rank0.idle) == (9, 3, 0)
    assert (rank1.compute, rank1.exposed, rank1.idle) == (8, 1 + 1 + 2, 0)


def test_blocking_by_hand() -> None:
    costs = PassCosts(BY_HAND.local, BY_HAND.stages[:1], BY_HAND.casts[:1], BY_HAND.reduces[:1], own_keys_fill=True)
    timeline = PassTimeline.of(replay(costs, blocking=True))
    assert extents(timeline, 0) == {"cast 1": (0, 2), "own keys": (2, 8), "stage 1": (8, 10), "reduce 1": (10, 13)}
    assert extents(timeline, 1) == {"cast 1": (0, 2), "own keys": (2, 3), "stage 1": (3, 7), "reduce 1": (10, 13)}
    assert report_times(timeline)[1].idle == 3


def test_nothing_travels() -> None:
    costs = PassCosts(np.array([3.0, 4.0]), np.empty((0, 2)), np.empty(0), np.empty(0))
    timeline = PassTimeline.of(replay(costs, blocking=True))
    assert extents(timeline, 0) == {"own keys": (0, 3)}
    assert timeline.seconds == 4


@st.composite
def pass_costs(draw: st.DrawFn, ways: int | None = None) -> PassCosts:
    """Whole numbers, so that sums are exact; some are 0. With `ways`, so many ways side by side."""
    cp_size, num_stages = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    side_by_side = () if ways is None else (ways,)

    def seconds(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)), float).reshape(shape)

    casts = seconds(num_stages, *side_by_side)
    stages = seconds(num_stages, *side_by_side, cp_size)
    if draw(st.booleans()):
        return PassCosts(seconds(cp_size), stages, casts, None)
    fills = draw(st.lists(st.booleans(), min_size=cp_size, max_size=cp_size))
    return PassCosts(seconds(cp_size), stages, casts, seconds(*casts.shape), np.array(fills))


def check_against_simulation(costs: PassCosts, blocking: bool) -> None:
    clock = replay(costs, blocking)

    def seconds(op: Op, rank: int | None) -> float:
        kind, n = op
        if kind == "attend":
            return float(costs.local[rank] if n is None else costs.stages[n, rank])
        table = costs.casts if kind == "cast" else costs.reduces
        assert table is not None
        return float(table[n])

    fills = np.broadcast_to(costs.own_keys_fill, costs.local.shape).tolist()
    backward = costs.reduces is not None
    outcome = simulate([loop_program(len(costs.casts), blocking, backward, fill) for fill in fills], seconds)
    assert clock.ranks.tolist() == outcome.ends
    found = {}
    own: list[list[tuple[float, float]]] = [[] for _ in costs.local]
    for step in clock.steps:
        for rank in range(len(costs.local)):
            if step.name == "attend" and step.stage is None:
                own[rank] += [(step.start[rank], step.end[rank])] if step.start[rank] < step.end[rank] else []
            elif step.name == "attend":
                found[(step.name, step.stage), rank] = (step.start[rank], step.end[rank])
            else:
                found[(step.name, step.stage), None] = (step.start, step.end)
    assert (found, own) == (outcome.extents, outcome.own)


@settings(max_examples=200, deadline=None)
@given(pass_costs(), st.booleans())
def test_replay_is_the_simulation(costs: PassCosts, blocking: bool) -> None:
    check_against_simulation(costs, blocking)


@settings(max_examples=50, deadline=None)
@given(pass_costs(ways=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_ways_side_by_side_are_ways_one_by_one(costs: PassCosts, blocking: list[bool]) -> None:
    together = replay(costs, np.array(blocking)).ranks
    for n in range(3 if len(costs.casts) else 0):
        reduces = None if costs.reduces is None else costs.reduces[:, n]
        one = replace(costs, stages=costs.stages[:, n], casts=costs.casts[:, n], reduces=reduces)
        np.testing.assert_array_equal(together[n], replay(one, blocking[n]).ranks)


@settings(max_examples=50, deadline=None)
@given(pass_costs(), st.booleans(), st.integers(1, 3))
def test_empty_stages_at_the_end_cost_nothing(costs: PassCosts, blocking: bool, more: int) -> None:
    def longer(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate((numbers, np.zeros((more, *numbers.shape[1:]))))

    reduces = None if costs.reduces is None else longer(costs.reduces)
    padded = replace(costs, stages=longer(costs.stages), casts=longer(costs.casts), reduces=reduces)
    assert replay(padded, blocking).ranks.max() == replay(costs, blocking).ranks.max()


@settings(max_examples=60, deadline=None)
@given(pass_costs(), st.booleans())
def test_parts_make_up_the_whole_on_every_rank(costs: PassCosts, blocking: bool) -> None:
    timeline = PassTimeline.of(replay(costs, blocking))
    total_compute = costs.local + costs.stages.sum(axis=0)
    for rank, times in enumerate(report_times(timeline)):
        assert times.compute == total_compute[rank]
        assert times.exposed >= 0 and times.idle >= 0
        assert times.compute + times.exposed + times.idle == timeline.seconds


CHEAP = CostModel(heads_q=2, heads_kv=1, head_dim=8, forward_tflops=1e-3, backward_tflops=2e-3, bandwidth=1e6)


@settings(max_examples=40, deadline=None)
@given(
    masks(max_seqlen=96, square=True),
    st.integers(1, 5),
    st.integers(1, 16),
    st.integers(0, 3),
    st.sampled_from([None, 4, 20]),
)
def test_a_plan_takes_the_time_of_its_areas_and_rows(
    mask: AttnMask, cp_size: int, chunk_size: int, degree: int, head_dim_v: int | None
) -> None:
    model = replace(CHEAP, head_dim_v=head_dim_v)
    dim, dim_v = CHEAP.head_dim, head_dim_v or CHEAP.head_dim
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=4, cost_model=model))
    plan = plan_attention(mask, cp_size, chunk_size, config=config)
    timeline = predict_timeline(plan)
    ranks = [plan.rank(r) for r in range(cp_size)]
    flops = 2 * CHEAP.heads_q * (3 * dim + 2 * dim_v)
    for rank, times in zip(ranks, report_times(timeline.backward), strict=True):
        overhead = CHEAP.stage_overhead * sum(len(stage.bands) > 0 for stage in rank.stages)
        assert times.compute == pytest.approx(rank.area * flops / 2e9 + overhead)
    travelling = [span for span in timeline.backward.spans if span.lane == "network"]
    assert {span.stage for span in travelling} == set(range(1, len(ranks[0].stages) + 1))
    for span in travelling:
        assert span.stage is not None
        collectives = [rank.stages[span.stage - 1].collective for rank in ranks]
        rows = max(max(c.num_recv_rows, c.num_send_rows) for c in collectives)
        row_bytes = (dim + dim_v) * (2 if span.name.startswith("cast") else 4)
        assert span.end - span.start == pytest.approx(CHEAP.latency + rows * row_bytes / CHEAP.bandwidth)


def test_the_head_dim_of_values_is_that_of_keys_if_none_is_given() -> None:
    plan = plan_attention(named_masks(256)["causal"], 4, 16)
    same = predict_timeline(plan, replace(CHEAP, head_dim_v=CHEAP.head_dim))
    assert predict_timeline(plan, CHEAP) == same != predict_timeline(plan, replace(CHEAP, head_dim_v=4))


def test_forward_passes_of_values_of_another_head_dim() -> None:
    """Half of the products are of values; results are read and written, and rows travel, as wide as they are."""
    plan = plan_attention(named_masks(256)["causal"], 4, 16)
    free = replace(CHEAP, latency=0, stage_overhead=0, head_dim_v=3 * CHEAP.head_dim)
    twice = replace(free, head_dim=2 * CHEAP.head_dim, head_dim_v=None, hbm_bandwidth=2 / 3 * free.hbm_bandwidth)
    ours, theirs = (predict_timeline(plan, model).forward.seconds for model in (free, twice))
    assert ours == pytest.approx(theirs)


def test_a_cost_model_of_ones_own() -> None:
    plan = plan_attention(named_masks(256)["causal"], 4, 16)
    assert predict_timeline(plan, CHEAP) != predict_timeline(plan)
    assert predict_timeline(plan, plan.config.overlap_config.cost_model) == predict_timeline(plan)


def test_gradients_in_the_type_of_the_input_travel_faster() -> None:
    def reduce_seconds(config: DistAttnConfig) -> float:
        plan = plan_attention(named_masks(256)["causal"], 4, 16, config=config)
        return sum(s.end - s.start for s in predict_timeline(plan).backward.spans if s.name == "reduce 1")

    free = CostModel(latency=0)
    half, whole, wide = (
        reduce_seconds(DistAttnConfig(overlap_config=OverlapConfig(cost_model=model), grad_wire_dtype=dtype))
        for dtype, model in (("input", free), ("float32", free), ("float32", CostModel(latency=0, element_bytes=8)))
    )
    assert (whole, wide) == (pytest.approx(2 * half), pytest.approx(4 * half))


def test_trace() -> None:
    dynamic = OverlapConfig(AttnOverlapMode.DYNAMIC, min_chunk_size=8, cost_model=CHEAP)
    plan = plan_attention(named_masks(256)["varlen causal"], 3, 16, config=DistAttnConfig(overlap_config=dynamic))
    timeline: Timeline = predict_timeline(plan)
    events = json.loads(json.dumps(chrome_trace(timeline)))["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0", "rank 1", "rank 2"}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(timeline.forward.spans) + len(timeline.backward.spans)
    for category, begin, part in (
        ("forward", 0, timeline.forward),
        ("backward", timeline.forward.seconds, timeline.backward),
    ):
        last = max(e["ts"] + e["dur"] for e in spans if e["cat"] == category)
        assert last == pytest.approx((begin + part.seconds) * 1e6)
    assert timeline.seconds * 1e6 == pytest.approx(max(e["ts"] + e["dur"] for e in spans))
