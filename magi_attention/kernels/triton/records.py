"""Records: what is where in the arrays of integers that a walk is made of. The host and the kernels go by these names.

A tile or a run is a row of its array, see :class:`magi_attention.kernels.triton.tile_walk.Tables`.
"""

TILE_START, TILE_END, TILE_FIRST_RUN, TILE_END_RUN, TILE_LAYERS = range(5)
TILE_SIZE = 5

RUN_START, RUN_FULL_END, RUN_END = range(3)
RUN_SIZE = 3
