"""What the kernels share: rings of tiles in shared memory, the walk over a schedule, masks, and arithmetic."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from magi_attention.kernels.hopper import records
from magi_attention.kernels.hopper.gluon_compat import add_tile, store_tile

LOG2_E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

# Of records, what kernels read.
WINDOW_ROW = gl.constexpr(records.WINDOW_ROW)
WINDOW_ROWS = gl.constexpr(records.WINDOW_ROWS)
WINDOW_ENTRY = gl.constexpr(records.WINDOW_ENTRY)
WINDOW_TILES = gl.constexpr(records.WINDOW_TILES)
WINDOW_FLAGS = gl.constexpr(records.WINDOW_FLAGS)
WINDOW_SIZE = gl.constexpr(records.WINDOW_SIZE)
ENTRY_COLUMN = gl.constexpr(records.ENTRY_COLUMN)
ENTRY_TILES = gl.constexpr(records.ENTRY_TILES)
ENTRY_CODE = gl.constexpr(records.ENTRY_CODE)
ENTRY_SIZE = gl.constexpr(records.ENTRY_SIZE)
BATCH_FIRST = gl.constexpr(records.BATCH_FIRST)
BATCH_END = gl.constexpr(records.BATCH_END)
BATCH_SIZE = gl.constexpr(records.BATCH_SIZE)
FLAG_BITS = gl.constexpr(records.FLAG_BITS)
FLAG_MASK = gl.constexpr(records.FLAG_MASK)
ROW_ENDS_INSIDE = gl.constexpr(records.ROW_ENDS_INSIDE)
ROW_BEGINS_INSIDE = gl.constexpr(records.ROW_BEGINS_INSIDE)
GOES_ON = gl.constexpr(records.GOES_ON)
ENDS = gl.constexpr(records.ENDS)


class WalkArgs(NamedTuple):
    """A walk, see :class:`magi_attention.kernels.hopper.walk.Walk`, as kernels take it.

    Items are pairs of a window and a head. A program takes one of ``num_batches`` batches of them, see
    :mod:`magi_attention.kernels.hopper.batches`, or, if there are none, items in turns with the others. Then ``heads``
    are walked side by side, so that few are in the cache at a time: all windows of the first ``heads`` heads, then of
    the next. With batches it is one.
    """

    windows: Any
    entries: Any
    starts: Any
    ends: Any
    batches: Any
    layer_stride: int
    num_windows: int
    heads: int
    num_items: int
    num_batches: int


class Ring(NamedTuple):
    """Tiles in shared memory that the producer fills and the consumers empty, over and over."""

    tiles: Any
    full: Any
    empty: Any


class Rows(NamedTuple):
    """A ``(tokens, heads, head_dim)`` tensor that results are stored to. A descriptor of its tiles goes with it, None
    where they are not of the products' type; descriptors cannot travel inside of tuples."""

    ptr: Any
    token_stride: int
    head_stride: int


@gluon.jit
def make_ring(tiles, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return Ring(tiles, full, empty)


class Turns(NamedTuple):
    """Which items a program takes, one each turn: those at ``first + turn * step``, and in every second turn ``swing``
    further on, as long as that is before ``end``."""

    first: Any
    step: Any
    swing: Any
    end: Any


@gluon.jit
def find_turns(walk):
    """The turns of this program: the items of its batch.

    Where there are no batches, programs deal the items out among themselves, one each a turn, and every second turn in
    reverse order: windows get lighter from first to last, and so two turns weigh about the same for each program.
    """
    programs, program = gl.num_programs(0), gl.program_id(0)
    first, step, swing, end = program, programs, programs - 1 - 2 * program, walk.num_items
    if walk.num_batches > 0:
        batch = walk.batches + program * BATCH_SIZE
        first, end = gl.load(batch + BATCH_FIRST), gl.load(batch + BATCH_END)
        step, swing = 1, 0
    return Turns(first, step, swing, end)


class Item(NamedTuple):
    """A window and a head: whether there is a turn for it, rows ``row`` to ``row + rows``, where their entries are, and
    the window's flags."""

    exists: Any
    head: Any
    row: Any
    rows: Any
    entry: Any
    tiles: Any
    flags: Any


@gluon.jit
def load_item(walk, turns, turn, ALTERNATE: gl.constexpr):
    """The item of a turn; behind the last one, some window and maybe no head.

    Of the groups of heads that are walked side by side, every second one may begin with its last window, so that
    weights go on where they were; the last group begins with its first. So do all where there are batches.
    """
    index = turns.first + turn * turns.step + (turn & 1) * turns.swing
    size = walk.num_windows * walk.heads
    group = index // size
    window = index % size // walk.heads
    if ALTERNATE:
        backwards = (walk.num_batches == 0) & (((walk.num_items // size - group) & 1) == 0)
        window = gl.where(backwards, walk.num_windows - 1 - window, window)
    head = group * walk.heads + index % walk.heads
    exists = index < turns.end
    at = walk.windows + window * WINDOW_SIZE
    row, rows, entry = gl.load(at + WINDOW_ROW), gl.load(at + WINDOW_ROWS), gl.load(at + WINDOW_ENTRY)
    return Item(exists, head, row, rows, entry, gl.load(at + WINDOW_TILES), gl.load(at + WINDOW_FLAGS))


@gluon.jit
def load_entry(walk, entry):
    """The column of an entry's first tile to visit, the number of its tiles, and the code of their layer and flags."""
    at = walk.entries + entry * ENTRY_SIZE
    return gl.load(at + ENTRY_COLUMN), gl.load(at + ENTRY_TILES), gl.load(at + ENTRY_CODE)


@gluon.jit
def load_intervals(walk, code, row, rows, like: gl.constexpr, LAYERED: gl.constexpr):
    """Start and end of the columns of 64 rows in the layer of ``code``; of rows from the ``rows``-th on, nothing."""
    index = gl.arange(0, 64, layout=like)
    where = row + index
    if LAYERED:
        where += gl.cast(code >> FLAG_BITS, gl.int64) * walk.layer_stride
    exists = index < rows
    return gl.load(walk.starts + where, mask=exists, other=0), gl.load(walk.ends + where, mask=exists, other=0)


@gluon.jit
def columns_before(like, ends):
    """Which columns of a tile in the layout of ``like`` come before each row's end.

    A thread has the columns ``2 * (lane % 4)`` plus constants. The two parts are taken apart, so that the comparisons
    are with constants and no registers hold column numbers.
    """
    col = gl.arange(0, like.shape[1], layout=gl.SliceLayout(0, like.type.layout))
    return (col & ~6)[None, :] < ends[:, None] - (col & 6)[None, :]


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def side_by_side(x):
    """A tile of 64 columns in another order of columns; twice gives the first again.

    Of a product's result a thread has the columns ``8 * n + 2 * (lane % 4)`` and the next one, for eight ``n``. In this
    order two ``n`` are neighbours, so that it stores four numbers at a time, and eight threads fill all banks once.
    """
    return x.reshape([x.shape[0], 2, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape(x.shape)


@gluon.jit
def row_pointers(like, x, row, head, kept, HEAD_DIM: gl.constexpr, COLUMN: gl.constexpr):
    """Where a head's columns from ``COLUMN`` on are, of rows from ``row`` on, in the layout of ``like``, and which
    elements are to be kept."""
    token = gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, like.type.layout))
    dim = COLUMN + gl.arange(0, like.shape[1], layout=gl.SliceLayout(0, like.type.layout))
    start = x.ptr + gl.cast(row, gl.int64) * x.token_stride + gl.cast(head, gl.int64) * x.head_stride
    offset = (token.to(gl.int64) * x.token_stride)[:, None] + dim[None, :]
    return start + offset, kept[:, None] & (dim < HEAD_DIM)[None, :]


@gluon.jit
def load_kept(like, x, row, head, kept, HEAD_DIM: gl.constexpr, COLUMN: gl.constexpr):
    ptr, exists = row_pointers(like, x, row, head, kept, HEAD_DIM, COLUMN)
    return gl.load(ptr, mask=exists, other=0.0)


@gluon.jit
def store_kept(result, x, row, head, kept, HEAD_DIM: gl.constexpr, COLUMN: gl.constexpr = 0):
    ptr, exists = row_pointers(result, x, row, head, kept, HEAD_DIM, COLUMN)
    gl.store(ptr, result, mask=exists)


@gluon.jit
def first_rows(like, live):
    """The first ``live`` rows of a tile in the layout of ``like``."""
    return gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, like.type.layout)) < live


@gluon.jit
def store_rows(result, x, x_desc, buffer, row, head, live, HEAD_DIM: gl.constexpr, COLUMN: gl.constexpr = 0):
    """Store a tile of results, of which ``live`` rows exist; whole ones leave by a bulk copy from ``buffer``.

    If the buffer has more columns, those must be behind the last one of a head, where copies end.
    """
    if x_desc is None:
        store_kept(result, x, row, head, first_rows(result, live), HEAD_DIM, COLUMN)
    else:
        low = result.to(x_desc.dtype)
        if live >= result.shape[0]:
            tma.store_wait(0)
            buffer.reshape([low.shape[0], buffer.shape[2]]).slice(0, low.shape[1], dim=1).store(low)
            fence_async_shared()
            store_tile(x_desc, [row, head, COLUMN], buffer)
        else:
            store_kept(low, x, row, head, first_rows(low, live), HEAD_DIM, COLUMN)


@gluon.jit
def split_columns(result, COLUMNS: gl.constexpr):
    """A tile of results as a tuple of tiles of up to ``COLUMNS`` columns: itself, or both its halves."""
    if result.shape[1] <= COLUMNS:
        blocks = (result,)
    else:
        blocks = result.reshape([result.shape[0], 2, COLUMNS]).permute((0, 2, 1)).split()
    return blocks


@gluon.jit
def add_rows(result, x_desc, buffer, row, column):
    """Add a tile of results to memory by bulk reductions, 64 columns at a time."""
    blocks = split_columns(result, 64)
    for n in gl.static_range(result.shape[1] // 64):
        tma.store_wait(0)
        buffer.store(blocks[n])
        fence_async_shared()
        add_tile(x_desc, [row, column + n * 64], buffer)
