"""Dispatch in an order that keeps neighbours together."""

import dataclasses
import pickle

import numpy as np
import pytest

from magi_attention.config import DispatchConfig, DistAttnConfig, LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import AttnPlan, plan_attention
from magi_attention.planning.load_balance import imbalance
from magi_attention.planning.report import area_imbalance, report
from magi_attention.testing.mask_zoo import named_masks


def planned(order: str, cp_size: int, total: int, chunk_size: int = 4) -> AttnPlan:
    config = DistAttnConfig(DispatchConfig(order=order))  # type: ignore[arg-type]
    return plan_attention(builders.causal(total), cp_size, chunk_size, config=config)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [60, 61, 119, 120, 7])
def test_contiguous_runs_follow_each_other(cp_size: int, total: int) -> None:
    dispatch = planned("contiguous", cp_size, total).dispatch
    n = dispatch.local_seqlen
    assert [dispatch.runs(r).tolist() for r in range(cp_size)] == [[[r * n, (r + 1) * n]] for r in range(cp_size)]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_zigzag_is_a_run_and_its_mirror_image(cp_size: int, pairs: int) -> None:
    half = pairs * 4
    total = 2 * cp_size * half
    dispatch = planned("zigzag", cp_size, total).dispatch
    for rank in range(cp_size):
        rows = np.concatenate([np.arange(a, b) for a, b in dispatch.runs(rank).tolist()])
        head, tail = (
            np.arange(rank * half, (rank + 1) * half),
            np.arange(total - (rank + 1) * half, total - rank * half),
        )
        np.testing.assert_array_equal(rows, np.concatenate((head, tail)))


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("chunks_a_rank", [1, 3, 5])
def test_zigzag_with_an_odd_number_of_chunks(cp_size: int, chunks_a_rank: int) -> None:
    dispatch = planned("zigzag", cp_size, cp_size * chunks_a_rank * 4).dispatch
    runs = [np.diff(dispatch.runs(rank)).ravel() // 4 for rank in range(cp_size)]
    assert all(r.sum() == chunks_a_rank and (len(r) == 1 or abs(r[0] - r[1]) == 1) for r in runs)
    owner = dispatch.owner
    assert (np.diff(owner[: owner.argmax() + 1]) >= 0).all() and (np.diff(owner[owner.argmax() :]) <= 0).all()


def test_imbalance_is_reported() -> None:
    ranks = report(planned("contiguous", 4, 1024))
    assert area_imbalance(ranks) == pytest.approx(7 / 4, rel=0.01), "the last quarter of a triangle is 7/16 of it"
    assert area_imbalance(report(planned("zigzag", 4, 1024))) == pytest.approx(1.0, abs=1e-12)
    assert area_imbalance(report(planned("balanced", 4, 1024))) <= 1.02
    for mask in named_masks(119).values():
        plan = plan_attention(mask, 3, 4, config=DistAttnConfig(DispatchConfig(order="contiguous")))
        assert area_imbalance(report(plan)) == pytest.approx(imbalance(plan.work, plan.dispatch.owner, 3))


def test_where_nothing_is_attended_all_ranks_have_the_same() -> None:
    plan = plan_attention(AttnMask.from_slices([], [], "full", 64, 64), 4, 4)
    assert imbalance(plan.work, plan.dispatch.owner, 4) == area_imbalance(report(plan)) == 1.0


def test_order_is_part_of_the_configuration() -> None:
    default, other = DispatchConfig(), DispatchConfig(order="zigzag")
    assert default == DispatchConfig(order="balanced") != other
    assert repr(other) != repr(DispatchConfig(order="contiguous"))
    assert pickle.loads(pickle.dumps(other)) == other
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.order = "balanced"  # type: ignore[misc]


@pytest.mark.parametrize("order", ["heap", "Zigzag", None, 1])
def test_unknown_orders_are_refused(order: object) -> None:
    with pytest.raises(ValueError, match="order must be one of 'balanced', 'contiguous', 'zigzag', not"):
        DispatchConfig(order=order)  # type: ignore[arg-type]


@pytest.mark.parametrize("alg", [MinHeapDispatchAlg(), LocalityDispatchAlg(0.05)])
def test_an_alg_that_would_be_ignored_is_refused(alg: MinHeapDispatchAlg | LocalityDispatchAlg) -> None:
    with pytest.raises(ValueError, match="alg must be left out with order 'contiguous'"):
        DispatchConfig(alg, "contiguous")
