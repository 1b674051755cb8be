"""The forward kernel: one program for a query tile and a key head, an online softmax over the tile's runs of keys.

Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao 2023, https://arxiv.org/abs/2307.08691.
"""

import torch
import triton
import triton.language as tl

from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.triton import tuning
from magi_attention.kernels.triton.tiles import (
    LOG2_E,
    advance,
    as_rows,
    bounded_products,
    load_interval,
    load_rows,
    load_run,
    load_tile,
    load_valid_rows,
    make_scales,
    packed_rows,
    pointers,
    store_valid_rows,
    tile_mask,
)
from magi_attention.kernels.triton.triton_schedule import TritonSchedule

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: TritonSchedule, params: AttnParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`magi_attention.kernels.reference.forward`."""
    num_rows, heads_q, head_dim = q.shape
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(heads_q, num_rows, dtype=torch.float32, device=q.device)
    shape = tuning.choose(head_dim, q.dtype, q.device).forward
    group = heads_q // k.shape[1]
    packed = tuning.packed_heads(group)
    walk = schedule.by_queries(shape.rows // packed, shape.cols, q.device)
    grid = len(walk.tiles), k.shape[1] * triton.cdiv(group, packed)
    if len(walk.tiles):
        forward_kernel[grid](
            *(as_rows(x) for x in (q, k, v, out)),
            lse,
            walk,
            make_scales(params),
            GROUP=group,
            PACKED=packed,
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            ROWS=shape.rows,
            COLS=shape.cols,
            SOFTCAP=params.softcap != 0,
            LAYERED=len(walk.starts) > 1,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
    return out, lse


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    walk,
    scales,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAYERED: tl.constexpr,
):
    first, end, first_run, end_run, num_layers = load_tile(walk)
    token, head, head_kv, valid = packed_rows(first, end, GROUP, PACKED, ROWS)
    q_tile = load_valid_rows(pointers(q, token, head, BLOCK_D), valid, HEAD_DIM, BLOCK_D)
    interval_start, interval_end = load_interval(walk, 0, token, valid)
    column = tl.arange(0, COLS)
    k_pointers, v_pointers = pointers(k, column, head_kv, BLOCK_D), pointers(v, column, head_kv, BLOCK_D)

    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out_tile = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for run in range(first_run, end_run):
        run_start, full_end, run_end = load_run(walk, run)
        for start in range(run_start, full_end, COLS):
            k_tile = load_rows(k_pointers + advance(k, start), HEAD_DIM, BLOCK_D)
            v_tile = load_rows(v_pointers + advance(v, start), HEAD_DIM, BLOCK_D)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            out_tile, total, top = softmax_step(products, v_tile, out_tile, total, top, scales)
        for start in range(full_end, run_end, COLS):
            inside = start + column < run_end
            k_tile = load_valid_rows(k_pointers + advance(k, start), inside, HEAD_DIM, BLOCK_D)
            v_tile = load_valid_rows(v_pointers + advance(v, start), inside, HEAD_DIM, BLOCK_D)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            mask = tile_mask(walk, token, valid, interval_start, interval_end, num_layers, start + column, LAYERED)
            products = tl.where(mask, products, float("-inf"))
            out_tile, total, top = softmax_step(products, v_tile, out_tile, total, top, scales)

    attends = total > 0.0
    total = tl.where(attends, total, 1.0)
    store_valid_rows(pointers(out, token, head, BLOCK_D), out_tile / total[:, None], valid, HEAD_DIM, BLOCK_D)
    row_lse = tl.where(attends, (top + tl.log2(total)) / LOG2_E, float("-inf"))
    tl.store(lse + head.to(tl.int64) * walk.num_rows + token, row_lse, mask=valid)


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
