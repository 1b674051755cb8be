"""A shift planned for all ranks at once, carried out in one process."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.planning import DispatchPlan
from magi_attention.planning.roll_plan import plan_roll


@st.composite
def dispatch_plans(draw: st.DrawFn) -> DispatchPlan:
    """Any equal dealing of chunks, with padding of less or more than a chunk."""
    cp_size, chunks_a_rank, chunk_size = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    owner = draw(st.permutations(np.repeat(np.arange(cp_size), chunks_a_rank).tolist()))
    padded = len(owner) * chunk_size
    total = draw(st.integers(1, padded))
    return DispatchPlan(total, padded - total, chunk_size, cp_size, np.array(owner, np.int64))


def global_rows(dispatch: DispatchPlan, rank: int) -> np.ndarray:
    return np.concatenate([np.arange(a, b) for a, b in dispatch.runs(rank).tolist()])


@settings(max_examples=200, deadline=None)
@given(dispatch_plans(), st.integers(-40, 40))
def test_every_real_row_arrives_in_its_place_and_only_those_that_must_travel(
    dispatch: DispatchPlan, shift: int
) -> None:
    ranks = range(dispatch.cp_size)
    plans = [plan_roll(dispatch, rank, shift) for rank in ranks]
    place = [global_rows(dispatch, rank) for rank in ranks]
    for rank, plan in enumerate(plans):
        result = np.full(dispatch.local_seqlen, -1)
        result[plan.stay_to] = place[rank][plan.stay_from]
        wire = []
        for sender, theirs in enumerate(plans):
            assert theirs.send_counts[rank] == plan.recv_counts[sender]
            first = sum(theirs.send_counts[:rank])
            wire.append(place[sender][theirs.send_rows[first : first + theirs.send_counts[rank]]])
        arrived = np.concatenate(wire)
        assert not np.isin(arrived, place[rank]).any(), "a rank's own rows do not travel"
        assert plan.send_counts[rank] == 0
        assert (result[plan.recv_to] == -1).all()
        result[plan.recv_to] = arrived
        real = place[rank] < dispatch.total_seqlen
        np.testing.assert_array_equal(result[real], (place[rank][real] - shift) % dispatch.total_seqlen)
        assert (result[~real] == -1).all(), "padding receives nothing"
    travels = any(sum(plan.send_counts) for plan in plans)
    assert {plan.any_travel for plan in plans} == {travels}


@pytest.mark.parametrize(("shift", "rows"), [(1, 1), (-1, 1), (3, 3), (0, 0), (48, 0), (49, 1)])
def test_contiguous_ranks_send_their_edges_only(shift: int, rows: int) -> None:
    dispatch = DispatchPlan(48, 0, 4, 3, np.repeat(np.arange(3), 4))
    assert [len(plan_roll(dispatch, rank, shift).send_rows) for rank in range(3)] == [rows] * 3
