"""The one process group that ``cp_group`` or ``cp_mesh`` stands for."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def resolve_group(cp_group: dist.ProcessGroup | None, cp_mesh: DeviceMesh | None) -> dist.ProcessGroup:
    """Turn the two ways of naming the ranks into a process group.

    A mesh of one axis gives its group; of a mesh with more axes all ranks form one group, made at first use.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If not exactly one is given, or a mesh of several axes does not name them.
    """
    if (cp_group is None) == (cp_mesh is None):
        given = "neither" if cp_group is None else "both"
        raise ValueError(f"exactly one of cp_group and cp_mesh must be given, not {given}")
    if cp_mesh is not None:
        if not isinstance(cp_mesh, DeviceMesh):
            raise TypeError(f"cp_mesh must be a torch DeviceMesh, not {cp_mesh!r}")
        if cp_mesh.ndim > 1 and cp_mesh.mesh_dim_names is None:
            raise ValueError("a cp_mesh of more than one axis needs mesh_dim_names, so that its axes can be joined")
        cp_group = (cp_mesh if cp_mesh.ndim == 1 else cp_mesh._flatten()).get_group()
    if not isinstance(cp_group, dist.ProcessGroup):
        raise TypeError(
            f"cp_group must be a torch.distributed.ProcessGroup that this rank is part of, not {cp_group!r}"
        )
    return cp_group


def position_device(group: dist.ProcessGroup) -> torch.device:
    """Where a group's training runs: the current CUDA device for NCCL, else the CPU."""
    if "nccl" in str(dist.get_backend_config(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
