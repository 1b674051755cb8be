"""CpGroup: the process groups that ``cp_group`` or ``cp_mesh`` stands for."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.comm import Exchange, FlatExchange, HierarchicalExchange, RowRouting
from magi_attention.config import IntraNode
from magi_attention.planning import GroupCollectivePlan
from magi_attention.planning.two_level import MeshShape, TwoLevelPlan
from magi_attention.runtime.side_groups import is_on_gpus, transfer_group


@dataclass(frozen=True)
class CpGroup:
    """The ranks of context parallelism.

    Attributes:
        flat: All of them, node by node.
        levels: The ranks with this rank's place, one in each node, and the ranks of this rank's node; None where
            nodes make no difference.
    """

    flat: dist.ProcessGroup
    levels: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    def size(self) -> int:
        """Number of ranks."""
        return self.flat.size()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their numbers in the default group."""
        return tuple(dist.get_process_group_ranks(self.flat))

    @property
    def mesh_shape(self) -> MeshShape | None:
        """Nodes, and ranks in each; None where nodes make no difference."""
        return None if self.levels is None else MeshShape(*(group.size() for group in self.levels))

    @property
    def intra(self) -> dist.ProcessGroup:
        """The ranks of this rank's node."""
        assert self.levels is not None
        return self.levels[1]

    def with_levels_for(self, intra_node: IntraNode) -> "CpGroup":
        """These ranks, with their levels only if those make a difference.

        Raises:
            ValueError: If the ranks of a node are to split heads and there are no nodes.
        """
        if intra_node == "heads" and self.levels is None:
            raise ValueError(
                "intra_node='heads' needs a cp_mesh of two axes, nodes and the ranks in each, such as "
                f"init_hierarchical_mesh({self.size()}, nodes, ranks_per_node), not a group without nodes"
            )
        is_used = intra_node == "heads" or (self.mesh_shape is not None and self.mesh_shape.has_two_levels)
        return self if is_used else CpGroup(self.flat)

    def planned_for(self, intra_node: IntraNode) -> "CpGroup":
        """The ranks that a plan is over: all, or, where the ranks of a node split heads, one of each node."""
        if intra_node == "sequence":
            return self
        assert self.levels is not None
        return CpGroup(self.levels[0])

    def exchange(self, plan: GroupCollectivePlan | TwoLevelPlan, device: torch.device) -> Exchange:
        """Make a stage's transfers ready for a device."""
        if isinstance(plan, GroupCollectivePlan):
            return FlatExchange(RowRouting.on_device(plan, device), transfer_group(self.flat, device))
        assert self.levels is not None
        inter, intra = (transfer_group(group, device) for group in self.levels)
        return HierarchicalExchange.on_device(plan, inter, intra, device)


def resolve_group(cp_group: dist.ProcessGroup | None, cp_mesh: DeviceMesh | None) -> CpGroup:
    """Turn the two ways of naming the ranks into process groups.

    A mesh of two axes is one of nodes and the ranks in each. All ranks of a mesh with several axes form one group, too,
    which is made at first use.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If not exactly one is given, or a mesh of several axes does not name them or is not in the order of
            its ranks.
    """
    if cp_group is None and cp_mesh is None:
        hint = "" if dist.is_initialized() else "; torch.distributed.init_process_group has not been called yet"
        raise ValueError(f"exactly one of cp_group and cp_mesh must be given, not neither{hint}")
    if cp_mesh is not None and not isinstance(cp_mesh, DeviceMesh):
        raise TypeError(f"cp_mesh must be a torch DeviceMesh, not {cp_mesh!r}")
    if cp_group is not None and cp_mesh is not None:
        raise ValueError("exactly one of cp_group and cp_mesh must be given, not both")
    if cp_mesh is not None:
        return _of_mesh(cp_mesh)
    if not isinstance(cp_group, dist.ProcessGroup):
        raise TypeError(
            f"cp_group must be a torch.distributed.ProcessGroup that this rank is part of, not {cp_group!r}"
        )
    return CpGroup(cp_group)


def _of_mesh(mesh: DeviceMesh) -> CpGroup:
    if mesh.ndim == 1:
        return CpGroup(mesh.get_group())
    if mesh.mesh_dim_names is None:
        raise ValueError("a cp_mesh of more than one axis needs mesh_dim_names, so that its axes can be joined")
    flat = mesh._flatten().get_group()
    if mesh.ndim > 2:
        return CpGroup(flat)
    inter, intra = mesh.get_group(0), mesh.get_group(1)
    ranks = np.array(dist.get_process_group_ranks(flat)).reshape(mesh.shape)
    mine = ranks[:, intra.rank()].tolist(), ranks[inter.rank()].tolist()
    if mine != (dist.get_process_group_ranks(inter), dist.get_process_group_ranks(intra)):
        raise ValueError(
            f"the ranks of a cp_mesh of two axes must be in ascending order, node by node, not {mesh.mesh.tolist()}"
        )
    return CpGroup(flat, (inter, intra))


def position_device(group: dist.ProcessGroup) -> torch.device:
    """Where a group's training runs: the current CUDA device for NCCL, else the CPU."""
    if is_on_gpus(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
