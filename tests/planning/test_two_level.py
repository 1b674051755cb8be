"""Routing in two levels: the same buffers as in one, and a row crosses to a node once."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import AttnPlan, GroupCollectivePlan, RankPlan, plan_attention, plan_new_mask
from magi_attention.planning.routing import route_stage
from magi_attention.planning.two_level import MeshShape, TwoLevelPlan, rows_across_nodes
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .test_plan_laws import check_every_cell_is_computed_once, rows_of

IN_ORDER = DispatchConfig(order="contiguous")
MESHES = [(2, 2), (2, 3), (3, 2), (4, 2), (2, 4)]


def exchange(plans: list[GroupCollectivePlan], held: list[np.ndarray]) -> list[np.ndarray]:
    """What each rank of a group receives, in the order of the wire, when rank n sends of the rows ``held[n]``."""
    wires = []
    for receiver, plan in enumerate(plans):
        arrived = []
        for sender, (other, rows) in enumerate(zip(plans, held, strict=True)):
            assert other.send_counts[receiver] == plan.recv_counts[sender]
            first = sum(other.send_counts[:receiver])
            sent = other.send_rows[first : first + other.send_counts[receiver]]
            assert not len(sent) or 0 <= sent.min() <= sent.max() < len(rows)
            arrived.append(rows[sent])
        wires.append(np.concatenate(arrived))
    return wires


class Nodes:
    """Runs one stage of a plan on all ranks at once, with the numbers of rows in the place of the rows."""

    def __init__(self, plan: AttnPlan, ranks: list[RankPlan], stage: int) -> None:
        assert plan.mesh_shape is not None
        nodes, size = plan.mesh_shape
        rails = [list(range(place, nodes * size, size)) for place in range(size)]
        inside = [list(range(node * size, (node + 1) * size)) for node in range(nodes)]
        own = [rows_of(plan.dispatch_k.runs(rank.rank)) for rank in ranks]
        levels = [rank.stages[stage].collective for rank in ranks]
        assert all(isinstance(level, TwoLevelPlan) for level in levels)
        self.node_of = [rank // size for rank in range(nodes * size)]
        self.crossed = self._exchange(rails, [level.crossing for level in levels], own)
        near = self._exchange(inside, [level.direct for level in levels], own)
        far = self._exchange(inside, [level.relay for level in levels], self.crossed)
        self.buffers = []
        for level, wire in zip(levels, map(np.concatenate, zip(near, far, strict=True)), strict=True):
            assert len(wire) == level.num_recv_rows
            order = np.arange(len(wire)) if level.recv_order is None else level.recv_order
            back = np.arange(len(wire)) if level.wire_order is None else level.wire_order
            np.testing.assert_array_equal(wire[order][back], wire)
            self.buffers.append(wire[order])

    @staticmethod
    def _exchange(
        groups: list[list[int]], plans: list[GroupCollectivePlan], held: list[np.ndarray]
    ) -> list[np.ndarray]:
        wires = [np.empty(0, int)] * len(plans)
        for group in groups:
            received = exchange([plans[rank] for rank in group], [held[rank] for rank in group])
            for rank, wire in zip(group, received, strict=True):
                wires[rank] = wire
        return wires


def check_laws(mask: AttnMask, mesh: tuple[int, int], chunk_size: int, config: DistAttnConfig) -> AttnPlan:
    flat = plan_attention(mask, mesh[0] * mesh[1], chunk_size, config=config)
    plan = flat.on_mesh(mesh)
    ranks = [plan.rank(rank) for rank in range(plan.cp_size)]
    check_every_cell_is_computed_once(mask, plan, ranks)
    crossed: list[tuple[int, int]] = []
    received: list[list[int]] = [[] for _ in ranks]
    sent = 0
    for stage in range(plan.routes.num_stages):
        nodes = Nodes(plan, ranks, stage)
        for rank, buffer in zip(ranks, nodes.buffers, strict=True):
            np.testing.assert_array_equal(buffer, rows_of(rank.stages[stage].runs))
            # It is the buffer that routing in one level would give.
            straight, runs = route_stage(plan.routes, plan.dispatch_k, rank.rank, stage)
            np.testing.assert_array_equal(buffer, rows_of(runs))
            assert straight.num_recv_rows == len(buffer)
            received[rank.rank] += buffer.tolist()
        sent += sum(rank.stages[stage].collective.num_send_rows for rank in ranks)
        crossed += [(nodes.node_of[rank], row) for rank, wire in enumerate(nodes.crossed) for row in wire.tolist()]
    # All stages together, a rank receives the rows that it would receive without nodes, each of them once.
    for rank, rows in enumerate(received):
        wanted = [rows_of(stage.runs) for stage in flat.rank(rank).stages]
        np.testing.assert_array_equal(sorted(rows), np.sort(np.concatenate([*wanted, np.empty(0, int)])))
    # A row crosses to a node once, and only if a rank of the node needs it and none has it.
    assert len(crossed) == len(set(crossed))
    owner = np.repeat(plan.dispatch_k.owner, chunk_size)
    wanted_by = {(rank // mesh[1], row) for rank, rows in enumerate(received) for row in rows}
    assert set(crossed) == {(node, row) for node, row in wanted_by if owner[row] // mesh[1] != node}
    straight = [(r, row) for r, rows in enumerate(received) for row in rows if owner[row] // mesh[1] != r // mesh[1]]
    for routes in (flat.routes, plan.routes):
        assert rows_across_nodes(routes, MeshShape(*mesh)) == (len(straight), len(crossed))
    assert sent == sum(map(len, received)) + len(crossed)
    return plan


def config_of(degree: int, min_chunk_size: int) -> DistAttnConfig:
    return DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=min_chunk_size))


@settings(max_examples=150, deadline=None)
@given(
    masks(max_seqlen=96, square=True),
    st.sampled_from(MESHES),
    st.integers(1, 12),
    st.builds(config_of, st.integers(0, 4), st.integers(1, 8)),
)
def test_laws_hold_for_generated_masks(
    mask: AttnMask, mesh: tuple[int, int], chunk_size: int, config: DistAttnConfig
) -> None:
    check_laws(mask, mesh, chunk_size, config)


@pytest.mark.parametrize("mesh", [(2, 3), (4, 4)])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_laws_hold_for_named_masks(name: str, mesh: tuple[int, int]) -> None:
    check_laws(named_masks(211)[name], mesh, 4, config_of(3, 4))


def test_a_row_that_ranks_need_in_different_stages_crosses_in_the_first() -> None:
    """Ranks 2 and 3 are one node. Of the rows of rank 0, rank 2 attends all and rank 3 the second half."""
    mask = AttnMask.from_slices([(32, 48), (48, 64)], [(0, 16), (8, 16)], "full", 64, 64)
    flat = plan_attention(mask, 4, 16, config=DistAttnConfig(IN_ORDER, OverlapConfig(degree=2, min_chunk_size=1)))
    assert [rows_of(flat.rank(2).stages[n].runs).tolist() for n in (0, 1)] == [[*range(8)], [*range(8, 16)]]
    assert [rows_of(flat.rank(3).stages[n].runs).tolist() for n in (0, 1)] == [[*range(8, 12)], [*range(12, 16)]]
    plan = flat.on_mesh((2, 2))
    assert [rows_of(plan.rank(2).stages[n].runs).tolist() for n in (0, 1)] == [[*range(12)], [*range(12, 16)]]
    assert [rows_of(plan.rank(3).stages[n].runs).tolist() for n in (0, 1)] == [[*range(8, 12)], [*range(12, 16)]]
    assert [plan.rank(0).stages[n].collective.crossing.send_counts for n in (0, 1)] == [(0, 12), (0, 4)]


def test_rows_of_the_own_node_keep_their_stages() -> None:
    """Ranks 0, 1 and 2 are one node. Of the rows of rank 0, rank 1 attends all and rank 2 the second half."""
    mask = AttnMask.from_slices([(16, 32), (32, 48)], [(0, 16), (8, 16)], "full", 96, 96)
    flat = plan_attention(mask, 6, 16, config=DistAttnConfig(IN_ORDER, OverlapConfig(degree=2, min_chunk_size=1)))
    plan = flat.on_mesh((2, 3))
    for rank in (1, 2):
        for a, b in zip(flat.rank(rank).stages, plan.rank(rank).stages, strict=True):
            np.testing.assert_array_equal(a.runs, b.runs)


def test_relays_have_the_place_of_the_owner() -> None:
    """Rows of rank 1, which has place 1, go to rank 3, even if rank 2 alone needs them."""
    mask = AttnMask.from_slices([(32, 48)], [(16, 32)], "full", 64, 64)
    plan = plan_attention(mask, 4, 16, config=DistAttnConfig(IN_ORDER)).on_mesh((2, 2))
    owner, relay, receiver = (plan.rank(rank).stages[0].collective for rank in (1, 3, 2))
    assert owner.crossing.send_counts == (0, 16) and owner.num_send_rows == 16
    assert relay.crossing.recv_counts == (16, 0) and relay.relay.send_counts == (16, 0)
    assert relay.num_recv_rows == 0 and relay.num_send_rows == 16
    assert receiver.relay.recv_counts == (0, 16) and receiver.num_recv_rows == 16


@pytest.mark.parametrize("mesh_shape", [None, (1, 4), (4, 1)])
def test_one_level_stays_as_it_is(mesh_shape: tuple[int, int] | None) -> None:
    plan = plan_attention(named_masks(64)["causal"], 4, 4)
    assert plan.on_mesh(mesh_shape) is plan


def test_no_rows_travel() -> None:
    plan = plan_attention(builders.varlen([0, 8, 16, 24, 32]), 4, 8).on_mesh((2, 2))
    assert [plan.rank(rank).stages for rank in range(4)] == [()] * 4
    assert rows_across_nodes(plan.routes, MeshShape(2, 2)) == (0, 0)


def test_another_mask_stays_on_the_mesh() -> None:
    plan = plan_attention(named_masks(64)["causal"], 4, 4).on_mesh((2, 2))
    new = plan_new_mask(named_masks(64)["full"], plan)
    assert plan_new_mask(named_masks(64)["full"], plan.rank(3)).mesh_shape == new.mesh_shape == (2, 2)
    assert isinstance(new.rank(1).stages[0].collective, TwoLevelPlan)


def test_plans_survive_pickling() -> None:
    plan = plan_attention(named_masks(203)["varlen causal"], 6, 8).on_mesh((3, 2))
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.mesh_shape == plan.mesh_shape
    for rank in range(6):
        a, b = copy.rank(rank), pickle.loads(pickle.dumps(plan.rank(rank)))
        assert a.mesh_shape == b.mesh_shape
        for x, y in zip(a.stages, b.stages, strict=True):
            for level in ("crossing", "direct", "relay"):
                p, q = getattr(x.collective, level), getattr(y.collective, level)
                np.testing.assert_array_equal(p.send_rows, q.send_rows)
                assert (p.send_counts, p.recv_counts) == (q.send_counts, q.recv_counts)


@pytest.mark.parametrize("mesh_shape", [(2, 3), (4,), (1, 2, 2), (-2, -2), (0, 4)])
def test_meshes_that_do_not_fit(mesh_shape: tuple[int, int]) -> None:
    plan = plan_attention(named_masks(64)["causal"], 4, 4)
    with pytest.raises(
        ValueError, match=r"mesh_shape must be \(nodes, ranks in a node\), with cp_size 4 as their product"
    ):
        plan.on_mesh(mesh_shape)


def test_meshes_of_no_integers() -> None:
    with pytest.raises(TypeError, match=r"mesh_shape must be an integer, got 2\.0"):
        plan_attention(named_masks(64)["causal"], 4, 4).on_mesh((2.0, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mesh_shape must be \(nodes, ranks in a node\), not 4"):
        plan_attention(named_masks(64)["causal"], 4, 4).on_mesh(4)  # type: ignore[arg-type]
