"""Gather equal numbers of rows from every rank."""

import torch
import torch.distributed as dist


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks behind each other, rank 0 first, on every rank.

    Args:
        rows: This rank's rows, the same shape and dtype on every rank.
        group: The process group.
    """
    world_size = dist.get_world_size(group)
    gathered = rows.new_empty((world_size * len(rows), *rows.shape[1:]))
    dist.all_gather(list(gathered.chunk(world_size)), rows.contiguous(), group=group)
    return gathered
