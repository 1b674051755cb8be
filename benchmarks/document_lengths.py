"""Document lengths of real training sets as histograms, and packs drawn from them.

The protocol of the published benchmarks: lengths are drawn uniformly inside a bin, packed in sequence to a total of S
tokens, and no document is longer than S / 4.

``document_lengths.json`` holds the figures, ``[start, end, weight]`` a bin. ``magi`` are 13.5 million documents of a
production pre-training set, published with MagiAttention's benchmarks (Apache-2.0); the others are the Pile and
ProLong, published with LongCA-bench (Apache-2.0).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Histogram:
    """Bins ``(start, end, weight)``: how often a document's length lies in ``[start, end)``."""

    bins: list[tuple[int, int, float]]

    def sample_pack(self, total: int, rng: np.random.Generator) -> list[int]:
        """Lengths of documents that fill ``total`` tokens exactly, none longer than a quarter of it."""
        starts, ends, weights = zip(*self.bins, strict=True)
        chances = np.array(weights) / sum(weights)
        lengths: list[int] = []
        left = total
        while left:
            n = rng.choice(len(chances), p=chances)
            length = min(int(rng.integers(starts[n], ends[n])), total // 4, left)
            lengths.append(length)
            left -= length
        return lengths

    def cu_seqlens(self, total: int, seed: int) -> NDArray[np.int64]:
        """Cumulative lengths of the pack that ``seed`` names."""
        return np.concatenate(([0], np.cumsum(self.sample_pack(total, np.random.default_rng(seed)))))


HISTOGRAMS = {
    name: Histogram([(start, end, weight) for start, end, weight in bins])
    for name, bins in json.loads(Path(__file__).with_suffix(".json").read_text()).items()
}
