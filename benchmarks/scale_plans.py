"""What a plan gives every rank to do, in numbers, and which ranks to look at."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.bands import K0, K1, IntArray, crop, relocate
from magi_attention.planning import AttnPlan
from magi_attention.planning.cost_model import StageWork, before_first_stage
from magi_attention.planning.joining import cells_meanwhile
from magi_attention.planning.runs import GroupedRuns

TILE = 128
"""Rows and keys of the tiles that work is counted in; kernels have such tiles."""


@dataclass(frozen=True, eq=False)
class Work:
    """The work of all ranks.

    Attributes:
        part_areas: Unmasked cells of each rank with its own keys, then with those of each stage, ``(num_stages + 1,
            cp_size)``.
        forward_areas: About the same of a forward pass, where some queries wait for the first stage with all their
            keys.
        tiles: Tiles of ``TILE`` rows by ``TILE`` keys that have one of its cells, ``(cp_size,)``.
        received: Rows that each rank receives in each stage, ``(num_stages, cp_size)``.
        sent: Rows that it sends, once for each rank that they go to.
    """

    part_areas: IntArray
    forward_areas: IntArray
    tiles: IntArray
    received: IntArray
    sent: IntArray

    @classmethod
    def of(cls, plan: AttnPlan, one_host: bool, other: "Work | None" = None) -> "Work":
        """Count the work of a plan.

        Args:
            plan: The plan.
            one_host: Whether its ranks are on one host.
            other: The work of a plan that differs in its stages only.
        """
        work = StageWork.measure(plan.mask, plan.work, plan.dispatch, plan.routes)
        part_areas = np.concatenate((work.local_areas[None], work.areas))
        forward_areas = part_areas.copy()
        if len(work.areas):
            model = plan.config.overlap_config.cost_model
            kept = int(cells_meanwhile(plan.first_cast_rows, model, one_host))
            early = before_first_stage(work.local_areas, work.could_wait, kept)
            forward_areas[0] = early
            forward_areas[1] += work.local_areas - early
        if other is None:
            tiles = np.array([_count_tiles(plan, rank) for rank in range(plan.cp_size)])
        else:
            tiles = other.tiles
        return cls(part_areas, forward_areas, tiles, work.received, work.sent)

    @cached_property
    def area(self) -> IntArray:
        """Unmasked cells of each rank, ``(cp_size,)``."""
        return self.part_areas.sum(axis=0)

    def areas(self, way: int) -> IntArray:
        """Of the parts of a pass, ``FORWARD`` or ``BACKWARD`` of ``scale_costs.py``."""
        return (self.forward_areas, self.part_areas)[way]

    @property
    def imbalance(self) -> float:
        """Largest area over the mean."""
        return float(self.area.max() / self.area.mean())

    def sample(self, count: int) -> dict[int, str]:
        """Ranks to measure and why: the heaviest in each respect, then some from all over the range of areas."""
        reasons = {"most area": self.area, "most rows": self.received.sum(axis=0), "most tiles": self.tiles}
        chosen: dict[int, list[str]] = {}
        for reason, amount in reasons.items():
            chosen.setdefault(int(np.argmax(amount)), []).append(reason)
        order = np.argsort(self.area, kind="stable")
        for rank in order[np.linspace(0, len(order) - 1, count).astype(int)].tolist():
            chosen.setdefault(rank, ["one of many"])
        return {rank: ", ".join(why) for rank, why in list(chosen.items())[:count]}


def _count_tiles(plan: AttnPlan, rank: int) -> int:
    mask = plan.mask
    bands = relocate(mask.bands, plan.dispatch.runs(rank), np.array([[0, mask.total_seqlen_k]]))
    first_rows = np.arange(0, plan.dispatch.local_seqlen, TILE)
    pieces, row, _ = crop(bands, first_rows, first_rows + TILE)
    first, end = pieces[:, K0] // TILE, -(-pieces[:, K1] // TILE)
    return int(GroupedRuns.merge(row, first, end, mask.total_seqlen_k // TILE + 2).lengths.sum())
