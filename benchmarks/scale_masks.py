"""The masks of emulate_scale.py, and packs of documents as MagiAttention's published distributed benchmark draws them.

Lengths have the published percentages. Documents longer than a quarter of a pack are split into quarters and a tail.
All are shuffled and packed in sequence; a pack's last document is cut at its end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import IntArray

LENGTHS = (5, 30, 75, 150, 350, 762, 1536, 3072, 6144, 12288, 24576, 49152, 98304, 163840)
PERCENTAGES = (0.22, 2.91, 5.20, 10.23, 28.19, 24.64, 15.65, 7.34, 3.05, 1.29, 0.85, 0.14, 0.17, 0.14)
"""How often a document of the production training set has each length: the middles of fourteen published bins."""

SHUFFLED_TOGETHER = 4096
"""Documents drawn and shuffled at a time."""

WINDOW, BLOCK = 1024, 2048


@dataclass(frozen=True)
class MaskKind:
    """A mask as a function of the borders of documents.

    Attributes:
        make: From ``cu_seqlens`` to the mask.
        packed: Whether documents are drawn; if not, the sequence is one document.
    """

    make: Callable[[IntArray], AttnMask]
    packed: bool


MASKS = {
    "varlen causal": MaskKind(lambda cu: builders.varlen(cu, causal=True), packed=True),
    "varlen full": MaskKind(lambda cu: builders.varlen(cu), packed=True),
    "causal": MaskKind(lambda cu: builders.varlen(cu, causal=True), packed=False),
    "full": MaskKind(lambda cu: builders.varlen(cu), packed=False),
    "sliding window": MaskKind(lambda cu: builders.sliding_window(cu, (WINDOW - 1, 0)), packed=False),
    "block causal": MaskKind(lambda cu: builders.block_causal(cu, BLOCK), packed=True),
}


def sample_packs(total: int, count: int, seed: int = 0) -> list[IntArray]:
    """``cu_seqlens`` of ``count`` packs of ``total`` tokens each."""
    lengths = _documents(max(1, total // 4), np.random.default_rng((seed, total)))
    packs = []
    for _ in range(count):
        borders = [0]
        while borders[-1] < total:
            borders.append(min(borders[-1] + next(lengths), total))
        packs.append(np.array(borders))
    return packs


def make_packs(kind: str, total: int, count: int, seed: int = 0) -> list[IntArray]:
    """``cu_seqlens`` for a kind of mask: one for those that are the same every time."""
    return sample_packs(total, count, seed) if MASKS[kind].packed else [np.array([0, total])]


def _documents(longest: int, rng: np.random.Generator) -> Iterator[int]:
    chances = np.array(PERCENTAGES) / sum(PERCENTAGES)
    while True:
        drawn = rng.choice(LENGTHS, size=SHUFFLED_TOGETHER, p=chances)
        quarters, tails = np.divmod(drawn, longest)
        pieces = np.concatenate((np.full(quarters.sum(), longest), tails[tails > 0]))
        yield from rng.permutation(pieces).tolist()
