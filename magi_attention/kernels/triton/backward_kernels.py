"""The backward kernels: one that starts, one for dq, query tile by query tile, and one for dk and dv, key tile by key
tile.

The last two make the probabilities again from the log-sum-exp (Dao 2023, https://arxiv.org/abs/2307.08691).
"""

import torch
import triton
import triton.language as tl

from magi_attention.kernels.query_grads import QueryGrads
from magi_attention.kernels.triton.launch import Launch, block_of
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

START_ROWS = 32
"""Queries of a program of the starting kernel, which does little more than read and write memory."""


def launch_start(
    out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None, head_dim: int
) -> QueryGrads:
    """See :func:`magi_attention.kernels.triton.start_backward`."""
    num_rows, heads, head_dim_v = out.shape
    lse_base_2, delta = (torch.empty(heads, num_rows, dtype=torch.float32, device=out.device) for _ in range(2))
    dq = torch.empty(num_rows, heads, head_dim, dtype=torch.float32, device=out.device)
    lse, dout_rows = lse.contiguous(), as_unit_rows(dout)
    if num_rows:
        start_kernel[triton.cdiv(num_rows, START_ROWS), heads](
            as_unit_rows(out),
            dout_rows,
            lse,
            lse if dlse is None else dlse.contiguous(),
            lse_base_2,
            delta,
            as_unit_rows(dq),
            num_rows,
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            BLOCK_D=block_of(head_dim),
            BLOCK_DV=block_of(head_dim_v),
            ROWS=START_ROWS,
            HAS_DLSE=dlse is not None,
            num_warps=4,
        )
    return QueryGrads(dout_rows.ptr, lse_base_2, delta, dq)


def launch_dq(launch: Launch, grads: QueryGrads) -> None:
    """Add the share of the keys to ``grads.dq``, without the softmax scale."""
    shape = launch.shapes.dq
    walk = launch.by_queries(shape)
    if walk.num_busy:
        dq_kernel[walk.num_busy, launch.query_programs](
            as_unit_rows(grads.dout),
            launch.q,
            launch.k,
            launch.v,
            grads.lse,
            grads.delta,
            as_unit_rows(grads.dq),
            walk.tables,
            launch.scales,
            PACKED=launch.packed,
            **launch.options(shape, walk),
        )


def launch_dkdv(launch: Launch, grads: QueryGrads, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Write ``dk`` and ``dv``."""
    shape = launch.shapes.dkdv
    walk = launch.by_keys(shape)
    if walk.num_tiles:
        dkdv_kernel[walk.num_tiles, launch.heads_kv](
            as_unit_rows(grads.dout),
            launch.q,
            launch.k,
            launch.v,
            grads.lse,
            grads.delta,
            as_unit_rows(dk),
            as_unit_rows(dv),
            walk.tables,
            launch.scales,
            num_queries=launch.schedule.num_rows,
            **launch.options(shape, walk),
        )


@triton.jit
def start_kernel(
    out,
    dout,
    lse,
    dlse,
    lse_base_2,
    delta,
    dq,
    num_rows,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Make the row terms of some queries and one head, and clear their ``dq``.

    A query that attends nothing must not let its gradients, which may be NaN, into any sum.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = token < num_rows
    entry = tl.cast(head, tl.int64) * num_rows + token
    row_lse = tl.load(lse + entry, mask=valid, other=float("-inf"))
    attends = row_lse != float("-inf")
    out_tile = load_valid_rows(pointers(out, token, head, BLOCK_DV), attends, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    dout_tile = load_valid_rows(pointers(dout, token, head, BLOCK_DV), attends, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    row_delta = tl.sum(out_tile * dout_tile, 1)
    if HAS_DLSE:
        row_delta -= tl.load(dlse + entry, mask=attends, other=0.0)
    tl.store(lse_base_2 + entry, tl.where(attends, row_lse * LOG2_E, float("inf")), mask=valid)
    tl.store(delta + entry, row_delta, mask=valid)
    zeros = tl.zeros((ROWS, BLOCK_D), tl.float32)
    store_valid_rows(pointers(dq, token, head, BLOCK_D), zeros, valid, HEAD_DIM, BLOCK_D)


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
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAYERED: tl.constexpr,
):
    first, end, first_run, end_run, num_layers = load_tile_record(walk)
    token, head, head_kv, valid = packed_rows(first, end, GROUP, PACKED, ROWS)
    row_lse, row_delta, attends = load_row_terms(lse, delta, head.to(tl.int64) * walk.num_rows + token, valid)
    q_tile = load_valid_rows(pointers(q, token, head, BLOCK_D), valid, HEAD_DIM, BLOCK_D)
    dout_tile = load_valid_rows(pointers(dout, token, head, BLOCK_DV), attends, HEAD_DIM_V, BLOCK_DV)
    interval_start, interval_end = load_interval(walk, 0, token, valid)
    column = tl.arange(0, COLS)
    k_pointers, v_pointers = pointers(k, column, head_kv, BLOCK_D), pointers(v, column, head_kv, BLOCK_DV)

    dq_pointers = pointers(dq, token, head, BLOCK_D)
    dq_tile = load_valid_rows(dq_pointers, valid, HEAD_DIM, BLOCK_D)
    for run in range(first_run, end_run):
        run_start, full_end, run_end = load_run_record(walk, run)
        for start in range(run_start, full_end, COLS):
            k_tile = load_rows(k_pointers + advance(k, start), HEAD_DIM, BLOCK_D)
            v_tile = load_rows(v_pointers + advance(v, start), HEAD_DIM_V, BLOCK_DV)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            probs = tl.exp2(products * scales.score - row_lse[:, None])
            dprobs = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            dproducts = product_gradients(products, probs, dprobs - row_delta[:, None], SOFTCAP)
            dq_tile = tl.dot(dproducts.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
        for start in range(full_end, run_end, COLS):
            inside = start + column < run_end
            k_tile = load_valid_rows(k_pointers + advance(k, start), inside, HEAD_DIM, BLOCK_D)
            v_tile = load_valid_rows(v_pointers + advance(v, start), inside, HEAD_DIM_V, BLOCK_DV)
            products = bounded_products(q_tile, k_tile, scales, SOFTCAP)
            mask = tile_mask(walk, token, valid, interval_start, interval_end, num_layers, start + column, LAYERED)
            probs = tl.exp2(tl.where(mask, products * scales.score - row_lse[:, None], float("-inf")))
            dprobs = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            dproducts = product_gradients(products, probs, dprobs - row_delta[:, None], SOFTCAP)
            dq_tile = tl.dot(dproducts.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    store_valid_rows(dq_pointers, dq_tile, valid, HEAD_DIM, BLOCK_D)


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
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAYERED: tl.constexpr,
):
    """Rows are keys here and columns are queries. The sums over the heads of a group stay in registers."""
    first, end, first_run, end_run, num_layers = load_tile_record(walk)
    head_kv = tl.program_id(1)
    key = first + tl.arange(0, ROWS)
    valid = key < end
    k_tile = load_valid_rows(pointers(k, key, head_kv, BLOCK_D), valid, HEAD_DIM, BLOCK_D)
    v_tile = load_valid_rows(pointers(v, key, head_kv, BLOCK_DV), valid, HEAD_DIM_V, BLOCK_DV)
    interval_start, interval_end = load_interval(walk, 0, key, valid)
    column = tl.arange(0, COLS)

    dk_tile = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for head in range(head_kv * GROUP, (head_kv + 1) * GROUP):
        q_pointers, dout_pointers = pointers(q, column, head, BLOCK_D), pointers(dout, column, head, BLOCK_DV)
        head_lse = lse + tl.cast(head, tl.int64) * num_queries
        head_delta = delta + tl.cast(head, tl.int64) * num_queries
        for run in range(first_run, end_run):
            run_start, full_end, run_end = load_run_record(walk, run)
            for start in range(run_start, full_end, COLS):
                q_tile = load_rows(q_pointers + advance(q, start), HEAD_DIM, BLOCK_D)
                dout_tile = load_rows(dout_pointers + advance(dout, start), HEAD_DIM_V, BLOCK_DV)
                products = bounded_products(k_tile, q_tile, scales, SOFTCAP)
                probs = tl.exp2(products * scales.score - tl.load(head_lse + start + column)[None, :])
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
                dout_tile = load_valid_rows(dout_pointers + advance(dout, start), attends, HEAD_DIM_V, BLOCK_DV)
                products = bounded_products(k_tile, q_tile, scales, SOFTCAP)
                mask = tile_mask(walk, key, valid, interval_start, interval_end, num_layers, start + column, LAYERED)
                probs = tl.exp2(tl.where(mask, products * scales.score - query_lse[None, :], float("-inf")))
                dv_tile = tl.dot(probs.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
                dprobs = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
                dproducts = product_gradients(products, probs, dprobs - query_delta[None, :], SOFTCAP)
                dk_tile = tl.dot(dproducts.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    store_valid_rows(pointers(dk, key, head_kv, BLOCK_D), dk_tile * scales.product, valid, HEAD_DIM, BLOCK_D)
    store_valid_rows(pointers(dv, key, head_kv, BLOCK_DV), dv_tile, valid, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def load_row_terms(lse, delta, entry, valid):
    """Log-sum-exp in units of ``log(2)`` and delta of queries, and which queries attend anything at all.

    A query that attends nothing is in no full tile, and in a partial tile its probabilities are 0; but its gradient,
    which may be NaN, must not be multiplied by them.
    """
    row_lse = tl.load(lse + entry, mask=valid, other=float("inf"))
    return row_lse, tl.load(delta + entry, mask=valid, other=0.0), row_lse != float("inf")


@triton.jit
def product_gradients(products, probs, dscores, SOFTCAP: tl.constexpr):
    """Gradients of the products, the softmax scale left out; ``tanh' = 1 - tanh^2``."""
    if SOFTCAP:
        return probs * dscores * (1.0 - products * products)
    else:
        return probs * dscores
