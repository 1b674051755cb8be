"""The backward kernels: one for dq, query tile by query tile, and one for dk and dv, key tile by key tile.

Both make the probabilities again from the log-sum-exp (Dao 2023, https://arxiv.org/abs/2307.08691).
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


def launch(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    schedule: TritonSchedule,
    params: AttnParams,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`magi_attention.kernels.reference.backward`."""
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    heads_kv, head_dim = k.shape[1:]
    group = q.shape[1] // heads_kv
    packed = tuning.packed_heads(group)
    shapes = tuning.choose(head_dim, q.dtype, q.device)
    inputs = *(as_rows(x) for x in (dout, q, k, v)), lse.contiguous(), delta.contiguous()
    shared = dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        SOFTCAP=params.softcap != 0,
    )
    shape = shapes.dq
    walk = schedule.by_queries(shape.rows // packed, shape.cols, q.device)
    if len(walk.tiles):
        dq_kernel[len(walk.tiles), heads_kv * triton.cdiv(group, packed)](
            *inputs,
            as_rows(dq),
            walk,
            make_scales(params),
            PACKED=packed,
            ROWS=shape.rows,
            COLS=shape.cols,
            LAYERED=len(walk.starts) > 1,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            **shared,
        )
    shape = shapes.dkdv
    walk = schedule.by_keys(shape.rows, shape.cols, q.device)
    if len(walk.tiles):
        dkdv_kernel[len(walk.tiles), heads_kv](
            *inputs,
            as_rows(dk),
            as_rows(dv),
            walk,
            make_scales(params),
            num_queries=len(q),
            ROWS=shape.rows,
            COLS=shape.cols,
            LAYERED=len(walk.starts) > 1,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            **shared,
        )
    return dq, dk, dv


@triton.jit
def dq_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dq,
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
    row_lse, row_delta, attends = load_row_terms(lse, delta, head.to(tl.int64) * walk.num_rows + token, valid)
    q_tile = load_valid_rows(pointers(q, token, head, BLOCK_D), valid, HEAD_DIM, BLOCK_D)
    dout_tile = load_valid_rows(pointers(dout, token, head, BLOCK_D), attends, HEAD_DIM, BLOCK_D)
    interval_start, interval_end = load_interval(walk, 0, token, valid)
    column = tl.arange(0, COLS)
    k_pointers, v_pointers = pointers(k, column, head_kv, BLOCK_D), pointers(v, column, head_kv, BLOCK_D)

    dq_tile = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for run in range(first_run, end_run):
        run_start, full_end, run_end = load_run(walk, run)
        for start in range(run_start, full_end, COLS):
            k_tile = load_rows(k_pointers + advance(k, start), HEAD_DIM, BLOCK_D)
            v_tile = load_rows(v_pointers + advance(v, start), HEAD_DIM, BLOCK_D)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            probs = tl.exp2(products * scales.score - row_lse[:, None])
            dprobs = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            dproducts = product_gradients(products, probs, dprobs - row_delta[:, None], SOFTCAP)
            dq_tile = tl.dot(dproducts.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
        for start in range(full_end, run_end, COLS):
            inside = start + column < run_end
            k_tile = load_valid_rows(k_pointers + advance(k, start), inside, HEAD_DIM, BLOCK_D)
            v_tile = load_valid_rows(v_pointers + advance(v, start), inside, HEAD_DIM, BLOCK_D)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            mask = tile_mask(walk, token, valid, interval_start, interval_end, num_layers, start + column, LAYERED)
            probs = tl.exp2(tl.where(mask, products * scales.score - row_lse[:, None], float("-inf")))
            dprobs = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            dproducts = product_gradients(products, probs, dprobs - row_delta[:, None], SOFTCAP)
            dq_tile = tl.dot(dproducts.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    store_valid_rows(pointers(dq, token, head, BLOCK_D), dq_tile * scales.product, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def dkdv_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    walk,
    scales,
    num_queries,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAYERED: tl.constexpr,
):
    """Rows are keys here and columns are queries. The sums over the heads of a group stay in registers."""
    first, end, first_run, end_run, num_layers = load_tile(walk)
    head_kv = tl.program_id(1)
    key = first + tl.arange(0, ROWS)
    valid = key < end
    k_tile = load_valid_rows(pointers(k, key, head_kv, BLOCK_D), valid, HEAD_DIM, BLOCK_D)
    v_tile = load_valid_rows(pointers(v, key, head_kv, BLOCK_D), valid, HEAD_DIM, BLOCK_D)
    interval_start, interval_end = load_interval(walk, 0, key, valid)
    column = tl.arange(0, COLS)

    dk_tile = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for head in range(head_kv * GROUP, (head_kv + 1) * GROUP):
        q_pointers, dout_pointers = pointers(q, column, head, BLOCK_D), pointers(dout, column, head, BLOCK_D)
        head_lse = lse + tl.cast(head, tl.int64) * num_queries
        head_delta = delta + tl.cast(head, tl.int64) * num_queries
        for run in range(first_run, end_run):
            run_start, full_end, run_end = load_run(walk, run)
            for start in range(run_start, full_end, COLS):
                q_tile = load_rows(q_pointers + advance(q, start), HEAD_DIM, BLOCK_D)
                dout_tile = load_rows(dout_pointers + advance(dout, start), HEAD_DIM, BLOCK_D)
                products = bounded_products(k_tile, q_tile, scales, SOFTCAP)
                probs = tl.exp2(products * scales.score - tl.load(head_lse + start + column)[None, :] * LOG2_E)
                dv_tile = tl.dot(probs.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
                dprobs = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
                dproducts = product_gradients(
                    products, probs, dprobs - tl.load(head_delta + start + column)[None, :], SOFTCAP
                )
                dk_tile = tl.dot(dproducts.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
            for start in range(full_end, run_end, COLS):
                inside = start + column < run_end
                query_lse, query_delta, attends = load_row_terms(head_lse + start, head_delta + start, column, inside)
                q_tile = load_valid_rows(q_pointers + advance(q, start), inside, HEAD_DIM, BLOCK_D)
                dout_tile = load_valid_rows(dout_pointers + advance(dout, start), attends, HEAD_DIM, BLOCK_D)
                products = bounded_products(k_tile, q_tile, scales, SOFTCAP)
                mask = tile_mask(walk, key, valid, interval_start, interval_end, num_layers, start + column, LAYERED)
                probs = tl.exp2(tl.where(mask, products * scales.score - query_lse[None, :], float("-inf")))
                dv_tile = tl.dot(probs.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
                dprobs = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
                dproducts = product_gradients(products, probs, dprobs - query_delta[None, :], SOFTCAP)
                dk_tile = tl.dot(dproducts.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    store_valid_rows(pointers(dk, key, head_kv, BLOCK_D), dk_tile * scales.product, valid, HEAD_DIM, BLOCK_D)
    store_valid_rows(pointers(dv, key, head_kv, BLOCK_D), dv_tile, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def load_row_terms(lse, delta, entry, valid):
    """Log-sum-exp in units of ``log(2)`` and delta of queries, and which queries attend anything at all.

    A query that attends nothing is in no full tile, and in a partial tile the mask leaves it out; but its gradient and
    its delta, which may be NaN, must not be multiplied by its probabilities.
    """
    row_lse = tl.load(lse + entry, mask=valid, other=0.0)
    attends = valid & (row_lse != float("-inf"))
    row_delta = tl.load(delta + entry, mask=attends, other=0.0)
    return row_lse * LOG2_E, row_delta, attends


@triton.jit
def product_gradients(products, probs, dscores, SOFTCAP: tl.constexpr):
    """Gradients of the products, the softmax scale left out; ``tanh' = 1 - tanh^2``."""
    if SOFTCAP:
        return probs * dscores * (1.0 - products * products)
    else:
        return probs * dscores
