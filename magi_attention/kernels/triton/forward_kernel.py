"""The forward kernel: one program for a query tile and a key head, an online softmax over the tile's runs of keys.

Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao 2023, https://arxiv.org/abs/2307.08691.
"""

import torch
import triton
import triton.language as tl

from magi_attention.kernels.parts import State
from magi_attention.kernels.triton.launch import Launch
from magi_attention.kernels.triton.tiles import (
    LOG2_E,
    advance,
    as_unit_rows,
    bounded_products,
    load_interval,
    load_rows,
    load_run_record,
    load_tile_record,
    load_valid_rows,
    packed_rows,
    pointers,
    store_valid_rows,
    tile_mask,
)

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def launch_forward(launch: Launch, state: State, sink: torch.Tensor | None, merge: bool) -> None:
    """Write the state, or merge into what it holds; the output goes to its sums where there are some."""
    shape = launch.shapes.forward
    walk = launch.by_queries(shape)
    num_tiles = walk.num_busy if merge else walk.num_tiles
    if num_tiles:
        forward_kernel[num_tiles, launch.query_programs](
            launch.q,
            launch.k,
            launch.v,
            as_unit_rows(state.out if state.sums is None else state.sums),
            state.lse,
            state.row_max,
            None if sink is None else sink.float().contiguous(),
            walk.tables,
            launch.scales,
            PACKED=launch.packed,
            MERGE=merge,
            **launch.options(shape, walk),
        )


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    row_max,
    sink,
    walk,
    scales,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAYERED: tl.constexpr,
    MERGE: tl.constexpr,
):
    first, end, first_run, end_run, num_layers = load_tile_record(walk)
    token, head, head_kv, valid = packed_rows(first, end, GROUP, PACKED, ROWS)
    q_tile = load_valid_rows(pointers(q, token, head, BLOCK_D), valid, HEAD_DIM, BLOCK_D)
    interval_start, interval_end = load_interval(walk, 0, token, valid)
    column = tl.arange(0, COLS)
    k_pointers, v_pointers = pointers(k, column, head_kv, BLOCK_D), pointers(v, column, head_kv, BLOCK_DV)
    out_pointers = pointers(out, token, head, BLOCK_DV)
    lse_pointers = lse + head.to(tl.int64) * walk.num_rows + token

    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out_tile = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    if MERGE:
        # A softmax over other keys goes on where it ended: its total is 1 when its highest score is its log-sum-exp.
        earlier_lse = tl.load(lse_pointers, mask=valid, other=float("-inf"))
        attended = earlier_lse != float("-inf")
        top = tl.where(attended, earlier_lse * LOG2_E, LOWEST)
        total = tl.where(attended, 1.0, 0.0)
        out_tile = load_valid_rows(out_pointers, attended, HEAD_DIM_V, BLOCK_DV)
    earlier_top, earlier_total = top, total
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for run in range(first_run, end_run):
        run_start, full_end, run_end = load_run_record(walk, run)
        for start in range(run_start, full_end, COLS):
            k_tile = load_rows(k_pointers + advance(k, start), HEAD_DIM, BLOCK_D)
            v_tile = load_rows(v_pointers + advance(v, start), HEAD_DIM_V, BLOCK_DV)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            if row_max is not None:
                highest = tl.maximum(highest, tl.max(products, 1))
            out_tile, total, top = softmax_step(products, v_tile, out_tile, total, top, scales)
        for start in range(full_end, run_end, COLS):
            inside = start + column < run_end
            k_tile = load_valid_rows(k_pointers + advance(k, start), inside, HEAD_DIM, BLOCK_D)
            v_tile = load_valid_rows(v_pointers + advance(v, start), inside, HEAD_DIM_V, BLOCK_DV)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            mask = tile_mask(walk, token, valid, interval_start, interval_end, num_layers, start + column, LAYERED)
            products = tl.where(mask, products, float("-inf"))
            if row_max is not None:
                highest = tl.maximum(highest, tl.max(products, 1))
            out_tile, total, top = softmax_step(products, v_tile, out_tile, total, top, scales)

    attends = total > 0.0
    if MERGE:  # what these keys add nothing to stays as it is, to the bit
        valid = valid & ((top != earlier_top) | (total != earlier_total))
    total = tl.where(attends, total, 1.0)
    row_lse = tl.where(attends, (top + tl.log2(total)) / LOG2_E, float("-inf"))
    if sink is not None:
        row_lse, share = join_sink(row_lse, tl.load(sink + head, mask=valid, other=0.0))
        out_tile *= share[:, None]
    store_valid_rows(out_pointers, out_tile / total[:, None], valid, HEAD_DIM_V, BLOCK_DV)
    tl.store(lse_pointers, row_lse, mask=valid)
    if row_max is not None:
        highest = highest * scales.score / LOG2_E
        max_pointers = row_max + head.to(tl.int64) * walk.num_rows + token
        if MERGE:
            highest = tl.maximum(highest, tl.load(max_pointers, mask=valid, other=float("-inf")))
        tl.store(max_pointers, highest, mask=valid)


@triton.jit
def join_sink(lse, sink):
    """The log-sum-exp of both, and the share of ``lse`` in it."""
    high = tl.maximum(lse, sink)
    finite = tl.where(high != float("-inf"), high, 0.0)
    part = tl.exp2((lse - finite) * LOG2_E)
    total = tl.maximum(part + tl.exp2((sink - finite) * LOG2_E), 1.0)  # the higher one adds 1; if both are -inf, 0
    return high + tl.log2(total) / LOG2_E, part / total


@triton.jit
def softmax_step(products, v_tile, out_tile, total, top, scales):
    """Take one more tile of keys into the rows' sums.

    ``top`` is the highest score so far; it is finite from the start, so that a row that attends nothing has
    probabilities ``exp2(-inf - top) = 0``.
    """
    new_top = tl.maximum(top, tl.max(products, 1) * scales.score)
    probs = tl.exp2(products * scales.score - new_top[:, None])
    decay = tl.exp2(top - new_top)
    out_tile = tl.dot(probs.to(v_tile.dtype), v_tile, out_tile * decay[:, None], input_precision="ieee")
    return out_tile, total * decay + tl.sum(probs, 1), new_top
