"""Keys of masks that are values already."""

import pytest
import torch
import torch.distributed as dist

from magi_attention.api import calc_attn, dispatch, magi_attn_flex_key, magi_attn_mask_key, undispatch
from magi_attention.mask import builders
from magi_attention.planning import plan_attention
from magi_attention.testing.rank_pool import RankPool

CU_SEQLENS = [0, 100, 256]
MASKS = {
    "window": builders.sliding_window(CU_SEQLENS, (9, 0)),
    "global window": builders.global_sliding_window(CU_SEQLENS, (9, 0), 4, causal=True),
    "prefix tree": builders.prefix_tree([(-1, 56), (0, 100), (1, 100)]),
}


def attend_three_ways(rank: int, group: dist.ProcessGroup, name: str) -> list[torch.Tensor]:
    """With the mask, with a plan of it made ahead, and spelled in slices."""
    mask = MASKS[name]
    plan = plan_attention(mask, group.size(), chunk_size=16)
    x = torch.randn(256, 2, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for key in (
        magi_attn_mask_key(mask, 0, 16, group),
        magi_attn_mask_key(mask, 0, 16, group, plan=plan.rank(rank)),
        magi_attn_flex_key(*mask.to_ranges(), 256, 256, 0, 16, group),
    ):
        local = dispatch(x, key)
        results.append(undispatch(calc_attn(local, local, local, key)[0], key))
    return results


@pytest.mark.parametrize("name", sorted(MASKS))
def test_the_same_attention_as_with_slices(rank_pool: RankPool, name: str) -> None:
    for by_mask, planned, by_slices in rank_pool.run(attend_three_ways, 2, name):
        assert torch.equal(by_mask, planned)
        torch.testing.assert_close(by_mask, by_slices)


def test_what_is_refused(local_group: dist.ProcessGroup) -> None:
    mask = MASKS["window"]
    with pytest.raises(TypeError, match="mask must be an AttnMask, as the builders make, not"):
        magi_attn_mask_key(mask.to_dense(), 0, 16, local_group)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="magi_attn_mask_key takes the very mask of a plan"):
        magi_attn_flex_key(*mask.to_ranges(), 256, 256, 0, 16, local_group, plan=plan_attention(mask, 1, 16))
