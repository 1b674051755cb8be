"""The GPU's part of packing and adding rows: one pass over memory each, in plain Triton.

Both kernels have a program for each block of rows and columns of the matrix that travels, in which the rows of all
tensors stand side by side. Shapes are compile-time arguments: they belong to the model, and tell the compiler where 16
bytes may be accessed at once. Numbers of rows belong to the mask, and any are taken. Launches go to the current device
and stream.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from magi_attention.comm.row_sums import RowSums

MOST_COLUMNS = 1024  # of a program
PACKED_ELEMENTS = 4096
ADDED_ELEMENTS = 1024  # fewer, since a program waits for one row after the other


class Rows(NamedTuple):
    """A tensor, and how far apart its rows and the segments of a row are; a segment's elements are side by side."""

    ptr: Any
    row_stride: int
    segment_stride: int


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["index"])
def pack_kernel(
    tensors,
    index,
    matrix,
    num_rows,
    SEGMENTS: tl.constexpr,
    BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, exists, col = block(num_rows, ROWS, COLS)
    source = row
    if index is not None:
        source = tl.load(index + row, mask=exists, other=0).to(tl.int64)
    tile = tl.zeros((ROWS, COLS), tensors[0].ptr.dtype.element_ty)
    for t in tl.static_range(len(SEGMENTS)):
        x = tensors[t]
        own = col - BOUNDS[t]
        segment = (own // SEGMENTS[t]).to(tl.int64) * x.segment_stride + own % SEGMENTS[t]
        inside = exists[:, None] & is_of(col, t, BOUNDS)[None, :]
        tile = tl.where(inside, tl.load(x.ptr + source[:, None] * x.row_stride + segment[None, :], mask=inside), tile)
    where = matrix + row[:, None] * BOUNDS[len(SEGMENTS)] + col[None, :]
    inside = exists[:, None] & (col < BOUNDS[len(SEGMENTS)])[None, :]
    tl.store(where, tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows", "offsets", "order"])
def add_kernel(
    totals,
    matrix,
    rows,
    offsets,
    order,
    num_rows,
    BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    entry, exists, col = block(num_rows, ROWS, COLS)
    row = tl.load(rows + entry, mask=exists, other=0).to(tl.int64)
    first = tl.load(offsets + entry, mask=exists, other=0)
    count = tl.load(offsets + entry + 1, mask=exists, other=0) - first
    tile = tl.zeros((ROWS, COLS), totals[0].dtype.element_ty)
    for t in tl.static_range(len(totals)):
        inside = exists[:, None] & is_of(col, t, BOUNDS)[None, :]
        tile = tl.where(inside, tl.load(places(totals[t], row, col, t, BOUNDS), mask=inside), tile)
    for nth in range(tl.max(count, 0)):
        arrives = nth < count
        wire = tl.load(order + first + nth, mask=arrives, other=0).to(tl.int64)
        where = matrix + wire[:, None] * BOUNDS[len(totals)] + col[None, :]
        inside = arrives[:, None] & (col < BOUNDS[len(totals)])[None, :]
        tile += tl.load(where, mask=inside, other=0.0).to(tile.dtype)
    for t in tl.static_range(len(totals)):
        inside = exists[:, None] & is_of(col, t, BOUNDS)[None, :]
        tl.store(places(totals[t], row, col, t, BOUNDS), tile, mask=inside)


@triton.jit
def block(num_rows, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program's rows, which of them there are, and its columns; tensors may have more than 2^31 elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < num_rows, tl.program_id(1) * COLS + tl.arange(0, COLS)


@triton.jit
def is_of(col, t: tl.constexpr, BOUNDS: tl.constexpr):
    """Which columns of the matrix are of tensor ``t``."""
    return (col >= BOUNDS[t]) & (col < BOUNDS[t + 1])


@triton.jit
def places(total, row, col, t: tl.constexpr, BOUNDS: tl.constexpr):
    """Where the elements of contiguous rows are."""
    return total + row[:, None] * (BOUNDS[t + 1] - BOUNDS[t]) + (col - BOUNDS[t])[None, :]


def pack_rows(tensors: Sequence[torch.Tensor], index: torch.Tensor | None, matrix: torch.Tensor) -> None:
    """Write the rows ``index`` of all tensors, or all rows, side by side to a contiguous ``matrix``, in its dtype."""
    num_rows, width = matrix.shape
    if num_rows:
        rows, segments = zip(*map(_as_rows, tensors), strict=True)
        grid, sizes = _blocks(num_rows, width, PACKED_ELEMENTS)
        pack_kernel[grid](rows, index, matrix, num_rows, SEGMENTS=segments, BOUNDS=_bounds(tensors), **sizes)


def add_rows(totals: Sequence[torch.Tensor], matrix: torch.Tensor, sums: RowSums) -> None:
    """See :func:`magi_attention.comm.row_sums.add_rows`."""
    if len(sums.rows):
        grid, sizes = _blocks(len(sums.rows), matrix.shape[1], ADDED_ELEMENTS)
        index = sums.rows, sums.offsets, sums.order
        add_kernel[grid](tuple(totals), matrix, *index, len(sums.rows), BOUNDS=_bounds(totals), **sizes)


def _as_rows(x: torch.Tensor) -> tuple[Rows, int]:
    """A tensor as the kernel takes it, copied only if neighbours in the last dimension are not so in memory; and the
    elements of a segment."""
    if x.ndim != 3:
        x = x.flatten(1)[:, None]
    if x.stride(2) != 1:
        x = x.contiguous()
    _, heads, head_dim = x.shape
    if x.stride(1) == head_dim:
        return Rows(x, x.stride(0), 0), heads * head_dim
    return Rows(x, x.stride(0), x.stride(1)), head_dim


def _bounds(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Where the columns of each tensor begin in the matrix, and the end of the last."""
    return tuple(accumulate((x.shape[1:].numel() for x in tensors), initial=0))


def _blocks(num_rows: int, width: int, elements: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of a kernel, and the rows and columns of a program, ``elements`` in all."""
    cols = min(1 << (width - 1).bit_length(), MOST_COLUMNS)
    rows = elements // cols
    return (-(-num_rows // rows), -(-width // cols)), {"ROWS": rows, "COLS": cols}
