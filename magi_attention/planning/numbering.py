"""Number ranks along the sequence, so that ranks which need the same rows share a node.

Nodes hold ranks of consecutive numbers. Which chunks a rank has decides what travels; what number it has decides only
whether that stays inside a node. Ranks that share a document need much the same rows, and their chunks lie near each
other.
"""

import numpy as np

from magi_attention.mask.bands import IntArray
from magi_attention.planning.chunking import ChunkWork


def number_along_sequence(work: ChunkWork, owner: IntArray, cp_size: int) -> IntArray:
    """The same shares, with ranks in the order of the centres of their areas: the mean place of their cells.

    Args:
        work: The chunks.
        owner: The rank of each chunk.
        cp_size: Number of ranks.
    """
    area = np.bincount(owner, work.areas, cp_size)
    moment = np.bincount(owner, work.areas * np.arange(work.num_chunks), cp_size)
    number = np.empty(cp_size, np.int64)
    number[np.argsort(moment / np.maximum(area, 1), kind="stable")] = np.arange(cp_size)
    return number[owner]
