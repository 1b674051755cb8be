"""What the kernels share: how a program finds its tile, loads rows, masks scores and makes them."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from magi_attention.kernels.triton import records

LOG2_E = tl.constexpr(1.4426950408889634)

# Of records, what kernels read.
TILE_START = tl.constexpr(records.TILE_START)
TILE_END = tl.constexpr(records.TILE_END)
TILE_FIRST_RUN = tl.constexpr(records.TILE_FIRST_RUN)
TILE_END_RUN = tl.constexpr(records.TILE_END_RUN)
TILE_LAYERS = tl.constexpr(records.TILE_LAYERS)
TILE_SIZE = tl.constexpr(records.TILE_SIZE)
RUN_START = tl.constexpr(records.RUN_START)
RUN_FULL_END = tl.constexpr(records.RUN_FULL_END)
RUN_END = tl.constexpr(records.RUN_END)
RUN_SIZE = tl.constexpr(records.RUN_SIZE)

UNIT = tl.constexpr(8)
"""What head_dims and strides are multiples of. The compiler knows it, so that loads are of eight elements."""


class UnitRows(NamedTuple):
    """A ``(tokens, heads, head_dim)`` tensor whose last dimension is contiguous; strides count ``UNIT`` elements."""

    ptr: Any
    token_stride: int
    head_stride: int


def as_unit_rows(x: torch.Tensor) -> UnitRows:
    """The tensor as kernels take it; copied if it is not."""
    token_stride, head_stride, dim_stride = x.stride()
    if dim_stride != 1 or token_stride % UNIT.value or head_stride % UNIT.value:
        x = x.contiguous()
    return UnitRows(x, x.stride(0) // UNIT.value, x.stride(1) // UNIT.value)


@triton.jit
def load_tile_record(walk):
    """The tile of this program: first row, end of the rows, first run, end of the runs, most intervals of a row."""
    at = walk.tiles + tl.program_id(0) * TILE_SIZE
    start, end, first_run = tl.load(at + TILE_START), tl.load(at + TILE_END), tl.load(at + TILE_FIRST_RUN)
    return start, end, first_run, tl.load(at + TILE_END_RUN), tl.load(at + TILE_LAYERS)


@triton.jit
def load_run_record(walk, run):
    """First column, end of the full tiles, end of the columns."""
    at = walk.runs + run * RUN_SIZE
    return tl.load(at + RUN_START), tl.load(at + RUN_FULL_END), tl.load(at + RUN_END)


@triton.jit
def packed_rows(first, end, GROUP: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr):
    """The token and the head of each row of a tile, the head of the keys, and which rows there are.

    The second axis of the grid counts the heads of the keys and, within each, the parts of its group that fit a tile.
    """
    PARTS: tl.constexpr = (GROUP + PACKED - 1) // PACKED
    head_kv, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    row = tl.arange(0, ROWS)
    token, member = first + row // PACKED, part * PACKED + row % PACKED
    return token, head_kv * GROUP + member, head_kv, (token < end) & (member < GROUP)


@triton.jit
def pointers(x, token, head, BLOCK_D: tl.constexpr):
    """Where the rows of ``token`` and ``head`` are; offsets have 64 bits, tensors may have more than 2^31 elements."""
    row = (token.to(tl.int64) * x.token_stride + tl.cast(head, tl.int64) * x.head_stride) * UNIT
    return x.ptr + row[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def advance(x, count):
    """How far ``count`` tokens are."""
    return tl.cast(count, tl.int64) * x.token_stride * UNIT


@triton.jit
def load_rows(where, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows that are all there; 0 behind ``HEAD_DIM``."""
    if HEAD_DIM == BLOCK_D:
        return tl.load(where)
    else:
        return tl.load(where, mask=tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def load_valid_rows(where, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """0 where a row is not ``valid``, and behind ``HEAD_DIM``."""
    return tl.load(where, mask=valid[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_valid_rows(where, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows that are ``valid``, in the type of the tensor."""
    mask = valid[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(where, rows.to(where.dtype.element_ty), mask=mask)


@triton.jit
def load_interval(walk, layer, row, valid):
    """First column and end of an interval of each row; an empty one for a row that is not ``valid``."""
    entry = tl.cast(layer, tl.int64) * walk.num_rows + row
    return tl.load(walk.starts + entry, mask=valid, other=0), tl.load(walk.ends + entry, mask=valid, other=0)


@triton.jit
def tile_mask(walk, row, valid, start, end, num_layers, column, LAYERED: tl.constexpr):
    """Which columns each row attends, ``(rows, columns)``; ``start`` and ``end`` are its first interval."""
    mask = (column[None, :] >= start[:, None]) & (column[None, :] < end[:, None])
    if LAYERED:
        for layer in range(1, num_layers):
            start, end = load_interval(walk, layer, row, valid)
            mask = mask | ((column[None, :] >= start[:, None]) & (column[None, :] < end[:, None]))
    return mask


@triton.jit
def bounded_products(a, b, scales, SOFTCAP: tl.constexpr):
    """``a @ b^T``; with softcap its scaled ``tanh``."""
    products = tl.dot(a, tl.trans(b), input_precision="ieee")
    if SOFTCAP:
        return tanh(products * scales.inner)
    else:
        return products


@triton.jit
def tanh(x):
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -magnitude, magnitude)
