"""Give chunks to ranks so that areas are equal and few rows move.

Where every query sees itself, the rows that all ranks receive are the sum over ranks of the keys a rank needs, less the
sequence: it does not matter who owns a row, only how many ranks need it. So a rank should take chunks that need the
same keys. In a causal document the chunk at position t needs all keys before t; once a rank has it, every earlier
chunk of the document is free for it. That suggests peeling: let one rank take the heaviest chunk that is left and its
neighbours, as many as its share of the area allows, then fill its places with the stretch of light chunks that costs
least and makes the area come out; then the next rank. Zigzag is what this gives for one causal document, the
contiguous cut for a sliding window.
"""

from dataclasses import dataclass

import numpy as np

from magi_attention.mask.bands import IntArray
from magi_attention.planning.chunking import ChunkWork
from magi_attention.planning.load_balance import (
    chunks_a_rank,
    deal_by_heap,
    last_chunk_is_pinned,
    min_heap,
    rank_areas,
)
from magi_attention.planning.numbering import number_along_sequence
from magi_attention.planning.runs import GroupedRuns
from magi_attention.planning.send_balance import balance_sends


def locality(work: ChunkWork, cp_size: int, tolerance: float) -> IntArray:
    """Few rows moved, with the most loaded rank at most ``1 + tolerance`` above the mean where the chunks allow it.

    Never worse than :func:`~magi_attention.planning.load_balance.min_heap`: where the heap's own balance lies above the
    tolerance it is the limit instead, and where peeling moves more rows, the heap's assignment is taken. Then sends are
    evened out and ranks numbered along the sequence.
    """
    heap = min_heap(work, cp_size)
    limit = max((1 + tolerance) * int(work.areas.sum()) / cp_size, int(rank_areas(work, heap, cp_size).max()))
    owner = _deal_anew(work, _even_out(work, _peel(work, cp_size, tolerance / 2), cp_size, limit), cp_size, limit)
    most_rows = work.rows_moved(heap)
    owner = owner if work.rows_moved(owner) <= most_rows else heap
    return number_along_sequence(work, balance_sends(work, owner, cp_size, limit, most_rows), cp_size)


def _peel(work: ChunkWork, cp_size: int, slack: float) -> IntArray:
    """One rank after another takes a share of what is left; the last one takes the rest, however large it is."""
    links = _Links.measure(work)
    by_area = np.argsort(work.areas, kind="stable")
    ranks = np.arange(cp_size)
    if last_chunk_is_pinned(work.num_chunks, cp_size):  # then its rank is the first, and the chunk its seed
        by_area = np.append(by_area[by_area != work.num_chunks - 1], work.num_chunks - 1)
        ranks = np.roll(ranks, 1)
    slots = chunks_a_rank(work.num_chunks, cp_size)
    owner = np.full(work.num_chunks, ranks[-1])
    free = np.ones(work.num_chunks, np.bool_)
    area_left = int(work.areas.sum())
    for turn, rank in enumerate(ranks[:-1].tolist()):
        target = area_left / (cp_size - turn)
        by_area = by_area[free[by_area]]
        share = _Share(int(slots[rank]), target, slack * target)
        taken = _fill(work, links, free, _grow_core(work, links, free, by_area, share), share)
        owner[taken] = rank
        free[taken] = False
        area_left -= int(work.areas[taken].sum())
    return owner


def _even_out(work: ChunkWork, owner: IntArray, cp_size: int, limit: float) -> IntArray:
    """Swap chunks of the most loaded rank for lighter ones, the cheapest swap that helps first, to keep the limit."""
    owner = owner.copy()
    movable = np.arange(work.num_chunks - last_chunk_is_pinned(work.num_chunks, cp_size))
    for _ in range(work.num_chunks):
        loads = rank_areas(work, owner, cp_size)
        worst = int(np.argmax(loads))
        if loads[worst] <= limit:
            break
        mine = np.flatnonzero(owner[movable] == worst)
        relief = work.areas[mine][:, None] - work.areas[movable]
        peak = np.maximum(loads[worst] - relief, loads[owner[movable]] + relief)
        if peak.min(initial=loads[worst]) >= loads[worst]:
            break
        needs = work.needs_of(owner)
        x, y = np.nonzero(peak <= limit)
        if len(x):
            given = _rows_beyond(work, needs, mine, np.arange(cp_size))
            got = _rows_beyond(work, needs, movable, np.array([worst]))[:, 0]
            best = int(np.argmin(given[x, owner[y]] + got[y]))
        else:
            x, y = np.nonzero(peak == peak.min())
            best = 0
        owner[mine[x[best]]], owner[y[best]] = owner[y[best]], worst
    return owner


def _deal_anew(work: ChunkWork, owner: IntArray, cp_size: int, limit: float) -> IntArray:
    """Pool the chunks of a few ranks and deal them by heap, of as few ranks as it takes to keep the limit.

    Where chunks are coarse, no single swap may help. Beside the ranks above the limit, those at the other end of the
    loads are tried, and those with many light chunks, which make areas come out. With all ranks in the pool this is
    the heap, which keeps the limit.
    """
    loads = rank_areas(work, owner, cp_size)
    if loads.max() <= limit:
        return owner
    slots = chunks_a_rank(work.num_chunks, cp_size)
    lights = np.bincount(owner[work.areas < work.areas.mean() / 2], minlength=cp_size)
    from_both_ends = np.abs(loads - np.median(loads))
    for pooled in range(2, cp_size + 1):
        for preference in (from_both_ends, lights):
            ranks = np.sort(np.argsort(-np.where(loads > limit, np.inf, preference), kind="stable")[:pooled])
            chunks = np.flatnonzero(np.isin(owner, ranks))
            pinned = last_chunk_is_pinned(work.num_chunks, cp_size) and ranks[-1] == cp_size - 1
            dealt = owner.copy()
            dealt[chunks] = ranks[deal_by_heap(work.areas[chunks], slots[ranks], pinned)]
            if rank_areas(work, dealt, cp_size).max() <= limit:
                return dealt
    raise AssertionError("the heap keeps the limit")


def _rows_beyond(work: ChunkWork, needs: GroupedRuns, chunks: IntArray, ranks: IntArray) -> IntArray:
    """Keys that a chunk needs and a rank does not, ``(len(chunks), len(ranks))``."""
    index = np.full(work.num_chunks, -1)
    index[chunks] = np.arange(len(chunks))
    at = index[work.needs.group]
    runs, at = work.needs.runs[at >= 0], at[at >= 0]
    shape = (len(runs), len(ranks))
    starts, ends = (np.broadcast_to(x[:, None], shape) for x in runs.T)
    extra = ends - starts - needs.covered(np.broadcast_to(ranks, shape), starts, ends)
    out = np.zeros((len(chunks), len(ranks)), np.int64)
    np.add.at(out, at, extra)
    return out


@dataclass(frozen=True, eq=False)
class _Share:
    slots: int
    target: float
    slack: float


@dataclass(frozen=True, eq=False)
class _Links:
    """What a chunk costs beside its neighbour: keys that it needs and the chunk before (behind) it does not."""

    after_previous: IntArray
    before_next: IntArray

    @classmethod
    def measure(cls, work: ChunkWork) -> "_Links":
        group, runs = work.needs.group, work.needs.runs
        shared = work.sum_by_chunk(work.needs.covered(group - 1, runs[:, 0], runs[:, 1]))  # with the chunk before
        after_previous = work.need_rows - shared
        before_next = work.need_rows.copy()
        before_next[:-1] -= shared[1:]
        return cls(after_previous, before_next)


def _grow_core(work: ChunkWork, links: _Links, free: np.ndarray, by_area: IntArray, share: _Share) -> IntArray:
    """The seed and free neighbours, cheapest first, while the lightest chunks could still fill the other places."""
    areas, seed = work.areas, int(by_area[-1])
    lightest = np.concatenate(([0], np.cumsum(areas[by_area[: share.slots]]))).tolist()
    core, load = [seed], int(areas[seed])
    left, right = seed - 1, seed + 1
    limit = share.target + share.slack
    while len(core) < share.slots:
        cost_left = links.before_next[left] if left >= 0 and free[left] else None
        cost_right = links.after_previous[right] if right < work.num_chunks and free[right] else None
        if cost_left is None and cost_right is None:
            break
        go_left = cost_right is None or (cost_left is not None and cost_left <= cost_right)
        chunk = left if go_left else right
        if load + areas[chunk] + lightest[share.slots - len(core) - 1] > limit:
            break
        core.append(chunk)
        load += int(areas[chunk])
        left, right = (left - 1, right) if go_left else (left, right + 1)
    return np.array(core)


def _fill(work: ChunkWork, links: _Links, free: np.ndarray, core: IntArray, share: _Share) -> IntArray:
    """The best way to use a first part of ``core`` and fill the other places with one stretch of the free chunks."""
    in_core = np.zeros(work.num_chunks, np.bool_)
    in_core[core] = True
    rest = np.flatnonzero(free & ~in_core)
    alone, beside = _stretch_costs(work, links, in_core, rest)
    area_before = np.concatenate(([0], np.cumsum(work.areas[rest])))
    cost_before = np.concatenate(([0], np.cumsum(beside)))
    entry = np.append(alone - beside, 0)  # what the first chunk of a stretch costs more than beside its predecessor
    price = work.need_rows[core[0]] / len(core)  # of a chunk left out of the core: others will need its keys again
    core_area = np.cumsum(work.areas[core])
    best: tuple[bool, float, int, int] | None = None
    for size in _core_sizes(len(core)):
        length = share.slots - size
        starts = len(rest) - length + 1
        if starts < 1:
            continue
        off = np.abs(area_before[length:] - area_before[:starts] - (share.target - core_area[size - 1]))
        fits = off <= share.slack
        if fits.any():
            cost = cost_before[length:] - cost_before[:starts] + entry[:starts] - size * price
            at = int(np.argmin(np.where(fits, cost, np.inf)))
            option = (False, float(cost[at]), size, at)
        else:
            at = int(np.argmin(off))
            option = (True, float(off[at]), size, at)
        best = option if best is None else min(best, option)
    assert best is not None
    _, _, size, at = best
    return np.concatenate((core[:size], rest[at : at + share.slots - size]))


def _core_sizes(largest: int) -> list[int]:
    """How much of the core to try: all, a little less, then fractions."""
    return sorted(
        {n for n in (largest, largest - 1, largest - 2, largest * 3 // 4, largest // 2, largest // 4, 1) if n > 0}
    )


def _stretch_costs(work: ChunkWork, links: _Links, in_core: np.ndarray, rest: IntArray) -> tuple[IntArray, IntArray]:
    """Keys that each chunk of ``rest`` needs beyond the core's: alone, and behind its predecessor in ``rest``."""
    needs = work.needs
    core_runs = needs.runs[in_core[needs.group]]
    line = np.zeros(len(core_runs), np.int64)
    core_needs = GroupedRuns.merge(line, core_runs[:, 0], core_runs[:, 1], needs.stride)
    shared = core_needs.covered(np.zeros(len(needs.runs), np.int64), needs.runs[:, 0], needs.runs[:, 1])
    alone = (work.need_rows - work.sum_by_chunk(shared))[rest]
    follows = np.zeros(len(rest), np.bool_)
    follows[1:] = rest[1:] == rest[:-1] + 1
    return alone, np.where(follows, np.minimum(links.after_previous[rest], alone), alone)
