"""The documented functions: what they return, and what they refuse."""

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from magi_attention import api
from magi_attention.api import (
    AttnRange,
    AttnRanges,
    DispatchConfig,
    DistAttnConfig,
    LocalityDispatchAlg,
    OverlapConfig,
    calc_attn,
    compute_pad_size,
    dispatch,
    get_most_recent_key,
    get_position_ids,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    plan_attention,
    roll,
    undispatch,
)
from magi_attention.mask import builders
from magi_attention.runtime.cache import RuntimeCache, runtimes
from magi_attention.testing.rank_pool import RankPool

CU = [0, 10, 37]
PAD, CHUNK = 3, 4  # fits one, two and five ranks


@pytest.fixture
def key(local_group: dist.ProcessGroup) -> api.DistAttnRuntimeKey:
    return magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group, causal=True)


def round_trip(rank: int, group: dist.ProcessGroup, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = torch.arange(37 * 2).reshape(37, 2).to(dtype)
    local, key = magi_attn_varlen_dispatch(x, CU, torch.tensor(CU), PAD, CHUNK, group, causal=True)
    assert torch.equal(undispatch(local, key), x)
    positions = get_position_ids(key)
    real = int((local.abs().sum(dim=1) > 0).sum()) + int(0 in positions[: len(positions)].tolist())
    return {"local": local, "positions": positions, "real": torch.tensor(real)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_undispatch_inverts_dispatch(rank_pool: RankPool, dtype: torch.dtype) -> None:
    results = rank_pool.run(round_trip, 2, dtype)
    x = torch.arange(37 * 2).reshape(37, 2).to(dtype)
    seen = []
    for result in results:
        local, positions = result["local"], result["positions"]
        assert positions.dtype == torch.int64 and len(local) == len(positions) == 20
        padding = (local == 0).all(dim=1) & (positions != 0)
        assert torch.equal(local[~padding], x[positions[~padding]])
        assert (positions[padding] == 36).all()
        seen += positions[~padding].tolist()
    assert sorted(seen) == list(range(37))


def gradients(rank: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    key = magi_attn_varlen_key(CU, CU, PAD, CHUNK, group)
    x = torch.ones(37, 1, requires_grad=True)
    local = dispatch(x, key)
    (local[:, 0] * get_position_ids(key)).sum().backward()
    leaf = torch.ones(20, 1, requires_grad=True)
    (undispatch(leaf, key)[:, 0] * torch.arange(1.0, 38.0)).sum().backward()
    return x.grad, dispatch(torch.arange(1.0, 38.0), key) - leaf.grad[:, 0]


def test_gradients_of_dispatch_and_undispatch(rank_pool: RankPool) -> None:
    for grad, difference in rank_pool.run(gradients, 2):
        assert torch.equal(grad[:, 0], torch.arange(37.0)), "every rank's rows are gathered"
        assert (difference == 0).all(), "each rank takes its own rows, padding gets none"


def test_flex_equals_varlen(local_group: dist.ProcessGroup) -> None:
    q_ranges = AttnRanges.from_ranges([(0, 10), (10, 37)])
    x = torch.randn(37, 3)
    local, flex = magi_attn_flex_dispatch(x, q_ranges, q_ranges, "causal", 37, 37, PAD, CHUNK, local_group)
    assert flex == magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group, causal=True)
    assert torch.equal(local[:37], x) and (local[37:] == 0).all()


def test_keys_are_frozen_values(local_group: dist.ProcessGroup) -> None:
    ranges = AttnRanges.from_ranges([(0, 8)])
    key = magi_attn_flex_key(ranges, ranges, ["full"], 12, 12, 0, 4, local_group)
    before = (hash(key), key.digest)
    ranges.append(AttnRange(8, 12))
    assert (hash(key), key.digest) == before and key.mask.area == 64
    other = magi_attn_flex_key(ranges, ranges, "full", 12, 12, 0, 4, local_group)
    assert other != key
    copy = pickle.loads(pickle.dumps(key))
    assert copy == key and hash(copy) == hash(key)
    assert get_position_ids(copy).tolist() == list(range(12))


def test_most_recent_key(local_group: dist.ProcessGroup) -> None:
    runtimes.clear()
    with pytest.raises(ValueError, match="no key has been made yet"):
        get_most_recent_key()
    first = magi_attn_varlen_key([0, 8], [0, 8], 0, 4, local_group)
    second = magi_attn_varlen_key([0, 4, 8], [0, 4, 8], 0, 4, local_group)
    assert get_most_recent_key() == second
    dispatch(torch.zeros(8), first)
    assert get_most_recent_key() == first


def test_evicted_keys_say_so(local_group: dist.ProcessGroup) -> None:
    api.set_plan_cache_capacity(1)
    try:
        old = magi_attn_varlen_key([0, 8], [0, 8], 0, 4, local_group)
        magi_attn_varlen_key([0, 4, 8], [0, 4, 8], 0, 4, local_group)
        for use in (get_position_ids, lambda key: dispatch(torch.zeros(8), key)):
            with pytest.raises(
                ValueError, match=r"not in the cache: it was evicted.*1 keys used last.*Make the key again"
            ):
                use(old)
        assert magi_attn_varlen_key([0, 8], [0, 8], 0, 4, local_group) == old
        assert get_position_ids(old).tolist() == list(range(8))
        with pytest.raises(ValueError, match="capacity of at least 1"):
            api.set_plan_cache_capacity(0)
    finally:
        api.set_plan_cache_capacity(128)


def test_the_cache_drops_the_least_recently_used(local_group: dist.ProcessGroup) -> None:
    keys = [magi_attn_varlen_key([0, n], [0, n], 0, 1, local_group) for n in (1, 2, 3)]
    cache = RuntimeCache(capacity=2)
    for key in keys[:2]:
        cache.put(key, runtimes.get(key))
    cache.get(keys[0])
    cache.put(keys[2], runtimes.get(keys[2]))
    assert [cache.find(key) is not None for key in keys] == [True, False, True]


def test_devices_hold_what_was_used_last(local_group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magi_attention.runtime.cache.ON_DEVICES", 2)
    keys = [magi_attn_varlen_key([0, n], [0, n], 0, 1, local_group) for n in (4, 5, 6)]
    made = []
    for key in (*keys, keys[0]):
        x = torch.zeros(key.total_seqlen_q, 1, 8)
        assert torch.equal(calc_attn(*[dispatch(x, key)] * 3, key)[0], x)
        made.append([len(runtimes._runtimes[key]._programs) for key in keys])
    assert made == [[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]


def test_devices_hold_what_a_graph_has_captured(
    local_group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[object] = []
    monkeypatch.setattr("magi_attention.runtime.runtime.keep_if_captured", lambda x, device: kept.append(x) or x)
    key = magi_attn_varlen_key([0, 7], [0, 7], 0, 1, local_group)
    x = dispatch(torch.zeros(7, 1, 8), key)
    undispatch(calc_attn(roll(x, 1, 0, key), x, x, key)[0], key)
    runtime = runtimes.get(key)
    for made in (runtime._programs, runtime._dispatches, runtime._rolls):
        assert made and all(any(x is y for y in kept) for x in made.values())


def test_a_plan_made_ahead(local_group: dist.ProcessGroup) -> None:
    mask = builders.varlen(CU, causal=True)
    plan = pickle.loads(pickle.dumps(plan_attention(mask, 1, CHUNK, PAD)))
    for given in (plan, pickle.loads(pickle.dumps(plan.rank(0)))):
        runtimes.clear()
        key = magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group, causal=True, plan=given)
        assert get_position_ids(key)[:37].tolist() == list(range(37))
        if given is not plan:
            assert runtimes.get(key).plan is given


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda: plan_attention(builders.varlen(CU), 1, CHUNK, PAD), "mask"),
        (lambda: plan_attention(builders.varlen(CU, causal=True), 1, 8, 3), "chunk_size"),
        (lambda: plan_attention(builders.varlen(CU, causal=True), 1, CHUNK, PAD + CHUNK), "pad_size"),
        (lambda: plan_attention(builders.varlen(CU, causal=True), 2, CHUNK, 3).rank(1), "cp_size"),
        (
            lambda: plan_attention(
                builders.varlen(CU, causal=True), 1, CHUNK, PAD, DistAttnConfig(overlap_config=OverlapConfig(degree=3))
            ),
            "config",
        ),
    ],
)
def test_a_plan_from_other_arguments_is_refused(local_group: dist.ProcessGroup, made, name: str) -> None:
    runtimes.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"plan was made with {name}"):
            magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group, causal=True, plan=made())
        magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group, causal=True)  # its plan is in the cache from now on


def test_bad_masks(local_group: dist.ProcessGroup) -> None:
    def flex(q, k, types="full", total=16):
        return magi_attn_flex_key(q, k, types, total, total, 0, 4, local_group)

    with pytest.raises(ValueError, match=r"q_ranges\[0\] = \[0, 17\) is out of bounds: total_seqlen_q is 16"):
        flex([(0, 17)], [(0, 16)])
    with pytest.raises(ValueError, match=r"k_ranges\[1\]"):
        flex([(0, 4), (4, 8)], [(0, 4), (8, 4)])
    with pytest.raises(ValueError, match="q_ranges has 2 ranges but k_ranges has 1"):
        flex([(0, 4), (4, 8)], [(0, 4)])
    with pytest.raises(ValueError, match=r"slice 0 .*slice 1 .*overlap"):
        flex([(0, 4), (2, 8)], [(0, 4), (0, 4)])
    with pytest.raises(ValueError, match="unknown attn_mask_type 'diagonal'"):
        flex([(0, 4)], [(0, 4)], "diagonal")
    with pytest.raises(ValueError, match="attn_mask_type has 2 entries but there are 1 slices"):
        flex([(0, 4)], [(0, 4)], ["full", "causal"])
    with pytest.raises(ValueError, match="total_seqlen_q == total_seqlen_k, not 8 and 16"):
        magi_attn_flex_key([(0, 4)], [(0, 4)], "full", 8, 16, 0, 4, local_group)
    documents = [(0, 4), (4, 8)]
    for codes in (np.array([1, 0]), torch.tensor([1, 0])):
        assert flex(documents, documents, codes).mask == flex(documents, documents, ["causal", "full"]).mask
    with pytest.raises(ValueError, match=r"unknown attn_mask_type 0\.5"):
        flex([(0, 4)], [(0, 4)], torch.tensor([0.5]))
    for ranges in (None, 3, AttnRange(0, 4), "full"):
        with pytest.raises(TypeError, match="q_ranges must be AttnRanges, or a sequence of ranges or pairs, got"):
            flex(ranges, [(0, 4)])
    for name in ("is_same_source", "is_q_permutable", "is_k_permutable"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got None"):
            magi_attn_flex_key([(0, 4)], [(0, 4)], "full", 8, 8, 0, 4, local_group, **{name: None})


def test_a_configuration_in_the_place_of_causal(local_group: dist.ProcessGroup) -> None:
    with pytest.raises(TypeError, match="causal must be True or False, got DistAttnConfig"):
        magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group, None, DistAttnConfig())  # type: ignore[arg-type]


def test_bad_cu_seqlens(local_group: dist.ProcessGroup) -> None:
    for cu_q, cu_k in (([1, 8], [1, 8]), ([0, 8, 4], [0, 8, 4]), ([0, 8], [0, 4, 8]), ([0, 8], [0, 12])):
        with pytest.raises(ValueError):
            magi_attn_varlen_key(cu_q, cu_k, 0, 4, local_group)


def test_exactly_one_of_group_and_mesh(local_group: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match="exactly one of cp_group and cp_mesh must be given, not neither"):
        magi_attn_varlen_key([0, 8], [0, 8], 0, 4)
    with pytest.raises(ValueError, match="exactly one of cp_group and cp_mesh must be given, not both"):
        magi_attn_varlen_key([0, 8], [0, 8], 0, 4, local_group, mesh)
    with pytest.raises(TypeError, match="cp_mesh must be a torch DeviceMesh"):
        magi_attn_varlen_key([0, 8], [0, 8], 0, 4, cp_mesh="cp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cp_group must be a torch.distributed.ProcessGroup"):
        magi_attn_varlen_key([0, 8], [0, 8], 0, 4, 3)  # type: ignore[arg-type]
    assert magi_attn_varlen_key([0, 8], [0, 8], 0, 4, cp_mesh=mesh).cp_ranks == (0,)


def flat_mesh(rank: int, group: dist.ProcessGroup) -> list[float]:
    mesh = api.init_hierarchical_mesh(4, 2, 2)
    local, key = magi_attn_varlen_dispatch(torch.arange(32.0), [0, 32], [0, 32], 0, 4, cp_mesh=mesh)
    again = magi_attn_varlen_key([0, 32], [0, 32], 0, 4, cp_mesh=mesh)
    assert again == key and key.cp_ranks == (0, 1, 2, 3)
    return undispatch(local, key).tolist()


def test_a_mesh_of_two_axes(rank_pool: RankPool) -> None:
    assert rank_pool.run(flat_mesh, 4) == [[float(n) for n in range(32)]] * 4


def test_a_plan_is_a_plan(local_group: dist.ProcessGroup) -> None:
    with pytest.raises(TypeError, match="plan must be what plan_attention returns"):
        magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group, plan="plan")  # type: ignore[arg-type]


def test_sizes_are_integers(local_group: dist.ProcessGroup) -> None:
    key = magi_attn_varlen_key(CU, CU, np.int64(PAD), np.int32(CHUNK), local_group)
    assert key.digest == magi_attn_varlen_key(CU, CU, PAD, CHUNK, local_group).digest
    with pytest.raises(TypeError, match="pad_size must be an integer"):
        magi_attn_varlen_key(CU, CU, None, CHUNK, local_group)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chunk_size must be an integer"):
        magi_attn_varlen_key(CU, CU, PAD, 4.0, local_group)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        magi_attn_varlen_key(CU, CU, PAD, 0, local_group)


def test_padding_that_does_not_fit(local_group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match=r"pad_size 2 does not fit.*use 3"):
        magi_attn_varlen_key(CU, CU, 2, CHUNK, local_group)
    with pytest.raises(ValueError, match="pad_size 2 does not fit"):
        magi_attn_varlen_key(CU, CU, 2, CHUNK, local_group)
    key = magi_attn_varlen_key(CU, CU, PAD + CHUNK, CHUNK, local_group)
    assert len(get_position_ids(key)) == 44


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((36, 4, 8), (40, 2, 8), (40, 2, 8)), "q has shape .36, 4, 8."),
        (((40, 4, 8), (36, 2, 8), (36, 2, 8)), "k has shape .36, 2, 8."),
        (((40, 4, 8), (40, 2, 8), (40, 1, 8)), "v"),
        (((40, 4, 8), (40, 3, 8), (40, 3, 8)), "head"),
        (((40, 4, 8), (40, 2, 4), (40, 2, 4)), "head_dim"),
        (((40, 32), (40, 2, 8), (40, 2, 8)), "q"),
    ],
)
def test_bad_shapes(key: api.DistAttnRuntimeKey, shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calc_attn(*(torch.zeros(shape) for shape in shapes), key)


def test_bad_tensors(key: api.DistAttnRuntimeKey) -> None:
    x = torch.zeros(40, 2, 8)
    with pytest.raises((TypeError, ValueError), match="dtype"):
        calc_attn(x, x.double(), x, key)
    with pytest.raises(TypeError):
        calc_attn(x.long(), x.long(), x.long(), key)
    with pytest.raises((TypeError, ValueError), match="device"):
        calc_attn(x, x.to("meta"), x, key)
    with pytest.raises(TypeError):
        calc_attn([1.0], x, x, key)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has shape .40, 2, 8., but the key is for 37 global rows"):
        dispatch(x, key)
    with pytest.raises(ValueError, match=r"x has shape .37,., but the key is for 40 local rows"):
        undispatch(torch.zeros(37), key)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, not list"):
        dispatch([0.0] * 37, key)  # type: ignore[arg-type]
    for use in (lambda: dispatch(x, "key"), lambda: calc_attn(x, x, x, None), lambda: get_position_ids(3)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="key must be a DistAttnRuntimeKey"):
            use()


def test_non_contiguous_inputs_are_handled(key: api.DistAttnRuntimeKey) -> None:
    q, k, v = (torch.randn(8, h, 40).permute(2, 1, 0) for h in (4, 2, 2))
    out, lse = calc_attn(q, k, v, key)
    expected, expected_lse = calc_attn(q.contiguous(), k.contiguous(), v.contiguous(), key)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_bad_options(key: api.DistAttnRuntimeKey) -> None:
    x = torch.zeros(40, 1, 8)
    for options, error, message in (
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be positive and finite, got -1.0"),
        ({"softcap": "30"}, TypeError, "softcap must be a number, got '30'"),
        ({"softmax_scale": True}, TypeError, "softmax_scale must be a number, got True"),
        ({"deterministic": 1}, TypeError, "deterministic must be True or False, got 1"),
        ({"sm_margin": -1}, ValueError, "sm_margin must not be negative, got -1"),
    ):
        with pytest.raises(error, match=message):
            calc_attn(x, x, x, key, **options)


def test_any_real_number_is_a_scale(key: api.DistAttnRuntimeKey) -> None:
    x = torch.randn(40, 1, 8)
    expected = calc_attn(x, x, x, key, softmax_scale=2.0)
    for scale in (2, np.float32(2), np.int64(2)):
        assert torch.equal(calc_attn(x, x, x, key, softmax_scale=scale)[0], expected[0])


def test_engine_by_name(key: api.DistAttnRuntimeKey) -> None:
    x = torch.randn(40, 1, 8)
    expected = calc_attn(x, x, x, key)
    assert all(torch.equal(a, b) for a, b in zip(calc_attn(x, x, x, key, engine="reference"), expected, strict=True))
    with pytest.raises(ValueError, match="engine must be one of"):
        calc_attn(x, x, x, key, engine="fast")
    with pytest.raises(ValueError, match="engine='triton' was asked for, but triton runs on CUDA GPUs"):
        calc_attn(x, x, x, key, engine="triton")


def test_bad_configurations(local_group: dist.ProcessGroup) -> None:
    with pytest.raises(TypeError, match="dist_attn_config must be a DistAttnConfig"):
        magi_attn_varlen_key([0, 8], [0, 8], 0, 4, local_group, dist_attn_config=OverlapConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="degree must be at least 0, not -1"):
        OverlapConfig(degree=-1)
    with pytest.raises(TypeError, match="min_chunk_size must be an integer"):
        OverlapConfig(min_chunk_size=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tolerance must lie in"):
        LocalityDispatchAlg(tolerance=1.5)
    with pytest.raises(TypeError, match="alg must be of type LocalityDispatchAlg or MinHeapDispatchAlg"):
        DispatchConfig(alg="heap")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="overlap_config must be of type OverlapConfig"):
        DistAttnConfig(overlap_config=3)  # type: ignore[arg-type]


def test_pad_size_is_what_dispatch_expects(local_group: dist.ProcessGroup) -> None:
    for total in (1, 7, 8, 9):
        key = magi_attn_varlen_key([0, total], [0, total], compute_pad_size(total, 1, 8), 8, local_group)
        assert len(get_position_ids(key)) % 8 == 0
