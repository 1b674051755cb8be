"""A case of emulate_scale.py: one kind of mask on so many GPUs, shared out one way; its packs, plans and speeds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scale_costs import BACKWARD, FORWARD, Amounts, Costs, Measured, Rates, flops, step_seconds
from scale_loop import Heads, Loop, Transfer, loop_of, replay
from scale_masks import MASKS, make_packs
from scale_network import Network, Traffic, traffic
from scale_plans import Work
from scale_results import FLAT, HEADS_IN_NODES, NO_NETWORK, TWO_LEVEL, Modelled, Planned
from scale_rivals import Setting, exchange_seconds, split_heads

from magi_attention.config import DispatchConfig, DistAttnConfig, GradWireDtype, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import IntArray
from magi_attention.planning import AttnPlan, plan_attention

NOMINAL = Rates()
CLOSE_ENOUGH = 1.02
"""Fewer stages are preferred to the fastest when they take at most so much longer."""


@dataclass(frozen=True)
class Problem:
    """What is the same for all masks and sizes.

    Attributes:
        tokens: Tokens of a GPU.
        heads: Heads of the model.
        network: Between GPUs.
        chunk_size: Rows in a chunk.
        degrees: Numbers of stages to choose from; the model chooses at nominal rates, the fewest that are fast.
        dispatch: How chunks are given to ranks.
        grad_wire_dtype: The type in which gradients of keys travel.
        num_packs: Packs of a mask with documents.
        seed: Of the documents.
    """

    tokens: int
    heads: Heads
    network: Network
    chunk_size: int
    degrees: Sequence[int] = (1, 2, 4, 8)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    grad_wire_dtype: GradWireDtype = "float32"
    num_packs: int = 5
    seed: int = 0

    def config(self, degree: int) -> DistAttnConfig:
        """Of a plan with so many stages."""
        return DistAttnConfig(self.dispatch, OverlapConfig(degree=degree), self.grad_wire_dtype)

    def setting(self, cp_size: int, area: int) -> Setting:
        """The same for rivals."""
        return Setting(cp_size, self.tokens, self.heads, self.network, area)


@dataclass(frozen=True)
class Journey:
    """A plan with one way for rows to travel.

    Attributes:
        work: What every rank has to do.
        amounts: The same, as costs are made from.
        loops: The steps of a forward and a backward pass.
        wires: Seconds of each transfer, forward and backward.
    """

    work: Work
    amounts: Amounts
    loops: tuple[Loop, Loop]
    wires: tuple[list[float], list[float]]


@dataclass(frozen=True)
class Pack:
    """A planned pack: its plan, and for each transport what comes of it. Ranks are measured with the first."""

    plan: AttnPlan
    journeys: dict[str, Journey]

    @property
    def measured_as(self) -> Journey:
        """What ranks are measured with."""
        return next(iter(self.journeys.values()))

    def seconds(
        self, transport: str, way: int, costs: Costs, measured: Mapping[int, Measured]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each rank, and how many of them it waits.

        The steps of measured ranks take as long as measured. Where rows travel in other stages than they did then, it
        is their attention, all stages together, that does.
        """
        journey = self.journeys[transport]
        loop = journey.loops[way]
        seconds = step_seconds(loop, way, journey.work, journey.amounts, costs)
        same_stages = np.array_equal(journey.work.areas(way), self.measured_as.work.areas(way))
        attends = np.array([step.kind == "attend" for step in loop.steps])
        for rank, times in measured.items():
            if same_stages:
                seconds[:, rank] = times.passes[way].seconds_in_whole
            else:
                seconds[attends, rank] *= times.passes[way].attend / max(seconds[attends, rank].sum(), 1e-12)
        own_keys_fill = self.plan.own_keys_fill & (way == BACKWARD and len(journey.work.part_areas) > 1)
        return replay(loop.steps, seconds, journey.wires[way], own_keys_fill)


@dataclass(eq=False)
class Case:
    """A kind of mask on so many GPUs, by our planner.

    Attributes:
        problem: The rest.
        mask: The name of the kind.
        method: ``OURS``: the sequence is cut among all GPUs; ``HEADS_IN_NODES``: among nodes, and heads inside them.
        cp_size: Number of GPUs.
        measured: Measured ranks by pack and rank.
    """

    problem: Problem
    mask: str
    method: str
    cp_size: int
    packs: list[Pack] = field(default_factory=list)
    documents: list[IntArray] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)
    measured: dict[tuple[int, int], Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.documents = make_packs(
            self.mask, self.problem.tokens * self.cp_size, self.problem.num_packs, self.problem.seed
        )

    @property
    def head_parts(self) -> int:
        """GPUs that share rows and have different heads."""
        return min(self.cp_size, self.problem.network.gpus_per_node) if self.method == HEADS_IN_NODES else 1

    @property
    def heads(self) -> Heads:
        """Of a rank."""
        return split_heads(self.problem.heads, self.head_parts)

    @property
    def ranks(self) -> int:
        """How many the sequence is cut among."""
        return self.cp_size // self.head_parts

    @property
    def one_host(self) -> bool:
        """Whether all GPUs are in one node."""
        return self.cp_size <= self.problem.network.gpus_per_node

    @property
    def network(self) -> Network:
        """Between ranks."""
        network = self.problem.network
        return replace(network, gpus_per_node=1) if self.head_parts > 1 else network

    @property
    def transports(self) -> tuple[str, ...]:
        """How rows may travel: in two levels where there are several nodes of several ranks."""
        node = self.network.gpus_per_node
        return (FLAT, TWO_LEVEL, NO_NETWORK) if 1 < node < self.ranks else (FLAT, NO_NETWORK)

    def make_mask(self, number: int) -> AttnMask:
        """Of a pack."""
        return MASKS[self.mask].make(self.documents[number])

    def plan(self) -> None:
        """Plan all packs."""
        degree = self._best_degree()
        for number in range(len(self.documents)):
            mask = self.make_mask(number)
            start = time.perf_counter()
            plan = plan_attention(mask, self.ranks, self.problem.chunk_size, config=self.problem.config(degree))
            planned = time.perf_counter()
            plan.rank(self.ranks // 2)
            pack = self._pack(plan)
            self.packs.append(pack)
            self.planned.append(
                self._describe(number, pack, 1e3 * (planned - start), 1e3 * (time.perf_counter() - planned))
            )

    def model(self, costs: Costs, kernels: str) -> list[Modelled]:
        """The speed with each transport."""
        setting = self.problem.setting(self.cp_size, 0)
        results = []
        for transport in self.transports:
            exchange = (0.0, 0.0) if transport == NO_NETWORK else exchange_seconds(setting, self.head_parts)
            speeds, waits = [], []
            for way in (FORWARD, BACKWARD):
                total = waited = work = 0.0
                for number, pack in enumerate(self.packs):
                    measured = {rank: m for (n, rank), m in self.measured.items() if n == number}
                    seconds, waiting = pack.seconds(transport, way, costs, measured)
                    slowest = int(np.argmax(seconds))
                    total += float(seconds[slowest]) + exchange[way]
                    waited += float(waiting[slowest]) + exchange[way]
                    work += flops(pack.plan.mask.area, self.problem.heads, way)
                speeds.append(work / total / self.cp_size / 1e12)
                waits.append(waited / total)
            results.append(Modelled(self.mask, self.method, transport, self.cp_size, *speeds, *waits, kernels))
        return results

    def _best_degree(self) -> int:
        """The fewest stages that are nearly as fast as the fastest, for the first pack at nominal rates."""
        mask, seconds = self.make_mask(0), {}
        for degree in self.problem.degrees:
            pack = self._pack(
                plan_attention(mask, self.ranks, self.problem.chunk_size, config=self.problem.config(degree))
            )
            ways = (pack.seconds(FLAT, way, NOMINAL, {})[0].max() for way in (FORWARD, BACKWARD))
            seconds[degree] = float(sum(ways))
        fastest = min(seconds.values())
        return min(degree for degree, s in seconds.items() if s <= fastest * CLOSE_ENOUGH)

    def _pack(self, plan: AttnPlan) -> Pack:
        work = Work.of(plan, self.one_host)
        journeys = {}
        for transport in self.transports:
            if transport == TWO_LEVEL:
                aligned = plan.on_mesh((self.ranks // self.network.gpus_per_node, self.network.gpus_per_node))
                journeys[transport] = self._journey(aligned, Work.of(aligned, self.one_host, work), transport)
            else:
                journeys[transport] = self._journey(plan, work, transport)
        return Pack(plan, journeys)

    def _journey(self, plan: AttnPlan, work: Work, transport: str) -> Journey:
        loops = loop_of(plan.routes.num_stages, self.problem.grad_wire_dtype)
        if transport == NO_NETWORK:
            wires = [[0.0] * len(loop.transfers) for loop in loops]
        else:
            stages = self._traffic(plan, transport)
            wires = [[self._wire(stages[t.stage], t) for t in loop.transfers] for loop in loops]
        amounts = Amounts.of(work, self.heads, plan.dispatch.local_seqlen)
        return Journey(work, amounts, loops, (wires[FORWARD], wires[BACKWARD]))

    def _traffic(self, plan: AttnPlan, transport: str) -> list[Traffic]:
        """Of each stage."""
        node, two_level = self.network.gpus_per_node, transport == TWO_LEVEL
        return [traffic(plan.routes, self.ranks, stage, node, two_level) for stage in range(plan.routes.num_stages)]

    def _wire(self, stage: Traffic, transfer: Transfer) -> float:
        return self.network.stage(stage, self.heads.row_elements * transfer.itemsize)

    def _describe(self, number: int, pack: Pack, plan_ms: float, rank_ms: float) -> Planned:
        first = pack.measured_as
        shard, received, sent = first.amounts.num_rows, first.work.received.sum(axis=0), first.work.sent.sum(axis=0)
        across = {
            transport: sum(int(stage.across.max()) for stage in self._traffic(pack.plan, transport)) / shard
            for transport in (FLAT, TWO_LEVEL)
        }
        return Planned(
            self.mask,
            self.method,
            self.cp_size,
            number,
            documents=len(self.documents[number]) - 1,
            stages=pack.plan.routes.num_stages,
            imbalance=first.work.imbalance,
            received_mean=float(received.mean() / shard),
            received_max=float(received.max() / shard),
            sent_max=float(sent.max() / shard),
            across_flat=across[FLAT],
            across_two_level=across[TWO_LEVEL],
            plan_ms=plan_ms,
            rank_ms=rank_ms,
        )
