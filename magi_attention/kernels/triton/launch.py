"""Launch: what the launches of one call have in common."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from magi_attention.kernels.lazy_schedule import LazySchedule
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.scales import Scales
from magi_attention.kernels.triton.tile_walk import TileWalk, make_tile_walk
from magi_attention.kernels.triton.tiles import UnitRows, as_unit_rows
from magi_attention.kernels.triton.tuning import TileShape, Tuning, choose, packed_heads


@dataclass(frozen=True)
class Launch:
    """The tensors, the mask and the sizes with which kernels are launched.

    Attributes:
        q: Queries.
        k: Keys.
        v: Values.
        heads_kv: Heads of the keys.
        group: Query heads for each of them.
        head_dim: The last dimension of queries and keys.
        head_dim_v: The last dimension of values.
        schedule: The mask.
        scales: How scores are made of products.
        softcap: Whether a ``tanh`` is among that.
        shapes: The shapes of tiles.
        device: Where the tensors are.
    """

    q: UnitRows
    k: UnitRows
    v: UnitRows
    heads_kv: int
    group: int
    head_dim: int
    head_dim_v: int
    schedule: LazySchedule
    scales: Scales
    softcap: bool
    shapes: Tuning
    device: torch.device

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: LazySchedule, params: AttnParams
    ) -> "Launch":
        """The launches over these tensors."""
        heads_kv, head_dim = k.shape[1:]
        return cls(
            q=as_unit_rows(q),
            k=as_unit_rows(k),
            v=as_unit_rows(v),
            heads_kv=heads_kv,
            group=q.shape[1] // heads_kv,
            head_dim=head_dim,
            head_dim_v=v.shape[2],
            schedule=schedule,
            scales=Scales.of(params),
            softcap=params.softcap != 0,
            shapes=choose(max(head_dim, v.shape[2]), q.dtype, q.device),
            device=q.device,
        )

    @property
    def packed(self) -> int:
        """Query heads in the rows of one query tile."""
        return packed_heads(self.group)

    @property
    def query_programs(self) -> int:
        """Programs for each query tile: one for each head of the keys and part of its query heads."""
        return self.heads_kv * triton.cdiv(self.group, self.packed)

    def by_queries(self, shape: TileShape) -> TileWalk:
        """The walk over query tiles of a shape, the rows of which are pairs of a query and a head."""
        return self.schedule.by_queries(make_tile_walk, shape.rows // self.packed, shape.cols, self.device)

    def by_keys(self, shape: TileShape) -> TileWalk:
        """The walk over key tiles of a shape."""
        return self.schedule.by_keys(make_tile_walk, shape.rows, shape.cols, self.device)

    def options(self, shape: TileShape, walk: TileWalk) -> dict[str, Any]:
        """The compile-time arguments that the kernels share."""
        return dict(
            GROUP=self.group,
            HEAD_DIM=self.head_dim,
            HEAD_DIM_V=self.head_dim_v,
            BLOCK_D=block_of(self.head_dim),
            BLOCK_DV=block_of(self.head_dim_v),
            ROWS=shape.rows,
            COLS=shape.cols,
            SOFTCAP=self.softcap,
            LAYERED=walk.layered,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )


def block_of(head_dim: int) -> int:
    """The dimension of tiles: products need at least 16, and a power of two."""
    return max(16, triton.next_power_of_2(head_dim))
