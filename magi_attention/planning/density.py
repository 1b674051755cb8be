"""Density: how much of what a rank's queries could attend they do attend, and what follows for its backward pass.

The loop of a backward pass may have kernels of stages beside that of own keys, which fills what stages leave. Masks of
short documents and windows gain by it: their kernels are short, and end with few programs. Where most queries attend
most keys, kernels are long, so that there is little to fill, and their programs read the same queries at the same time
from the cache, until those of another kernel come between them.
"""

import numpy as np
from numpy.typing import NDArray

from magi_attention.planning.chunking import ChunkWork
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.load_balance import rank_areas
from magi_attention.planning.runs import sum_by_group

MOST_FILLED = 1 / 3
"""Density from which on kernels run one after the other; see docs/notes/2026-11-28-queries-in-the-cache.md."""


def density(work: ChunkWork, dispatch: DispatchPlan) -> NDArray[np.float64]:
    """Of each rank's queries and all keys that any of them attends, the share of unmasked cells, ``(cp_size,)``."""
    needs = work.needs_of(dispatch.owner)
    keys = sum_by_group(needs.group, needs.lengths, dispatch.cp_size)
    return rank_areas(work, dispatch.owner, dispatch.cp_size) / np.maximum(keys * dispatch.real_seqlens, 1)


def own_keys_fill(work: ChunkWork, dispatch: DispatchPlan) -> NDArray[np.bool_]:
    """On which ranks own keys fill the time that stages leave in the backward pass, if the engine allows it."""
    return density(work, dispatch) < MOST_FILLED
