"""The kernels before and after the backward kernel: one pass over the queries each."""

import torch
import triton
import triton.language as tl

from magi_attention.kernels.hopper.device_walk import ALIGN
from magi_attention.kernels.hopper.launcher import Launcher, rows
from magi_attention.kernels.query_grads import QueryGrads

TOKENS = 32  # of a program
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def start_kernel(
    out,
    dout,
    lse,
    dlse,
    neg_lse,
    neg_delta,
    dq,
    num_tokens,
    stride,
    HEAD_DIM_V: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dim_v = tl.arange(0, COLUMNS_V)[None, :]
    exists = token < num_tokens
    inside = exists[:, None] & (dim_v < HEAD_DIM_V)
    far = token.to(tl.int64)[:, None]
    out_tile = tl.load(out.ptr + far * out.token_stride + head * out.head_stride + dim_v, mask=inside, other=0.0)
    dout_tile = tl.load(dout.ptr + far * dout.token_stride + head * dout.head_stride + dim_v, mask=inside, other=0.0)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + head * num_tokens + token, mask=exists, other=0.0)
    row_lse = tl.load(lse + head * num_tokens + token, mask=exists, other=float("-inf"))
    attends = row_lse != float("-inf")
    stored = token < stride
    tl.store(neg_lse + head * stride + token, tl.where(attends, row_lse * -LOG2_E, float("-inf")), mask=stored)
    tl.store(neg_delta + head * stride + token, tl.where(attends, -delta, 0.0), mask=stored)
    dim = tl.arange(0, COLUMNS)[None, :]
    zeros = tl.zeros((TOKENS, COLUMNS), tl.float32)
    tl.store(dq + (far * tl.num_programs(0) + head) * DIM + dim, zeros, mask=exists[:, None] & (dim < DIM))


@triton.jit
def in_order(tile, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """The dimensions of each 64 as :func:`magi_attention.kernels.hopper.pipeline.side_by_side` found them."""
    return tile.reshape((TOKENS, COLUMNS // 32, 4, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((TOKENS, COLUMNS))


@triton.jit
def finish_kernel(
    sums, result, scale, num_tokens,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, SHUFFLED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, COLUMNS)
    row = token.to(tl.int64)[:, None] * tl.num_programs(0) + tl.program_id(0)
    exists = (token < num_tokens)[:, None]
    tile = tl.load(sums + row * DIM + dim[None, :], mask=exists & (dim < DIM)[None, :], other=0.0)
    if SHUFFLED:
        tile = in_order(tile, TOKENS, COLUMNS)
    low = (tile * scale).to(result.dtype.element_ty)
    tl.store(result + row * HEAD_DIM + dim[None, :], low, mask=exists & (dim < HEAD_DIM)[None, :])


_start, _finish = Launcher(start_kernel), Launcher(finish_kernel)


def launch_start(
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    head_dim: int,
    dim: int,
) -> QueryGrads:
    """What the backward kernel needs of each query.

    ``lse`` becomes its negative in units of ``log(2)``, and ``delta`` its negative, so that both are added. A query
    that attends nothing gets -inf, which makes its probabilities 0, and delta 0. Both are ``(num_heads, tokens)``, with
    the tokens up to a multiple of ``ALIGN`` as if there were more that attend nothing. ``dq`` is filled with zeros; it
    has the ``dim`` dimensions that are multiplied, and gets them in an order of the backward kernel's own.
    """
    num_tokens, num_heads, head_dim_v = out.shape
    stride = -(-num_tokens // ALIGN) * ALIGN
    neg_lse, neg_delta = torch.empty(2, num_heads, stride, dtype=torch.float32, device=out.device).unbind()
    dq = torch.empty(num_tokens, num_heads, dim, dtype=torch.float32, device=out.device)
    if num_tokens:
        grid = num_heads, -(-num_tokens // TOKENS), 1
        args = rows(out), rows(dout), lse, dlse, neg_lse, neg_delta, dq, num_tokens, stride
        sizes = {"HEAD_DIM_V": head_dim_v, "COLUMNS_V": triton.next_power_of_2(head_dim_v)}
        _start(grid, *args, **sizes, DIM=dim, COLUMNS=triton.next_power_of_2(dim), TOKENS=TOKENS)
    return QueryGrads(dout, neg_lse, neg_delta, dq[:, :, :head_dim])


def all_dims(dq: torch.Tensor) -> torch.Tensor:
    """``dq`` of :func:`launch_start` with the dimensions that a head does not have, too."""
    num_tokens, num_heads, _ = dq.shape
    dim = dq.stride(1)
    assert dq.storage_offset() == 0 and dq.untyped_storage().nbytes() == 4 * num_tokens * num_heads * dim
    return dq.as_strided((num_tokens, num_heads, dim), (num_heads * dim, dim, 1))


def launch_finish(sums: torch.Tensor, result: torch.Tensor, scale: float, shuffled: bool) -> None:
    """``result`` from the sums of the backward kernel: times ``scale``, and only the dimensions that a head has.

    Sums of queries are ``shuffled``: their dimensions are put in order.
    """
    num_tokens, num_heads, head_dim = result.shape
    if num_tokens:
        grid = num_heads, -(-num_tokens // TOKENS), 1
        dim = sums.shape[2]
        sizes = {"HEAD_DIM": head_dim, "DIM": dim, "COLUMNS": triton.next_power_of_2(dim)}
        _finish(grid, sums, result, scale, num_tokens, **sizes, SHUFFLED=shuffled, TOKENS=TOKENS)
