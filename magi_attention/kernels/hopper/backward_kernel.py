"""The backward kernel for Hopper: an item is 128 keys of one head, whose program walks the queries that attend them.

It has two consumers, warp groups that own 64 keys each, and one producer, a warp that feeds them tiles of q and dout by
bulk copies. Scores are made transposed, keys by queries, so that dk and dv add up in registers over all query heads
that share the keys, and P and dS are ready there as operands. For dq both consumers need all of dS: they exchange it
through shared memory, and each adds its half of dq to memory by a bulk reduction.

An item may also be the keys and some of those heads, or a part of the queries. Then dk and dv are added to memory in
their turn.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from magi_attention.kernels.hopper.backward_roles import KEYS, Rings, consume_items, hidden_zero, mma_layout, produce
from magi_attention.kernels.hopper.gluon_compat import add_tile
from magi_attention.kernels.hopper.pipeline import (
    ROW_BEGINS_INSIDE,
    ROW_ENDS_INSIDE,
    columns_before,
    exp2,
    make_ring,
    side_by_side,
    tanh,
)

STAGES = gl.constexpr(2)  # of q and of dout


class SharedDs(NamedTuple):
    """What the consumers share: dS of both, twice; their halves of dq; and the descriptor that these are added to."""

    ds_tiles: Any
    ds_full: Any
    dq_tiles: Any
    dq_desc: Any


@gluon.jit
def multiply_ds(ds_tiles, key_tiles, buffer, zero, CONSUMER: gl.constexpr, layout: gl.constexpr):
    """Start this consumer's half of dS k: half of the queries where there are 128, else half of the dimensions."""
    D: gl.constexpr = key_tiles.shape[3]
    BLOCK_Q: gl.constexpr = ds_tiles.shape[2]
    dq = gl.zeros([64, D if BLOCK_Q == 128 else D // 2], gl.float32, layout)
    for part in gl.static_range(2):
        ds = ds_tiles.index(buffer * 2 + part).permute((1, 0))
        k = key_tiles.index(zero + part).reshape([KEYS, D])
        if BLOCK_Q == 128:
            ds = ds.slice(CONSUMER * 64, 64, dim=0)
        else:
            k = k.slice(CONSUMER * (D // 2), D // 2, dim=1)
        dq = warpgroup_mma(ds, k, dq, use_acc=part == 1, is_async=True)
    return dq


@gluon.jit
def next_tile(
    dk, dv, rings, shared, tile, query, head, starts, ends, flags, scales,
    CONSUMER: gl.constexpr, D: gl.constexpr, DIM_V: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One tile of queries: their part of ``dk`` and ``dv``, and this consumer's half of their ``dq``."""
    BLOCK_Q: gl.constexpr = rings.q.tiles.shape[1]
    SPLIT_QUERIES: gl.constexpr = BLOCK_Q == 128
    dtype: gl.constexpr = rings.k.tiles.dtype
    s_layout: gl.constexpr = mma_layout(BLOCK_Q)
    dq_layout: gl.constexpr = mma_layout(D if SPLIT_QUERIES else D // 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    queries: gl.constexpr = gl.SliceLayout(0, s_layout)
    zeros = gl.zeros([KEYS, BLOCK_Q], gl.float32, s_layout)
    stage = tile % STAGES
    phase = (tile // STAGES) & 1
    buffer = tile & 1
    zero = hidden_zero(tile)
    k_tile = rings.k.tiles.index(zero + CONSUMER).reshape([KEYS, D])
    v_tile = rings.v.tiles.index(zero + CONSUMER).reshape([KEYS, D])
    q_tile = rings.q.tiles.index(stage).reshape([BLOCK_Q, D])
    dout_tile = rings.dout.tiles.index(stage).reshape([BLOCK_Q, D])
    mbarrier.wait(rings.q.full.index(stage), phase)
    s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(rings.dout.full.index(stage), phase)
    dp = warpgroup_mma(v_tile, dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = rings.lse.index(stage).load(queries)
    s = warpgroup_mma_wait(1, deps=[s])
    if SOFTCAP:
        s = tanh(s * scales.inner)
        slope = 1.0 - s * s
    p = exp2(s * scales.score + lse[None, :])
    if MASKED:
        if (flags & ROW_ENDS_INSIDE) != 0:
            p = gl.where(columns_before(p, ends - query), p, 0.0)
        if (flags & ROW_BEGINS_INSIDE) != 0:
            p = gl.where(columns_before(p, starts - query), 0.0, p)
    p_low = gl.convert_layout(p.to(dtype), p_layout)
    dp = warpgroup_mma_wait(0, deps=[dp])
    delta = rings.delta.index(stage).load(queries)
    dv = warpgroup_mma(p_low, dout_tile, dv, is_async=True)
    ds = p * (dp + delta[None, :])
    if SOFTCAP:
        ds *= slope
    ds_low = ds.to(dtype)
    shared.ds_tiles.index(buffer * 2 + CONSUMER).store(ds_low)
    fence_async_shared()
    mbarrier.arrive(shared.ds_full.index(buffer), count=1)
    ds_operand = gl.convert_layout(ds_low, p_layout)
    mbarrier.wait(shared.ds_full.index(buffer), (tile // 2) & 1)
    dq = multiply_ds(shared.ds_tiles, rings.k.tiles, buffer, zero, CONSUMER, dq_layout)
    dk = warpgroup_mma(ds_operand, q_tile, dk, is_async=True)
    dv, p_low = warpgroup_mma_wait(3, deps=[dv, p_low])
    mbarrier.arrive(rings.dout.empty.index(stage), count=1)
    dq = warpgroup_mma_wait(1, deps=[dq])
    dq_tile = shared.dq_tiles.index(CONSUMER)
    tma.store_wait(0)
    dq_tile.store(side_by_side(dq))
    fence_async_shared()
    if SPLIT_QUERIES:
        add_tile(shared.dq_desc, [query + CONSUMER * 64, head * D], dq_tile)
    else:
        add_tile(shared.dq_desc, [query, head * D + CONSUMER * (D // 2)], dq_tile)
    dk, ds_operand = warpgroup_mma_wait(0, deps=[dk, ds_operand])
    mbarrier.arrive(rings.q.empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def consume(
    ds_tiles,
    ds_full,
    dq_tiles,
    dq_desc,
    dk_desc,
    dv_desc,
    dk_rows,
    dv_rows,
    walk,
    scales,
    rings,
    CONSUMER: gl.constexpr,
    GROUP: gl.constexpr,
    MEMBERS: gl.constexpr,
    ADDS_UP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    DIM: gl.constexpr,
    DIM_V: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LAYERED: gl.constexpr,
):
    shared = SharedDs(ds_tiles, ds_full, dq_tiles, dq_desc)
    consume_items(
        next_tile, shared, dk_desc, dv_desc, dk_rows, dv_rows, walk, scales, rings,
        CONSUMER, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, HEAD_DIM_V, DIM, DIM_V, SOFTCAP, LAYERED, False,
    )  # fmt: skip


@gluon.jit
def backward_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    lse_desc,
    delta_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    num_queries,
    dk_rows,
    dv_rows,
    walk,
    scales,
    GROUP: gl.constexpr,
    MEMBERS: gl.constexpr,
    ADDS_UP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    DIM: gl.constexpr,
    DIM_V: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LAYERED: gl.constexpr,
):
    D: gl.constexpr = k_desc.block_type.shape[2]
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[0]
    dtype: gl.constexpr = q_desc.dtype
    k_ring = make_ring(gl.allocate_shared_memory(dtype, [2, KEYS, 1, D], k_desc.layout), 1, 2)
    v_ring = make_ring(gl.allocate_shared_memory(dtype, [2, KEYS, 1, D], v_desc.layout), 1, 2)
    q_ring = make_ring(gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, 1, D], q_desc.layout), STAGES, 2)
    dout_ring = make_ring(gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, 1, D], q_desc.layout), STAGES, 2)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], lse_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_Q], dtype)
    ds_tiles = gl.allocate_shared_memory(dtype, [4, KEYS, BLOCK_Q], ds_layout)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 64, dq_desc.block_type.shape[1]], dq_desc.layout)
    rings = Rings(k_ring, v_ring, q_ring, dout_ring, lse_tiles, delta_tiles)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    ds_tiles, ds_full, dq_tiles, dq_desc, dk_desc, dv_desc, dk_rows, dv_rows, walk, scales, rings,
                    0, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, HEAD_DIM_V, DIM, DIM_V, SOFTCAP, LAYERED,
                ),
            ),
            (
                consume,
                (
                    ds_tiles, ds_full, dq_tiles, dq_desc, dk_desc, dv_desc, dk_rows, dv_rows, walk, scales, rings,
                    1, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, HEAD_DIM_V, DIM, DIM_V, SOFTCAP, LAYERED,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, walk, num_queries, rings,
                    GROUP, MEMBERS, False,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
