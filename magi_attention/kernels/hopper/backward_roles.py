"""The roles of the backward kernels: a producer, and two consumers with a function of their kernel's own for each tile.

In the kernel up to 128 dimensions a consumer owns 64 of the window's 128 keys. In the *wide* one it owns half of the
dimensions of all 64 keys, and tiles in shared memory are halves, too.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from magi_attention.kernels.hopper.gluon_compat import load_tile
from magi_attention.kernels.hopper.pipeline import (
    FLAG_MASK,
    ROW_ENDS_INSIDE,
    add_rows,
    find_turns,
    load_entry,
    load_intervals,
    load_item,
    split_columns,
    store_rows,
)

KEYS = gl.constexpr(64)  # of a consumer's sums


class Rings(NamedTuple):
    """What the producer brings: k and v once for a window, the others for each tile, lse with q and delta with dout."""

    k: Any
    v: Any
    q: Any
    dout: Any
    lse: Any
    delta: Any


@gluon.constexpr_function
def mma_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def hidden_zero(tile):
    """0, but the compiler does not know: it would keep places of operands that never move in registers, and spill."""
    return tile >> 30


@gluon.jit
def load_keys(desc, ring, turn, row, head, WIDE: gl.constexpr):
    """The keys of a window in two tiles, one for each consumer."""
    D: gl.constexpr = desc.block_type.shape[2]
    full = ring.full.index(0)
    mbarrier.wait(ring.empty.index(0), (turn & 1) ^ 1)
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    for part in gl.static_range(2):
        if WIDE:
            load_tile(desc, [row, head, part * D], full, ring.tiles.index(part))
        else:
            load_tile(desc, [row + part * KEYS, head, 0], full, ring.tiles.index(part))


@gluon.jit
def load_queries(desc, term_desc, ring, terms, tile, query, head, term, WIDE: gl.constexpr):
    """A tile of queries, or both its halves, and a number for each query."""
    D: gl.constexpr = desc.block_type.shape[2]
    PARTS: gl.constexpr = 2 if WIDE else 1
    STAGES: gl.constexpr = ring.full.shape[0]
    stage = tile % STAGES
    full = ring.full.index(stage)
    mbarrier.wait(ring.empty.index(stage), ((tile // STAGES) & 1) ^ 1)
    mbarrier.expect(full, PARTS * desc.block_type.nbytes + term_desc.block_type.nbytes)
    for part in gl.static_range(PARTS):
        load_tile(desc, [query, head, part * D], full, ring.tiles.index(stage * PARTS + part))
    load_tile(term_desc, [term], full, terms.index(stage))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, walk, num_queries, rings,
    GROUP: gl.constexpr, MEMBERS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[0]
    turns = find_turns(walk)
    turn = 0
    tile = 0
    item = load_item(walk, turns, 0, False)
    while item.exists:
        # Items and entries are read one ahead, so that nothing waits for them.
        after = load_item(walk, turns, turn + 1, False)
        query, run, _ = load_entry(walk, item.entry)
        head_kv = item.head * MEMBERS // GROUP
        load_keys(k_desc, rings.k, turn, item.row, head_kv, WIDE)
        load_keys(v_desc, rings.v, turn, item.row, head_kv, WIDE)
        for member in range(MEMBERS):
            head = item.head * MEMBERS + member
            entry = item.entry
            left = item.tiles
            while left > 0:
                left -= run
                entry = gl.where(left > 0, entry + 1, item.entry)
                next_query, next_run, _ = load_entry(walk, entry)
                for _ in range(run):
                    term = head * num_queries + query
                    load_queries(q_desc, lse_desc, rings.q, rings.lse, tile, query, head, term, WIDE)
                    load_queries(dout_desc, delta_desc, rings.dout, rings.delta, tile, query, head, term, WIDE)
                    query -= BLOCK_Q
                    tile += 1
                query, run = next_query, next_run
        turn += 1
        item = after


@gluon.jit
def consume_items(
    next_tile: gl.constexpr, shared, dk_desc, dv_desc, dk_rows, dv_rows, walk, scales, rings,
    CONSUMER: gl.constexpr, GROUP: gl.constexpr, MEMBERS: gl.constexpr, ADDS_UP: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr,
    SOFTCAP: gl.constexpr, LAYERED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Add up dk and dv of item after item; ``next_tile`` adds those of a tile, and sends ``dq`` where it belongs."""
    COLUMN: gl.constexpr = CONSUMER * rings.k.tiles.shape[3] if WIDE else 0
    COLUMN_V: gl.constexpr = CONSUMER * rings.v.tiles.shape[3] if WIDE else 0
    COLUMNS: gl.constexpr = min(rings.k.tiles.shape[3], DIM - COLUMN)
    COLUMNS_V: gl.constexpr = min(rings.v.tiles.shape[3], DIM_V - COLUMN_V)
    BLOCK_Q: gl.constexpr = rings.q.tiles.shape[1]
    ROW_STEP: gl.constexpr = 0 if WIDE else CONSUMER * KEYS
    keys: gl.constexpr = gl.SliceLayout(1, mma_layout(BLOCK_Q // 2 if WIDE else BLOCK_Q))

    turn = 0
    tile = 0
    item = load_item(walk, find_turns(walk), 0, False)
    while item.exists:
        key, live = item.row + ROW_STEP, item.rows - ROW_STEP
        query, run, code = load_entry(walk, item.entry)
        starts, ends = load_intervals(walk, code, key, live, keys, LAYERED)
        # Keys behind the window's end belong to other windows: here they must not add to dq.
        ragged = gl.where(live < KEYS, ROW_ENDS_INSIDE, 0)
        dk = gl.zeros([KEYS, COLUMNS], gl.float32, mma_layout(COLUMNS))
        dv = gl.zeros([KEYS, COLUMNS_V], gl.float32, mma_layout(COLUMNS_V))
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
                flags = (code & FLAG_MASK) | ragged
                # Two loops, so that the one for whole tiles has no branch.
                if flags == 0:
                    for _ in range(run):
                        dk, dv = next_tile(
                            dk, dv, rings, shared, tile, query, head, starts, ends, flags, scales,
                            CONSUMER, DIM, DIM_V, False, SOFTCAP,
                        )  # fmt: skip
                        query -= BLOCK_Q
                        tile += 1
                else:
                    for _ in range(run):
                        dk, dv = next_tile(
                            dk, dv, rings, shared, tile, query, head, starts, ends, flags, scales,
                            CONSUMER, DIM, DIM_V, True, SOFTCAP,
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
                add_rows(dv, dv_desc, shared.dq_tiles.index(CONSUMER), key, head_kv * DIM_V + COLUMN_V)
                column = head_kv * DIM + COLUMN
                add_rows(dk * scales.product, dk_desc, shared.dq_tiles.index(CONSUMER), key, column)
        else:
            # Nobody reads this part of v any more: the other consumer was through with v before it shared its last dS.
            v_buffer = rings.v.tiles.index(CONSUMER)
            if live > 0:
                store_rows(dv, dv_rows, dv_desc, v_buffer, key, head_kv, live, HEAD_DIM_V, COLUMN_V)
                blocks = split_columns(dk * scales.product, v_buffer.shape[2])
                for n in gl.static_range(len(blocks)):
                    store_rows(
                        blocks[n], dk_rows, dk_desc, v_buffer, key, head_kv, live, HEAD_DIM,
                        COLUMN + n * v_buffer.shape[2],
                    )  # fmt: skip
            tma.store_wait(0)
            mbarrier.arrive(rings.v.empty.index(0), count=1)
        item = after
    tma.store_wait(0)
