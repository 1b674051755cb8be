"""A walk holds exactly the mask, and what a kernel does with it is attention."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels.hopper.records import (
    ENDS,
    ENTRY_CODE,
    ENTRY_COLUMN,
    ENTRY_SIZE,
    ENTRY_TILES,
    FLAG_BITS,
    FLAG_MASK,
    GOES_ON,
    ROW_BEGINS_INSIDE,
    ROW_ENDS_INSIDE,
    WINDOW_ENTRY,
    WINDOW_ROW,
    WINDOW_ROWS,
    WINDOW_SIZE,
    WINDOW_TILES,
)
from magi_attention.kernels.hopper.walk import READ_AHEAD, SPARE_ENTRIES, Walk, build_walk, cut_long_windows
from magi_attention.kernels.hopper.windows import MASK_COST, TILE_COST, WINDOW_COST
from magi_attention.kernels.parts import Part
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import transpose
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

BLOCKS = [(4, 8), (8, 4), (64, 128), (1, 1), (7, 3)]


class Tile(NamedTuple):
    window: int
    col: int
    layer: int
    flags: int


def walk_tiles(walk: Walk, step: int) -> Iterator[Tile]:
    """Every tile in the order in which a kernel visits it, which it learns from the arrays alone."""
    for window, (_, _, entry, num_tiles, _) in enumerate(walk.windows.tolist()):
        left = 0
        for _ in range(num_tiles):
            if left == 0:
                col, left, code, _ = walk.entries[entry].tolist()
                entry += 1
            yield Tile(window, col, code >> FLAG_BITS, code & FLAG_MASK)
            left, col = left - 1, col + step


def kept(walk: Walk, tile: Tile, rows: slice, block_cols: int, flags: int) -> np.ndarray:
    """The cells of a tile that remain when it is masked as `flags` say, shape (rows, block_cols)."""
    cols = tile.col + np.arange(block_cols)
    keep = np.ones((rows.stop - rows.start, block_cols), np.bool_)
    if flags & ROW_ENDS_INSIDE:
        keep &= cols < walk.ends[tile.layer, rows, None]
    if flags & ROW_BEGINS_INSIDE:
        keep &= cols >= walk.starts[tile.layer, rows, None]
    return keep


def check(mask: AttnMask, block_rows: int, block_cols: int, transposed: bool = False, apart: bool = False) -> Walk:
    dense = mask.to_dense().T if transposed else mask.to_dense()
    bands = transpose(mask.bands) if transposed else mask.bands
    align = 4 if transposed and block_cols % 4 == 0 else 1
    goes_on, attends = np.arange(dense.shape[0]) % 7 < 3, dense.any(1)
    waiting = goes_on & ~attends
    own = (attends, ~waiting)[block_rows % 2] if apart else None
    part = Part(goes_on, waiting, own)
    walk = build_walk(bands, *dense.shape, block_rows, block_cols, align, part)
    assert not (walk.entries[:, ENTRY_COLUMN] % align).any()
    num_rows, num_cols = dense.shape
    assert (walk.num_rows, walk.num_cols) == dense.shape
    assert all(x.dtype == np.int32 for x in (walk.windows, walk.entries, walk.starts, walk.ends))
    assert all(x.flags.c_contiguous for x in (walk.windows, walk.entries, walk.starts, walk.ends))

    windows = walk.windows
    assert windows.shape[1] == WINDOW_SIZE and walk.entries.shape[1] == ENTRY_SIZE
    assert sorted(i for first, rows, *_ in windows.tolist() for i in range(first, first + rows)) == [*range(num_rows)]
    assert ((windows[:, WINDOW_ROWS] >= 1) & (windows[:, WINDOW_ROWS] <= block_rows)).all()
    assert (np.diff(windows[:, WINDOW_TILES]) <= 0).all(), "the heaviest window comes first"
    waits = [not dense[a : a + n].any() and goes_on[a : a + n].all() for a, n, *_ in windows.tolist()]
    assert sorted(waits) == waits and sum(waits) == walk.num_waiting, "what waits for a later part comes last"
    same = (np.diff(windows[:, WINDOW_TILES]) == 0) & (np.diff(waits) == 0)
    assert (np.diff(windows[:, WINDOW_ROW])[same] > 0).all(), "windows of one weight keep their order"
    for padded in (walk.starts, walk.ends):
        assert padded.shape[1] >= max(windows[:, WINDOW_ROW], default=0) + block_rows + READ_AHEAD
        assert (padded[:, num_rows:] == 0).all()

    for first, rows, _, _, flags in windows.tolist():
        assert own is None or len(set(own[first : first + rows])) == 1, "a window is of one kind of rows"
        going = goes_on[first : first + rows]
        assert flags == GOES_ON * going.any() + ENDS * (not going.all())

    assert walk.entries[-SPARE_ENTRIES:].tolist() == [[0, 1, ROW_ENDS_INSIDE, 0]] * 2
    assert (walk.entries[:, ENTRY_TILES] >= 1).all() and (walk.entries[:, 3] == 0).all()
    assert windows[:, WINDOW_TILES].sum() == walk.entries[:-SPARE_ENTRIES, ENTRY_TILES].sum(), (
        "each entry is of one window"
    )
    idle = windows[:, WINDOW_TILES] == 0
    assert (windows[idle, WINDOW_ENTRY] == len(walk.entries) - SPARE_ENTRIES).all(), (
        "windows without tiles have the first spare entry"
    )

    count = np.zeros((num_rows, num_cols + block_cols), np.int64)
    before: Tile | None = None
    for tile in walk_tiles(walk, -block_cols):
        if before is not None and before.window == tile.window:
            low = tile.layer, tile.col + (tile.layer == before.layer) * block_cols
            assert low <= (before.layer, before.col)
        before = tile
        assert 0 <= tile.col < num_cols and 0 <= tile.layer < len(walk.starts)
        rows = slice(windows[tile.window, WINDOW_ROW], windows[tile.window, :2].sum())
        cells = kept(walk, tile, rows, block_cols, ROW_ENDS_INSIDE | ROW_BEGINS_INSIDE)
        assert cells.any(), "a tile that no row attends is absent"
        assert (kept(walk, tile, rows, block_cols, tile.flags) == cells).all(), "flags mask all that must be masked"
        assert (tile.flags == 0) == cells.all(), "full tiles have no flags"
        cols = tile.col + np.arange(block_cols)
        assert (tile.flags & ROW_ENDS_INSIDE != 0) == bool((walk.ends[tile.layer, rows] <= cols[-1]).any())
        assert (tile.flags & ROW_BEGINS_INSIDE != 0) == bool((walk.starts[tile.layer, rows] > cols[0]).any())
        count[rows, tile.col : tile.col + block_cols] += cells
    assert (count[:, :num_cols] == dense).all() and not count[:, num_cols:].any(), "each attended cell is in one tile"
    return walk


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks(name: str, blocks: tuple[int, int], transposed: bool) -> None:
    check(named_masks(103)[name], *blocks, transposed)
    check(named_masks(331)[name], 64, 128, transposed)
    check(named_masks(331)[name], 64, 128, transposed, apart=True)


@settings(max_examples=300, deadline=None)
@given(masks(max_seqlen=60), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_generated_masks(mask: AttnMask, block_rows: int, block_cols: int, transposed: bool) -> None:
    check(mask, block_rows, block_cols, transposed, apart=block_cols % 2 == 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=20), st.booleans(), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_generated_documents(lengths: list[int], causal: bool, rows: int, cols: int, transposed: bool) -> None:
    check(builders.varlen(builders.cu_seqlens_from_lengths(lengths), causal=causal), rows, cols, transposed)


def attend(walk: Walk, q: np.ndarray, k: np.ndarray, v: np.ndarray, blocks: tuple[int, int]) -> np.ndarray:
    """Attention as a kernel computes it: an online softmax over the tiles of a window, masked where flags say so.

    Reads behind the last row or column give zeros. A window is always block_rows rows, of which the last are not
    stored if it has fewer. A window without tiles is computed like one with one tile.
    """
    block_rows, block_cols = blocks
    q, k, v = (np.concatenate((x, np.zeros((sum(blocks), x.shape[1])))) for x in (q, k, v))
    walk = replace(walk, windows=np.maximum(walk.windows, [0, 0, 0, 1, 0]))
    tiles: dict[int, list[Tile]] = {}
    for tile in walk_tiles(walk, -block_cols):
        tiles.setdefault(tile.window, []).append(tile)
    out = np.full((walk.num_rows, v.shape[1]), np.nan)
    for window, (first, num_rows, *_) in enumerate(walk.windows.tolist()):
        rows = slice(first, first + block_rows)
        acc, total, top = np.zeros((block_rows, v.shape[1])), np.zeros(block_rows), np.full(block_rows, -np.inf)
        for tile in tiles[window]:
            cols = slice(tile.col, tile.col + block_cols)
            scores = np.where(kept(walk, tile, rows, block_cols, tile.flags), q[rows] @ k[cols].T, -np.inf)
            new_top = np.maximum(top, scores.max(axis=1))
            base = np.where(np.isneginf(new_top), 0, new_top)
            p, decay = np.exp(scores - base[:, None]), np.exp(top - base)
            acc, total, top = acc * decay[:, None] + p @ v[cols], total * decay + p.sum(axis=1), new_top
        out[first : first + num_rows] = (acc / np.where(total > 0, total, 1)[:, None])[:num_rows]
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [(4, 8), (8, 4), (64, 128)])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_a_kernel_that_walks_computes_attention(name: str, blocks: tuple[int, int], transposed: bool) -> None:
    mask = named_masks(143)[name]
    dense = mask.to_dense().T if transposed else mask.to_dense()
    num_rows, num_cols = dense.shape
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 6)) for n in (num_rows, num_cols, num_cols))
    p = np.exp(q @ k.T) * dense
    want = p @ v / np.where(dense.any(axis=1), p.sum(axis=1), 1)[:, None]

    walk = build_walk(transpose(mask.bands) if transposed else mask.bands, *dense.shape, *blocks)
    got = attend(walk, q, k, v, blocks)
    # Both are means of v, whose weights have some roundings: of a score, which is a sum of 6 products, minus the row's
    # largest, and for every tile again of the change of the largest, which adds up to no more than twice the score; of
    # exp, and of its product with every tile's decay. Then weights, and their products with v, are added up.
    size = (np.abs(q) @ np.abs(k).T).max()
    num_tiles = walk.windows[:, WINDOW_TILES].max(initial=0)
    roundings = (6 + 1 + 2) * size + 1 + 2 * num_tiles + num_cols
    bound = 2 * (2 * roundings) * np.finfo(float).eps * np.abs(v).max()
    assert np.abs(got - want).max() <= bound


def first_rows(mask: AttnMask) -> list[int]:
    return sorted(check(mask, 64, 128).windows[:, WINDOW_ROW].tolist())


def documents(lengths: list[int], causal: bool = False) -> AttnMask:
    return builders.varlen(builders.cu_seqlens_from_lengths(lengths), causal=causal)


def test_windows_begin_with_documents() -> None:
    assert first_rows(documents([128 + 40, 64 + 41])) == [0, 64, 128, 168, 168 + 64]


def test_documents_that_fit_share_a_window() -> None:
    assert first_rows(documents([20] * 9)) == [0, 60, 120]
    assert first_rows(documents([100, 10, 10, 64])) == [0, 64, 120]


def test_documents_are_joined_where_it_saves_a_window() -> None:
    assert first_rows(documents([70, 150])) == [0, 64, 128, 192]


def test_documents_are_not_joined_where_it_masks_many_tiles() -> None:
    assert 2570 in first_rows(documents([2570, 340]))


def test_a_shared_prompt_is_not_read_again_for_each_answer() -> None:
    rows = first_rows(builders.shared_prefix(300, [70] * 10))
    assert rows == [*range(0, 1000, 64)]


def test_long_answers_begin_windows() -> None:
    assert {0, 20 + 512 + 33} <= set(first_rows(builders.shared_prefix(20, [512 + 33, 512 + 40, 512 + 40])))


def test_rows_without_columns_are_windows_without_tiles() -> None:
    walk = check(AttnMask.from_slices([(70, 140)], [(0, 300)], "full", 500, 300), 64, 128)
    assert walk.windows[:, WINDOW_TILES].tolist() == [3, 3, 0, 0, 0, 0, 0, 0]


def test_rows_without_columns_join_those_behind() -> None:
    assert first_rows(AttnMask.from_slices([(40, 128)], [(1000, 1100)], "full", 128, 1100)) == [0, 64]


def cost(walk: Walk) -> int:
    num_tiles, code = walk.entries[:-SPARE_ENTRIES, ENTRY_TILES], walk.entries[:-SPARE_ENTRIES, ENTRY_CODE]
    masked = num_tiles[code & FLAG_MASK != 0].sum()
    return int(TILE_COST * num_tiles.sum() + MASK_COST * masked + WINDOW_COST * len(walk.windows))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.booleans(), st.integers(1, 20), st.integers(10, 20))
def test_documents_cost_no_more_than_each_alone(lengths: list[int], causal: bool, rows: int, cols: int) -> None:
    together = cost(check(documents(lengths, causal), rows, cols))
    assert together <= sum(cost(check(documents([n], causal), rows, cols)) for n in lengths)


def test_a_causal_million_has_two_entries_a_window() -> None:
    walk = build_walk(builders.causal(1 << 20).bands, 1 << 20, 1 << 20, 64, 128)
    assert len(walk.windows) == 1 << 14
    assert len(walk.entries) - SPARE_ENTRIES == 2 * len(walk.windows) - 2, (
        "the first two windows have a partial tile only"
    )
    assert walk.windows[:, WINDOW_TILES].sum() == sum(range(1, (1 << 13) + 1)) * 2


def test_empty() -> None:
    nothing = np.empty((0, 6), np.int64)
    for num_rows, num_cols in ((0, 0), (0, 5), (5, 0), (5, 5)):
        walk = build_walk(nothing, num_rows, num_cols, 4, 4)
        assert walk.windows[:, WINDOW_ROWS].sum() == num_rows and not walk.windows[:, WINDOW_TILES].any()
        assert len(walk.entries) == SPARE_ENTRIES


@given(masks(max_seqlen=30))
def test_transpose(mask: AttnMask) -> None:
    turned = AttnMask.from_bands(transpose(mask.bands), mask.total_seqlen_k, mask.total_seqlen_q)
    assert (turned.to_dense() == mask.to_dense().T).all()


@settings(max_examples=200, deadline=None)
@given(masks(max_seqlen=60), st.integers(1, 20), st.integers(1, 12), st.integers(1, 6))
def test_cut_windows_have_the_same_tiles(mask: AttnMask, block_rows: int, block_cols: int, most_tiles: int) -> None:
    walk = build_walk(mask.bands, *mask.to_dense().shape, block_rows, block_cols)
    cut = cut_long_windows(walk, most_tiles)
    assert cut.windows.dtype == cut.entries.dtype == np.int32
    assert (cut.windows[:, WINDOW_TILES] <= most_tiles).all() and (np.diff(cut.windows[:, WINDOW_TILES]) <= 0).all()
    assert (cut.entries[:, ENTRY_TILES] >= 1).all() and cut.entries[-SPARE_ENTRIES:].tolist() == walk.entries[
        -SPARE_ENTRIES:
    ].tolist()
    idle = cut.windows[:, WINDOW_TILES] == 0
    assert (cut.windows[idle, WINDOW_ENTRY] == len(cut.entries) - SPARE_ENTRIES).all()

    def tiles(walk: Walk) -> list[tuple[int, ...]]:
        """The row at which each tile's window begins, its number of rows, and the tile, in any order."""
        return sorted((*walk.windows[tile.window, :2].tolist(), *tile[1:]) for tile in walk_tiles(walk, -block_cols))

    assert tiles(cut) == tiles(walk)
    pieces = np.unique(cut.windows[:, :2], axis=0, return_counts=True)
    whole = walk.windows[np.argsort(walk.windows[:, WINDOW_ROW])]
    assert (pieces[0] == whole[:, :2]).all() and (
        pieces[1] == np.maximum(-(-whole[:, WINDOW_TILES] // most_tiles), 1)
    ).all()
