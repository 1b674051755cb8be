"""The masks of bench_flex_attn.py, and what rivals need to be told about them.

A mask is ours first (:class:`~magi_attention.mask.AttnMask`). From it come the three things that others take: packed
documents with a causal flag and a window, where it is that plain; one interval of keys for each row, or of rows for
each key; and exact lists of the blocks that are full and of those that are cut.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scale_masks
from document_lengths import HISTOGRAMS
from numpy.typing import NDArray

from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import K0, Q0, IntArray, area, crop

BLOCK = 128
WINDOW = 1024
CAUSAL_BLOCK = 2048
PUBLISHED_KINDS = ("varlen full", "varlen causal", "block causal")


@dataclass(frozen=True)
class Documents:
    """A mask as libraries for packed documents know it.

    Attributes:
        cu_seqlens: Cumulative lengths, from 0 to the length of the sequence.
        causal: Whether a token attends no later one.
        window: How many tokens a token attends, itself included; None for no limit. Needs ``causal``.
    """

    cu_seqlens: tuple[int, ...]
    causal: bool = False
    window: int | None = None

    @property
    def single(self) -> bool:
        return len(self.cu_seqlens) == 2

    @property
    def max_seqlen(self) -> int:
        return int(np.diff(self.cu_seqlens).max())

    def mask(self) -> AttnMask:
        left = -1 if self.window is None else self.window - 1
        return builders.sliding_window(self.cu_seqlens, (left, 0 if self.causal else -1))


@dataclass(frozen=True)
class Case:
    """A mask to time, with its name and, if it is that plain, its spelling as documents."""

    name: str
    mask: AttnMask
    documents: Documents | None

    @property
    def seqlen(self) -> int:
        return self.mask.total_seqlen_q

    @property
    def is_full(self) -> bool:
        return self.mask.area == self.mask.total_seqlen_q * self.mask.total_seqlen_k

    def forward_flops(self, heads: int, head_dim: int, head_dim_v: int | None = None) -> int:
        """Useful work: two products of 2 x head_dim operations for each unmasked cell and head. Backward has five."""
        return 2 * self.mask.area * heads * (head_dim + (head_dim_v or head_dim))


@dataclass(frozen=True)
class Intervals:
    """A mask with one interval a row, or else one a key.

    Attributes:
        of_rows: Row ``i`` attends the keys ``start[i] <= j < end[i]`` if true; else key ``j`` is attended by the rows
            ``start[j] <= i < end[j]``.
        start: int32, one a row or a key.
        end: The same.
    """

    of_rows: bool
    start: NDArray[np.int32]
    end: NDArray[np.int32]


@dataclass(frozen=True)
class BlockLists:
    """Of each row of blocks, the columns of those that are cut by the mask, and of those inside it.

    Attributes:
        partial_count: int32 ``(rows,)``.
        partial_index: int32 ``(rows, columns)``; the first ``partial_count`` of a row are valid and ascend.
        full_count: int32 ``(rows,)``.
        full_index: int32 ``(rows, columns)``.
    """

    partial_count: NDArray[np.int32]
    partial_index: NDArray[np.int32]
    full_count: NDArray[np.int32]
    full_index: NDArray[np.int32]


def intervals(mask: AttnMask) -> Intervals:
    """The mask as intervals of rows or, if a row has several, of keys.

    Raises:
        ValueError: If some row and some key both have several.
    """
    q0, q1, k0, k1, lo, hi = mask.bands.T
    transposed = np.stack((k0, k1, q0, q1, -hi, -lo), axis=1)
    for of_rows, bands, total in ((True, mask.bands, mask.total_seqlen_q), (False, transposed, mask.total_seqlen_k)):
        start, end, count = _hull(bands, total)
        if np.array_equal(end - start, count):
            return Intervals(of_rows, start.astype(np.int32), end.astype(np.int32))
    raise ValueError(f"{mask!r} has several intervals in some row and in some key")


def _hull(bands: IntArray, total: int) -> tuple[IntArray, IntArray, IntArray]:
    """Of each row, its first key, the end of its last, and how many it attends; 0, 0, 0 where there are none."""
    start, end, count = np.full(total, np.iinfo(np.int64).max), np.zeros(total, np.int64), np.zeros(total, np.int64)
    for q0, q1, k0, k1, lo, hi in bands.tolist():
        rows = np.arange(q0, q1)
        first, last = np.maximum(k0, rows + lo), np.minimum(k1, rows + hi + 1)
        start[q0:q1] = np.minimum(start[q0:q1], first)
        end[q0:q1] = np.maximum(end[q0:q1], last)
        count[q0:q1] += last - first
    return np.minimum(start, end), end, count


def cells_of_blocks(mask: AttnMask) -> IntArray:
    """How many cells of each ``BLOCK x BLOCK`` block are unmasked, ``(rows, columns)``."""
    rows, columns = (-(-total // BLOCK) for total in (mask.total_seqlen_q, mask.total_seqlen_k))
    starts = BLOCK * np.arange(max(rows, columns))
    pieces, row, _ = crop(mask.bands, starts[:rows], starts[:rows] + BLOCK, Q0)
    pieces, column, source = crop(pieces, starts[:columns], starts[:columns] + BLOCK, K0)
    cells = np.bincount(row[source] * columns + column, weights=area(pieces), minlength=rows * columns)
    return cells.astype(np.int64).reshape(rows, columns)


def block_lists(cells: IntArray, total_rows: int, total_columns: int) -> BlockLists:
    """Exact lists from the cells of each block; give ``cells.T`` for the transpose."""
    sizes = (np.minimum(BLOCK, total - BLOCK * np.arange(-(-total // BLOCK))) for total in (total_rows, total_columns))
    whole = cells == np.multiply.outer(*sizes)
    lists = []
    for blocks in ((cells > 0) & ~whole, whole):
        lists += [blocks.sum(axis=1, dtype=np.int32), np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)]
    return BlockLists(*lists)


def random_documents(total: int) -> list[int]:
    """Fourteen lengths that fill ``total`` tokens, log-normal: some documents are thirty times as long as others."""
    rng = np.random.default_rng(17)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(1, int(rng.lognormal(np.log(total / 12), 1.0)))))
    return lengths


def branching_texts(total: int) -> list[tuple[int, int]]:
    """Nodes of a prefix tree that fills ``total`` tokens: a prompt of a quarter, four branches, three leaves each."""
    rng = np.random.default_rng(0)
    parents = [-1]
    for _ in range(4):
        branch = len(parents)
        parents += [0, branch, branch, branch]
    prompt = total // 4
    cuts = np.cumsum(rng.uniform(0.5, 1.5, len(parents) - 1))
    ends = prompt + np.round((total - prompt) * cuts / cuts[-1]).astype(int)
    return list(zip(parents, [prompt, *np.diff(ends, prepend=prompt).tolist()], strict=True))


def _packed(lengths: list[int], causal: bool = False, window: int | None = None) -> tuple[AttnMask, Documents]:
    documents = Documents(tuple(builders.cu_seqlens_from_lengths(lengths).tolist()), causal, window)
    return documents.mask(), documents


def _block_causal(total: int) -> tuple[AttnMask, None]:
    return builders.block_causal(builders.cu_seqlens_from_lengths(random_documents(total)), CAUSAL_BLOCK), None


def _published(kind: str, total: int) -> tuple[AttnMask, Documents | None]:
    """The first pack that emulate_scale.py has of a kind of mask."""
    (cu_seqlens,) = scale_masks.sample_packs(total, 1)
    if kind == "block causal":
        return scale_masks.MASKS[kind].make(cu_seqlens), None
    return _packed(np.diff(cu_seqlens).tolist(), causal=kind == "varlen causal")


def _pack(histogram: str, total: int) -> tuple[AttnMask, Documents]:
    return _packed(HISTOGRAMS[histogram].sample_pack(total, np.random.default_rng(0)), causal=True)


MASKS: dict[str, Callable[[int], tuple[AttnMask, Documents | None]]] = {
    "full": lambda total: _packed([total]),
    "causal": lambda total: _packed([total], causal=True),
    "varlen full": lambda total: _packed(random_documents(total)),
    "varlen causal": lambda total: _packed(random_documents(total), causal=True),
    "sliding window": lambda total: _packed([total], causal=True, window=WINDOW),
    "block causal": _block_causal,
    "prefix tree": lambda total: (builders.prefix_tree(branching_texts(total)), None),
    **{f"pack {name}": lambda total, name=name: _pack(name, total) for name in HISTOGRAMS},
    **{f"published {kind}": lambda total, kind=kind: _published(kind, total) for kind in PUBLISHED_KINDS},
}
"""Each mask as a function of the sequence's length. Documents of a pack are causal, none longer than a quarter; those
of the published masks are drawn as in MagiAttention's published distributed benchmark."""


def make_case(name: str, seqlen: int) -> Case:
    """The mask of this name for ``seqlen`` tokens."""
    return Case(name, *MASKS[name](seqlen))
