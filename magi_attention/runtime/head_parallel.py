"""Heads as a second axis: the ranks of a node exchange rows for heads, attend, and exchange back.

Between nodes the sequence is split, as the plan says; inside a node the heads are, as in DeepSpeed-Ulysses
(https://arxiv.org/abs/2309.14509). Before and after attention a rank has some rows of its node with all heads, during
attention all rows of its node with some heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from magi_attention.comm.row_exchange import Transfer, exchange
from magi_attention.kernels.params import AttnParams
from magi_attention.runtime.dist_attn import DistAttn
from magi_attention.runtime.program import RankProgram
from magi_attention.runtime.runtime import DistAttnRuntime
from magi_attention.runtime.spans import span


@dataclass(frozen=True)
class NodeRows:
    """The rows of a node.

    Attributes:
        counts: How many each of its ranks has. Laid one behind the other they are in the order of the node's plan.
        group: Its ranks.
    """

    counts: tuple[int, ...]
    group: dist.ProcessGroup

    def split_heads(self, x: torch.Tensor) -> Transfer:
        """Start to turn this rank's rows of all heads into all rows of this rank's heads."""
        size = len(self.counts)
        by_heads = x.unflatten(1, (size, x.shape[1] // size)).transpose(0, 1).flatten(0, 1)
        return exchange(by_heads.contiguous(), [len(x)] * size, self.counts, self.group)

    def join_heads(self, x: torch.Tensor) -> Transfer:
        """Start the way back. What arrives is what each rank of the node has of this rank's rows, see :meth:`join`."""
        return exchange(x.contiguous(), self.counts, [self._mine] * len(self.counts), self.group)

    def join(self, arrived: torch.Tensor) -> torch.Tensor:
        """This rank's rows of all heads."""
        return arrived.unflatten(0, (len(self.counts), self._mine)).transpose(0, 1).flatten(1, 2).contiguous()

    @property
    def _mine(self) -> int:
        return self.counts[self.group.rank()]


class SplitHeads(torch.autograd.Function):
    """This rank's rows of all heads to all rows of the node of this rank's heads, for several tensors at once.

    Each is ``(local rows, heads, ...)`` and becomes ``(rows of the node, heads / ranks of the node, ...)``.
    """

    @staticmethod
    def forward(ctx: Any, rows: tuple[NodeRows, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.rows = rows
        with span("split heads"):
            transfers = [r.split_heads(x) for r, x in zip(rows, tensors, strict=True)]
            return tuple(transfer.wait() for transfer in transfers)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *JoinHeads.apply(ctx.rows, *grads)


class JoinHeads(torch.autograd.Function):
    """The inverse of :class:`SplitHeads`, and its transpose."""

    @staticmethod
    def forward(ctx: Any, rows: tuple[NodeRows, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.rows = rows
        with span("join heads"):
            transfers = [r.join_heads(x) for r, x in zip(rows, tensors, strict=True)]
            return tuple(r.join(transfer.wait()) for r, transfer in zip(rows, transfers, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *SplitHeads.apply(ctx.rows, *grads)


def check_heads(heads_q: int, heads_kv: int, ranks_per_node: int) -> None:
    """Refuse heads that the ranks of a node cannot share.

    Raises:
        ValueError: If they cannot have equal numbers of query heads, with either whole KV heads of their own or one KV
            head that as many ranks share as any other.
    """
    if heads_q % ranks_per_node or (heads_kv % ranks_per_node and ranks_per_node % heads_kv):
        raise ValueError(
            f"with intra_node='heads' the {ranks_per_node} ranks of a node share the heads: q must have a multiple of "
            f"{ranks_per_node} heads, k and v a multiple or a divisor of it, not {heads_q} and {heads_kv}; use a "
            "cp_mesh with fewer ranks in a node, or intra_node='sequence'"
        )


def attend_by_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    runtime: DistAttnRuntime,
    program: RankProgram,
    params: AttnParams,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """What :class:`~magi_attention.runtime.dist_attn.DistAttn` gives, for local rows of all heads.

    The highest scores of heads that other ranks of the node attend to are -inf here.
    """
    group = runtime.cp_group.intra
    size, place = group.size(), group.rank()
    node = slice(runtime.rank - place, runtime.rank - place + size)
    rows_q, rows_k = (NodeRows(plan.local_seqlens[node], group) for plan in (runtime.dispatch, runtime.dispatch_k))
    # Ranks that share a KV head each get it, and its gradient is the sum of theirs.
    copies = max(1, size // k.shape[1])
    k, v = (x.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2) for x in (k, v))
    q, k, v = SplitHeads.apply((rows_q, rows_k, rows_k), q, k, v)
    sink = None if sink is None else sink.chunk(size)[place]
    out, lse, *max_logits = DistAttn.apply(q, k, v, program, params, sink)
    out, lse = JoinHeads.apply((rows_q, rows_q), out, lse.T.unsqueeze(2))
    results = out, lse.squeeze(2).T.contiguous()
    if not max_logits:
        return results
    of_node = max_logits[0].new_full((size, len(max_logits[0])), -torch.inf)
    of_node[place] = max_logits[0]
    return *results, of_node.flatten()
