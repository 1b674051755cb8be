"""Agreement: find out that ranks were given different masks before they send rows that nobody expects."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from magi_attention.runtime.side_groups import host_group


@dataclass(frozen=True)
class Agreement:
    """The digests of all ranks' keys, on their way."""

    mine: torch.Tensor
    gathered: list[torch.Tensor]
    work: dist.Work

    def disagreement(self) -> str | None:
        """Wait for the digests and compare them: on every rank, what to say when they are not all the same."""
        self.work.wait()
        digests = [tuple(d.tolist()) for d in self.gathered]
        if len(set(digests)) == 1:
            return None
        groups = [[r for r, d in enumerate(digests) if d == digest] for digest in dict.fromkeys(digests)]
        return (
            "the ranks of the context-parallel group were given different masks, padding, chunk sizes or "
            f"configurations; ranks that agree with each other: {groups}. Every rank must pass the same global mask"
        )


def start_agreement(digest: bytes, group: dist.ProcessGroup) -> Agreement:
    """Start gathering the ranks' digests: 16 bytes a rank, hidden behind whatever comes next.

    It is between the hosts, so that nobody waits for a GPU that is still busy with the step before.
    """
    group = host_group(group)
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(gathered, mine, group=group, async_op=True)
    return Agreement(mine, gathered, work)
