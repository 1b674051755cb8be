"""Node shares: the rows of a node cut among its ranks, for plans whose ranks are nodes."""

import numpy as np

from magi_attention.planning.dispatch_plan import DispatchPlan


def cut_among_ranks(dispatch: DispatchPlan, ranks_per_node: int) -> DispatchPlan:
    """The chunks of all ranks, where ``dispatch`` gives chunks to nodes.

    A node's chunks, in ascending order, are cut into runs of equal numbers, one for each of its ranks. So the rows of
    its ranks, laid one behind the other, are the rows of the node. Where numbers do not divide, the last ranks have one
    more: the last chunk of the sequence may be short.
    """
    place = np.empty_like(dispatch.owner)
    for node in range(dispatch.cp_size):
        chunks = dispatch.chunks(node)
        place[chunks] = (np.arange(1, len(chunks) + 1) * ranks_per_node - 1) // max(len(chunks), 1)
    return DispatchPlan(
        dispatch.total_seqlen,
        dispatch.pad_size,
        dispatch.chunk_size,
        dispatch.cp_size * ranks_per_node,
        dispatch.owner * ranks_per_node + place,
    )
