"""FlexAttention's masks as an :class:`~magi_attention.mask.AttnMask`: a ``mask_mod`` function, or a ``BlockMask``.

The function is evaluated strip by strip, a strip being one row of blocks, and a strip in pieces, so that memory stays
far below queries times keys. What it attends in each row are intervals, and intervals join into bands down the rows.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.interop.unread_index import BatchIndex, HeadIndex
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import IntArray, merge_runs, ranges_to_indices
from magi_attention.mask.integers import as_length, as_size
from magi_attention.mask.row_joiner import GrowingBand, join_rows
from magi_attention.mask.true_runs import split_by_row, true_runs

if TYPE_CHECKING:
    import torch.nn.attention.flex_attention

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_CELLS_AT_ONCE = 1 << 22  # a mask_mod makes int64 tensors of so many cells: 32 MiB each

NO_RUNS = np.empty((0, 2), np.int64)


def mask_from_mask_mod(
    mask_mod: MaskMod,
    total_seqlen_q: int,
    total_seqlen_k: int,
    device: torch.device | str = "cpu",
    *,
    block_size: int = 128,
    max_slices: int = 100_000,
) -> AttnMask:
    """The mask with exactly the cells that a FlexAttention ``mask_mod`` attends.

    The function is evaluated for every cell, some 4 million at once: for a long sequence on a GPU, or better from a
    ``BlockMask`` (:func:`mask_from_block_mask`), which says where that is not needed.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, True where a query attends a key. It is called with ``q_idx`` int64
            of shape ``(rows, 1)`` and ``kv_idx`` of shape ``(1, keys)`` and returns bool that broadcasts to
            ``(rows, keys)``. It must not depend on the batch index ``b`` or the head index ``h``.
        total_seqlen_q: Number of queries.
        total_seqlen_k: Number of keys.
        device: Where to evaluate it; that of the tensors that it reads.
        block_size: Rows evaluated together, and the side of the tiles that error messages name.
        max_slices: Most slices that the mask may need; more by default than :func:`~magi_attention.mask.from_dense`
            allows, whose sequences are short enough for a matrix.

    Returns:
        The mask; its :meth:`~magi_attention.mask.AttnMask.to_ranges` are the arguments of ``magi_attn_flex_key``.

    Raises:
        TypeError: If ``mask_mod`` does not return a bool tensor, or a size is no integer.
        ValueError: If it depends on ``b`` or ``h``, returns another shape, or is no mask of bands: it needs more than
            ``max_slices`` slices. The message names the first tile of those in which most bands begin.
    """
    total_q, total_k = as_length(total_seqlen_q, "total_seqlen_q"), as_length(total_seqlen_k, "total_seqlen_k")
    block_size = as_size(block_size, "block_size")
    grid = _Grid(total_q, total_k, block_size, block_size)
    strip = _Strip(np.array([[0, total_k]]), NO_RUNS)
    return _detect(mask_mod, grid, (strip for _ in grid.row_starts), torch.device(device), max_slices)


def mask_from_block_mask(
    block_mask: "torch.nn.attention.flex_attention.BlockMask", *, max_slices: int = 100_000
) -> AttnMask:
    """The mask with exactly the cells that a FlexAttention ``BlockMask`` attends.

    Empty blocks are skipped and full ones filled; its ``mask_mod`` is evaluated in the partial blocks only, on the
    device of the block mask.

    Args:
        block_mask: As ``create_block_mask`` of ``torch.nn.attention.flex_attention`` makes it, for one batch entry and
            one head (``B`` and ``H`` None or 1).
        max_slices: Most slices that the mask may need.

    Returns:
        The mask, of the block mask's two lengths.

    Raises:
        TypeError: If ``block_mask`` is no ``BlockMask``, or its ``mask_mod`` does not return a bool tensor.
        ValueError: If the block mask has more than one batch entry or head, or as :func:`mask_from_mask_mod`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be a BlockMask, as create_block_mask returns, not {type(block_mask).__name__}"
        )
    entries = tuple(block_mask.kv_indices.shape[:-2])
    if any(n != 1 for n in entries):
        raise ValueError(
            f"block_mask is for (B, H) = {entries}, but an AttnMask is the same for all batch entries and heads: "
            "make it with B=None, H=None, or one for each of them"
        )
    grid = _Grid(*block_mask.seq_lengths, *block_mask.BLOCK_SIZE)
    return _detect(block_mask.mask_mod, grid, _strips(block_mask, grid), block_mask.kv_indices.device, max_slices)


@dataclass(frozen=True)
class _Grid:
    """A mask's size and that of the tiles it is cut into."""

    total_q: int
    total_k: int
    block_q: int
    block_k: int

    @property
    def row_starts(self) -> range:
        """The first row of each strip."""
        return range(0, self.total_q, self.block_q)


@dataclass(frozen=True, eq=False)
class _Strip:
    """One row of blocks: ``(start, end)`` runs of keys that are attended as the function says, and by all rows."""

    partial: IntArray
    full: IntArray


def _strips(block_mask: "torch.nn.attention.flex_attention.BlockMask", grid: _Grid) -> Iterator[_Strip]:
    """The strips of a block mask, from the top."""

    def rows(counts: torch.Tensor | None, indices: torch.Tensor | None) -> list[IntArray]:
        if counts is None or indices is None:
            return [NO_RUNS] * len(grid.row_starts)
        count, index = counts.flatten().tolist(), indices.flatten(0, -2).cpu().numpy().astype(np.int64)
        starts = [index[row, : count[row]] * grid.block_k for row in range(len(grid.row_starts))]
        return [merge_runs(np.stack((s, np.minimum(s + grid.block_k, grid.total_k)), axis=1)) for s in starts]

    partial = rows(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = rows(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    yield from (_Strip(*runs) for runs in zip(partial, full, strict=True))


def _detect(
    mask_mod: MaskMod, grid: _Grid, strips: Iterable[_Strip], device: torch.device, max_slices: int
) -> AttnMask:
    """Join the intervals of all rows, strip by strip."""

    def intervals() -> Iterator[Iterator[tuple[int, int]]]:
        for start, strip in zip(grid.row_starts, strips, strict=True):
            rows = np.arange(start, min(start + grid.block_q, grid.total_q))
            yield from _intervals_by_row(mask_mod, rows, strip, grid.total_k + 1, device)

    def not_bands(bands: list[GrowingBand]) -> ValueError:
        return _not_bands(bands, grid, max_slices)

    return join_rows(intervals(), grid.total_q, grid.total_k, max_slices, not_bands)


def _intervals_by_row(
    mask_mod: MaskMod, rows: IntArray, strip: _Strip, stride: int, device: torch.device
) -> Iterator[Iterator[tuple[int, int]]]:
    """The half-open key intervals of each row of a strip, joined where they touch.

    Rows are kept apart on one number line by ``stride``, which is more than any key, so that one merge serves all.
    """
    every_row = (np.arange(len(rows)) * stride)[:, None, None] + strip.full
    pieces = [every_row.reshape(-1, 2)]
    keys = ranges_to_indices(strip.partial[:, 0], strip.partial[:, 1] - strip.partial[:, 0])
    at_once = max(1, _CELLS_AT_ONCE // len(rows))
    for first in range(0, len(keys), at_once):
        some = keys[first : first + at_once]
        row, start, end = true_runs(_evaluate(mask_mod, rows, some, device), some)
        pieces.append(np.stack((start, end), axis=1) + (row * stride)[:, None])
    runs = merge_runs(np.concatenate(pieces))
    row_of = runs[:, 0] // stride
    runs -= (row_of * stride)[:, None]
    return split_by_row(row_of, runs[:, 0], runs[:, 1], len(rows))


def _evaluate(mask_mod: MaskMod, rows: IntArray, keys: IntArray, device: torch.device) -> NDArray[np.bool_]:
    """``mask_mod`` for some rows and keys, bool ``(rows, keys)``."""
    q_idx, kv_idx = torch.from_numpy(rows).to(device)[:, None], torch.from_numpy(keys).to(device)[None]
    cells = mask_mod(BatchIndex.on(device), HeadIndex.on(device), q_idx, kv_idx)
    if not isinstance(cells, torch.Tensor) or cells.dtype != torch.bool:
        got = cells.dtype if isinstance(cells, torch.Tensor) else type(cells).__name__
        raise TypeError(f"mask_mod must return a bool tensor, True where a query attends a key, not {got}")
    try:
        return cells.expand(len(rows), len(keys)).cpu().numpy()
    except RuntimeError:
        raise ValueError(
            f"mask_mod returned shape {tuple(cells.shape)} for q_idx of shape {tuple(q_idx.shape)} and kv_idx of shape "
            f"{tuple(kv_idx.shape)}: it must broadcast to {(len(rows), len(keys))}"
        ) from None


def _not_bands(bands: list[GrowingBand], grid: _Grid, max_slices: int) -> ValueError:
    """The error that names the tile in which most bands begin, the first of them."""
    corners = np.array([(band.first_row, band.first_start) for band in bands])
    tiles, counts = np.unique(corners // (grid.block_q, grid.block_k), axis=0, return_counts=True)
    q_block, k_block = tiles[np.argmax(counts)].tolist()
    q_start, k_start = q_block * grid.block_q, k_block * grid.block_k
    q_end, k_end = min(q_start + grid.block_q, grid.total_q), min(k_start + grid.block_k, grid.total_k)
    return ValueError(
        f"the mask_mod over {grid.total_q} x {grid.total_k} cells needs more than max_slices = {max_slices} slices: "
        f"tile (q block {q_block}, k block {k_block}), queries [{q_start}, {q_end}) x keys [{k_start}, {k_end}), is "
        f"not made of bands, {counts.max()} begin in it. Raise max_slices if a mask with so little structure is meant"
    )
