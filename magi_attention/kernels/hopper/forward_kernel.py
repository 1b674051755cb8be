"""The forward kernel for Hopper: persistent programs that walk the windows of a schedule.

A program has two consumers, warp groups that own 64 rows of scores each, and one producer, a warp that feeds them tiles
of q, k and v by bulk copies. A consumer issues the q k^T of a tile together with the p v of the tile before, and makes
the one's softmax while the tensor cores are at the other (Shah et al. 2024, FlashAttention-3,
https://arxiv.org/abs/2407.08608); the other consumer fills what gaps are left.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from magi_attention.kernels.hopper.forward_results import finish
from magi_attention.kernels.hopper.forward_tiles import (
    ROWS,
    bounded,
    masked,
    multiply_keys,
    multiply_values,
    next_tile,
    parts_of,
    row_sums,
    wait_for_values,
)
from magi_attention.kernels.hopper.gluon_compat import load_tile
from magi_attention.kernels.hopper.pipeline import (
    FLAG_MASK,
    exp2,
    find_turns,
    load_entry,
    load_intervals,
    load_item,
    make_ring,
)


@gluon.jit
def load_parts(desc, row, head, full, tiles, number, PARTS: gl.constexpr):
    """Start to copy the ``number``-th of tiles that are ``PARTS`` narrower ones each."""
    for n in gl.static_range(PARTS):
        load_tile(desc, [row, head, n * desc.block_type.shape[2]], full, tiles.index(number * PARTS + n))


@gluon.jit
def produce(q_desc, k_desc, v_desc, walk, turns, q_ring, k_ring, v_ring, GROUP: gl.constexpr, PACK: gl.constexpr):
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[0]
    Q_STAGES: gl.constexpr = q_ring.full.shape[0]
    STAGES: gl.constexpr = k_ring.full.shape[0]
    K_PARTS: gl.constexpr = k_ring.tiles.shape[0] // STAGES
    V_PARTS: gl.constexpr = v_ring.tiles.shape[0] // STAGES
    turn = 0
    tile = 0
    # Everything is read one step ahead, so that nothing waits for it.
    item = load_item(walk, turns, 0, True)
    after = load_item(walk, turns, 1, True)
    first_col, first_run, _ = load_entry(walk, item.entry)
    while item.exists:
        col, run = first_col, first_run
        first_col, first_run, _ = load_entry(walk, after.entry)
        row, head, entry = item.row, item.head * PACK, item.entry
        left = gl.maximum(item.tiles, 1)  # rows that attend nothing have a tile, too
        item = after
        after = load_item(walk, turns, turn + 2, True)
        head_kv = head // GROUP
        stage = turn % Q_STAGES
        q_full = q_ring.full.index(stage)
        mbarrier.wait(q_ring.empty.index(stage), ((turn // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(q_full, 2 * K_PARTS * q_desc.block_type.nbytes)
        for consumer in gl.static_range(2):
            if PACK == 2:
                load_parts(q_desc, row, head + consumer, q_full, q_ring.tiles, stage * 2 + consumer, K_PARTS)
            else:
                load_parts(q_desc, row + consumer * ROWS, head, q_full, q_ring.tiles, stage * 2 + consumer, K_PARTS)
        while left > 0:
            left -= run
            entry += 1
            next_col, next_run, _ = load_entry(walk, entry)
            for _ in range(run):
                stage = tile % STAGES
                free = ((tile // STAGES) & 1) ^ 1
                mbarrier.wait(k_ring.empty.index(stage), free)
                mbarrier.expect(k_ring.full.index(stage), K_PARTS * k_desc.block_type.nbytes)
                load_parts(k_desc, col, head_kv, k_ring.full.index(stage), k_ring.tiles, stage, K_PARTS)
                mbarrier.wait(v_ring.empty.index(stage), free)
                mbarrier.expect(v_ring.full.index(stage), V_PARTS * v_desc.block_type.nbytes)
                load_parts(v_desc, col, head_kv, v_ring.full.index(stage), v_ring.tiles, stage, V_PARTS)
                col -= BLOCK_K
                tile += 1
            col, run = next_col, next_run
        turn += 1


@gluon.jit
def consume(
    out,
    out_desc,
    walk,
    turns,
    scales,
    q_ring,
    k_ring,
    v_ring,
    out_buffers,
    CONSUMER: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LAYERED: gl.constexpr,
    PART: gl.constexpr,
):
    BLOCK_K: gl.constexpr = k_ring.tiles.shape[1]
    V_COLUMNS: gl.constexpr = v_ring.tiles.shape[3]
    STAGES: gl.constexpr = k_ring.full.shape[0]
    Q_STAGES: gl.constexpr = q_ring.full.shape[0]
    K_PARTS: gl.constexpr = k_ring.tiles.shape[0] // STAGES
    V_PARTS: gl.constexpr = v_ring.tiles.shape[0] // STAGES
    ROW_STEP: gl.constexpr = 0 if PACK == 2 else CONSUMER * ROWS
    HEAD_STEP: gl.constexpr = CONSUMER if PACK == 2 else 0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V_COLUMNS, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = q_ring.tiles.dtype
    scale = scales.score

    turn = 0
    tile = 0
    item = load_item(walk, turns, 0, True)
    col, run, code = load_entry(walk, item.entry)
    starts, ends = load_intervals(walk, code, item.row + ROW_STEP, item.rows - ROW_STEP, rows, LAYERED)
    while item.exists:
        done = item
        row, live, entry = item.row + ROW_STEP, item.rows - ROW_STEP, item.entry
        left = gl.maximum(item.tiles, 1) - 1
        item = load_item(walk, turns, turn + 1, True)
        q_stage = turn % Q_STAGES
        mbarrier.wait(q_ring.full.index(q_stage), (turn // Q_STAGES) & 1)
        q_parts = parts_of(q_ring.tiles, q_stage * 2 + CONSUMER, K_PARTS)

        s = multiply_keys(q_parts, k_ring, tile, s_layout)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_ring.empty.index(tile % STAGES), count=1)
        s = masked(bounded(s, scales, SOFTCAP), starts - col, ends - col, code & FLAG_MASK)
        top = gl.max(s, 1)
        safe_top = gl.where(top == float("-inf"), 0.0, top)
        probs = exp2(s * scale - (safe_top * scale)[:, None])
        total = row_sums(probs)
        p = gl.convert_layout(probs.to(dtype), p_layout)
        acc = (gl.zeros([ROWS, V_COLUMNS], gl.float32, acc_layout),) * V_PARTS
        col -= BLOCK_K
        run -= 1
        while left > 0:
            left -= run
            entry += 1
            next_col, next_run, next_code = load_entry(walk, entry)
            # Two loops, so that the one for whole tiles has no branch.
            if (code & FLAG_MASK) == 0:
                for _ in range(run):
                    acc, p, top, total = next_tile(
                        acc, p, top, total, q_parts, k_ring, v_ring, tile, scales, starts, ends, code, col,
                        False, SOFTCAP,
                    )  # fmt: skip
                    tile += 1
            else:
                for _ in range(run):
                    acc, p, top, total = next_tile(
                        acc, p, top, total, q_parts, k_ring, v_ring, tile, scales, starts, ends, code, col,
                        True, SOFTCAP,
                    )  # fmt: skip
                    col -= BLOCK_K
                    tile += 1
            col, run, code = next_col, next_run, next_code
            if LAYERED:
                starts, ends = load_intervals(walk, code, row, live, rows, LAYERED)
        mbarrier.arrive(q_ring.empty.index(q_stage), count=1)
        col, run, code = load_entry(walk, item.entry)
        starts, ends = load_intervals(walk, code, item.row + ROW_STEP, item.rows - ROW_STEP, rows, LAYERED)
        acc, p = wait_for_values(multiply_values(p, v_ring, tile, acc), p)
        mbarrier.arrive(v_ring.empty.index(tile % STAGES), count=1)
        tile += 1
        if live > 0:
            finish(
                acc, top, total, out, out_desc, out_buffers.index(CONSUMER), done, scale,
                ROW_STEP, HEAD_STEP, PACK, HEAD_DIM_V, PART,
            )  # fmt: skip
        turn += 1
    tma.store_wait(0)


@gluon.jit
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    out,
    walk,
    scales,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    K_PARTS: gl.constexpr,
    V_PARTS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LAYERED: gl.constexpr,
    PART: gl.constexpr,
):
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[0]
    K_COLUMNS: gl.constexpr = k_desc.block_type.shape[2]
    V_COLUMNS: gl.constexpr = v_desc.block_type.shape[2]
    dtype: gl.constexpr = q_desc.dtype
    turns = find_turns(walk)
    q_tiles = gl.allocate_shared_memory(dtype, [2 * Q_STAGES * K_PARTS, ROWS, 1, K_COLUMNS], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES * K_PARTS, BLOCK_K, 1, K_COLUMNS], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES * V_PARTS, BLOCK_K, 1, V_COLUMNS], v_desc.layout)
    out_buffers = gl.allocate_shared_memory(dtype, [2, ROWS, 1, out_desc.block_type.shape[2]], out_desc.layout)
    q_ring = make_ring(q_tiles, Q_STAGES, 2)
    k_ring = make_ring(k_tiles, STAGES, 2)
    v_ring = make_ring(v_tiles, STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out, out_desc, walk, turns, scales, q_ring, k_ring, v_ring, out_buffers,
                    0, PACK, HEAD_DIM_V, SOFTCAP, LAYERED, PART,
                ),
            ),
            (
                consume,
                (
                    out, out_desc, walk, turns, scales, q_ring, k_ring, v_ring, out_buffers,
                    1, PACK, HEAD_DIM_V, SOFTCAP, LAYERED, PART,
                ),
            ),
            (produce, (q_desc, k_desc, v_desc, walk, turns, q_ring, k_ring, v_ring, GROUP, PACK)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
