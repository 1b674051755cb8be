"""Cross-attention equals dense attention: keys and values are another tensor with ranks of their own."""

import pickle

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention import api
from magi_attention.api import (
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
    Sources,
    calc_attn,
    compute_pad_size,
    dispatch,
    get_position_ids,
    magi_attn_flex_key,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    plan_attention,
    plan_new_mask,
    undispatch,
)
from magi_attention.mask import AttnMask, builders
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.dense_oracle import dense_attention
from magi_attention.testing.rank_pool import RankPool
from magi_attention.testing.strategies import masks

from .attention_on_ranks import Problem, Result, attend, attend_densely, attend_on_ranks, make_key
from .test_hierarchy import mesh_of

CROSS = Sources(is_same_source=False)
STAGED = DistAttnConfig(overlap_config=OverlapConfig(degree=3, min_chunk_size=5))
CU_Q, CU_K = [0, 10, 37], [0, 3, 21]


def check_fp64(pool: RankPool, size: int, problem: Problem) -> None:
    compare(attend_on_ranks(pool, size, problem), attend_densely(problem))


def compare(ours: Result, oracle: Result) -> None:
    for (name, actual), (_, expected) in zip(ours.items(), oracle.items(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40, deadline=None)
@given(
    mask=masks(max_seqlen=70),
    size=st.sampled_from([1, 2, 3]),
    chunk_size=st.integers(1, 9),
    overlap=st.builds(OverlapConfig, degree=st.integers(0, 3), min_chunk_size=st.just(3)),
    uneven=st.booleans(),
    sources=st.builds(Sources, st.just(False), st.booleans(), st.booleans()),
)
def test_generated_masks(
    rank_pool: RankPool,
    mask: AttnMask,
    size: int,
    chunk_size: int,
    overlap: OverlapConfig,
    uneven: bool,
    sources: Sources,
) -> None:
    uneven = uneven and mask.total_seqlen_q > chunk_size * (size - 1)
    config = DistAttnConfig(DispatchConfig(uneven=uneven), overlap)
    check_fp64(rank_pool, size, Problem.random(mask, chunk_size=chunk_size, config=config, sources=sources))


NAMED = {
    "full": builders.full(61, 23),
    "more keys than queries": builders.causal(20, 90),
    "documents": builders.varlen([0, 1, 1, 30, 61], [0, 5, 9, 9, 40]),
    "one key": builders.full(40, 1),
    "rows that attend nothing and keys that nobody attends": AttnMask.from_slices([(5, 9)], [(20, 30)], "full", 41, 57),
    "nothing": AttnMask.from_slices([], [], "full", 20, 30),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", NAMED)
def test_named_masks(rank_pool: RankPool, name: str, size: int) -> None:
    problem = Problem.random(NAMED[name], config=STAGED, sources=CROSS)
    ours = attend_on_ranks(rank_pool, size, problem)
    compare(ours, attend_densely(problem))
    dense = torch.from_numpy(NAMED[name].to_dense())
    assert (ours.out[~dense.any(1)] == 0).all() and (ours.dq[~dense.any(1)] == 0).all()
    assert (ours.dk[~dense.any(0)] == 0).all() and (ours.dv[~dense.any(0)] == 0).all()
    assert torch.equal(torch.isneginf(ours.lse), ~dense.any(1).expand_as(ours.lse))


def test_low_precision(rank_pool: RankPool) -> None:
    from ..kernels.attention import check_bound

    problem = Problem.random(NAMED["documents"], dtype=torch.bfloat16, config=STAGED, sources=CROSS)
    check_bound(list(vars(attend_on_ranks(rank_pool, 3, problem)).values()), problem)


def attend_on_nodes(rank: int, group: dist.ProcessGroup, problem: Problem) -> Result:
    return attend(problem, make_key(problem, mesh_of((2, 2))))


@pytest.mark.parametrize("name", ["full", "documents"])
def test_rows_travel_in_two_levels(rank_pool: RankPool, name: str) -> None:
    config = DistAttnConfig(DispatchConfig(uneven=True), OverlapConfig(degree=3, min_chunk_size=3))
    problem = Problem.random(NAMED[name], config=config, sources=CROSS)
    for ours in rank_pool.run(attend_on_nodes, 4, problem):
        compare(ours, attend_densely(problem))


# --- A decoder: self-attention and cross-attention over the same queries ---------------------------------------------


def decoder_on_rank(rank: int, group: dist.ProcessGroup, is_k_permutable: bool, order: str) -> list[torch.Tensor]:
    """Layers of self-attention and of cross-attention to an encoder's output, on rows dispatched once."""
    x, memory = decoder_inputs()
    config = DistAttnConfig(DispatchConfig(order=order))  # type: ignore[arg-type]
    pad_size = compute_pad_size(37, group.size(), 4)
    key = magi_attn_varlen_key(CU_Q, CU_Q, pad_size, 4, group, causal=True, dist_attn_config=config)
    cross = make_varlen_key_for_new_mask_after_dispatch(
        CU_Q, CU_K, key, is_same_source=False, is_k_permutable=is_k_permutable
    )
    slices = builders.varlen(CU_Q, CU_K).to_ranges()
    again = make_flex_key_for_new_mask_after_dispatch(
        *slices, key, total_seqlen_k=21, is_same_source=False, is_k_permutable=is_k_permutable
    )
    assert cross == again and cross.dispatch_of == key.mask
    assert torch.equal(get_position_ids(cross), get_position_ids(key))
    h, local_memory = dispatch(x, key), dispatch(memory, cross, side="k")
    assert len(local_memory) == len(get_position_ids(cross, side="k"))
    for _ in range(2):
        h = h + calc_attn(h, h, h, key)[0]
        h = h + calc_attn(h, local_memory, local_memory, cross)[0]
    out = undispatch(h, cross)
    assert torch.equal(undispatch(local_memory, cross, side="k"), memory)
    (out * out).sum().backward()
    return [out.detach(), x.grad, memory.grad]


def decoder_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True) for n in (37, 21)]


def decoder_densely() -> list[torch.Tensor]:
    x, memory = decoder_inputs()
    of_self, of_memory = builders.varlen(CU_Q, causal=True).to_dense(), builders.varlen(CU_Q, CU_K).to_dense()
    h = x
    for _ in range(2):
        h = h + dense_attention(h, h, h, of_self)[0]
        h = h + dense_attention(h, memory, memory, of_memory)[0]
    (h * h).sum().backward()
    return [h.detach(), x.grad, memory.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("order", ["balanced", "contiguous"])
@pytest.mark.parametrize("is_k_permutable", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_decoder(rank_pool: RankPool, size: int, is_k_permutable: bool, order: str) -> None:
    for ours in rank_pool.run(decoder_on_rank, size, is_k_permutable, order):
        for actual, expected in zip(ours, decoder_densely(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def two_masks_over_keys_in_order(rank: int, group: dist.ProcessGroup) -> bool:
    key = magi_attn_varlen_key(CU_Q, CU_Q, compute_pad_size(37, group.size(), 4), 4, group)
    first, second = (
        make_varlen_key_for_new_mask_after_dispatch(CU_Q, cu_k, key, is_same_source=False, is_k_permutable=False)
        for cu_k in (CU_K, [0, 0, 21])
    )
    return first != second and torch.equal(get_position_ids(first, side="k"), get_position_ids(second, side="k"))


def test_keys_in_order_are_the_same_for_every_mask(rank_pool: RankPool) -> None:
    assert rank_pool.run(two_masks_over_keys_in_order, 3) == [True] * 3


# --- Rows, keys and errors -------------------------------------------------------------------------------------------


def rows_on_rank(rank: int, group: dist.ProcessGroup, is_q_permutable: bool, is_k_permutable: bool) -> list[list[int]]:
    pad_size = compute_pad_size(37, group.size(), 2)
    x, memory = torch.arange(37.0), torch.arange(100.0, 121.0)
    local, key = magi_attn_varlen_dispatch(
        x, CU_Q, CU_K, pad_size, 2, group,
        is_same_source=False, is_q_permutable=is_q_permutable, is_k_permutable=is_k_permutable,
    )  # fmt: skip
    local_memory = dispatch(memory, key, side="k")
    assert torch.equal(undispatch(local, key), x) and torch.equal(undispatch(local_memory, key, side="k"), memory)
    assert torch.equal(local_memory, memory[get_position_ids(key, side="k")])
    real = len(local) if rank < group.size() - 1 else len(local) - pad_size
    assert is_q_permutable or torch.equal(local[:real], x[get_position_ids(key)[:real]])
    return [get_position_ids(key).tolist(), get_position_ids(key, side="k").tolist()]


@pytest.mark.parametrize(("is_q_permutable", "is_k_permutable"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_each_side(rank_pool: RankPool, size: int, is_q_permutable: bool, is_k_permutable: bool) -> None:
    results = rank_pool.run(rows_on_rank, size, is_q_permutable, is_k_permutable)
    queries, keys = ([row for result in results for row in result[side]] for side in (0, 1))
    assert sorted(set(queries)) == list(range(37)) and sorted(keys) == list(range(21))
    lengths = [len(result[1]) for result in results]
    assert max(lengths) - min(lengths) <= 2
    assert is_q_permutable or queries == sorted(queries)
    assert is_k_permutable or keys == sorted(keys)


def test_keys_are_values(local_group: dist.ProcessGroup) -> None:
    def make(**flags: bool) -> api.DistAttnRuntimeKey:
        return magi_attn_flex_key([(0, 8)], [(0, 8)], "full", 8, 8, 0, 4, local_group, **flags)

    of_self, cross = make(), make(is_same_source=False)
    keys = [of_self, cross, make(is_q_permutable=False), make(is_same_source=False, is_k_permutable=False)]
    assert len(set(keys)) == len({key.digest for key in keys}) == 4
    assert pickle.loads(pickle.dumps(cross)) == cross == make(is_same_source=False)
    after = make_flex_key_for_new_mask_after_dispatch([(0, 8)], [(0, 8)], "full", of_self, is_same_source=False)
    assert after not in keys and after.sources == cross.sources and after.dispatch_of == of_self.mask


def test_plans_made_ahead(local_group: dist.ProcessGroup) -> None:
    mask = builders.varlen(CU_Q, CU_K)
    plan = pickle.loads(pickle.dumps(plan_attention(mask, 1, 4, 3, sources=CROSS)))
    runtimes.clear()
    key = magi_attn_varlen_key(CU_Q, CU_K, 3, 4, local_group, is_same_source=False, plan=plan)
    assert runtimes.get(key).plan.dispatch_k is plan.dispatch_k
    with pytest.raises(ValueError, match=r"plan was made with sources Sources\(is_same_source=False.*but the key has"):
        magi_attn_varlen_key(CU_Q, CU_K, 3, 4, local_group, is_same_source=False, is_k_permutable=False, plan=plan)
    base = magi_attn_varlen_key(CU_Q, CU_Q, 3, 4, local_group)
    ahead = plan_new_mask(mask, plan_attention(base.mask, 1, 4, 3), sources=CROSS)
    made = make_varlen_key_for_new_mask_after_dispatch(CU_Q, CU_K, base, is_same_source=False, plan=ahead)
    assert runtimes.get(made).plan.dispatch_k is ahead.dispatch_k


def test_what_is_refused(local_group: dist.ProcessGroup) -> None:
    key = magi_attn_varlen_key(CU_Q, CU_K, 3, 4, local_group, is_same_source=False)
    q, k = torch.zeros(40, 2, 8), torch.zeros(21, 2, 8)
    with pytest.raises(ValueError, match=r"k has shape .40, 2, 8., but the key is for 21 local rows of keys"):
        calc_attn(q, q, q, key)
    with pytest.raises(ValueError, match=r"q has shape .21, 2, 8., but the key is for 40 local rows of queries"):
        calc_attn(k, k, k, key)
    with pytest.raises(ValueError, match=r"x has shape .37, 2., but the key is for 21 global rows of keys"):
        dispatch(torch.zeros(37, 2), key, side="k")
    with pytest.raises(ValueError, match="but the key is for 40 local rows of queries"):
        undispatch(k, key)
    for use in (
        lambda: dispatch(q, key, side="v"),  # type: ignore[arg-type]
        lambda: undispatch(q, key, side=None),  # type: ignore[arg-type]
        lambda: get_position_ids(key, side="kv"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="side must be 'q' or 'k', not"):
            use()
    with pytest.raises(ValueError, match=r"total_seqlen_q == total_seqlen_k, not 37 and 21.*is_same_source=False"):
        magi_attn_varlen_key(CU_Q, CU_K, 3, 4, local_group)
    with pytest.raises(ValueError, match="dispatched for cross-attention"):
        make_varlen_key_for_new_mask_after_dispatch(CU_Q, CU_K, key)
    base = magi_attn_varlen_key(CU_Q, CU_Q, 3, 4, local_group)
    with pytest.raises(ValueError, match="over 37 queries and 21 keys, but the rows were dispatched for"):
        make_varlen_key_for_new_mask_after_dispatch(CU_Q, CU_K, base)
    with pytest.raises(ValueError, match="is_k_permutable=False needs is_same_source=False"):
        make_varlen_key_for_new_mask_after_dispatch(CU_Q, CU_Q, base, is_k_permutable=False)
    heap = DistAttnConfig(DispatchConfig(MinHeapDispatchAlg()))
    with pytest.raises(ValueError, match="is_q_permutable=False needs the default DispatchConfig"):
        magi_attn_varlen_key(
            CU_Q, CU_K, 3, 4, local_group, dist_attn_config=heap, is_same_source=False, is_q_permutable=False
        )


def different_flags(rank: int, group: dist.ProcessGroup) -> str:
    cu = [0, 5, 37]  # of no other test: the disagreement stays with the key
    key = magi_attn_varlen_key(cu, cu, 3, 4, group, is_same_source=rank == 0)
    with pytest.raises(ValueError) as caught:
        dispatch(torch.zeros(37), key)
    return str(caught.value)


def test_different_sources_are_an_error_on_every_rank(rank_pool: RankPool) -> None:
    for message in rank_pool.run(different_flags, 2):
        assert "given different masks" in message and "[[0], [1]]" in message
