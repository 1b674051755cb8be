"""Add up rows that every rank has a part of, each at the rank it belongs to: the transpose of gathering them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def reduce_scatter_rows(rows: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks of the rows that belong to this rank.

    Parts travel in one all-to-all, which every backend has for any numbers of rows, and are added up where they arrive:
    the sum repeats bit by bit, and bf16 and fp16 are rounded once, from a sum in float32.

    Args:
        rows: This rank's part of the rows of all ranks, rank 0 first, of one shape and dtype on every rank.
        counts: How many rows belong to each rank.
        group: The process group.
    """
    mine = counts[dist.get_rank(group)]
    received = rows.new_empty((len(counts) * mine, *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), [mine] * len(counts), list(counts), group=group)
    return received.unflatten(0, (len(counts), mine)).sum(dim=0, dtype=rows.dtype)
