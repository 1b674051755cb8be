"""What programs of the hopper backward kernel find in the cache, simulated on a CPU.

    PYTHONPATH=. python benchmarks/simulate_cache.py --masks causal "pack magi" --tokens 8192
    PYTHONPATH=. python benchmarks/simulate_cache.py --masks "published varlen causal" --gpus 4 --tokens 32768

Programs take the items that the engine would give them, in its order. A tile of queries of a head, with what is read
and added for it, is in the cache unless too many others have been used since. When tiles that are not there need more
than the memory gives, all programs slow down alike. By default numbers are of an H100; ``--memory 4.3`` is an H200.
With several GPUs the table has the own keys and the only stage of the first and the last rank, one after the other and
beside each other. ``docs/notes/2026-11-28-queries-in-the-cache.md`` has what was measured beside it.
"""

import argparse
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from attention_cases import MASKS, make_case
from emulate_scale import parse_heads

from magi_attention.kernels import hopper
from magi_attention.kernels.hopper.device_walk import make_key_walk
from magi_attention.kernels.hopper.shapes import BACKWARD_SHAPES
from magi_attention.kernels.hopper.work import backward_work
from magi_attention.mask.bands import IntArray
from magi_attention.planning import plan_attention

HEAD_DIM = 128
CACHED_OF_TILE = 64 << 10  # q and dout in bf16, dq in float32, of 64 queries
PROGRAM_TILES, ITEM_TILES, ADDING_TILES = 3.6, 1.5, 1.2
"""What starting a program takes, an item, and adding up its dk and dv in memory, in times of a tile."""


class Machine(NamedTuple):
    """A GPU.

    Attributes:
        programs: How many run at a time.
        cache: Bytes that the cache holds.
        memory: Bytes a second that the memory gives.
        missing: Bytes to and from memory for a tile that is not in the cache.
        tile: Seconds that a program takes for a tile.
    """

    programs: int = 132
    cache: float = 40 * 2**20
    memory: float = 3.0e12
    missing: float = 92e3
    tile: float = 2.12e-6


@dataclass(frozen=True)
class Kernel:
    """A launch of the backward kernel.

    Attributes:
        members: Query heads of an item.
        overhead: What an item takes beside its tiles, in times of a tile.
        tiles: Of each window, the tiles of queries in the order in which they are visited.
        batches: The items of each program, as pairs of a share of heads and a window, in the order of starts.
    """

    members: int
    overhead: float
    tiles: list[list[int]]
    batches: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, bands: IntArray, rows: int, keys: int, heads_kv: int, group: int, machine: Machine) -> "Kernel":
        """What the engine would launch."""
        shape = BACKWARD_SHAPES[HEAD_DIM]
        walk = hopper.schedule(bands, rows, keys).by_keys(
            make_key_walk, shape.block_k, shape.block_q, torch.device("cpu")
        )
        work = backward_work(walk, heads_kv, group, HEAD_DIM, machine.programs, takes_turns=False)
        windows, entries = work.args.windows.tolist(), work.args.entries.tolist()

        def visited(entry: int, count: int) -> list[int]:
            tiles: list[int] = []
            while len(tiles) < count:
                column, run, *_ = entries[entry]
                tiles += [column // shape.block_q - n for n in range(run)]
                entry += 1
            return tiles[:count]

        return cls(
            work.members,
            ITEM_TILES + ADDING_TILES * work.adds_up,
            [visited(entry, count) for _, _, entry, count, _ in windows],
            [[divmod(item, len(windows)) for item in range(*batch)] for batch in work.args.batches.tolist()],
        )

    def run(self, program: int) -> Iterator[tuple[int, int] | None]:
        """A program's tiles, each a head and which queries, and None at the end of an item."""
        for share, window in self.batches[program]:
            for member in range(self.members):
                yield from ((share * self.members + member, tile) for tile in self.tiles[window])
            yield None


class Outcome(NamedTuple):
    """Seconds until each kernel ends, and the share of all tiles that were not in the cache."""

    ends: list[float]
    missed: float


def simulate(kernels: list[Kernel], machine: Machine, begin: float = 0.0) -> Outcome:
    """Run kernels over the same queries.

    Args:
        kernels: Of which the first is served first.
        machine: The GPU.
        begin: Seconds from the start of the others to that of the first one.
    """
    if_all_missed = machine.programs * machine.missing / machine.memory / machine.tile
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    waiting = [deque(range(len(kernel.batches))) for kernel in kernels]
    running: list[tuple[int, Iterator[tuple[int, int] | None]] | None] = [None] * machine.programs
    clock = [(0.0, program) for program in range(machine.programs)]  # in times of a tile
    ends, num_tiles, num_missed, lately_missed = [0.0] * len(kernels), 0, 0, 0.0
    while clock:
        now, program = heapq.heappop(clock)
        current = running[program]
        if current is None:
            ready = (n for n, left in enumerate(waiting) if left and (n > 0 or now * machine.tile >= begin))
            number = next(ready, None)
            if number is not None:
                running[program] = number, kernels[number].run(waiting[number].popleft())
                heapq.heappush(clock, (now + PROGRAM_TILES, program))
            elif waiting[0]:
                heapq.heappush(clock, (begin / machine.tile + 1e-6, program))
            continue
        number, tiles = current
        try:
            tile = next(tiles)
        except StopIteration:
            running[program], ends[number] = None, max(ends[number], now)
            heapq.heappush(clock, (now, program))
            continue
        if tile is None:
            heapq.heappush(clock, (now + kernels[number].overhead, program))
            continue
        missed = tile not in cache
        cache[tile] = None
        cache.move_to_end(tile)
        if len(cache) > machine.cache // CACHED_OF_TILE:
            cache.popitem(last=False)
        num_tiles, num_missed = num_tiles + 1, num_missed + missed
        lately_missed += (missed - lately_missed) / 1000
        heapq.heappush(clock, (now + max(1.0, lately_missed * if_all_missed), program))
    return Outcome([end * machine.tile for end in ends], num_missed / max(num_tiles, 1))


def rank_lines(name: str, tokens: int, gpus: int, heads: tuple[int, int], machine: Machine) -> Iterator[str]:
    """The table of a mask."""
    heads_kv, group = heads[1], heads[0] // heads[1]
    mask = make_case(name, tokens).mask
    if gpus == 1:
        kernel = Kernel.of(mask.bands, tokens, tokens, heads_kv, group, machine)
        (end,), missed = simulate([kernel], machine)
        yield f"| {name} | | {kernel.members} | {end * 1e3:.2f} | {missed:.0%} | | | | |"
        return
    plan = plan_attention(mask, gpus, 512)
    for rank in (0, gpus - 1):
        part = plan.rank(rank)
        rows = part.local_seqlen_q
        own = Kernel.of(part.local_bands, rows, part.local_seqlen_k, heads_kv, group, machine)
        (own_end,), own_missed = simulate([own], machine)
        line = f"| {name} | {rank} | {own.members} | {own_end * 1e3:.2f} | {own_missed:.0%} |"
        if not part.num_recv_rows:
            yield f"{line} | | | |"
            continue
        stage = Kernel.of(part.stages[0].bands, rows, part.num_recv_rows, heads_kv, group, machine)
        (end,), missed = simulate([stage], machine)
        row_bytes = 2 * heads_kv * HEAD_DIM * 2
        ends, _ = simulate([stage, own], machine, begin=part.num_recv_rows * row_bytes / 290e9)
        yield f"{line} {stage.members} | {end * 1e3:.2f} | {missed:.0%} | {max(ends) * 1e3:.2f} |"


def main(argv: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=["causal"])
    parser.add_argument("--tokens", type=int, default=8192, help="of the sequence")
    parser.add_argument("--gpus", type=int, default=1, help="that the sequence is cut among")
    parser.add_argument("--heads", type=parse_heads, default=(64, 8), metavar="Q:KV")
    parser.add_argument("--memory", type=float, default=3.0, help="TB/s that the memory gives")
    parser.add_argument("--cache", type=float, default=40.0, help="MiB that the cache holds")
    args = parser.parse_args(argv)
    machine = Machine(cache=args.cache * 2**20, memory=args.memory * 1e12)
    print("| mask | rank | heads an item | own keys, ms | missed | stage: heads an item | ms | missed | beside, ms |")
    print("| --- " * 9 + "|")
    for name in args.masks:
        for line in rank_lines(name, args.tokens, args.gpus, args.heads, machine):
            print(line, flush=True)


if __name__ == "__main__":
    main()
