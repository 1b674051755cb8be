"""What a consumer of the forward kernel does with a tile: products, masks, and a step of the softmax."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from magi_attention.kernels.hopper.pipeline import (
    FLAG_MASK,
    ROW_BEGINS_INSIDE,
    ROW_ENDS_INSIDE,
    columns_before,
    exp2,
    tanh,
)

ROWS = gl.constexpr(64)  # of a consumer


@gluon.jit
def row_sums(p):
    """Sums inside each thread only, ``(rows, 4)``; the four threads of a row are summed once, after the loop."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def scaled(acc, weights):
    """Each row of some tiles times its weight."""
    weights = gl.convert_layout(weights, gl.SliceLayout(1, acc[0].type.layout))[:, None]
    result = acc[:0]
    for n in gl.static_range(len(acc)):
        result = result + (acc[n] * weights,)
    return result


@gluon.jit
def parts_of(tiles, number, PARTS: gl.constexpr):
    """The ``number``-th of tiles that are ``PARTS`` narrower ones each, as a tuple of those."""
    SHAPE: gl.constexpr = [tiles.shape[1], tiles.shape[3]]
    parts = ()
    for n in gl.static_range(PARTS):
        parts = parts + (tiles.index(number * PARTS + n).reshape(SHAPE),)  # type: ignore[assignment]
    return parts


@gluon.jit
def multiply_keys(q_parts, k_ring, tile, layout: gl.constexpr):
    """Start q k^T of the ``tile``-th tile as soon as it is there."""
    BLOCK_K: gl.constexpr = k_ring.tiles.shape[1]
    STAGES: gl.constexpr = k_ring.full.shape[0]
    mbarrier.wait(k_ring.full.index(tile % STAGES), (tile // STAGES) & 1)
    k_parts = parts_of(k_ring.tiles, tile % STAGES, len(q_parts))
    s = gl.zeros([ROWS, BLOCK_K], gl.float32, layout)
    for n in gl.static_range(len(q_parts)):
        s = warpgroup_mma(q_parts[n], k_parts[n].permute((1, 0)), s, use_acc=n > 0, is_async=True)
    return s


@gluon.jit
def multiply_values(p, v_ring, tile, acc):
    """Start p v of the ``tile``-th tile as soon as it is there."""
    STAGES: gl.constexpr = v_ring.full.shape[0]
    mbarrier.wait(v_ring.full.index(tile % STAGES), (tile // STAGES) & 1)
    v_parts = parts_of(v_ring.tiles, tile % STAGES, len(acc))
    result = acc[:0]
    for n in gl.static_range(len(acc)):
        result = result + (warpgroup_mma(p, v_parts[n], acc[n], is_async=True),)
    return result


@gluon.jit
def wait_for_values(acc, p):
    """Wait for all products, of which these are the last, and give up ``p``, too."""
    done = warpgroup_mma_wait(0, deps=acc + (p,))
    return done[: len(acc)], done[len(acc)]


@gluon.jit
def bounded(s, scales, SOFTCAP: gl.constexpr):
    return tanh(s * scales.inner) if SOFTCAP else s


@gluon.jit
def masked(s, starts, ends, flags):
    """-inf where a row does not attend a column of the tile."""
    if (flags & ROW_ENDS_INSIDE) != 0:
        s = gl.where(columns_before(s, ends), s, float("-inf"))
    if (flags & ROW_BEGINS_INSIDE) != 0:
        s = gl.where(columns_before(s, starts), float("-inf"), s)
    return s


@gluon.jit
def next_tile(
    acc, p, top, total, q_parts, k_ring, v_ring, tile, scales, starts, ends, code, col,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """The scores of the tile behind the ``tile``-th, and the ``tile``-th one's part of the output."""
    STAGES: gl.constexpr = k_ring.full.shape[0]
    s_layout: gl.constexpr = top.type.layout.parent
    scale = scales.score
    s_next = multiply_keys(q_parts, k_ring, tile + 1, s_layout)
    acc_next = multiply_values(p, v_ring, tile, acc)
    s = warpgroup_mma_wait(len(acc), deps=[s_next])
    mbarrier.arrive(k_ring.empty.index((tile + 1) % STAGES), count=1)
    s = bounded(s, scales, SOFTCAP)
    if MASKED:
        s = masked(s, starts - col, ends - col, code & FLAG_MASK)
    new_top = gl.maximum(top, gl.max(s, 1))
    safe_top = new_top
    if MASKED:
        safe_top = gl.where(new_top == float("-inf"), 0.0, new_top)
    decay = exp2(top * scale - safe_top * scale)
    probs = exp2(s * scale - (safe_top * scale)[:, None])
    part = row_sums(probs)
    total = total * gl.convert_layout(decay, gl.SliceLayout(1, part.type.layout))[:, None] + part
    acc, p = wait_for_values(acc_next, p)
    mbarrier.arrive(v_ring.empty.index(tile % STAGES), count=1)
    acc = scaled(acc, decay)
    p = gl.convert_layout(probs.to(p.dtype), p.type.layout)
    return acc, p, new_top, total
