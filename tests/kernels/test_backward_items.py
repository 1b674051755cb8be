"""How the work of the backward kernel is cut, for masks and numbers of heads that are told by their windows alone."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from magi_attention.kernels.hopper.backward_items import LEAST_TILES, Items, backward_items


def windows(tiles: list[int]) -> Any:
    """What is looked at of a walk over windows with these numbers of tiles."""
    differ = np.count_nonzero(np.diff(tiles))
    busy = np.count_nonzero(tiles)
    return SimpleNamespace(
        num_busy=busy, num_tiles=sum(tiles), longest=max(tiles, default=0), is_uneven=2 * differ > len(tiles)
    )


@pytest.mark.parametrize("num_windows", [64, 128])
def test_whole_sequences_keep_their_heads_together(num_windows: int) -> None:
    assert backward_items(windows([2 * num_windows] * num_windows), 8, 6, 132) == Items(6)


def test_very_long_sequences_do_not() -> None:
    assert backward_items(windows([512] * 256), 8, 6, 132) == Items(3)
    assert backward_items(windows([1024] * 512), 8, 4, 132) == Items(4)


@pytest.mark.parametrize(
    ("group", "members"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4), (12, 4), (16, 4), (15, 3)]
)
def test_uneven_windows_are_of_few_heads(group: int, members: int) -> None:
    assert backward_items(windows([*range(2, 130, 2)]), 48 // group, group, 132) == Items(members)


def test_a_round_that_few_programs_have_work_in_is_avoided() -> None:
    """24 windows of 8 key heads are one round of 132 items, and one of 60; three rounds of less work are full."""
    assert backward_items(windows([48] * 24), 8, 6, 132) == Items(3)


def test_few_windows_are_cut() -> None:
    for tiles in ([1000], [1000, 3], [900, 900, 900]):
        members, most_tiles = backward_items(windows(tiles), 1, 8, 132)
        assert members == 1 and most_tiles is not None
        assert LEAST_TILES <= most_tiles <= max(LEAST_TILES, 8 * sum(tiles) / 132 / 3)


def test_one_long_window_among_short_ones_is_cut() -> None:
    members, most_tiles = backward_items(windows([2000] + [2] * 500), 1, 8, 132)
    assert members == 1 and most_tiles is not None and most_tiles < 100


@pytest.mark.parametrize("tiles", [[], [0, 0], [2], [1, 2, 1]])
def test_what_is_short_anyway_is_left_whole(tiles: list[int]) -> None:
    assert backward_items(windows(tiles), 1, 8, 132) == Items(8)


def test_pieces_are_not_shorter_than_what_they_cost() -> None:
    assert backward_items(windows([LEAST_TILES]), 1, 8, 132) == Items(1)
    assert backward_items(windows([LEAST_TILES + 1]), 1, 8, 132) == Items(1, LEAST_TILES)
