"""Agreement: find out that ranks were given different masks before they send rows that nobody expects."""

import hashlib
import socket

import torch
import torch.distributed as dist

from magi_attention.runtime.side_groups import host_group


class Agreement:
    """Whether the ranks made a key from the same arguments: asked when it is made, and answered when it is used.

    What they tell each other, 24 bytes a rank, travels between the hosts, hidden behind whatever comes next: nobody
    waits for a GPU that is still busy with the step before.
    """

    def __init__(self) -> None:
        self._work: dist.Work | None = None
        self._digests: list[torch.Tensor] = []
        self._problem: str | None = None
        self.one_host = False
        """Whether the ranks are processes of one host, as far as it has been settled."""

    def ask(self, digest: bytes, group: dist.ProcessGroup) -> None:
        """Start gathering the ranks' digests. What they made before does not count any more."""
        group = host_group(group)
        mine = torch.frombuffer(bytearray(digest + _host()), dtype=torch.int64)
        self._digests = [torch.empty_like(mine) for _ in range(group.size())]
        self._work = dist.all_gather(self._digests, mine, group=group, async_op=True)
        self._problem = None

    def settle(self) -> None:
        """Wait for the digests.

        Raises:
            ValueError: On every rank, if they are not all the same; also later, until the ranks ask anew.
        """
        if self._work is not None:
            self._work.wait()
            told = [tuple(digest.tolist()) for digest in self._digests]
            self._problem = _problem([numbers[:-1] for numbers in told])
            self.one_host = len({numbers[-1] for numbers in told}) == 1
            self._work = None
        if self._problem is not None:
            raise ValueError(self._problem)


def _host() -> bytes:
    """Stands for the name of this host."""
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=8).digest()


def _problem(digests: list[tuple[int, ...]]) -> str | None:
    if len(set(digests)) == 1:
        return None
    groups = [[r for r, d in enumerate(digests) if d == digest] for digest in dict.fromkeys(digests)]
    return (
        "the ranks of the context-parallel group were given different masks, padding, chunk sizes or "
        f"configurations; ranks that agree with each other: {groups}. Every rank must pass the same global mask"
    )
