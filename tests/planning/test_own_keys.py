"""Which of a rank's own keys the backward pass begins with."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.config import CostModel, DistAttnConfig
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import plan_attention
from magi_attention.planning.own_keys import WINDOW, cut_own_keys, keeps_own_keys, share_before
from magi_attention.testing.strategies import masks


def test_work_is_shared_out_as_bytes_are() -> None:
    assert share_before(CostModel(element_bytes=2), 4) == 1 / 3
    assert share_before(CostModel(element_bytes=2), 2) == share_before(CostModel(element_bytes=4), 4) == 1 / 2


@settings(max_examples=50, deadline=None)
@given(masks(max_seqlen=64), st.floats(0, 1))
def test_no_other_cut_is_closer_to_the_share(mask: AttnMask, share: float) -> None:
    cut = cut_own_keys(mask.bands, mask.total_seqlen_k, share)
    cells = np.append(0, mask.to_dense().sum(axis=0).cumsum())
    assert 0 <= cut <= mask.total_seqlen_k
    assert abs(cells[cut] - share * cells[-1]) == np.abs(cells - share * cells[-1]).min()


@pytest.mark.parametrize("num_keys", [8 * WINDOW + 1, 5000])
def test_many_keys_are_cut_between_windows(num_keys: int) -> None:
    for mask in (builders.full(num_keys), builders.causal(num_keys)):
        cut = cut_own_keys(mask.bands, num_keys, 1 / 3)
        cells = mask.to_dense()[:, :cut].sum()
        assert cut % WINDOW == 0 and 0 < cut < num_keys
        assert abs(cells / mask.area - 1 / 3) < WINDOW / num_keys


def test_some_are_kept_where_it_takes_long_to_go_home() -> None:
    """A shard of 8192 tokens, 64:8 heads: 5.3 ms to compute half its cells, 0.25 ms for all rows to go home."""
    model = CostModel()
    assert keeps_own_keys(8192, 8192**2 / 2, model, 4)
    assert not keeps_own_keys(500, 8192**2 / 2, model, 4), "gone in no time"
    assert not keeps_own_keys(8192, 64 * 8192**2, model, 4), "the end of a long kernel costs more"
    assert not keeps_own_keys(0, 8192**2 / 2, model, 4)
    assert keeps_own_keys(500, 8192**2 / 2, CostModel(bandwidth=1e10), 4)
    assert not keeps_own_keys(8192, 8192**2 / 2, CostModel(stage_overhead=1.0), 4)


def test_all_ranks_know_alike() -> None:
    plan = plan_attention(builders.causal(512), 4, 16)
    assert plan.keeps_own_keys and all(plan.rank(r).keeps_own_keys for r in range(4))


def test_all_keys_come_first_where_nothing_travels() -> None:
    plan = plan_attention(builders.varlen(range(0, 513, 128)), 4, 16)
    assert plan.routes.num_stages == 0 and not plan.keeps_own_keys
    assert [plan.rank(r).own_keys_before for r in range(4)] == [128] * 4


def test_a_rank_without_work_among_its_own_keys() -> None:
    assert cut_own_keys(builders.full(8).bands[:0], 8, 1 / 3) == 0
    assert cut_own_keys(builders.full(8).bands[:0], 0, 1 / 3) == 0


def test_gradients_in_the_type_of_the_input() -> None:
    """They take half the time, so that more is done before them."""
    before = [
        plan_attention(builders.full(512), 2, 16, config=DistAttnConfig(grad_wire_dtype=dtype)).rank(0).own_keys_before
        for dtype in ("float32", "input")
    ]
    assert before == [85, 128]
