"""How busy programs are that deal items out in turns, and how many heads they have side by side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.kernels.hopper.turns import busy_share, heads_side_by_side

PROGRAMS = 132


def loads(tiles: list[int], heads: int, all_heads: int, programs: int) -> list[int]:
    """What each program has to do, turn by turn, as ``find_turns`` and ``load_item`` of the kernels have it."""
    num_items, size = len(tiles) * all_heads, len(tiles) * heads
    result = []
    for program in range(programs):
        load = turn = 0
        while (index := program + turn * programs + (turn & 1) * (programs - 1 - 2 * program)) < num_items:
            group, window = index // size, index % size // heads
            if (num_items // size - group) & 1 == 0:
                window = len(tiles) - 1 - window
            load += max(tiles[window], 1) + 1
            turn += 1
        result.append(load)
    return result


@given(
    tiles=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    programs=st.integers(1, 7),
)
def test_share_of_any_windows(tiles: list[int], heads: int, groups: int, programs: int) -> None:
    tiles = sorted(tiles, reverse=True)
    load = loads(tiles, heads, heads * groups, programs)
    share = busy_share(np.array(tiles, np.int32), heads, heads * groups, programs)
    assert share == pytest.approx(sum(load) / (programs * max(load)))


def test_as_many_as_the_cache_holds_where_more_bring_nothing() -> None:
    alike, causal = np.full(256, 64, np.int32), np.arange(256, 0, -1, dtype=np.int32)
    assert heads_side_by_side(alike, 2, 16, PROGRAMS) == heads_side_by_side(causal, 2, 16, PROGRAMS) == 2


@pytest.mark.parametrize(("num_windows", "before", "after"), [(68, 0.56, 0.9), (200, 0.83, 0.95), (261, 0.66, 0.95)])
def test_more_where_lengths_differ(num_windows: int, before: float, after: float) -> None:
    """As on packed documents: some programs would get the longest windows of one head, and again of the next."""
    tiles = np.geomspace(64, 1, num_windows).astype(np.int32)
    assert busy_share(tiles, 1, 16, PROGRAMS) < before
    assert busy_share(tiles, heads_side_by_side(tiles, 1, 16, PROGRAMS), 16, PROGRAMS) > after


def test_no_more_than_leaves_some_programs_at_each_head() -> None:
    tiles = np.geomspace(16, 1, 40).astype(np.int32)
    assert heads_side_by_side(tiles, 2, 128, PROGRAMS) <= 16


def test_no_more_where_there_are_many_windows() -> None:
    tiles = np.repeat([64, 4], [1000, 1200]).astype(np.int32)
    assert heads_side_by_side(tiles, 1, 16, PROGRAMS) == 1
