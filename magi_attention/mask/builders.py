"""The masks that models use, by name: each function returns an :class:`~magi_attention.mask.AttnMask`.

Documents packed into one sequence are given by their cumulative lengths ``cu_seqlens``, as flash-attention takes them:
0, then the end of each document, in a list, a numpy array or a tensor. Documents may be empty. A single document may
also be given by its length, an int. All positions below are of one document; no document sees another.

Where queries and keys differ in number, the last query is aligned with the last key.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray, ranges_to_indices
from magi_attention.mask.integers import (
    IntegersLike,
    as_cu_seqlens,
    as_flag,
    as_int,
    as_length,
    as_lengths,
    as_limit,
    as_size,
    as_window,
)

SeqlensLike = int | IntegersLike

_FAR = 1 << 40  # farther than any two tokens are apart: a strip without a limit


def full(seqlen_q: int, seqlen_k: int | None = None) -> AttnMask:
    """Every query attends every key; ``seqlen_k`` is ``seqlen_q`` by default."""
    return varlen(as_length(seqlen_q, "seqlen_q"), None if seqlen_k is None else as_length(seqlen_k, "seqlen_k"))


def causal(seqlen_q: int, seqlen_k: int | None = None) -> AttnMask:
    """The last query attends every key, each query before it one key fewer; ``seqlen_k`` is ``seqlen_q`` by default."""
    return varlen(
        as_length(seqlen_q, "seqlen_q"), None if seqlen_k is None else as_length(seqlen_k, "seqlen_k"), causal=True
    )


def varlen(cu_seqlens_q: SeqlensLike, cu_seqlens_k: SeqlensLike | None = None, causal: bool = False) -> AttnMask:
    """Packed documents, each of which attends itself.

    Args:
        cu_seqlens_q: Cumulative lengths of the documents' queries, shape ``(documents + 1,)``.
        cu_seqlens_k: The same of their keys; as the queries' by default.
        causal: Whether each document is causal.

    Raises:
        TypeError: If a length is not an integer, or ``causal`` no flag.
        ValueError: If cumulative lengths do not begin at 0, decrease, or differ in number.
    """
    return sliding_window(cu_seqlens_q, (-1, 0 if as_flag(causal, "causal") else -1), cu_seqlens_k)


def sliding_window(
    cu_seqlens_q: SeqlensLike, window_size: tuple[int, int], cu_seqlens_k: SeqlensLike | None = None
) -> AttnMask:
    """Query ``i`` attends the keys ``i - left`` to ``i + right``, both included.

    Args:
        cu_seqlens_q: Cumulative lengths of the documents' queries, shape ``(documents + 1,)``.
        window_size: ``(left, right)``, -1 for no limit on that side. A causal window of ``w`` tokens is ``(w - 1, 0)``.
        cu_seqlens_k: The same of their keys; as the queries' by default.

    Raises:
        TypeError: If a length or a window is not an integer.
        ValueError: If cumulative lengths do not begin at 0, decrease, or differ in number, or a window is below -1.
    """
    q, k = _documents(cu_seqlens_q, cu_seqlens_k)
    lo, hi = _strip(k[1:] - q[1:], window_size)
    return AttnMask.from_bands(_stack(q[:-1], q[1:], k[:-1], k[1:], lo, hi), q[-1], k[-1])


def global_sliding_window(
    cu_seqlens_q: SeqlensLike,
    window_size: tuple[int, int],
    global_size: int,
    causal: bool = False,
    cu_seqlens_k: SeqlensLike | None = None,
) -> AttnMask:
    """A sliding window, and the first keys of a document that all its queries attend (attention sinks).

    With ``causal`` this is the mask of StreamingLLM (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).

    Args:
        cu_seqlens_q: Cumulative lengths of the documents' queries, shape ``(documents + 1,)``.
        window_size: ``(left, right)`` as in :func:`sliding_window`.
        global_size: Number of keys at the start of each document that all its queries attend.
        causal: Whether no query attends a key behind its own position, global or not.
        cu_seqlens_k: Cumulative lengths of the documents' keys; as the queries' by default.

    Raises:
        TypeError: If a length or a window is not an integer.
        ValueError: As :func:`sliding_window`, or if ``global_size`` is negative.
    """
    q, k = _documents(cu_seqlens_q, cu_seqlens_k)
    diagonal = k[1:] - q[1:]
    lo, hi = _strip(diagonal, window_size)
    seen_to = diagonal if as_flag(causal, "causal") else diagonal + _FAR
    split = np.minimum(k[:-1] + as_length(global_size, "global_size"), k[1:])
    first_keys = _stack(q[:-1], q[1:], k[:-1], split, diagonal - _FAR, seen_to)
    window = _stack(q[:-1], q[1:], split, k[1:], lo, np.minimum(hi, seen_to))
    return AttnMask.from_bands(np.concatenate((first_keys, window)), q[-1], k[-1])


def prefix_lm(cu_seqlens: SeqlensLike, prefix_lens: SeqlensLike) -> AttnMask:
    """A prefix that attends itself in both directions, and a causal rest that also attends the prefix.

    Args:
        cu_seqlens: Cumulative lengths of the documents, shape ``(documents + 1,)``.
        prefix_lens: Length of each document's prefix, shape ``(documents,)``, or one int for all.

    Raises:
        TypeError: If a length is not an integer.
        ValueError: If ``cu_seqlens`` does not begin at 0 or decreases, or a prefix is negative or longer than its
            document.
    """
    borders = _borders(cu_seqlens, "cu_seqlens")
    start, end = borders[:-1], borders[1:]
    if isinstance(prefix_lens, int) or getattr(prefix_lens, "ndim", 1) == 0:  # one number, perhaps numpy's or torch's
        prefix_lens = [as_length(prefix_lens, "prefix_lens")] * len(start)
    prefix = as_lengths(prefix_lens, "prefix_lens")
    if len(prefix) != len(start):
        raise ValueError(f"prefix_lens has {len(prefix)} entries but cu_seqlens has {len(start)} documents")
    beyond = np.flatnonzero(prefix > end - start)
    if len(beyond):
        n = beyond[0]
        raise ValueError(f"prefix_lens[{n}] = {prefix[n]} is longer than its document of {end[n] - start[n]} tokens")
    split = start + prefix
    seen_by_all = _stack(start, end, start, split, -_FAR, _FAR)
    rest = _stack(split, end, split, end, -_FAR, 0)
    return AttnMask.from_bands(np.concatenate((seen_by_all, rest)), borders[-1], borders[-1])


def block_causal(cu_seqlens: SeqlensLike, block_size: int, window: int = -1, causal: bool = False) -> AttnMask:
    """Blocks of tokens, such as video frames, that attend themselves in both directions and the blocks before them.

    Args:
        cu_seqlens: Cumulative lengths of the documents, shape ``(documents + 1,)``.
        block_size: Tokens of a block; the last block of a document may be shorter.
        window: How many blocks before its own a token attends; -1 for all.
        causal: Whether no query attends a key behind its own position, as in the chunked attention of Llama 4, which is
            ``window=0, causal=True``.

    Raises:
        TypeError: If a length is not an integer.
        ValueError: If ``cu_seqlens`` does not begin at 0 or decreases, ``block_size`` is not positive, or ``window`` is
            below -1.
    """
    borders = _borders(cu_seqlens, "cu_seqlens")
    block_size = as_size(block_size, "block_size")
    reach = min(_distance(as_limit(window, "window")) * block_size, _FAR)
    count = -(-np.diff(borders) // block_size)
    document = np.repeat(np.arange(len(count)), count)
    start = borders[document] + block_size * ranges_to_indices(np.zeros_like(count), count)
    end = np.minimum(start + block_size, borders[document + 1])
    hi = 0 if as_flag(causal, "causal") else _FAR
    bands = _stack(start, end, np.maximum(borders[document], start - reach), end, -_FAR, hi)
    return AttnMask.from_bands(bands, borders[-1], borders[-1])


def shared_prefix(prefix_len: int, answer_lens: IntegersLike) -> AttnMask:
    """One prompt and many answers to it, one behind the other: an answer attends the prompt and, causally, itself.

    Args:
        prefix_len: Length of the prompt, which is causal.
        answer_lens: Length of each answer, shape ``(answers,)``.

    Raises:
        TypeError: If a length is not an integer.
        ValueError: If a length is negative.
    """
    lengths = [as_length(prefix_len, "prefix_len"), *as_lengths(answer_lens, "answer_lens").tolist()]
    return prefix_tree([(-1, lengths[0]), *((0, n) for n in lengths[1:])])


def prefix_tree(nodes: Sequence[tuple[int, int]]) -> AttnMask:
    """Texts that branch: a token attends all tokens of its node's ancestors and, causally, its own node.

    Args:
        nodes: ``(parent, length)`` of each node, in the order in which the nodes lie in the sequence. A parent is the
            index of an earlier node, or -1 for a root; there may be several roots.

    Raises:
        TypeError: If ``nodes`` is no sequence of pairs, or an entry is not an integer.
        ValueError: If a parent does not come before its child, or a length is negative.
    """
    parents, offset = [], 0
    seen_by: list[list[list[int]]] = []  # of each node, the runs of rows that attend its keys
    keys = []
    for n, (parent, length) in enumerate(_pairs(nodes)):
        parent = as_int(parent, f"nodes[{n}][0]")
        if not -1 <= parent < n:
            raise ValueError(f"nodes[{n}] has parent {parent}: it must be an earlier node, or -1 for none")
        start, offset = offset, offset + as_length(length, f"nodes[{n}][1]")
        parents.append(parent)
        keys.append((start, offset))
        seen_by.append([])
        ancestor = n
        while ancestor >= 0:
            runs = seen_by[ancestor]
            if runs and runs[-1][1] == start:
                runs[-1][1] = offset
            else:
                runs.append([start, offset])
            ancestor = parents[ancestor]
    # Every row that attends a node comes behind its keys or is one of them, so one causal strip cuts what must be cut.
    bands = [(q0, q1, k0, k1, -_FAR, 0) for (k0, k1), runs in zip(keys, seen_by, strict=True) for q0, q1 in runs]
    return AttnMask.from_bands(np.array(bands, np.int64).reshape(-1, 6), offset, offset)


def cu_seqlens_from_lengths(lengths: IntegersLike) -> IntArray:
    """Cumulative lengths, int64 of shape ``(documents + 1,)``, of documents of these lengths.

    Raises:
        TypeError: If a length is not an integer.
        ValueError: If a length is negative.
    """
    return np.concatenate(([0], np.cumsum(as_lengths(lengths, "lengths"))))


def _pairs(nodes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    if not isinstance(nodes, Iterable):
        raise TypeError(f"nodes must be pairs (parent, length), got {nodes!r}")
    for n, node in enumerate(nodes):
        try:
            parent, length = node
        except (TypeError, ValueError):
            raise TypeError(f"nodes[{n}] must be a pair (parent, length), got {node!r}") from None
        yield parent, length


def _stack(*columns: IntArray | int) -> IntArray:
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def _distance(limit: int) -> int:
    return _FAR if limit == -1 else limit


def _strip(diagonal: IntArray, window_size: IntegersLike) -> tuple[IntArray, IntArray]:
    """``lo`` and ``hi`` of a window around the diagonal ``j - i = diagonal``."""
    left, right = map(_distance, as_window(window_size))
    return diagonal - left, diagonal + right


def _borders(cu_seqlens: SeqlensLike, name: str) -> IntArray:
    if isinstance(cu_seqlens, int) or getattr(cu_seqlens, "ndim", 1) == 0:  # one number, perhaps numpy's or torch's
        return np.array([0, as_length(cu_seqlens, name)], np.int64)
    return as_cu_seqlens(cu_seqlens, name)


def _documents(cu_seqlens_q: SeqlensLike, cu_seqlens_k: SeqlensLike | None) -> tuple[IntArray, IntArray]:
    q = _borders(cu_seqlens_q, "cu_seqlens_q")
    k = q if cu_seqlens_k is None else _borders(cu_seqlens_k, "cu_seqlens_k")
    if len(q) != len(k):
        raise ValueError(
            f"cu_seqlens_q has {len(q) - 1} documents but cu_seqlens_k has {len(k) - 1}: each needs queries and keys"
        )
    return q, k
