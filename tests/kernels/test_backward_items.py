"""How the work of the backward kernel is cut."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.kernels.hopper.backward_items import LEAST_TILES, Items, backward_items, keeps_step
from magi_attention.kernels.hopper.walk import Walk, build_walk
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import transpose

KEYS, QUERIES = 128, 64  # of a window, and of a tile


def items(walk: Walk, heads_kv: int, group: int, cached: float = 4.0) -> Items:
    return backward_items(walk, heads_kv, group, 132, cached)


def windows(*tiles: int, apart: bool = False) -> Walk:
    """Windows of keys with these numbers of tiles of queries, the same ones, or each window with queries of its own."""
    busy = np.array([n for n in tiles if n])
    first = np.where(apart, np.cumsum(busy) - busy, 0) * QUERIES
    entries = np.stack((first + (busy - 1) * QUERIES, busy, 0 * busy, 0 * busy), axis=1)
    spare = len(entries)
    entry = [*range(spare), *[spare] * (len(tiles) - spare)]
    table = [[n * KEYS, KEYS, entry[n], count, 0] for n, count in enumerate(sorted(tiles, key=lambda n: n == 0))]
    table.sort(key=lambda window: -window[3])
    entries = np.concatenate((entries, [[0, 1, 1, 0]] * 2)).astype(np.int32)
    num_rows, num_cols = len(tiles) * KEYS, int(max(tiles, default=0)) * QUERIES
    nothing = np.empty((1, 0), np.int32)
    return Walk(np.array(table, np.int32).reshape(-1, 5), entries, nothing, nothing, num_rows, num_cols, QUERIES)


def documents(lengths: list[int], causal: bool = False) -> AttnMask:
    return builders.varlen([*accumulate(lengths, initial=0)], causal=causal)


def walk_of(mask: AttnMask) -> Walk:
    return build_walk(transpose(mask.bands), mask.total_seqlen_k, mask.total_seqlen_q, KEYS, QUERIES)


@pytest.mark.parametrize("num_windows", [64, 128])
def test_whole_sequences_keep_their_heads_together(num_windows: int) -> None:
    few = 128 // num_windows
    assert items(windows(*[2 * num_windows] * num_windows), 8, 6) == Items(6, (few,) * (8 // few))


def test_very_long_sequences_do_not() -> None:
    assert items(windows(*[512] * 256), 8, 6, cached=1.0) == Items(3, (1,) * 16)
    assert items(windows(*[1024] * 512), 8, 4, cached=0.5) == Items(4, (1,) * 8)


@pytest.mark.parametrize(
    ("group", "members"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4), (12, 4), (16, 4), (15, 3)]
)
def test_uneven_windows_are_of_few_heads(group: int, members: int) -> None:
    assert items(windows(*range(2, 130, 2)), 48 // group, group).members == members


def test_uneven_windows_are_few_enough_for_the_cache() -> None:
    """Programs are at a head for each member of their items, of which the cache must hold most of the queries."""
    causal = windows(*range(2, 514, 2))
    assert [items(causal, 8, 8, cached).members for cached in (4.0, 2.0, 1.0)] == [4, 4, 2]
    assert items(windows(*[512] * 256), 8, 8, cached=1.0).members == 4, "in step or nearly so"


def test_the_last_group_of_heads_is_large_where_windows_differ() -> None:
    assert items(windows(*range(2, 130, 2)), 8, 6).groups == (2, 2, 2, 2, 2, 2, 4)
    assert items(windows(*[*range(122, 130)] * 8), 8, 6).groups == (2, 2, 2, 2)
    assert items(windows(*range(2, 34, 2)), 8, 8).groups[-1] > 12, "few windows: nearly all heads at once"


def test_groups_are_alike_where_windows_of_documents_differ() -> None:
    """Two of four heads end sooner than three of three, two and three."""
    walk = windows(*[33] * 30, *[25] * 20, *[10] * 15, apart=True)
    assert items(walk, 8, 6) == Items(6, (4, 4))
    assert items(walk, 7, 6).groups == (3, 4)
    assert items(walk, 8, 6, cached=3.5).groups == (2, 3, 3)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 99))
def test_groups_have_all_heads(tiles: list[int], heads_kv: int, group: int, cached: float) -> None:
    members, groups, most_tiles = items(windows(*tiles), heads_kv, group, cached)
    assert group % members == 0 and sum(groups) * members == heads_kv * group and min(groups) > 0
    assert most_tiles is None or (members == 1 and LEAST_TILES <= most_tiles < max(tiles))


def test_a_round_that_few_programs_have_work_in_is_avoided() -> None:
    """24 windows of 8 key heads are one round of 132 items, and one of 60; three rounds of less work are full."""
    assert items(windows(*[48] * 24), 8, 6).members == 3


@pytest.mark.parametrize(("num_windows", "members"), [(26, 2), (30, 6)])
def test_programs_are_busy_for_most_of_the_time(num_windows: int, members: int) -> None:
    """Two rounds of 132 items that are full to 0.79, and to 0.91."""
    assert items(windows(*[48] * num_windows), 8, 6).members == members


def test_a_few_long_windows_must_not_be_what_all_wait_for() -> None:
    """The first 133 items are long, so that some program gets two of them, and all others end long before."""
    long_ones, short_ones = [40] * 18, [4] * 60
    assert items(windows(*long_ones, *short_ones, apart=True), 8, 8).members < 8
    assert items(windows(*[40] * 63, apart=True), 8, 8).members == 8


def test_few_windows_are_cut() -> None:
    for tiles in ([1000], [1000, 3], [900, 900, 900]):
        members, _, most_tiles = items(windows(*tiles), 1, 8)
        assert members == 1 and most_tiles is not None
        assert LEAST_TILES <= most_tiles <= max(LEAST_TILES, 8 * sum(tiles) / 132 / 3)


def test_one_long_window_among_short_ones_is_cut() -> None:
    members, _, most_tiles = items(windows(2000, *[2] * 500), 1, 8)
    assert members == 1 and most_tiles is not None and most_tiles < 100


@pytest.mark.parametrize("tiles", [[], [0, 0], [2], [1, 2, 1]])
def test_what_is_short_anyway_is_left_whole(tiles: list[int]) -> None:
    assert items(windows(*tiles), 1, 8) == Items(8, (1,))


def test_pieces_are_not_shorter_than_what_they_cost() -> None:
    assert items(windows(LEAST_TILES), 1, 8) == Items(1, (8,))
    assert items(windows(LEAST_TILES + 1), 1, 8) == Items(1, (8,), LEAST_TILES)


def test_windows_that_share_queries_keep_step_if_they_have_as_many() -> None:
    assert keeps_step(walk_of(builders.full(4096)))
    assert keeps_step(walk_of(documents([3000, 500, 1800, 40, 2000])))
    assert keeps_step(walk_of(builders.sliding_window([0, 8192], (512, 0))))
    assert not keeps_step(walk_of(builders.causal(4096)))
    assert not keeps_step(walk_of(documents([3000, 500, 1800, 40, 2000], causal=True)))


def test_equal_neighbours_are_not_enough_to_keep_step() -> None:
    """As where a rank has chunks of four windows from all over a causal sequence."""
    stairs = np.repeat(np.arange(2, 34, 2), 4)
    assert not keeps_step(windows(*stairs))
    assert keeps_step(windows(*stairs, apart=True))


def test_idle_windows_do_not_count() -> None:
    assert keeps_step(windows(9, 0, 9, 0, 0, 0, 9))
