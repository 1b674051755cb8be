"""How a window of the forward kernel ends: its sums are normalised, merged into those over earlier keys, and stored."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from magi_attention.kernels.hopper.forward_tiles import ROWS, scaled
from magi_attention.kernels.hopper.pipeline import (
    ENDS,
    GOES_ON,
    LN2,
    LOG2_E,
    exp2,
    load_kept,
    split_columns,
    store_kept,
    store_rows,
)

WHOLE, FIRST_PART, LATER_PART = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Which keys a launch is over: all, or a part of them, see :mod:`magi_attention.kernels.parts`."""


class Out(NamedTuple):
    """Where results go. Without parts of the keys, ``sums`` is anything; ``row_max`` is None if it is not asked for.

    ``sink`` has what joins the softmax of each head's rows, or is None.
    """

    rows: Any
    sums: Any
    lse: Any
    lse_stride: int
    row_max: Any
    sink: Any


@gluon.jit
def merged_lse(before, lse):
    high = gl.maximum(before, lse)
    high = gl.where(high == float("-inf"), 0.0, high)
    return high + gl.log2(exp2((before - high) * LOG2_E) + exp2((lse - high) * LOG2_E)) * LN2


@gluon.jit
def store_columns(
    result, kept, begun, weight_before, out, out_desc, buffer, row, head, live, flags,
    HEAD_DIM_V: gl.constexpr, COLUMN: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Store an item's columns from ``COLUMN`` on, of a later part together with what is there from those before."""
    rows: gl.constexpr = gl.SliceLayout(1, result.type.layout)
    kept = gl.convert_layout(kept, rows)
    if PART == LATER_PART:
        before = load_kept(result, out.sums, row, head, gl.convert_layout(begun, rows), HEAD_DIM_V, COLUMN)
        result += before * gl.convert_layout(weight_before, rows)[:, None]
    if PART == WHOLE:
        store_rows(result, out.rows, out_desc, buffer, row, head, live, HEAD_DIM_V, COLUMN)
    else:
        if (flags & GOES_ON) != 0:
            store_kept(result, out.sums, row, head, kept, HEAD_DIM_V, COLUMN)
        if (flags & ENDS) != 0:
            if PART == FIRST_PART:
                store_rows(result, out.rows, out_desc, buffer, row, head, live, HEAD_DIM_V, COLUMN)
            else:
                store_kept(result.to(out_desc.dtype), out.rows, row, head, kept, HEAD_DIM_V, COLUMN)


@gluon.jit
def finish(
    acc, top, total, out, out_desc, buffer, item, scale,
    ROW_STEP: gl.constexpr, HEAD_STEP: gl.constexpr, PACK: gl.constexpr, HEAD_DIM_V: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Normalise the sums of an item and store them, as many columns at a time as ``buffer`` holds."""
    COLUMNS: gl.constexpr = out_desc.block_type.shape[2]
    row, live, head = item.row + ROW_STEP, item.rows - ROW_STEP, item.head * PACK + HEAD_STEP
    rows: gl.constexpr = top.type.layout
    total = gl.convert_layout(gl.sum(total, 1), rows)
    dead = total == 0.0
    lse = gl.where(dead, float("-inf"), (top * scale + gl.log2(total)) * LN2)
    weight = gl.where(dead, 0.0, 1.0 / total)
    token = gl.arange(0, ROWS, layout=rows)
    kept = token < live
    begun, weight_before = None, None
    lse_ptr = out.lse + gl.cast(head, gl.int64) * out.lse_stride + row + token
    if PART == LATER_PART:
        kept = kept & (total != 0.0)  # what these keys add nothing to stays as it is
        before = gl.load(lse_ptr, mask=kept, other=float("-inf"))
        merged = merged_lse(before, lse)
        weight *= exp2((lse - merged) * LOG2_E)
        weight = gl.where(kept, weight, 0.0)
        weight_before = gl.where(kept, exp2((before - merged) * LOG2_E), 0.0)
        begun = before != float("-inf")
        lse = merged
    if out.sink is not None:
        merged = merged_lse(gl.load(out.sink + head), lse)
        weight = gl.where(dead, 0.0, weight * exp2((lse - merged) * LOG2_E))
        lse = merged
    gl.store(lse_ptr, lse, mask=kept)
    if out.row_max is not None:
        max_ptr = out.row_max + gl.cast(head, gl.int64) * out.lse_stride + row + token
        highest = top * scale * LN2
        if PART == LATER_PART:
            highest = gl.maximum(highest, gl.load(max_ptr, mask=kept, other=float("-inf")))
        gl.store(max_ptr, highest, mask=kept)
    results = scaled(acc, weight)
    for part in gl.static_range(len(acc)):
        blocks = split_columns(results[part], COLUMNS)
        for n in gl.static_range(len(blocks)):
            store_columns(
                blocks[n], kept, begun, weight_before, out, out_desc, buffer, row, head, live, item.flags,
                HEAD_DIM_V, part * acc[0].shape[1] + n * COLUMNS, PART,
            )  # fmt: skip
