"""The emulation of many GPUs: what it records, counts and models, and whole runs without a GPU."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import CostModel, DispatchConfig, DistAttnConfig, MinHeapDispatchAlg, OverlapConfig
from magi_attention.kernels import reference
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import builders
from magi_attention.mask.bands import area, ranges_to_indices
from magi_attention.planning import AttnPlan, plan_attention
from magi_attention.planning.joining import join_first_stage

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import attention_cases
import cp_results
import emulate_scale
import plot_scale
import scale_case
import scale_costs as costs
import scale_loop as loop
import scale_masks as masks
import scale_network as network
import scale_plans as plans
import scale_record as record
import scale_results as results
import scale_rivals as rivals
import scaling_table

FORWARD, BACKWARD = costs.FORWARD, costs.BACKWARD
HEADS = loop.Heads(4, 2, 8)
FREE = network.Link(0.0, math.inf)


def make_plan(
    lengths: list[int], cp_size: int, degree: int = 1, chunk_size: int = 8, cost_model: CostModel | None = None
) -> AttnPlan:
    """A plan of causal documents."""
    mask = builders.varlen(builders.cu_seqlens_from_lengths(lengths), causal=True)
    overlap = OverlapConfig(degree=degree, min_chunk_size=1, cost_model=cost_model or CostModel())
    return plan_attention(mask, cp_size, chunk_size, config=DistAttnConfig(overlap_config=overlap))


def some_lengths(total: int, seed: int) -> list[int]:
    """Lengths that fill so many tokens, most of them short."""
    rng, lengths = np.random.default_rng(seed), []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, 1 + int(rng.exponential(total / 6))))
    return lengths


# Packs


def test_packs_are_those_of_the_published_benchmark() -> None:
    total = 1 << 23
    packs = masks.sample_packs(total, 3)
    assert all(cu[0] == 0 and cu[-1] == total and (np.diff(cu) > 0).all() for cu in packs)
    lengths = np.concatenate([np.diff(cu)[:-1] for cu in packs])
    assert set(lengths) == set(masks.LENGTHS)
    shares = np.array([(lengths == n).mean() for n in masks.LENGTHS])
    expected = np.array(masks.PERCENTAGES) / sum(masks.PERCENTAGES)
    assert np.abs(shares - expected).max() < 0.015 and np.corrcoef(shares, expected)[0, 1] > 0.99


@pytest.mark.parametrize("total", [512, 1 << 16])
def test_long_documents_are_split_into_quarters(total: int) -> None:
    lengths = np.concatenate([np.diff(cu) for cu in masks.sample_packs(total, 20)])
    assert lengths.max() == total // 4
    other = masks.sample_packs(total, 20, seed=1)
    assert not all(np.array_equal(a, b) for a, b in zip(masks.sample_packs(total, 20), other, strict=True))


@pytest.mark.parametrize("kind", masks.MASKS)
def test_masks_have_the_length_of_their_packs(kind: str) -> None:
    packs = masks.make_packs(kind, 4096, 3)
    assert len(packs) == (3 if masks.MASKS[kind].packed else 1)
    for cu in packs:
        mask = masks.MASKS[kind].make(cu)
        assert mask.total_seqlen_q == mask.total_seqlen_k == 4096 and mask.area > 0


# What is recorded


class SetClock:
    """A clock that the test sets."""

    time = 0.0

    def begin(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_recorder_leaves_out_what_it_is_told_to() -> None:
    clock = SetClock()
    recorder = record.Recorder(clock)
    clock.time = 1.0
    recorder.end_step("rows")
    number = recorder.send()
    clock.time = 5.0
    recorder.skip()
    clock.time = 7.0
    recorder.end_step("attend")
    recorder.wait(number)
    clock.time = 7.5
    recorder.end_step("attend")
    assert recorder.steps == [
        record.Step("rows"),
        record.Step("send"),
        record.Step("attend"),
        record.Step("wait"),
        record.Step("attend", 1),
    ]
    assert recorder.seconds() == [1.0, 0.0, 2.0, 0.0, 0.5]


@pytest.mark.parametrize("num_stages", [0, 1, 2, 3, 5])
def test_loop_sends_and_attends_every_stage(num_stages: int) -> None:
    forward, backward = loop.loop_of(num_stages)
    assert [(t.stage, t.homeward) for t in forward.transfers] == [(n, False) for n in range(num_stages)]
    assert sorted((t.homeward, t.stage) for t in backward.transfers) == [
        (homeward, n) for homeward in (False, True) for n in range(num_stages)
    ]
    assert {t.itemsize for t in forward.transfers} <= {2}
    assert {t.itemsize for t in backward.transfers if t.homeward} <= {4}
    assert {t.itemsize for t in loop.loop_of(num_stages, "input")[BACKWARD].transfers} <= {2}
    for way in (forward, backward):
        attended = [step.number for step in way.steps if step.kind == "attend"]
        assert attended == list(range(num_stages + 1))
        sent = [step.number for step in way.steps if step.kind == "send"]
        assert sent == list(range(len(way.transfers)))
        assert sorted({step.number for step in way.steps if step.kind == "wait"}) == sent


def test_stages_travel_while_others_are_attended() -> None:
    forward, _ = loop.loop_of(2)
    order = [(step.kind, step.number) for step in forward.steps if step.kind != "rows"]
    assert order == [
        *(("send", 0), ("attend", 0), ("send", 1), ("wait", 0), ("attend", 1), ("wait", 1), ("attend", 2)),
    ]


@pytest.mark.parametrize("degree", [1, 2])
def test_ranks_take_the_steps_of_the_toy_problem(degree: int) -> None:
    plan = make_plan([70, 3, 40, 15], cp_size=4, degree=degree)
    bench = loop.Bench(reference, AttnParams(0.3), torch.device("cpu"), record.HostClock())
    for rank in range(4):
        passes = loop.measure_rank(bench, plan.rank(rank), HEADS, seconds=0.0, one_host=True)
        for measured, expected in zip(passes, loop.loop_of(plan.routes.num_stages), strict=True):
            assert measured.steps == expected.steps
            assert measured.whole > 0 and 0 < measured.attend <= sum(measured.seconds)
            still = [s for step, s in zip(measured.steps, measured.seconds, strict=True) if step.kind in "send wait"]
            assert not any(still)


# The replay


def test_own_keys_fill_the_time_of_transfers() -> None:
    """Five seconds of own keys: three until rows arrive, the rest while others go home, which takes longer."""
    kinds = [
        ("send", 0),
        ("whole", 0),
        ("attend", 0),
        ("wait", 0),
        ("attend", 1),
        ("send", 1),
        ("whole", 1),
        ("wait", 1),
    ]
    steps = [record.Step(*kind) for kind in kinds]
    seconds = np.array([[0.0], [1.0], [5.0], [0.0], [2.0], [0.0], [0.5], [0.0]])
    for fills, end, waited in ((True, 11.0, 2.5), (False, 13.0, 4.5)):
        clock, waits = loop.replay(steps, seconds, [4.0, 5.0], fills)
        assert (clock.tolist(), waits.tolist()) == ([end], [waited])
    # A rank that computes with them at once is five seconds late for the second transfer, and both wait for it.
    clock, waits = loop.replay(steps, seconds.repeat(2, axis=1), [4.0, 5.0], np.array([True, False]))
    assert (clock.tolist(), waits.tolist()) == ([13.0, 13.0], [4.5, 4.5])


def test_attention_takes_what_is_left_of_the_whole() -> None:
    steps = tuple(record.Step(*kind) for kind in (("whole", 0), ("attend", 0), ("attend", 1), ("rows", 0)))
    assert loop.Pass(steps, (1.0, 4.0, 2.0, 0.5), whole=4.5).seconds_in_whole == (1.0, 2.0, 1.0, 0.5)
    assert loop.Pass(steps, (1.0, 4.0, 2.0, 0.5), whole=0.0).seconds_in_whole == (1.0, 4.0, 2.0, 0.5)


def test_replay_of_a_transfer_beside_work() -> None:
    steps = [record.Step(kind) for kind in ("rows", "send", "attend", "wait", "rows")]
    seconds = np.array([[1.0, 2.0], [0, 0], [3.0, 1.0], [0, 0], [0.5, 0.5]])
    total, waited = loop.replay(steps, seconds, [2.5])  # begins at 2, when both are there, and ends at 4.5
    np.testing.assert_allclose(total, [5.0, 5.0])
    np.testing.assert_allclose(waited, [0.5, 1.5])
    total, waited = loop.replay(steps, seconds, [0.0])
    np.testing.assert_allclose(total, [4.5, 3.5])
    assert not waited.any()


def test_transfers_follow_each_other() -> None:
    steps = [record.Step("send", 0), record.Step("send", 1), record.Step("wait", 1), record.Step("wait", 0)]
    total, waited = loop.replay(steps, np.zeros((4, 3)), [2.0, 3.0])
    np.testing.assert_allclose(total, 5.0)
    np.testing.assert_allclose(waited, 5.0)


# The network


def test_link_goes_through_exact_points() -> None:
    link = network.Link.fit([(n, 2e-5 + n / 3e11) for n in (1e6, 1e7, 1e8)])
    assert link.latency == pytest.approx(2e-5) and link.bandwidth == pytest.approx(3e11)
    assert link.seconds(0.0) == 0
    fitted = network.Link.fit(network.NVLINK_POINTS)
    for size, seconds in network.NVLINK_POINTS:
        assert fitted.seconds(size) == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("points", [[(1, 1)], [(1, 1), (1, 2)], [(1, 2), (2, 1)]])
def test_link_refuses_points_that_fix_none(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="points must"):
        network.Link.fit(points)


@given(seed=st.integers(0, 99), degree=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_traffic_is_what_a_count_of_rows_gives(seed: int, degree: int) -> None:
    cp_size, node = 8, 2
    plan = make_plan(some_lengths(256, seed), cp_size, degree)
    for stage in range(plan.routes.num_stages):
        across_out, across_in, inside_out, inside_in, handed_out, handed_in, packed = np.zeros((7, cp_size), int)
        crossed: set[tuple[int, int]] = set()
        once_out, once_in = np.zeros((2, cp_size), int)
        now = plan.routes.stage == stage
        routes = zip(*(x[now].tolist() for x in (plan.routes.owner, plan.routes.receiver)), strict=True)
        spans = zip(plan.routes.start[now].tolist(), plan.routes.end[now].tolist(), strict=True)
        for (owner, receiver), (start, end) in zip(routes, spans, strict=True):
            for row in range(start, end):
                if owner // node == receiver // node:
                    inside_out[owner] += 1
                    inside_in[receiver] += 1
                    continue
                across_out[owner] += 1
                across_in[receiver] += 1
                relay = receiver // node * node + owner % node
                packed[relay] += 1
                if relay != receiver:
                    handed_out[relay] += 1
                    handed_in[receiver] += 1
                if (row, receiver // node) not in crossed:
                    crossed.add((row, receiver // node))
                    once_out[owner] += 1
                    once_in[relay] += 1
        flat = network.traffic(plan.routes, cp_size, stage, node, two_level=False)
        np.testing.assert_array_equal(flat.across, np.maximum(across_out, across_in))
        np.testing.assert_array_equal(flat.inside, np.maximum(inside_out, inside_in))
        assert not flat.packed.any() and not flat.spread.any()
        two_level = network.traffic(plan.routes, cp_size, stage, node, two_level=True)
        np.testing.assert_array_equal(two_level.across, np.maximum(once_out, once_in))
        np.testing.assert_array_equal(two_level.inside, flat.inside)
        np.testing.assert_array_equal(two_level.packed, packed)
        np.testing.assert_array_equal(two_level.spread, np.maximum(handed_out, handed_in))


def test_two_levels_are_those_of_the_library() -> None:
    plan = make_plan(some_lengths(256, seed=3), cp_size=8, degree=2).on_mesh((4, 2))
    for stage in range(plan.routes.num_stages):
        traffic = network.traffic(plan.routes, 8, stage, 2, two_level=True)
        for rank in range(8):
            routing = plan.rank(rank).stages[stage].collective
            crossing = routing.crossing
            assert traffic.across[rank] == max(crossing.num_send_rows, crossing.num_recv_rows)
            assert traffic.packed[rank] == routing.relay.num_send_rows


def test_seconds_of_collectives() -> None:
    net = network.Network(4, inside=network.Link(1.0, 10.0), across=network.Link(2.0, 5.0), packing=FREE)
    assert net.exchange(80.0, 4) == 1 + 60 / 10
    assert net.exchange(80.0, 8) == max(1 + 30 / 10, 2 + 40 / 5)
    packed = replace(net, packing=network.Link(3.0, 20.0))
    assert packed.exchange(80.0, 4) == 1 + 60 / 10 + 3 + 80 / 20 and packed.exchange(80.0, 1) == 0
    assert net.all_gather(10.0, 4) == 1 + 30 / 10
    assert net.all_gather(10.0, 8) == max(1 + 70 / 10, 2 + 10 / 5)
    assert net.ring_step(10.0, 4) == 1 + 1 and net.ring_step(10.0, 8) == 2 + 2
    with pytest.raises(ValueError, match="fill nodes of 4 GPUs, got 6"):
        net.num_nodes(6)


# Work and costs


@pytest.mark.parametrize("degree", [1, 3])
def test_work_is_counted_for_every_rank(degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "TILE", 4)
    plan = make_plan(some_lengths(256, seed=5), cp_size=4, degree=degree)
    work = plans.Work.of(plan, one_host=True)
    dense = plan.mask.to_dense()
    assert work.area.sum() == plan.mask.area
    for rank in range(4):
        part = plan.rank(rank)
        assert work.area[rank] == part.area
        assert work.received[:, rank].tolist() == [stage.collective.num_recv_rows for stage in part.stages]
        assert work.sent[:, rank].tolist() == [stage.collective.num_send_rows for stage in part.stages]
        runs = plan.dispatch.runs(rank)
        rows = dense[ranges_to_indices(runs[:, 0], runs[:, 1] - runs[:, 0])]
        assert work.tiles[rank] == rows.reshape(len(rows) // 4, 4, -1, 4).any(axis=(1, 3)).sum()


@pytest.mark.parametrize("degree", [1, 3])
def test_forward_work_is_about_what_ranks_do_where_queries_wait(degree: int) -> None:
    instant = CostModel(bandwidth=1e30, latency=0.0)  # so that queries wait in short sequences, too
    plan = make_plan(some_lengths(8192, seed=5), cp_size=4, degree=degree, chunk_size=256, cost_model=instant)
    work = plans.Work.of(plan, one_host=True)
    own = []
    for rank in map(plan.rank, range(4)):
        joined = join_first_stage(rank, one_host=True)
        own.append(area(rank.local_bands if joined is None else joined.early).sum())
    assert (work.forward_areas.sum(axis=0) == work.area).all()
    assert (work.forward_areas[0] < work.part_areas[0]).any()
    without_waiting, estimated = (areas[0].sum() - sum(own) for areas in (work.part_areas, work.forward_areas))
    assert abs(estimated) < abs(without_waiting) / 2


def test_heaviest_ranks_are_sampled_first() -> None:
    area, received = np.array([[5, 9, 5, 1]]), np.array([[2, 1, 3, 8]])
    work = plans.Work(area, area, np.array([7, 2, 1, 1]), received, received)
    assert list(work.sample(3).items()) == [(1, "most area"), (3, "most rows"), (0, "most tiles")]
    assert set(work.sample(9)) == {0, 1, 2, 3}


def test_least_squares_finds_what_made_the_times() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(1, 1e6, (12, 4))
    true = np.array([1e-6, 0.0, 3e-7, 0.0])
    np.testing.assert_allclose(costs.least_squares(features, features @ true), true, rtol=1e-6, atol=1e-15)
    negative = features @ np.array([2e-6, -1e-7, 0, 0])
    assert (costs.least_squares(features, negative) >= 0).all()
    assert costs.least_squares(features[:1], np.array([1.0])) @ features[0] == pytest.approx(1.0)


def measured_ranks(plan: AttnPlan, rates: costs.Costs) -> list[costs.Measured]:
    """Ranks that took as long as the costs say."""
    work, loops = plans.Work.of(plan, one_host=True), loop.loop_of(plan.routes.num_stages)
    rows = plan.dispatch.local_seqlen
    amounts = costs.Amounts.of(work, HEADS, rows)
    seconds = [costs.step_seconds(loops[way], way, work, amounts, rates) for way in (FORWARD, BACKWARD)]
    ranks = []
    for rank in range(plan.cp_size):
        passes = (loop.Pass(loops[way].steps, tuple(seconds[way][:, rank]), 0.0) for way in (FORWARD, BACKWARD))
        moved = (tuple(x[:, rank].tolist()) for x in (work.received, work.sent))
        ranks.append(costs.Measured(rows, HEADS, int(work.area[rank]), int(work.tiles[rank]), *moved, tuple(passes)))
    return ranks


def test_fit_predicts_what_follows_its_form() -> None:
    rates = costs.Rates(forward=3e12, backward=2e12, memory=1e10)
    plan, other = (make_plan(some_lengths(512, seed), cp_size=8, degree=2) for seed in (1, 2))
    fit = costs.Fit.to(measured_ranks(plan, rates), [loop.loop_of(plan.routes.num_stages)] * 8)
    assert all(error < 1e-6 for way in fit.error for error in way)
    work = plans.Work.of(other, one_host=True)
    amounts = costs.Amounts.of(work, HEADS, other.dispatch.local_seqlen)
    loops = loop.loop_of(other.routes.num_stages)
    for way in (FORWARD, BACKWARD):
        expected = costs.step_seconds(loops[way], way, work, amounts, rates)
        np.testing.assert_allclose(costs.step_seconds(loops[way], way, work, amounts, fit), expected, rtol=1e-5)


def test_steps_of_a_rank_add_up() -> None:
    """All rows that travel are packed and unpacked once each way, and all cells attended once."""
    plan = make_plan(some_lengths(512, seed=1), cp_size=8, degree=3)
    work, loops = plans.Work.of(plan, one_host=True), loop.loop_of(plan.routes.num_stages)
    amounts = costs.Amounts.of(work, HEADS, plan.dispatch.local_seqlen)
    rates = costs.Rates(1e12, 1e12, 1e9)
    received, sent = work.received.sum(axis=0), work.sent.sum(axis=0)
    for way, cast_bytes, home_bytes in ((FORWARD, 2, 0), (BACKWARD, 2, 4)):
        packed, unpacked = costs.moved_bytes(loops[way], HEADS, work.received, work.sent)
        elements = cast_bytes * sent + home_bytes * received, cast_bytes * received + home_bytes * sent
        np.testing.assert_array_equal(packed.sum(axis=0), HEADS.row_elements * elements[0])
        np.testing.assert_array_equal(unpacked.sum(axis=0), HEADS.row_elements * elements[1])
        seconds = costs.step_seconds(loops[way], way, work, amounts, rates)
        kinds = np.array([step.kind for step in loops[way].steps])
        np.testing.assert_allclose(
            seconds[kinds == "attend"].sum(axis=0), costs.flops(1, HEADS, way) * work.area / 1e12
        )
        moved = (packed + unpacked).sum(axis=0)
        np.testing.assert_allclose(seconds[kinds == "rows"].sum(axis=0), 2 * moved / 1e9)
        elements = plan.dispatch.local_seqlen * HEADS.q * HEADS.dim
        np.testing.assert_allclose(seconds[kinds == "whole"].sum(axis=0), (0, 14)[way] * elements / 1e9)


# Our method and others


def problem(**changes: object) -> scale_case.Problem:
    """Small sizes, and a network that takes no time."""
    free = network.Network(4, FREE, FREE, FREE)
    return replace(scale_case.Problem(64, HEADS, free, 8, degrees=(1,), num_packs=2), **changes)


@pytest.mark.parametrize("method", [results.OURS, results.HEADS_IN_NODES])
def test_speed_is_that_of_the_kernels_where_nothing_else_takes_time(method: str) -> None:
    case = scale_case.Case(problem(), "causal", method, 8)
    case.plan()
    rates = costs.Rates(forward=3e12, backward=2e12, memory=math.inf)
    (planned,) = case.planned
    for modelled in case.model(rates, "given"):
        assert modelled.forward == pytest.approx(3 / planned.imbalance)
        assert modelled.backward == pytest.approx(2 / planned.imbalance)
        assert modelled.forward_waits == pytest.approx(0, abs=0.02)


def test_fewer_rows_are_faster() -> None:
    """The speed is lower the slower the network, and with two levels higher where nodes are far apart."""
    slow = network.Network(4, network.Link(0, 1e12), network.Link(0, 1e9))
    case = scale_case.Case(problem(network=slow), "varlen causal", results.OURS, 16)
    case.plan()
    speeds = {m.transport: m for m in case.model(costs.Rates(1e12, 1e12, 1e15), "given")}
    flat, two_level, none = (speeds[name] for name in results.TRANSPORTS)
    assert flat.forward < two_level.forward < none.forward
    assert flat.backward < two_level.backward < none.backward
    assert flat.forward_waits > two_level.forward_waits > none.forward_waits == 0
    assert all(p.across_two_level < p.across_flat for p in case.planned)


def test_measured_ranks_take_as_long_as_measured() -> None:
    case = scale_case.Case(problem(), "varlen causal", results.OURS, 4)
    case.plan()
    rates = costs.Rates(1e12, 1e12, 1e12)
    before = case.model(rates, "given")[0]
    rank = measured_ranks(case.packs[0].plan, costs.Rates(1e9, 1e9, 1e12))[2]
    case.measured[0, 2] = rank
    after = case.model(rates, "given")[0]
    slow = sum(rank.passes[FORWARD].seconds)
    assert after.forward < before.forward / 10
    assert case.packs[0].seconds(results.FLAT, FORWARD, rates, {2: rank})[0][2] >= slow


def test_own_keys_fill_on_the_ranks_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the backward pass only."""
    fills = []
    monkeypatch.setattr(scale_case, "replay", lambda *args: fills.append(args[3].tolist()) or (np.zeros(4),) * 2)
    case = scale_case.Case(problem(), "varlen causal", results.OURS, 4)
    case.plan()
    fills.clear()
    for way in (FORWARD, BACKWARD):
        case.packs[0].seconds(results.FLAT, way, costs.Rates(1e12, 1e12, 1e12), {})
    assert (
        fills == [[False] * 4, case.packs[0].plan.own_keys_fill.tolist()] == [[False] * 4, [False, True, True, False]]
    )


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_zigzag_gives_every_row_to_one_rank(ranks: int) -> None:
    cu = builders.cu_seqlens_from_lengths([100, 1, 7, 160, 48])
    runs = [rivals.zigzag_runs(cu, ranks, rank) for rank in range(ranks)]
    assert all((r[1:, 0] >= r[:-1, 1]).all() for r in runs)
    rows = np.concatenate([ranges_to_indices(r[:, 0], r[:, 1] - r[:, 0]) for r in runs])
    np.testing.assert_array_equal(np.sort(rows), np.arange(cu[-1]))


def test_shards_of_rivals_hold_an_even_share() -> None:
    cu = builders.cu_seqlens_from_lengths([300, 500, 224])
    mask = builders.varlen(cu, causal=True)
    setting = rivals.Setting(8, 128, loop.Heads(8, 2, 8), network.Network(4, FREE, FREE, FREE), mask.area)
    ulysses, gather, usp = (rivals.shard_of(rival, mask, cu, setting) for rival in ("Ulysses", "all-gather", "USP"))
    assert (ulysses.area, ulysses.heads) == (mask.area, loop.Heads(1, 1, 8))
    assert gather.area == pytest.approx(mask.area / 8, rel=0.05) and gather.heads == setting.heads
    assert usp.area == pytest.approx(mask.area / 2, rel=0.05) and usp.heads == loop.Heads(2, 1, 8)
    assert rivals.shard_of("Ulysses", mask, cu, replace(setting, cp_size=16)) is None


@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_rivals_reach_the_rate_of_kernels_without_a_network(rival: str) -> None:
    setting = rivals.Setting(8, 128, HEADS, network.Network(4, FREE, FREE, FREE), area=800)
    seconds = rivals.model_seconds(rival, setting, (2e9, 1e9))
    if rival == "Ulysses":
        assert seconds is None  # 8 ranks, 4 heads
        seconds = rivals.model_seconds(rival, replace(setting, heads=loop.Heads(8, 2, 4)), (2e9, 1e9))
    assert seconds == pytest.approx((4 * 100 * 32 / 2e9, 10 * 100 * 32 / 1e9))


def test_rivals_send_what_they_must() -> None:
    net = network.Network(4, network.Link(0, 1e9), network.Link(0, 1e9), packing=network.Link(0, 1e10))
    setting = rivals.Setting(4, 128, loop.Heads(8, 2, 16), net, area=1)
    queries, keys = 128 * 8 * 16 * 2, 128 * 2 * 16 * 2 * 2
    fast = (1e30, 1e30)
    np.testing.assert_allclose(rivals.model_seconds("ring", setting, fast), (3 * keys / 1e9, 3 * 3 * keys / 1e9))
    np.testing.assert_allclose(rivals.model_seconds("all-gather", setting, fast), (3 * keys / 1e9, 9 * keys / 1e9))
    copied = 2 * keys  # two key heads for four ranks
    exchanged = (2 * queries + copied) * (3 / 4 / 1e9 + 1 / 1e10)
    np.testing.assert_allclose(rivals.model_seconds("Ulysses", setting, fast), (exchanged, exchanged))
    np.testing.assert_allclose(rivals.model_seconds("USP", setting, fast), (exchanged, exchanged))


# Beside measured numbers


@pytest.mark.parametrize("kind", attention_cases.PUBLISHED_KINDS)
def test_what_is_emulated_first_is_what_bench_cp_measures(kind: str) -> None:
    total = 1 << 15
    (cu_seqlens,) = masks.make_packs(kind, total, 1)
    assert attention_cases.make_case(f"published {kind}", total).mask == masks.MASKS[kind].make(cu_seqlens)


def test_predictions_beside_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = cp_results.Report({}, ["magi"], [])
    measured.transfers.append(cp_results.Transfer(1 << 20, 2.0, 1.5))
    outcomes = {"magi": cp_results.Outcome(forward_ms=1.0, backward_ms=5.0)}  # 500 and 250 TFLOP/s
    for mask, tokens in (("published varlen causal", 4 << 13), ("causal", 4 << 13), ("causal", 4 << 15)):
        measured.results.append(cp_results.Result(mask, tokens, 4, 64, 8, 128, 4 * 500 * 10**9, outcomes))
    emulated = results.Report({"tokens a GPU": "8192"})
    for mask, gpus, speeds in (("varlen causal", 4, (600, 225)), ("causal", 8, (1, 1))):
        emulated.modelled.append(
            results.Modelled(mask, results.OURS, results.FLAT, gpus, *speeds, 0.0, 0.0, "measured")
        )
    for report, name in ((measured, "measured"), (emulated, "emulated")):
        (tmp_path / name).mkdir()
        report.save(tmp_path / name)
    paths = [str(tmp_path / name / "results.json") for name in ("measured", "emulated")]
    scaling_table.main([*paths, "--links", str(tmp_path / "links.json")])
    text = capsys.readouterr().out
    assert "| varlen causal | 8k | 4 | magi | 500 / 250 | 600 / 225 | +20 / -10 |" in text
    assert "magi: median and largest error 20 and 20 % forward, 10 and 10 % backward." in text
    assert text.count("| magi |") == 1, "other sizes were not measured or not emulated"
    assert json.loads((tmp_path / "links.json").read_text()) == [[3 << 20, 0.002]]


# Whole runs

SMALL = ["--tokens", "64", "--chunk-size", "8", "--heads", "4:2", "--head-dim", "8", "--gpus-per-node", "2"]


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> results.Report:
    monkeypatch.setattr(sys, "argv", ["emulate_scale.py", *SMALL, "--out", str(out), *options])
    emulate_scale.main()
    return results.Report.load(out / "results.json")


def speeds(report: results.Report) -> list[tuple[str, int, float, float]]:
    return [(m.name, m.cp_size, m.forward, m.backward) for m in report.modelled]


def test_run_at_given_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    masks_and_sizes = ["--masks", "varlen causal", "causal", "--cp-sizes", "2", "8", "--packs", "2"]
    report = run(monkeypatch, tmp_path, "--rates", "forward=0.3,backward=0.2", *masks_and_sizes)
    assert not report.measured and not report.kernel_rates and not report.fit_errors
    assert {m.kernels for m in report.modelled} == {"given: 0.3 / 0.2 TFLOP/s"}
    assert {(m.mask, m.cp_size) for m in report.modelled} == {
        (mask, size) for mask in ("varlen causal", "causal") for size in (2, 8)
    }
    assert {m.method for m in report.modelled} == {results.OURS, results.HEADS_IN_NODES, *rivals.RIVALS}
    assert all(0 < m.forward <= 0.3001 and 0 < m.backward <= 0.2001 for m in report.modelled)
    assert len(report.planned) == 2 * 2 * (2 + 1)
    text = (tmp_path / "results.md").read_text()
    assert "## What is measured, what is modelled" in text and "*published: MagiAttention, native transport*" in text
    assert "459 / 361" in text
    plot_scale.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_run_on_a_cpu_and_its_times_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = ["--masks", "varlen causal", "--cp-sizes", "4", "--packs", "2", "--methods", "USP", "ring"]
    report = run(monkeypatch, tmp_path / "first", *sizes, "--device", "cpu", "--seconds", "0")
    assert len(report.measured) == 6 and not any(r.failure for r in report.measured)
    assert {r.rival for r in report.kernel_rates} == {"USP", "all-gather"}
    assert {m.kernels for m in report.modelled if m.method == results.OURS} == {"measured and fitted"}
    assert report.fit_errors[0].num_ranks == 6
    reuse = ["--reuse", str(tmp_path / "first" / "results.json")]
    again = run(monkeypatch, tmp_path / "second", *sizes, *reuse)
    assert again.measured == report.measured
    assert speeds(again) == speeds(report)
    other_heads = run(monkeypatch, tmp_path / "other", *sizes, *reuse, "--heads", "6:3")
    assert not other_heads.measured
    # Another network changes what is modelled, and no time of a rank.
    (tmp_path / "links.json").write_text(json.dumps([[1e3, 1.0], [1e6, 2.0]]))
    links = ["--links", str(tmp_path / "links.json"), "--degrees", "1"]
    slow = run(monkeypatch, tmp_path / "third", *sizes, *reuse, *links)
    assert slow.modelled[0].name == report.modelled[0].name == "ours, all-to-all"
    assert slow.modelled[0].forward < report.modelled[0].forward / 2


def test_spent_budget_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = run(monkeypatch, tmp_path, "--device", "cpu", "--budget", "0", "--cp-sizes", "2", "--packs", "1")
    assert not report.measured and report.modelled[0].kernels == "given: 600 / 480 TFLOP/s"


def test_rank_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure, calls = loop.measure_rank, []

    def fails_at_first(*args: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError("\nfull\nand a long trace")
        return measure(*args)

    monkeypatch.setattr("scale_run.measure_rank", fails_at_first)
    options = ["--device", "cpu", "--seconds", "0", "--cp-sizes", "2", "--packs", "1", "--methods", "ours"]
    report = run(monkeypatch, tmp_path, *options)
    assert [r.failure for r in report.measured] == ["MemoryError: full", ""]
    assert "not measured: varlen causal, ours, 2 GPUs, rank" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cp-sizes", "1"], "--cp-sizes must be at least 2"),
        (["--cp-sizes", "12"], "fill nodes of 8 GPUs, got [12]"),
        (["--degrees", "0", "2"], "--degrees must be at least 1"),
        (["--chunk-size", "3000"], "--tokens must be a multiple of --chunk-size 3000, got 8192"),
        (["--heads", "64:7"], "argument --heads"),
        (["--rates", "sideways=3"], "argument --rates"),
        (["--rates", "forward=3", "--reuse", "x"], "--rates and --reuse exclude each other"),
    ],
)
def test_options_that_make_no_sense(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        emulate_scale.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_options() -> None:
    rates = ["--rates", "forward=600,backward=480"]
    args = emulate_scale.parse_arguments([*rates, "--dispatch", "heap", "--methods", "USP"])
    assert args.rates == costs.Rates(600e12, 480e12, 2000e9) and args.methods == [results.OURS, "USP"]
    made = emulate_scale.make_problem(args)
    assert made.config(2).dispatch_config == DispatchConfig(alg=MinHeapDispatchAlg())
    assert made.heads == loop.Heads(64, 8, 128) and made.network.gpus_per_node == 8
    assert emulate_scale.make_bench(args) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        run(monkeypatch, tmp_path)
