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

from magi_attention.kernels.hopper.gluon_compat import add_tile, load_tile
from magi_attention.kernels.hopper.pipeline import (
    ROW_BEGINS_INSIDE,
    ROW_ENDS_INSIDE,
    add_rows,
    columns_before,
    exp2,
    find_turns,
    load_entry,
    load_intervals,
    load_item,
    make_ring,
    side_by_side,
    store_rows,
    tanh,
)

KEYS = gl.constexpr(64)  # of a consumer


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, walk, num_queries, rings,
    GROUP: gl.constexpr, MEMBERS: gl.constexpr,
):  # fmt: skip
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[0]
    STAGES: gl.constexpr = rings.q.full.shape[0]
    turns = find_turns(walk)
    turn = 0
    tile = 0
    item = load_item(walk, turns, 0, False)
    while item.exists:
        # Items and entries are read one ahead, so that nothing waits for them.
        after = load_item(walk, turns, turn + 1, False)
        query, run, _ = load_entry(walk, item.entry)
        head_kv = item.head * MEMBERS // GROUP
        mbarrier.wait(rings.k.empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(rings.k.full.index(0), 2 * k_desc.block_type.nbytes)
        for consumer in gl.static_range(2):
            load_tile(
                k_desc, [item.row + consumer * KEYS, head_kv, 0], rings.k.full.index(0), rings.k.tiles.index(consumer)
            )
        mbarrier.wait(rings.v.empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(rings.v.full.index(0), 2 * v_desc.block_type.nbytes)
        for consumer in gl.static_range(2):
            load_tile(
                v_desc, [item.row + consumer * KEYS, head_kv, 0], rings.v.full.index(0), rings.v.tiles.index(consumer)
            )
        for member in range(MEMBERS):
            head = item.head * MEMBERS + member
            entry = item.entry
            left = item.tiles
            while left > 0:
                left -= run
                entry = gl.where(left > 0, entry + 1, item.entry)
                next_query, next_run, _ = load_entry(walk, entry)
                for _ in range(run):
                    stage = tile % STAGES
                    free = ((tile // STAGES) & 1) ^ 1
                    term = head * num_queries + query
                    q_full = rings.q.full.index(stage)
                    mbarrier.wait(rings.q.empty.index(stage), free)
                    mbarrier.expect(q_full, q_desc.block_type.nbytes + BLOCK_Q * 4)
                    load_tile(q_desc, [query, head, 0], q_full, rings.q.tiles.index(stage))
                    load_tile(lse_desc, [term], q_full, rings.lse.index(stage))
                    dout_full = rings.dout.full.index(stage)
                    mbarrier.wait(rings.dout.empty.index(stage), free)
                    mbarrier.expect(dout_full, dout_desc.block_type.nbytes + BLOCK_Q * 4)
                    load_tile(dout_desc, [query, head, 0], dout_full, rings.dout.tiles.index(stage))
                    load_tile(delta_desc, [term], dout_full, rings.delta.index(stage))
                    query -= BLOCK_Q
                    tile += 1
                query, run = next_query, next_run
        turn += 1
        item = after


class Rings(NamedTuple):
    """What the producer brings: k and v once for a window, the others for each tile, lse with q and delta with dout."""

    k: Any
    v: Any
    q: Any
    dout: Any
    lse: Any
    delta: Any


class DqOut(NamedTuple):
    """How dq leaves: dS of both consumers, twice; their halves of dq; and the descriptor that these are added to."""

    ds_tiles: Any
    ds_full: Any
    tiles: Any
    desc: Any


@gluon.constexpr_function
def mma_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def multiply_ds(ds_tiles, k_ring, buffer, CONSUMER: gl.constexpr, layout: gl.constexpr):
    """Start this consumer's half of dS k: half of the queries where there are 128, else half of the dimensions."""
    D: gl.constexpr = k_ring.tiles.shape[3]
    BLOCK_Q: gl.constexpr = ds_tiles.shape[2]
    dq = gl.zeros([64, D if BLOCK_Q == 128 else D // 2], gl.float32, layout)
    for part in gl.static_range(2):
        ds = ds_tiles.index(buffer * 2 + part).permute((1, 0))
        k = k_ring.tiles.index(part).reshape([KEYS, D])
        if BLOCK_Q == 128:
            ds = ds.slice(CONSUMER * 64, 64, dim=0)
        else:
            k = k.slice(CONSUMER * (D // 2), D // 2, dim=1)
        dq = warpgroup_mma(ds, k, dq, use_acc=part == 1, is_async=True)
    return dq


@gluon.jit
def next_tile(
    dk, dv, k_tile, v_tile, rings, dq_out, tile, query, head, starts, ends, flags, scales,
    CONSUMER: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One tile of queries: their part of ``dk`` and ``dv``, and this consumer's half of their ``dq``."""
    D: gl.constexpr = k_tile.shape[1]
    BLOCK_Q: gl.constexpr = rings.q.tiles.shape[1]
    STAGES: gl.constexpr = rings.q.full.shape[0]
    SPLIT_QUERIES: gl.constexpr = BLOCK_Q == 128
    dtype: gl.constexpr = k_tile.dtype
    s_layout: gl.constexpr = mma_layout(BLOCK_Q)
    dq_layout: gl.constexpr = mma_layout(D if SPLIT_QUERIES else D // 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    queries: gl.constexpr = gl.SliceLayout(0, s_layout)
    zeros = gl.zeros([KEYS, BLOCK_Q], gl.float32, s_layout)
    stage = tile % STAGES
    phase = (tile // STAGES) & 1
    buffer = tile & 1
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
    dq_out.ds_tiles.index(buffer * 2 + CONSUMER).store(ds_low)
    fence_async_shared()
    mbarrier.arrive(dq_out.ds_full.index(buffer), count=1)
    ds_operand = gl.convert_layout(ds_low, p_layout)
    mbarrier.wait(dq_out.ds_full.index(buffer), (tile // 2) & 1)
    dq = multiply_ds(dq_out.ds_tiles, rings.k, buffer, CONSUMER, dq_layout)
    dk = warpgroup_mma(ds_operand, q_tile, dk, is_async=True)
    dv, p_low = warpgroup_mma_wait(3, deps=[dv, p_low])
    mbarrier.arrive(rings.dout.empty.index(stage), count=1)
    dq = warpgroup_mma_wait(1, deps=[dq])
    dq_tile = dq_out.tiles.index(CONSUMER)
    tma.store_wait(0)
    dq_tile.store(side_by_side(dq))
    fence_async_shared()
    if SPLIT_QUERIES:
        add_tile(dq_out.desc, [query + CONSUMER * 64, head * D], dq_tile)
    else:
        add_tile(dq_out.desc, [query, head * D + CONSUMER * (D // 2)], dq_tile)
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
    SOFTCAP: gl.constexpr,
    LAYERED: gl.constexpr,
):
    D: gl.constexpr = rings.k.tiles.shape[3]
    BLOCK_Q: gl.constexpr = rings.q.tiles.shape[1]
    acc_layout: gl.constexpr = mma_layout(D)
    dq_out = DqOut(ds_tiles, ds_full, dq_tiles, dq_desc)
    keys: gl.constexpr = gl.SliceLayout(1, mma_layout(BLOCK_Q))
    k_tile = rings.k.tiles.index(CONSUMER).reshape([KEYS, D])
    v_tile = rings.v.tiles.index(CONSUMER).reshape([KEYS, D])

    turn = 0
    tile = 0
    item = load_item(walk, find_turns(walk), 0, False)
    while item.exists:
        key, live = item.row + CONSUMER * KEYS, item.rows - CONSUMER * KEYS
        query, run, code = load_entry(walk, item.entry)
        starts, ends = load_intervals(walk, code, key, live, keys, LAYERED)
        # Keys behind the window's end belong to other windows: here they must not add to dq.
        ragged = gl.where(live < KEYS, ROW_ENDS_INSIDE, 0)
        dk = gl.zeros([KEYS, D], gl.float32, acc_layout)
        dv = gl.zeros([KEYS, D], gl.float32, acc_layout)
        mbarrier.wait(rings.k.full.index(0), turn & 1)
        mbarrier.wait(rings.v.full.index(0), turn & 1)
        for member in range(MEMBERS):
            head = item.head * MEMBERS + member
            entry = item.entry
            left = item.tiles
            while left > 0:
                left -= run
                entry = gl.where(left > 0, entry + 1, item.entry)
                next_query, next_run, next_code = load_entry(walk, entry)
                flags = (code & 3) | ragged
                # Two loops, so that the one for whole tiles has no branch.
                if flags == 0:
                    for _ in range(run):
                        dk, dv = next_tile(
                            dk, dv, k_tile, v_tile, rings, dq_out, tile, query, head, starts, ends, flags, scales,
                            CONSUMER, False, SOFTCAP,
                        )  # fmt: skip
                        query -= BLOCK_Q
                        tile += 1
                else:
                    for _ in range(run):
                        dk, dv = next_tile(
                            dk, dv, k_tile, v_tile, rings, dq_out, tile, query, head, starts, ends, flags, scales,
                            CONSUMER, True, SOFTCAP,
                        )  # fmt: skip
                        query -= BLOCK_Q
                        tile += 1
                query, run, code = next_query, next_run, next_code
                if LAYERED:
                    starts, ends = load_intervals(walk, code, key, live, keys, LAYERED)
        mbarrier.arrive(rings.k.empty.index(0), count=1)
        head_kv = item.head * MEMBERS // GROUP
        turn += 1
        # The turns are found again, so that no registers hold them beside dk and dv.
        after = load_item(walk, find_turns(walk), turn, False)
        if ADDS_UP:
            mbarrier.arrive(rings.v.empty.index(0), count=1)
            if live > 0:
                add_rows(dv, dv_desc, dq_tiles.index(CONSUMER), key, head_kv)
                add_rows(dk * scales.product, dk_desc, dq_tiles.index(CONSUMER), key, head_kv)
        else:
            v_buffer = rings.v.tiles.index(CONSUMER)
            if live > 0:
                store_rows(dv, dv_rows, dv_desc, v_buffer, key, head_kv, live, HEAD_DIM)
                store_rows(dk * scales.product, dk_rows, dk_desc, v_buffer, key, head_kv, live, HEAD_DIM)
            tma.store_wait(0)
            mbarrier.arrive(rings.v.empty.index(0), count=1)
        item = after
    tma.store_wait(0)


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
    STAGES: gl.constexpr,
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
                    0, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, SOFTCAP, LAYERED,
                ),
            ),
            (
                consume,
                (
                    ds_tiles, ds_full, dq_tiles, dq_desc, dk_desc, dv_desc, dk_rows, dv_rows, walk, scales, rings,
                    1, GROUP, MEMBERS, ADDS_UP, HEAD_DIM, SOFTCAP, LAYERED,
                ),
            ),
            (
                produce,
                (q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, walk, num_queries, rings, GROUP, MEMBERS),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
