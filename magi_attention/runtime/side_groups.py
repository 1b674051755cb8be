"""Side groups: more process groups of the same ranks, for what the one that users give does not do, or not as well.

They are made at first use, by its ranks alone. To make one is a collective. They are kept until the process ends, also
when the user's group is destroyed: with NCCL to end one is a collective, too, which ranks would come to at other times.

``torch.distributed.new_group`` is not what makes them. Without ``use_local_synchronization`` all ranks of the job would
have to call it, also those of other groups. With it, ranks wait for each other under a name that counts the groups each
is in, so that two ranks of which one is in more groups wait for ever.
"""

import atexit
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

_groups: dict[tuple[dist.ProcessGroup, str], dist.ProcessGroup] = {}


def is_on_gpus(group: dist.ProcessGroup | None) -> bool:
    """Whether NCCL carries its tensors; None is the default group."""
    return "nccl" in str(dist.get_backend_config(group))


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """For tensors on the CPU; ``group`` itself if it takes them."""
    return group if "cpu:" in str(dist.get_backend_config(group)) else side_group(group, "gloo")


def transfer_group(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """For transfers beside computation, of tensors on a device.

    With NCCL it is one whose kernels get the next free multiprocessor of a GPU. Otherwise they would wait for the end
    of a kernel with more programs than there are multiprocessors, and the GPUs at the other ends with them.
    """
    return side_group(group, "nccl") if device.type == "cuda" and is_on_gpus(group) else group


def side_group(group: dist.ProcessGroup, backend: Literal["gloo", "nccl"]) -> dist.ProcessGroup:
    """The side group with a backend: gloo, or NCCL with streams of high priority. Its timeout is that of ``group``."""
    if (group, backend) not in _groups:
        _groups[group, backend] = _make(group, backend)
    return _groups[group, backend]


def _make(group: dist.ProcessGroup, backend: Literal["gloo", "nccl"]) -> dist.ProcessGroup:
    store = PrefixStore(f"magi_attention/{backend}", _get_process_group_store(group))
    rank, size, timeout = group.rank(), group.size(), _timeout(group)
    side = dist.ProcessGroup(store, rank, size)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout
        kind, device = dist.ProcessGroup.BackendType.NCCL, torch.device("cuda")
        transport: dist.ProcessGroupNCCL | dist.ProcessGroupGloo = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        kind, device = dist.ProcessGroup.BackendType.GLOO, torch.device("cpu")
        transport = dist.ProcessGroupGloo(store, rank, size, timeout)
    side._set_default_backend(kind)
    side._register_backend(device, kind, transport)
    return side


def _timeout(group: dist.ProcessGroup) -> timedelta:
    device = torch.device("cuda" if is_on_gpus(group) else "cpu")
    return group._get_backend(device).options._timeout


@atexit.register
def _shut_down() -> None:
    """Before the interpreter is gone, see cache.py; torch ends only groups that ``new_group`` made."""
    while _groups:
        _groups.popitem()[1].shutdown()
