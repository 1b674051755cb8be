"""DistAttnRuntimeKey: everything that determines a plan, as a frozen value."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from magi_attention.config import DistAttnConfig
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.planning.sources import SELF_ATTENTION, Sources
from magi_attention.planning.two_level import MeshShape


@dataclass(frozen=True)
class DistAttnRuntimeKey:
    """Names a plan and the process group it runs on. Made by the key functions of the interface.

    Keys are values: equal when they are made of equal parts, hashable, picklable, and made of frozen copies, so that
    nothing a caller changes later changes them.

    Attributes:
        mask: The global mask.
        pad_size: Rows of padding at the end of the queries.
        chunk_size: Rows in a chunk.
        cp_ranks: Global ranks of the context-parallel group, in order.
        group_name: Name of the process group.
        config: The configuration.
        dispatch_of: The mask that the chunks of queries were given to ranks for; None for ``mask`` itself.
        mesh_shape: Nodes, and ranks in each; None where nodes make no difference.
        sources: Where queries and keys come from.
    """

    mask: AttnMask
    pad_size: int
    chunk_size: int
    cp_ranks: tuple[int, ...]
    group_name: str
    config: DistAttnConfig
    dispatch_of: AttnMask | None = None
    mesh_shape: MeshShape | None = None
    sources: Sources = SELF_ATTENTION

    @property
    def cp_size(self) -> int:
        """Number of ranks."""
        return len(self.cp_ranks)

    @property
    def total_seqlen_q(self) -> int:
        """Queries, without padding."""
        return self.mask.total_seqlen_q

    @property
    def total_seqlen_k(self) -> int:
        """Keys, without padding."""
        return self.mask.total_seqlen_k

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ when anything differs that ranks must agree on, the same in every process."""
        dispatch_of = None if self.dispatch_of is None else self.dispatch_of.digest
        parts = (self.pad_size, self.chunk_size, self.cp_ranks, self.config, dispatch_of, self.mesh_shape, self.sources)
        return hashlib.blake2b(self.mask.digest + repr(parts).encode(), digest_size=16).digest()
