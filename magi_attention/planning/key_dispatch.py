"""Give keys of another source than the queries to ranks: equal numbers of rows, where they are attended most."""

import numpy as np

from magi_attention.mask.bands import IntArray
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.load_balance import chunks_a_rank, last_chunk_is_pinned
from magi_attention.planning.runs import GroupedRuns


def dispatch_keys(
    needs: GroupedRuns, total_seqlen_k: int, chunk_size: int, cp_size: int, permutable: bool
) -> DispatchPlan:
    """Cut keys into chunks, without padding, and give them to ranks.

    Every key that is at home on a rank that attends it is one row less to receive, and nothing else matters for
    traffic once the queries have their ranks.

    Args:
        needs: The keys that each rank attends; a group is a rank.
        total_seqlen_k: Number of keys.
        chunk_size: Most rows in a chunk; few keys are cut into smaller ones, so that every rank gets some.
        cp_size: Number of ranks.
        permutable: Whether any rank may have any chunk. If not, rank r gets the r-th of ``cp_size`` equal runs.
    """
    share = max(total_seqlen_k // cp_size, 1)
    chunk_size = min(chunk_size, share) if permutable else share
    num_chunks = -(-total_seqlen_k // chunk_size)
    if permutable:
        starts = np.repeat(np.arange(num_chunks) * chunk_size, cp_size)
        attended = needs.covered(np.tile(np.arange(cp_size), num_chunks), starts, starts + chunk_size)
        owner = _where_attended_most(attended.reshape(num_chunks, cp_size))
    else:
        owner = np.repeat(np.arange(cp_size), chunks_a_rank(num_chunks, cp_size))
    return DispatchPlan(total_seqlen_k, 0, chunk_size, cp_size, owner)


def _where_attended_most(attended: IntArray) -> IntArray:
    """The rank of each chunk: one that attends much of it.

    Each chunk asks for the rank that attends most of it. A rank that too many ask for takes those that would lose most
    elsewhere, and the others ask for their next best. Where chunks don't divide among the ranks, every rank then takes
    one more of those that are left; the last chunk, which may be short, is among these.

    Args:
        attended: How many keys of each chunk each rank attends, ``(num_chunks, cp_size)``.
    """
    num_chunks, cp_size = attended.shape
    owner = np.full(num_chunks, -1)
    chunks = np.arange(num_chunks - last_chunk_is_pinned(num_chunks, cp_size))
    for room in (np.full(cp_size, num_chunks // cp_size), np.ones(cp_size, np.int64)):
        while len(chunks) and room.any():
            options = np.where(room > 0, attended[chunks], -1)
            asked = options.argmax(axis=1)
            best = np.sort(options, axis=1)[:, -2:]
            queue = np.lexsort((best[:, 0] - best[:, -1], asked))
            place = np.arange(len(queue)) - np.searchsorted(asked[queue], asked[queue])
            taken = queue[place < room[asked[queue]]]
            owner[chunks[taken]] = asked[taken]
            room = room - np.bincount(asked[taken], minlength=cp_size)
            chunks = chunks[owner[chunks] < 0]
        chunks = np.flatnonzero(owner < 0)
    return owner
