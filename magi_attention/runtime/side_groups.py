"""Side groups: more process groups of the same ranks, for what the one that users give does not do, or not as well.

They are made at first use, by its ranks alone, and kept. To make one is a collective.
"""

import atexit
from typing import Any

import torch.distributed as dist

_groups: dict[tuple[dist.ProcessGroup, str], dist.ProcessGroup] = {}
atexit.register(_groups.clear)  # before the interpreter is gone, see cache.py


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """For tensors on the CPU; ``group`` itself if it takes them."""
    if "cpu:" in str(dist.get_backend_config(group)):
        return group
    return _side_group(group, "host", backend="gloo")


def transfer_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """For transfers beside computation: with NCCL, one whose kernels get the next free multiprocessor of a GPU.

    Otherwise they would wait for the end of a kernel with more programs than there are multiprocessors, and the GPUs at
    the other ends with them.
    """
    if "nccl" not in str(dist.get_backend_config(group)):
        return group
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    return _side_group(group, "transfers", backend="nccl", pg_options=options)


def _side_group(group: dist.ProcessGroup, purpose: str, **how: Any) -> dist.ProcessGroup:
    if (group, purpose) not in _groups:
        ranks = dist.get_process_group_ranks(group)
        _groups[group, purpose] = dist.new_group(ranks, use_local_synchronization=True, **how)
    return _groups[group, purpose]
