"""How windows are cut into batches: all in order, none too long, and enough of them for all programs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.kernels.hopper.batches import cut_batches

PROGRAMS = 132


def cut(tiles: list[int], groups: int = 1, heads: int = 1, most_tiles: int = 128, programs: int = 1) -> list[list[int]]:
    """The tiles of each batch's windows."""
    batches = cut_batches(np.array(tiles, np.int32), groups, heads, most_tiles, programs)
    assert batches.dtype == np.int32 and batches[0] == 0 and (np.diff(batches) > 0).all()
    assert batches[-1] == groups * len(tiles)
    return [x.tolist() for x in np.split(np.tile(tiles, groups), batches[1:-1])]


lengths = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 300)), min_size=1, max_size=200)


@given(lengths, st.integers(1, 4), st.integers(1, 60), st.integers(1, 200), st.integers(1, 140))
def test_any_windows(tiles: list[int], groups: int, heads: int, most_tiles: int, programs: int) -> None:
    tiles = sorted(tiles, reverse=True)
    batches = cut(tiles, groups, heads, most_tiles, programs)
    left = sum(max(n, 1) for batch in batches for n in batch)
    for batch in batches:
        size = sum(max(n, 1) for n in batch)
        assert len(batch) == 1 or (size <= most_tiles and size * programs <= left * heads)
        left -= size
    assert len(batches) * heads >= min(len(tiles) * heads, programs)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=100), st.integers(1, 8))
def test_long_windows_are_alone(short: list[int], num_long: int) -> None:
    batches = cut([65] * num_long + sorted(short, reverse=True), heads=1000)
    assert batches[:num_long] == [[65]] * num_long and all(65 not in batch for batch in batches[num_long:])


def test_short_windows_share_programs_while_there_is_much_to_do() -> None:
    """A sliding window: 14 windows of 9 tiles are 126 tiles."""
    batches = cut([9] * 1024, groups=2, heads=24, programs=PROGRAMS)
    sizes = [len(batch) for batch in batches]
    assert sizes[:120] == [14] * 120 and sizes[-10:] == [1] * 10
    assert len(set(sizes)) > 4 and len(batches) < 2048 / 10


def test_windows_without_tiles_count_as_one() -> None:
    assert cut([0] * 32, most_tiles=8)[0] == [0] * 8


@pytest.mark.parametrize("most_tiles", [1, 128])
def test_few_windows_are_batches_of_their_own(most_tiles: int) -> None:
    assert cut([2, 1, 1, 0], heads=16, most_tiles=most_tiles, programs=PROGRAMS) == [[2], [1], [1], [0]]


def test_no_windows() -> None:
    assert cut_batches(np.empty(0, np.int32), 3, 2, 128, PROGRAMS).tolist() == [0]
