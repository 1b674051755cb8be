"""Keys and configurations travel between processes; what was made under inference mode serves training."""

import pickle
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from magi_attention.api import (
    AttnMask,
    AttnOverlapMode,
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    Sources,
    calc_attn,
    compute_pad_size,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    roll,
    undispatch,
)
from magi_attention.mask import builders
from magi_attention.planning.two_level import MeshShape
from magi_attention.runtime.cache import runtimes
from magi_attention.testing.rank_pool import RankPool

CU, CU_K = [0, 10, 37], [0, 3, 21]

CONFIGS = [
    DistAttnConfig(),
    DistAttnConfig(DispatchConfig(MinHeapDispatchAlg(), uneven=True)),
    DistAttnConfig(DispatchConfig(LocalityDispatchAlg(0.1))),
    DistAttnConfig(DispatchConfig(order="zigzag"), OverlapConfig(degree=3)),
    DistAttnConfig(overlap_config=OverlapConfig(AttnOverlapMode.DYNAMIC, max_degree=3), grad_wire_dtype="input"),
]
FULL_KEY = DistAttnRuntimeKey(
    mask=builders.varlen(CU, CU_K),
    pad_size=3,
    chunk_size=4,
    cp_ranks=(4, 5, 6, 7),
    group_name="cp",
    config=CONFIGS[-1],
    dispatch_of=builders.varlen(CU, causal=True),
    mesh_shape=MeshShape(2, 2),
    sources=Sources(is_same_source=False),
)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_configurations_are_picklable_values(config: DistAttnConfig) -> None:
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and hash(copy) == hash(config) and repr(copy) == repr(config)
    assert sum(other == config for other in CONFIGS) == 1


def test_a_key_of_everything_there_is_survives_pickling() -> None:
    plain = {field.name: field.default for field in fields(DistAttnRuntimeKey)}
    assert all(getattr(FULL_KEY, name) != default for name, default in plain.items()), (
        "a new field: give it a value here"
    )
    FULL_KEY.digest  # noqa: B018 - what is computed once and kept must not get in the way
    copy = pickle.loads(pickle.dumps(FULL_KEY))
    assert copy == FULL_KEY and hash(copy) == hash(FULL_KEY) and copy.digest == FULL_KEY.digest
    assert isinstance(copy.mask, AttnMask) and not copy.mask.bands.flags.writeable


def test_a_digest_is_the_same_in_every_process() -> None:
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).digest.hex())"
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(FULL_KEY), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == FULL_KEY.digest.hex()


def test_a_copy_of_a_key_finds_the_plan(local_group: dist.ProcessGroup) -> None:
    base = magi_attn_varlen_key(CU, CU, 3, 4, local_group, causal=True)
    cross = make_varlen_key_for_new_mask_after_dispatch(CU, CU_K, base, is_same_source=False)
    for key in (base, cross):
        copy = pickle.loads(pickle.dumps(key))
        assert runtimes.get(copy) is runtimes.get(key)
        assert torch.equal(get_position_ids(copy, side="k"), get_position_ids(key, side="k"))


def train(rank: int, group: dist.ProcessGroup, rehearse: bool) -> list[torch.Tensor]:
    """A training step, behind the same step under inference mode in which all is made that is kept."""
    runtimes.clear()
    generator = torch.Generator().manual_seed(0)
    x, memory = (torch.randn(n, 2, 8, generator=generator, dtype=torch.float64) for n in (37, 21))

    def step(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        key = magi_attn_varlen_key(CU, CU, compute_pad_size(37, group.size(), 4), 4, group, causal=True)
        cross = make_varlen_key_for_new_mask_after_dispatch(CU, CU_K, key, is_same_source=False)
        h, local_memory = dispatch(x, key), dispatch(memory, cross, side="k", grad="partial")
        h = h + get_position_ids(key)[:, None, None] / 37
        h = h + roll(calc_attn(h, h, h, key)[0], 2, 0, key)
        out, lse = calc_attn(h, local_memory, local_memory, cross)
        return undispatch(out, key, grad="partial") + undispatch(lse.T.contiguous(), cross)[..., None]

    results = []
    if rehearse:
        with torch.inference_mode():
            out = step(x, memory)
            assert out.is_inference()
            results.append(out.clone())
    x.requires_grad_(), memory.requires_grad_()
    out = step(x, memory)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    return [*(results or [out.detach()]), out.detach(), x.grad, memory.grad]


@pytest.mark.parametrize("size", [1, 3])
def test_what_was_made_under_inference_mode_serves_training(rank_pool: RankPool, size: int) -> None:
    plain, rehearsed = (rank_pool.run(train, size, rehearse) for rehearse in (False, True))
    for ours, expected in zip(rehearsed, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
