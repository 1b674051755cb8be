"""What the stages of a plan cost every rank: cells and rows, and the seconds that a CostModel makes of them.

Seconds are made by basic arithmetic and maxima only, element by element, which round alike on every machine: ranks that
choose stages by them choose the same.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.config import CostModel, GradWireDtype
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import K0, Q0, Q1, IntArray, area, crop, shift
from magi_attention.planning.chunking import ChunkWork
from magi_attention.planning.density import own_keys_fill
from magi_attention.planning.dispatch_plan import DispatchPlan
from magi_attention.planning.load_balance import rank_areas
from magi_attention.planning.routing import Routes
from magi_attention.planning.runs import GroupedRuns, sum_by_group

FloatArray = NDArray[np.floating[Any]]
Array = NDArray[Any]

HIDDEN = 2
"""Work that is kept for the time in which rows of the first stage travel, as a multiple of that: ranks are never quite
in step."""


@dataclass(frozen=True, eq=False)
class StageWork:
    """What all ranks compute, receive and send in each stage.

    Attributes:
        local_areas: Unmasked cells among a rank's own keys, ``(cp_size,)``.
        areas: Unmasked cells with the rows that a stage brings, ``(num_stages, cp_size)``.
        queries: About how many queries attend these rows, and never less than do, ``(num_stages, cp_size)``.
        could_wait: About how many cells among a rank's own keys are of queries that attend the first stage,
            ``(cp_size,)``.
        received: Rows that arrive, ``(num_stages, cp_size)``.
        sent: Rows that leave, a row once for every rank it goes to, ``(num_stages, cp_size)``.
        own_keys_fill: Where own keys would fill what stages leave in a backward pass that waits for nothing first,
            ``(cp_size,)``.
    """

    local_areas: IntArray
    areas: IntArray
    queries: IntArray
    could_wait: IntArray
    received: IntArray
    sent: IntArray
    own_keys_fill: NDArray[np.bool_]

    @classmethod
    def measure(cls, mask: AttnMask, work: ChunkWork, dispatch: DispatchPlan, routes: Routes) -> "StageWork":
        """Count for all ranks at once: each rank's queries are cropped to the rows of each of its stages."""
        cp_size, num_stages = dispatch.cp_size, routes.num_stages
        stride = work.needs.stride  # the keys of rank r are moved by r * stride, so that ranks do not meet
        arriving = GroupedRuns.merge(routes.receiver * num_stages + routes.stage, routes.start, routes.end, stride)
        keys = arriving.runs + (arriving.group // max(num_stages, 1) * stride)[:, None]
        in_order = np.argsort(keys[:, 0])
        starts, ends = keys[in_order].T
        borders, owner = dispatch.owner_runs
        pieces, run, _ = crop(mask.bands, borders[:-1], borders[1:])
        pieces, run, source = crop(shift(pieces, 0, owner[run] * stride), starts, ends, K0)
        group = arriving.group[in_order[run]]

        def by_stage(group: IntArray, numbers: IntArray) -> IntArray:
            total = sum_by_group(group, numbers, cp_size * num_stages)
            return np.ascontiguousarray(total.reshape(cp_size, num_stages).T)

        areas = by_stage(group, area(pieces))
        by_band = np.lexsort((group, source))  # what a rank has of a band stands together: count from first to last row
        first = np.flatnonzero(np.diff(source[by_band], prepend=-1) | np.diff(group[by_band], prepend=-1))
        q0, q1 = (pieces[by_band, column] for column in (Q0, Q1))
        rows = np.maximum.reduceat(q1, first) - np.minimum.reduceat(q0, first) if len(first) else first
        local_areas = rank_areas(work, dispatch.owner, cp_size) - areas.sum(axis=0)
        queries = np.minimum(by_stage(group[by_band[first]], rows), dispatch.local_seqlens)
        share = queries[:1].sum(axis=0) / dispatch.local_seqlens
        return cls(
            local_areas=local_areas,
            areas=areas,
            queries=queries,
            could_wait=(local_areas * share).astype(np.int64),
            received=by_stage(arriving.group, arriving.lengths),
            sent=by_stage(routes.owner * num_stages + routes.stage, routes.rows),
            own_keys_fill=own_keys_fill(work, dispatch),
        )

    def split(self, parts: IntArray, whole: int) -> "StageWork":
        """About what stages do that have ``parts[n]`` parts of ``whole`` of all rows that travel in the only stage."""

        def share(numbers: IntArray) -> IntArray:
            return numbers * parts[:, None] // whole

        return StageWork(
            local_areas=self.local_areas,
            areas=share(self.areas),
            queries=self.queries * (parts[:, None] > 0),
            could_wait=self.could_wait,
            received=share(self.received),
            sent=share(self.sent),
            own_keys_fill=self.own_keys_fill,
        )


@dataclass(frozen=True, eq=False)
class PassCosts:
    """Seconds of the parts of one pass, forward or backward. Many ways to make stages may stand side by side.

    Attributes:
        local: Attention among a rank's own keys, ``(cp_size,)``.
        stages: Attention with the rows of a stage, ``(num_stages, ..., cp_size)``.
        casts: Sending a stage's keys and values, as long as the slowest rank takes, ``(num_stages, ...)``.
        reduces: Sending home a stage's dK and dV, the same; None in the forward pass.
        own_keys_fill: Whether a rank computes with its own keys when it would wait, in place of at once,
            ``(cp_size,)`` or for all.
        merging: Merging the results of a stage into what was there, shaped as ``stages``; None in the backward pass.
        could_wait: The part of ``local`` that may be computed together with the first stage, ``(cp_size,)``.
    """

    local: FloatArray
    stages: FloatArray
    casts: FloatArray
    reduces: FloatArray | None
    own_keys_fill: NDArray[np.bool_] | bool = False
    merging: FloatArray | None = None
    could_wait: FloatArray | float = 0.0

    @classmethod
    def forward(cls, work: StageWork, model: CostModel) -> "PassCosts":
        """The forward pass. A later stage reads and writes the float32 results of the queries that attend it."""
        dim_v, per_cell = model.head_dims[1], forward_seconds(model)
        per_query = 2 * 4 * model.heads_q * dim_v / model.hbm_bandwidth
        stages = work.areas * per_cell + (work.areas > 0) * model.stage_overhead
        return cls(
            work.local_areas * per_cell,
            stages,
            _collectives(work, model, model.element_bytes),
            None,
            merging=work.queries * per_query,
            could_wait=work.could_wait * per_cell,
        )

    @classmethod
    def backward(cls, work: StageWork, model: CostModel, grad_bytes: int) -> "PassCosts":
        """The backward pass; its partial gradients have ``grad_bytes`` bytes an element on the wire."""
        dim, dim_v = model.head_dims  # scores, dq and dk are products of dim; dv and the gradients of scores of dim_v
        per_cell = 2 * model.heads_q * (3 * dim + 2 * dim_v) / (model.backward_tflops * 1e12)
        stages = work.areas * per_cell + (work.areas > 0) * model.stage_overhead
        casts, reduces = (_collectives(work, model, size) for size in (model.element_bytes, grad_bytes))
        return cls(work.local_areas * per_cell, stages, casts, reduces, work.own_keys_fill)

    def take(self, stages: IntArray) -> "PassCosts":
        """The costs when the n-th stage is ``stages[n]``, an array of shape ``(num_stages, ...)``."""
        reduces, merging = (None if costs is None else costs[stages] for costs in (self.reduces, self.merging))
        return replace(self, stages=self.stages[stages], casts=self.casts[stages], reduces=reduces, merging=merging)

    def joined(self, blocking: NDArray[np.bool_] | bool) -> "PassCosts":
        """The costs as they are once queries wait for the first stage, see :mod:`magi_attention.planning.joining`.

        Args:
            blocking: Whether the first rows are waited for before anything is computed, ``(...)``.
        """
        if self.merging is None:
            return self
        stages, local = self.stages + self.merging, self.local
        if len(stages):
            meanwhile = np.where(blocking, 0.0, HIDDEN * self.casts[0])[..., None]
            local = before_first_stage(self.local, self.could_wait, meanwhile)
            waiting = self.local - local
            nothing = self.could_wait == 0  # could wait, so that all of what merging takes is saved
            share = np.where(nothing, 1.0, waiting / np.where(nothing, 1.0, self.could_wait))
            stages[0] += waiting - self.merging[0] * share
        return replace(self, local=local, stages=stages, merging=None)


def before_first_stage(local: Array, could_wait: Array | float, meanwhile: Array | float) -> Array:
    """About how much of the work with own keys does not wait for the first stage, in whatever unit.

    Args:
        local: The work with own keys.
        could_wait: Of queries that attend the first stage.
        meanwhile: What is kept for the time in which its rows travel.
    """
    return np.maximum(local - could_wait, np.minimum(local, meanwhile))


def forward_seconds(model: CostModel) -> float:
    """Seconds of a cell in the forward pass."""
    return 2 * model.heads_q * sum(model.head_dims) / (model.forward_tflops * 1e12)


def grad_wire_bytes(dtype: GradWireDtype, model: CostModel) -> int:
    """Bytes of an element of dK and dV on their way home."""
    return model.element_bytes if dtype == "input" else max(model.element_bytes, 4)


def _collectives(work: StageWork, model: CostModel, element_bytes: int) -> FloatArray:
    """Seconds of each stage's all-to-all of rows of keys and values."""
    rows = np.maximum(work.received.max(axis=-1), work.sent.max(axis=-1))
    return transfer_seconds(rows, model, element_bytes, model.bandwidth)


def transfer_seconds(rows: IntArray, model: CostModel, element_bytes: int, bandwidth: float) -> FloatArray:
    """Seconds of all-to-alls in which a rank sends or receives so many rows; nothing where nothing travels."""
    per_row = model.heads_kv * sum(model.head_dims) * element_bytes / bandwidth
    return rows * per_row + (rows > 0) * model.latency
