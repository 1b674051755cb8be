"""Gather the rows of every rank, on every rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def all_gather_rows(rows: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks behind each other, rank 0 first, on every rank.

    Backends gather equal sizes only, so where ``counts`` differ all ranks send as many rows as the longest has.

    Args:
        rows: This rank's rows, of one dtype and, but for their number, one shape on every rank.
        counts: How many rows each rank has.
        group: The process group.
    """
    most = max(counts)
    missing = most - len(rows)
    if missing:
        rows = torch.cat((rows, rows.new_zeros((missing, *rows.shape[1:]))))
    gathered = rows.new_empty((len(counts) * most, *rows.shape[1:]))
    parts = gathered.chunk(len(counts))
    dist.all_gather(list(parts), rows.contiguous(), group=group)
    if min(counts) == most:
        return gathered
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
