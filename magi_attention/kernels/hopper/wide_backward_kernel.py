"""The backward kernel for a head_dim above 128: an item is 64 keys of one head, and tiles are 64 queries.

Sums of 64 keys and 256 dimensions fill the registers of two consumers. Each owns 128 of the dimensions, of dk and dv as
of dq, but makes the scores of all dimensions for 32 of the 64 queries. So they exchange P and dS through shared memory.
Where a head has no more than 192 dimensions, the second consumer owns 64, and nothing is multiplied behind them. Of
values with no more than 128, both own 64.
All else is as in :mod:`magi_attention.kernels.hopper.backward_kernel`.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from magi_attention.kernels.hopper.backward_roles import KEYS, Rings, consume_items, hidden_zero, mma_layout, produce
from magi_attention.kernels.hopper.pipeline import (
    ROW_BEGINS_INSIDE,
    ROW_ENDS_INSIDE,
    add_rows,
    columns_before,
    exp2,
    make_ring,
    side_by_side,
    tanh,
)

QUERIES = gl.constexpr(64)
SCORED = gl.constexpr(32)  # queries whose scores a consumer makes
HALF = gl.constexpr(128)  # of the dimensions of keys
STAGES = gl.constexpr(2)  # of q; of dout there is room for one


class SharedScores(NamedTuple):
    """What the consumers share: P and dS of two tiles; a buffer of each for its half of dq; and the descriptor that
    these are added to.

    There is a barrier for each of the two. When it lets a consumer go on, the other one has finished the tile before,
    and what that tile had in them may be overwritten in the next one.
    """

    p_tiles: Any
    p_full: Any
    ds_tiles: Any
    ds_full: Any
    dq_tiles: Any
    dq_desc: Any


@gluon.jit
def multiply_keys(key_tiles, query_tiles, zero, stage, CONSUMER: gl.constexpr, DIM: gl.constexpr, layout: gl.constexpr):
    """Start the product of all keys and this consumer's queries, summed over both parts of the dimensions."""
    product = gl.zeros([KEYS, SCORED], gl.float32, layout)
    for part in gl.static_range(2):
        keys = first_columns(key_tiles.index(zero + part), KEYS, part, DIM)
        queries = first_columns(query_tiles.index(stage * 2 + part), QUERIES, part, DIM)
        queries = queries.slice(CONSUMER * SCORED, SCORED, dim=0)
        product = warpgroup_mma(keys, queries.permute((1, 0)), product, use_acc=part == 1, is_async=True)
    return product


@gluon.jit
def first_columns(tile, ROWS: gl.constexpr, PART: gl.constexpr, DIM: gl.constexpr):
    """What is multiplied of the ``PART``-th part of the dimensions."""
    COLUMNS: gl.constexpr = tile.shape[2]
    return tile.reshape([ROWS, COLUMNS]).slice(0, min(COLUMNS, DIM - PART * COLUMNS), dim=1)


@gluon.jit
def share(scores, tile, full, CONSUMER: gl.constexpr):
    """Store this consumer's part of a tile of scores that both multiply, and say so."""
    tile.slice(CONSUMER * SCORED, SCORED, dim=1).store(scores)
    fence_async_shared()
    mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def multiply_ds(ds_tile, key_tiles, CONSUMER: gl.constexpr, COLUMN: gl.constexpr):
    """Start the product of dS and 64 of this consumer's columns of k."""
    k = key_tiles.index(CONSUMER).reshape([KEYS, HALF]).slice(COLUMN, 64, dim=1)
    zeros = gl.zeros([QUERIES, 64], gl.float32, mma_layout(64))
    return warpgroup_mma(ds_tile.permute((1, 0)), k, zeros, use_acc=False, is_async=True)


@gluon.jit
def next_tile(
    dk, dv, rings, shared, tile, query, head, starts, ends, flags, scales,
    CONSUMER: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One tile of queries: their part of this consumer's columns of ``dk`` and ``dv``, and its columns of ``dq``."""
    dtype: gl.constexpr = rings.q.tiles.dtype
    s_layout: gl.constexpr = mma_layout(SCORED)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    stage = tile % STAGES
    zero = hidden_zero(tile)
    mbarrier.wait(rings.q.full.index(stage), (tile // STAGES) & 1)
    s = multiply_keys(rings.k.tiles, rings.q.tiles, zero, stage, CONSUMER, DIM, s_layout)
    mbarrier.wait(rings.dout.full.index(zero), tile & 1)
    dp = multiply_keys(rings.v.tiles, rings.dout.tiles, zero, zero, CONSUMER, DIM_V, s_layout)
    lse = rings.lse.index(stage).slice(CONSUMER * SCORED, SCORED).load(columns)
    s = warpgroup_mma_wait(2, deps=[s])
    if SOFTCAP:
        s = tanh(s * scales.inner)
        slope = 1.0 - s * s
    p = exp2(s * scales.score + lse[None, :])
    if MASKED:
        first = query + CONSUMER * SCORED
        if (flags & ROW_ENDS_INSIDE) != 0:
            p = gl.where(columns_before(p, ends - first), p, 0.0)
        if (flags & ROW_BEGINS_INSIDE) != 0:
            p = gl.where(columns_before(p, starts - first), 0.0, p)
    p_tile = shared.p_tiles.index(tile & 1)
    share(p.to(dtype), p_tile, shared.p_full, CONSUMER)
    dp = warpgroup_mma_wait(0, deps=[dp])
    delta = rings.delta.index(zero).slice(CONSUMER * SCORED, SCORED).load(columns)
    mbarrier.wait(shared.p_full.index(0), tile & 1)
    dout_part = first_columns(rings.dout.tiles.index(zero * 2 + CONSUMER), QUERIES, CONSUMER, DIM_V)
    dv = warpgroup_mma(p_tile, dout_part, dv, is_async=True)
    ds = p * (dp + delta[None, :])
    if SOFTCAP:
        ds *= slope
    ds_tile = shared.ds_tiles.index(tile & 1)
    share(ds.to(dtype), ds_tile, shared.ds_full, CONSUMER)
    mbarrier.wait(shared.ds_full.index(0), tile & 1)
    q_part = first_columns(rings.q.tiles.index(stage * 2 + CONSUMER), QUERIES, CONSUMER, DIM)
    OWNS_HALF: gl.constexpr = dk.shape[1] == HALF
    dq = multiply_ds(ds_tile, rings.k.tiles, CONSUMER, 0)
    if OWNS_HALF:
        more_dq = multiply_ds(ds_tile, rings.k.tiles, CONSUMER, 64)
    dk = warpgroup_mma(ds_tile, q_part, dk, is_async=True)
    dv = warpgroup_mma_wait(3 if OWNS_HALF else 2, deps=[dv])
    mbarrier.arrive(rings.dout.empty.index(zero), count=1)
    column = head * DIM + CONSUMER * HALF
    dq = warpgroup_mma_wait(2 if OWNS_HALF else 1, deps=[dq])
    add_rows(side_by_side(dq), shared.dq_desc, shared.dq_tiles.index(CONSUMER), query, column)
    if OWNS_HALF:
        more_dq = warpgroup_mma_wait(1, deps=[more_dq])
        add_rows(side_by_side(more_dq), shared.dq_desc, shared.dq_tiles.index(CONSUMER), query, column + 64)
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(rings.q.empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def consume(
    p_tiles,
    p_full,
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
    shared = SharedScores(p_tiles, p_full, ds_tiles, ds_full, dq_tiles, dq_desc)
    consume_items(
        next_tile, shared, dk_desc, dv_desc, dk_rows, dv_rows, walk, scales, rings,
        CONSUMER, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, HEAD_DIM_V, DIM, DIM_V, SOFTCAP, LAYERED, True,
    )  # fmt: skip


@gluon.jit
def wide_backward_kernel(
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
    dtype: gl.constexpr = q_desc.dtype
    V_COLUMNS: gl.constexpr = v_desc.block_type.shape[2]
    k_ring = make_ring(gl.allocate_shared_memory(dtype, [2, KEYS, 1, HALF], k_desc.layout), 1, 2)
    v_ring = make_ring(gl.allocate_shared_memory(dtype, [2, KEYS, 1, V_COLUMNS], v_desc.layout), 1, 2)
    q_ring = make_ring(gl.allocate_shared_memory(dtype, [2 * STAGES, QUERIES, 1, HALF], q_desc.layout), STAGES, 2)
    dout_ring = make_ring(gl.allocate_shared_memory(dtype, [2, QUERIES, 1, V_COLUMNS], dout_desc.layout), 1, 2)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [1, QUERIES], lse_desc.layout)
    # As wide as the part of a consumer, which may not begin inside of what is swizzled together.
    part_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    p_tiles = gl.allocate_shared_memory(dtype, [2, KEYS, QUERIES], part_layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, KEYS, QUERIES], part_layout)
    p_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(p_full.index(0), count=2)
    mbarrier.init(ds_full.index(0), count=2)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 64, dq_desc.block_type.shape[1]], dq_desc.layout)
    rings = Rings(k_ring, v_ring, q_ring, dout_ring, lse_tiles, delta_tiles)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    p_tiles, p_full, ds_tiles, ds_full, dq_tiles, dq_desc, dk_desc, dv_desc, dk_rows, dv_rows, walk,
                    scales, rings, 0, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, HEAD_DIM_V, DIM, DIM_V, SOFTCAP, LAYERED,
                ),
            ),
            (
                consume,
                (
                    p_tiles, p_full, ds_tiles, ds_full, dq_tiles, dq_desc, dk_desc, dv_desc, dk_rows, dv_rows, walk,
                    scales, rings, 1, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, HEAD_DIM_V, DIM, DIM_V, SOFTCAP, LAYERED,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, walk, num_queries, rings,
                    GROUP, MEMBERS, True,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
