"""Records: what is where in the arrays of integers that a walk is made of. The host and the kernels go by these names.

A window or an entry is a row of its array, see :class:`magi_attention.kernels.hopper.walk.Walk`; a batch is one of what
:func:`magi_attention.kernels.hopper.batches.cut_batches` returns.
"""

WINDOW_ROW, WINDOW_ROWS, WINDOW_ENTRY, WINDOW_TILES, WINDOW_FLAGS = range(5)
WINDOW_SIZE = 5

ENTRY_COLUMN, ENTRY_TILES, ENTRY_CODE = range(3)
ENTRY_SIZE = 4
"""One more than there are columns: entries begin at 16 bytes."""

BATCH_FIRST, BATCH_END = range(2)
BATCH_SIZE = 2

FLAG_BITS = 2
"""Bits of an entry's code that are flags of its tiles; those above are the layer."""

FLAG_MASK = (1 << FLAG_BITS) - 1
"""These bits."""

ROW_ENDS_INSIDE = 1
"""Flag of a tile: of some row, the columns end before the tile does. Cells are kept where ``column < ends``."""

ROW_BEGINS_INSIDE = 2
"""Flag of a tile: of some row, the columns start behind the tile's first. Cells are kept where ``column >= starts``."""

GOES_ON = 1
"""Flag of a window: some row has keys in a later part of the keys, see :mod:`magi_attention.kernels.parts`."""

ENDS = 2
"""Flag of a window: some row has no keys in a later part."""
