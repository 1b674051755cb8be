"""The simulation of programs that share a cache: what is certain of small kernels, and what it prints."""

import sys
from pathlib import Path

import pytest

from magi_attention.mask import builders

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from simulate_cache import CACHED_OF_TILE, ITEM_TILES, PROGRAM_TILES, Kernel, Machine, main, simulate

SECOND_A_TILE = Machine(programs=2, cache=100 * CACHED_OF_TILE, memory=1e12, missing=0.0, tile=1.0)


def kernel(*batches: list[tuple[int, int]], tiles: list[list[int]], members: int = 1) -> Kernel:
    return Kernel(members, ITEM_TILES, tiles, list(batches))


def test_two_programs_share_what_they_read() -> None:
    both = kernel([(0, 0)], [(0, 1)], tiles=[[2, 1, 0], [2, 1, 0]])
    outcome = simulate([both], SECOND_A_TILE)
    assert outcome.missed == 0.5
    assert outcome.ends == [pytest.approx(PROGRAM_TILES + 3 + ITEM_TILES)]


def test_heads_share_nothing() -> None:
    members = kernel([(0, 0), (1, 0)], tiles=[[1, 0]], members=2)
    assert list(members.run(0)) == [(0, 1), (0, 0), (1, 1), (1, 0), None, (2, 1), (2, 0), (3, 1), (3, 0), None]
    assert simulate([members], SECOND_A_TILE).missed == 1


def test_the_least_recently_used_tile_goes() -> None:
    one_by_one = kernel([(0, 0), (0, 1)], tiles=[[0, 1, 2], [2, 1, 0]])
    machine = SECOND_A_TILE._replace(cache=2 * CACHED_OF_TILE)
    assert simulate([one_by_one], machine).missed == 4 / 6  # of the second window only tiles 2 and 1 are there
    assert simulate([one_by_one], SECOND_A_TILE).missed == 3 / 6


def test_misses_take_time_when_memory_gives_less() -> None:
    every_tile_once = kernel([(0, 0)], [(1, 0)], tiles=[[*range(2000)]])
    slow = SECOND_A_TILE._replace(memory=1.0, missing=1.0)  # two programs need two bytes a second
    ratio = simulate([every_tile_once], slow).ends[0] / simulate([every_tile_once], SECOND_A_TILE).ends[0]
    assert 1.5 < ratio < 2


def test_the_first_kernel_is_served_first() -> None:
    first = kernel([(0, 0)], tiles=[[0] * 10])
    others = kernel(*[[(0, 0)]] * 6, tiles=[[0] * 10])
    alone = PROGRAM_TILES + 10 + ITEM_TILES
    assert simulate([first, others], SECOND_A_TILE).ends == [pytest.approx(alone), pytest.approx(4 * alone)]
    ends = simulate([first, others], SECOND_A_TILE, begin=1.0).ends
    assert ends == [pytest.approx(2 * alone), pytest.approx(4 * alone)]  # when a program ends
    idle = simulate([first, kernel([(0, 0)], tiles=[[0]])], SECOND_A_TILE, begin=100.0).ends
    assert idle[0] == pytest.approx(100 + alone, abs=0.01)


def test_kernels_have_the_tiles_of_their_mask() -> None:
    causal = Kernel.of(builders.causal(1000).bands, 1000, 1000, 2, 2, Machine())
    seen = [tile for program in range(len(causal.batches)) for tile in causal.run(program) if tile is not None]
    expected = [(head, tile) for head in range(4) for key in range(0, 1000, 128) for tile in range(key // 64, 16)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_the_table(gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--masks", "causal", "sliding window", "--tokens", "4096", "--gpus", gpus, "--heads", "4:2"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * int(gpus) and all(row.count("|") == header.count("|") for row in rows)
