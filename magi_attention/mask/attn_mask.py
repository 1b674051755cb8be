"""AttnMask: a whole attention mask as an immutable value."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask import drawing
from magi_attention.mask.attn_range import AttnRange
from magi_attention.mask.bands import K0, Q0, Q1, IntArray, area, merge_runs, row_intervals, tighten
from magi_attention.mask.integers import as_int, as_int_array, as_length
from magi_attention.mask.mask_type import AttnMaskType
from magi_attention.mask.overlap import find_overlap
from magi_attention.mask.ranges import AttnRanges, RangesLike, check_within
from magi_attention.mask.slices import AttnSlice, MaskTypesLike, bands_to_slices, parse_mask_types, slices_to_bands


@dataclass(frozen=True, eq=False)
class AttnMask:
    """Which query attends which key, for a whole sequence.

    Masks are values: immutable, hashable, picklable, equal when they are made of the same bands. Build one from slices
    with :meth:`from_slices`, which finds slices that overlap, or with a function of
    :mod:`magi_attention.mask.builders`. The constructor and :meth:`from_bands` trust bands to share no cell and to lie
    inside the sequence; the constructor also trusts them to be tight and sorted, as :meth:`from_bands` makes them.

    Attributes:
        total_seqlen_q: Number of queries.
        total_seqlen_k: Number of keys.
        bands: int64 array of shape ``(n, 6)``, read-only, see :mod:`magi_attention.mask.bands`; no two share a cell.

    Raises:
        TypeError: If a length is no integer, or bands are not integers.
        ValueError: If a length is negative, or bands have another shape.
    """

    total_seqlen_q: int
    total_seqlen_k: int
    bands: IntArray

    def __post_init__(self) -> None:
        for name in ("total_seqlen_q", "total_seqlen_k"):
            object.__setattr__(self, name, as_length(getattr(self, name), name))
        bands = _as_bands(self.bands)
        if bands.flags.writeable:  # the caller's own array
            bands = bands.copy()
            bands.flags.writeable = False
        object.__setattr__(self, "bands", bands)

    @classmethod
    def from_slices(
        cls,
        q_ranges: RangesLike,
        k_ranges: RangesLike,
        attn_mask_type: MaskTypesLike,
        total_seqlen_q: int,
        total_seqlen_k: int,
    ) -> "AttnMask":
        """The mask made of slices ``(q_ranges[n], k_ranges[n], attn_mask_type[n])``.

        Args:
            q_ranges: ``n`` half-open ranges of queries.
            k_ranges: ``n`` half-open ranges of keys.
            attn_mask_type: One mask type for all slices, or one each.
            total_seqlen_q: Number of queries; every query range ends there at the latest.
            total_seqlen_k: Number of keys.

        Raises:
            ValueError: If the numbers of ranges differ, a range is reversed or out of bounds, a type is unknown, or two
                slices share a cell; the message names the slices.
        """
        total_seqlen_q = as_length(total_seqlen_q, "total_seqlen_q")
        total_seqlen_k = as_length(total_seqlen_k, "total_seqlen_k")
        q, k = AttnRanges.as_array(q_ranges, "q_ranges"), AttnRanges.as_array(k_ranges, "k_ranges")
        if len(q) != len(k):
            raise ValueError(
                f"q_ranges has {len(q)} ranges but k_ranges has {len(k)}: slice n is (q_ranges[n], k_ranges[n])"
            )
        check_within(q, "q_ranges", total_seqlen_q, f"total_seqlen_q is {total_seqlen_q}")
        check_within(k, "k_ranges", total_seqlen_k, f"total_seqlen_k is {total_seqlen_k}")
        codes = parse_mask_types(attn_mask_type, len(q))
        bands = slices_to_bands(q, k, codes)
        pair = find_overlap(bands)
        if pair is not None:
            a, b = (
                f"slice {n} ({AttnSlice(AttnRange(*q[n]), AttnRange(*k[n]), AttnMaskType.from_int_type(codes[n]))})"
                for n in pair
            )
            raise ValueError(f"{a} and {b} overlap: a (query, key) cell may belong to one slice only")
        return cls.from_bands(bands, total_seqlen_q, total_seqlen_k)

    @classmethod
    def from_bands(cls, bands: IntArray, total_seqlen_q: int, total_seqlen_k: int) -> "AttnMask":
        """The mask made of bands that are known to share no cell and to lie inside the sequence."""
        bands = tighten(_as_bands(bands))[0]
        bands = np.ascontiguousarray(bands[np.lexsort((bands[:, K0], bands[:, Q0]))])
        bands.flags.writeable = False
        return cls(total_seqlen_q, total_seqlen_k, bands)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ when the mask differs, the same in every process."""
        header = np.array([self.total_seqlen_q, self.total_seqlen_k], np.int64)
        return hashlib.blake2b(header.tobytes() + self.bands.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnMask) and self.digest == other.digest

    def __hash__(self) -> int:
        return int.from_bytes(self.digest[:8], "little", signed=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"total_seqlen_q": self.total_seqlen_q, "total_seqlen_k": self.total_seqlen_k, "bands": self.bands}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["bands"].flags.writeable = False
        self.__dict__.update(state)

    @cached_property
    def area(self) -> int:
        """Number of unmasked cells."""
        return int(area(self.bands).sum())

    @property
    def slices(self) -> list[AttnSlice]:
        """The mask spelled in slices of the four published types."""
        return bands_to_slices(self.bands)

    def to_ranges(self) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
        """The slices as ``(q_ranges, k_ranges, attn_mask_type)``, the arguments of ``magi_attn_flex_key``."""
        slices = self.slices
        q_ranges, k_ranges = AttnRanges(), AttnRanges()
        q_ranges.extend(s.q_range for s in slices)
        k_ranges.extend(s.k_range for s in slices)
        return q_ranges, k_ranges, [s.mask_type for s in slices]

    def row_intervals(self, row: int) -> list[tuple[int, int]]:
        """The half-open key intervals that query ``row`` attends, ascending, joined where they touch.

        Raises:
            TypeError: If ``row`` is no integer.
            ValueError: If it is not a query of the mask.
        """
        row = as_int(row, "row")
        if not 0 <= row < self.total_seqlen_q:
            raise ValueError(f"row {row} is out of bounds: the mask has queries 0 to {self.total_seqlen_q - 1}")
        alive = self.bands[(self.bands[:, Q0] <= row) & (row < self.bands[:, Q1])]
        runs = np.stack(row_intervals(alive, np.full(len(alive), row)), axis=1)
        return [(start, end) for start, end in merge_runs(runs).tolist()]

    def to_dense(self) -> NDArray[np.bool_]:
        """Boolean matrix of shape ``(total_seqlen_q, total_seqlen_k)``, True where a query attends a key."""
        dense = np.zeros((self.total_seqlen_q, self.total_seqlen_k), np.bool_)
        for q0, q1, k0, k1, lo, hi in self.bands.tolist():
            distance = np.arange(k0, k1) - np.arange(q0, q1)[:, None]
            dense[q0:q1, k0:k1] |= (distance >= lo) & (distance <= hi)
        return dense

    def draw(self, max_size: int = 64) -> str:
        """The mask as text, one character a block of cells: full, partly attended, or empty."""
        return drawing.draw(self.bands, self.total_seqlen_q, self.total_seqlen_k, max_size)

    def plot(self, path: str | os.PathLike[str], title: str | None = None) -> None:
        """Write the mask as an image, of any length; the ending of ``path`` chooses the format (needs matplotlib)."""
        drawing.plot(self.bands, self.total_seqlen_q, self.total_seqlen_k, path, title)

    def __str__(self) -> str:
        return self.draw()

    def __repr__(self) -> str:
        return f"AttnMask({self.total_seqlen_q} x {self.total_seqlen_k}, {len(self.bands)} bands, area {self.area})"


def _as_bands(bands: IntArray) -> IntArray:
    bands = as_int_array(bands, "bands")
    if bands.ndim != 2 or bands.shape[1] != 6:
        raise ValueError(f"bands must have shape (n, 6), rows of (q0, q1, k0, k1, lo, hi), got shape {bands.shape}")
    return bands
