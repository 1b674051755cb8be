"""What a plan costs each rank, in numbers that people and programs can read."""

from dataclasses import dataclass

import numpy as np

from magi_attention.mask.bands import area
from magi_attention.planning.attn_plan import AttnPlan
from magi_attention.planning.cost_model import FloatArray
from magi_attention.planning.load_balance import peak_over_mean
from magi_attention.planning.rank_plan import RankPlan
from magi_attention.planning.timeline import PassTimeline


@dataclass(frozen=True)
class StageReport:
    """One stage on one rank: unmasked cells computed with the rows that it brings, and rows received and sent."""

    area: int
    recv_rows: int
    send_rows: int


@dataclass(frozen=True)
class RankReport:
    """One rank's part of a plan.

    Attributes:
        rank: The rank.
        tokens: Its local rows, padding included; the same on every rank unless shards are uneven.
        area: Unmasked cells that it computes.
        recv_rows: Distinct remote key/value rows that it receives.
        send_rows: Rows that it sends, a row once for each rank it goes to.
        chunks: Its chunks, by their number in the global sequence, ascending.
        local_area: The part of ``area`` that needs no remote row.
        stages: The remote work.
    """

    rank: int
    tokens: int
    area: int
    recv_rows: int
    send_rows: int
    chunks: list[int]
    local_area: int
    stages: list[StageReport]


def report(plan: AttnPlan) -> list[RankReport]:
    """Every rank's part of a plan."""
    return [report_rank(plan.rank(rank)) for rank in range(plan.cp_size)]


def report_rank(plan: RankPlan) -> RankReport:
    """One rank's part of a plan."""
    stages = [
        StageReport(int(area(s.bands).sum()), s.collective.num_recv_rows, s.collective.num_send_rows)
        for s in plan.stages
    ]
    return RankReport(
        rank=plan.rank,
        tokens=plan.local_seqlen_q,
        area=plan.area,
        recv_rows=plan.num_recv_rows,
        send_rows=plan.num_send_rows,
        chunks=plan.dispatch.chunks(plan.rank).tolist(),
        local_area=int(area(plan.local_bands).sum()),
        stages=stages,
    )


def area_imbalance(ranks: list[RankReport]) -> float:
    """Largest area of a rank over the mean; 1 is perfect. The most loaded rank sets the pace for all."""
    return peak_over_mean([rank.area for rank in ranks])


@dataclass(frozen=True)
class RankTimes:
    """Where the time of a pass goes on one rank, in seconds. The parts make up the time of the pass on every rank.

    Attributes:
        compute: It computes. The slowest rank is the one that computes longest.
        exposed: It waits while rows are under way.
        idle: It waits for ranks that still compute.
    """

    compute: float
    exposed: float
    idle: float


def report_times(timeline: PassTimeline) -> list[RankTimes]:
    """Where the time of a pass goes, on every rank."""

    def times(rank: int, lane: str) -> FloatArray:
        spans = [(span.start, span.end) for span in timeline.spans if (span.rank, span.lane) == (rank, lane)]
        return np.array(spans).reshape(-1, 2)

    def on_rank(rank: int) -> RankTimes:
        computing, travelling = times(rank, "compute"), times(rank, "network")
        compute, exposed = (float((lane[:, 1] - lane[:, 0]).sum()) for lane in (computing, travelling))
        both_end = np.minimum.outer(computing[:, 1], travelling[:, 1])
        both_start = np.maximum.outer(computing[:, 0], travelling[:, 0])
        exposed -= float(np.maximum(both_end - both_start, 0).sum())
        # Differences of times: below zero by rounding, now and then.
        exposed = max(exposed, 0.0)
        return RankTimes(compute, exposed, max(timeline.seconds - compute - exposed, 0.0))

    return [on_rank(rank) for rank in range(timeline.cp_size)]
