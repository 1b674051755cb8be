"""How windows are cut into batches: all in order, none too long, and enough of them for all programs."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from magi_attention.kernels.hopper.batches import cut_batches

PROGRAMS = 132


def cut(tiles: list[int], groups: list[int], most_tiles: int = 128, programs: int = 1) -> list[list[int]]:
    """The tiles of each batch's windows, in the order in which programs start."""
    batches = cut_batches(np.array(tiles, np.int32), groups, most_tiles, programs)
    assert batches.dtype == np.int32 and (batches[:, 0] < batches[:, 1]).all()
    in_order = batches[np.argsort(batches[:, 0])]  # of items, each of which is in one batch
    assert (in_order[1:, 0] == in_order[:-1, 1]).all()
    assert in_order[0, 0] == 0 and in_order[-1, 1] == sum(groups) * len(tiles)
    head, last_head = batches[:, 0] // len(tiles), (batches[:, 1] - 1) // len(tiles)
    np.testing.assert_array_equal(head, last_head)
    group = np.repeat(np.arange(len(groups)), groups)[head]
    assert (np.diff(group) >= 0).all(), "one group after the other"
    window = batches[:, 0] % len(tiles) + group * len(tiles)
    assert (np.diff(window) >= 0).all(), "windows of a group in order, for all its heads at a time"
    return [np.tile(tiles, sum(groups))[slice(*batch)].tolist() for batch in batches]


lengths = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 300)), min_size=1, max_size=200)


groups_of_heads = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@example([11, 0, 0, 0], [1, 1], 2, 8)
@given(lengths, groups_of_heads, st.integers(1, 200), st.integers(1, 140))
def test_any_windows(tiles: list[int], groups: list[int], most_tiles: int, programs: int) -> None:
    tiles = sorted(tiles, reverse=True)
    batches = cut(tiles, groups, most_tiles, programs)
    left = sum(max(n, 1) for batch in batches for n in batch)
    for batch in batches:
        size = sum(max(n, 1) for n in batch)
        assert len(batch) == 1 or (size <= most_tiles and size * programs <= left + size * max(groups))
        left -= size
    assert len(batches) >= min(len(tiles) * groups[-1], programs)  # of the last group alone


@given(st.lists(st.integers(0, 3), min_size=1, max_size=100), st.integers(1, 8))
def test_long_windows_are_alone(short: list[int], num_long: int) -> None:
    batches = cut([65] * num_long + sorted(short, reverse=True), [2])
    assert batches[: 2 * num_long] == [[65]] * (2 * num_long)
    assert all(65 not in batch for batch in batches[2 * num_long :])


def test_short_windows_share_programs_while_there_is_much_to_do() -> None:
    """A sliding window: 14 windows of 9 tiles are 126 tiles."""
    batches = cut([9] * 1024, [24, 24], programs=PROGRAMS)
    sizes = [len(batch) for batch in batches]
    assert sizes[: 70 * 24] == [14] * (70 * 24) and sizes[-240:] == [1] * 240
    assert len(set(sizes)) > 4 and len(batches) < 2048 * 24 / 10


def test_heads_side_by_side_and_in_turn() -> None:
    batches = cut_batches(np.array([7, 7, 1], np.int32), [2, 1], 128, 1000)
    assert batches.tolist() == [[0, 1], [3, 4], [1, 2], [4, 5], [2, 3], [5, 6], [6, 7], [7, 8], [8, 9]]


def test_windows_without_tiles_count_as_one() -> None:
    assert cut([0] * 32, [1], most_tiles=8)[0] == [0] * 8


@pytest.mark.parametrize("most_tiles", [1, 128])
def test_few_windows_are_batches_of_their_own(most_tiles: int) -> None:
    batches = cut([2, 1, 1, 0], [16], most_tiles, PROGRAMS)
    assert batches == [[2]] * 16 + [[1]] * 32 + [[0]] * 16
