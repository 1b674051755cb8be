"""The sizes of tiles, and how many warps and buffers work on one.

Derived from what the compiler reports for compute capability 8.0 and 9.0, see ``tests/kernels/test_triton_compile.py``:
the largest tiles of those tried that spill (next to) no registers and fit into shared memory. Only the backward kernels
of 256 for compute capability 9.0 have been timed, on an H200: these were the fastest of eight and of seven shapes.
"""

from dataclasses import dataclass

import torch

MAX_HEAD_DIM = 256

MAX_PACKED_HEADS = 8
"""Most query heads in the rows of one tile. More would save little at the edges of a mask and make schedules longer."""


@dataclass(frozen=True)
class TileShape:
    """How a kernel computes a tile.

    Attributes:
        rows: Rows of a tile: pairs of a query and a head, or keys in :attr:`Tuning.dkdv`.
        cols: Keys of a step, or queries in :attr:`Tuning.dkdv`.
        num_warps: Warps that share a tile.
        num_stages: Steps whose loads are under way at a time.
    """

    rows: int
    cols: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tuning:
    """The tile shapes of the three kernels."""

    forward: TileShape
    dq: TileShape
    dkdv: TileShape


# By the largest head_dim that each is for. A multiprocessor of compute capability 9 has 227 KiB of shared memory, and
# operands of its products lie there.
_HOPPER = {
    64: Tuning(TileShape(128, 64, 4, 3), TileShape(128, 64, 8, 3), TileShape(128, 64, 8, 3)),
    128: Tuning(TileShape(128, 64, 8, 3), TileShape(128, 64, 8, 2), TileShape(128, 64, 8, 2)),
    256: Tuning(TileShape(128, 64, 8, 2), TileShape(128, 32, 8, 3), TileShape(64, 64, 8, 2)),
}
# Within 99 KiB, which all since Ampere have.
_OTHERS = {
    64: Tuning(TileShape(128, 64, 4, 3), TileShape(128, 64, 8, 2), TileShape(128, 64, 8, 2)),
    128: Tuning(TileShape(128, 64, 8, 3), TileShape(128, 64, 8, 2), TileShape(64, 64, 8, 2)),
    256: Tuning(TileShape(64, 32, 8, 2), TileShape(64, 16, 8, 2), TileShape(64, 16, 8, 2)),
}
# Products of float32 are made without tensor cores: their operands lie in registers.
_FLOAT32 = {
    64: Tuning(*[TileShape(32, 32, 8, 1)] * 3),
    128: Tuning(*[TileShape(32, 16, 8, 1)] * 3),
    256: Tuning(*[TileShape(16, 16, 4, 1)] * 3),
}


def choose(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """The tile shapes for heads of ``head_dim``, the largest there is and at most 256, on ``device``."""
    if dtype == torch.float32:
        table = _FLOAT32
    else:
        table = _HOPPER if compute_capability(device) == 9 else _OTHERS
    return table[next(largest for largest in table if head_dim <= largest)]


def compute_capability(device: torch.device) -> int:
    """The major number; 0 where there is none, as under Triton's interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def packed_heads(group: int) -> int:
    """How many of the ``group`` query heads of a key head share a tile: as equal parts as there can be."""
    return -(-group // -(-group // MAX_PACKED_HEADS))
