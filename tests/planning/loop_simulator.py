"""The slow twin of `magi_attention.planning.replay`: ranks run a program step by step, and meet in collectives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Op = tuple[str, int | None]
"""`("cast", n)` and `("reduce", n)` post a transfer, `("wait cast", n)` and `("wait reduce", n)` wait for it, and
`("attend", n)` computes: with a stage's rows, or with None with the rank's own. `("begin", None)` has the rank compute
with its own whenever it would wait, and `("end", None)` with what is left of them."""


def loop_program(num_stages: int, blocking: bool, backward: bool, own_keys_fill: bool = False) -> list[Op]:
    """What a rank does in a pass, written from its description in docs/design.md."""
    program: list[Op] = []
    fills = own_keys_fill and num_stages > 0 and not blocking
    if num_stages:
        program.append(("cast", 0))
    if num_stages and blocking:
        program.append(("wait cast", 0))
    program.append(("begin" if fills else "attend", None))
    for n in range(num_stages):
        if n + 1 < num_stages:
            program.append(("cast", n + 1))
        program += [("wait cast", n), ("attend", n)]
        if backward:
            program.append(("reduce", n))
            if n > 0:
                program.append(("wait reduce", n - 1))
    if fills:
        program.append(("end", None))
    if backward and num_stages:
        program.append(("wait reduce", num_stages - 1))
    return program


@dataclass
class Outcome:
    """When each rank is done, and from when to when everything took place: `(op, rank)`, transfers without a rank.

    What ranks do with their own keys is apart, since it may be in pieces.
    """

    ends: list[float]
    own: list[list[tuple[float, float]]]
    extents: dict[tuple[Op, int | None], tuple[float, float]] = field(default_factory=dict)

    def attend_own(self, rank: int, seconds: float) -> None:
        now = self.ends[rank]
        self.ends[rank] = now + seconds
        if seconds > 0:
            self.own[rank].append((now, self.ends[rank]))


def simulate(programs: Sequence[Sequence[Op]], seconds: Callable[[Op, int | None], float]) -> Outcome:
    """Run each rank's program; `seconds(op, rank)` is what it takes, for a transfer with rank None."""
    cp_size = len(programs)
    outcome = Outcome([0.0] * cp_size, [[] for _ in range(cp_size)])
    own_left = [0.0] * cp_size
    at = [0] * cp_size
    reached: dict[Op, list[float]] = {op: [] for op in programs[0] if op[0] in ("cast", "reduce")}
    network = 0.0
    while any(position < len(program) for position, program in zip(at, programs, strict=True)):
        progress = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                kind, n = op = program[at[rank]]
                now = outcome.ends[rank]
                if op == ("attend", None):
                    outcome.attend_own(rank, seconds(op, rank))
                elif kind == "begin":
                    own_left[rank] = seconds(("attend", None), rank)
                elif kind == "end":
                    outcome.attend_own(rank, own_left[rank])
                    own_left[rank] = 0.0
                elif kind == "attend":
                    outcome.ends[rank] = now + seconds(op, rank)
                    outcome.extents[op, rank] = now, outcome.ends[rank]
                elif kind in ("cast", "reduce"):
                    reached[op].append(now)
                else:
                    transfer = outcome.extents.get(((kind.removeprefix("wait "), n), None))
                    if transfer is None:
                        break
                    filled = min(own_left[rank], max(transfer[1] - now, 0.0))
                    own_left[rank] -= filled
                    outcome.attend_own(rank, filled)
                    outcome.ends[rank] = max(now, transfer[1])
                at[rank] += 1
                progress = True
        for op, arrivals in reached.items():  # in the order in which they are posted
            if (op, None) in outcome.extents:
                continue
            if len(arrivals) < cp_size:
                break
            start = max(network, *arrivals)
            network = start + seconds(op, None)
            outcome.extents[op, None] = start, network
            progress = True
        assert progress, "the ranks wait for each other for ever"
    return outcome
