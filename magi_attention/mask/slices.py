"""Slices, the public spelling of a mask, and their conversion to bands and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.attn_range import AttnRange
from magi_attention.mask.bands import IntArray
from magi_attention.mask.mask_type import AttnMaskType

if TYPE_CHECKING:
    import torch

MaskTypeLike = AttnMaskType | str | int
MaskTypesLike = Union[MaskTypeLike, Sequence[MaskTypeLike], NDArray[Any], "torch.Tensor"]


@dataclass(frozen=True)
class AttnSlice:
    """One rectangle of a mask: the queries of ``q_range`` attend the keys of ``k_range`` as ``mask_type`` says.

    Attributes:
        q_range: The queries; a pair ``(start, end)`` becomes an AttnRange.
        k_range: The keys.
        mask_type: The type; its string or code becomes the type.

    Raises:
        TypeError: If a border of a range is no integer.
        ValueError: If a range is no range, or the type is unknown.
    """

    q_range: AttnRange
    k_range: AttnRange
    mask_type: AttnMaskType = AttnMaskType.FULL

    def __post_init__(self) -> None:
        for name in ("q_range", "k_range"):
            value = getattr(self, name)
            if type(value) is not AttnRange:
                object.__setattr__(self, name, AttnRange.from_range(value, name))
        if type(self.mask_type) is not AttnMaskType:
            object.__setattr__(self, "mask_type", AttnMaskType.parse(self.mask_type))

    def __str__(self) -> str:
        q, k = self.q_range, self.k_range
        return f"q [{q.start}, {q.end}) x k [{k.start}, {k.end}) {self.mask_type.value}"


def slices_to_bands(q_ranges: IntArray, k_ranges: IntArray, mask_types: IntArray) -> IntArray:
    """One band a slice, in order, not tight: slices without a cell stay, so that row n is slice n.

    Args:
        q_ranges: ``(start, end)`` of each slice's queries, shape ``(n, 2)``.
        k_ranges: The same of its keys.
        mask_types: Codes 0 full, 1 causal, 2 inverse causal, 3 bi-causal, shape ``(n,)``.
    """
    q0, q1 = q_ranges[:, 0], q_ranges[:, 1]
    k0, k1 = k_ranges[:, 0], k_ranges[:, 1]
    causal, inverse = (mask_types & 1).astype(bool), (mask_types & 2).astype(bool)
    lo = np.where(inverse, k0 - q0, k0 - q1 + 1)
    hi = np.where(causal, k1 - q1, k1 - q0 - 1)
    return np.stack((q0, q1, k0, k1, lo, hi), axis=1)


def bands_to_slices(bands: IntArray) -> list[AttnSlice]:
    """Spell bands in the four mask types: at most three slices a band, with the same cells.

    A row's interval begins at the rectangle's left side or on the strip, and ends on the strip or at the right side.
    Both change at most once over a band's rows; between the changes the rows form one slice.
    """
    slices = []
    for q0, q1, k0, k1, lo, hi in bands.tolist():
        # The first row whose interval begins on the strip, and the first whose interval ends at the right side.
        on_strip = k0 - lo if lo > k0 - q1 + 1 else q1
        at_right = k1 - hi if hi < k1 - 1 - q0 else q0
        cuts = sorted({q0, q1, *(c for c in (on_strip, at_right) if q0 < c < q1)})
        for a, b in pairwise(cuts):
            code = 2 * (a >= on_strip) + (b <= at_right) if b - a > 1 else 0
            k_range = AttnRange(max(k0, a + lo), min(k1, b + hi))
            slices.append(AttnSlice(AttnRange(a, b), k_range, AttnMaskType.from_int_type(code)))
    return slices


def parse_mask_types(mask_types: MaskTypesLike, count: int) -> IntArray:
    """Codes of ``count`` slices from one mask type for all, or a sequence, array or tensor of one each.

    Raises:
        ValueError: If a type is unknown or the sequence has another length.
    """
    if hasattr(mask_types, "tolist"):  # an array or a tensor
        mask_types = mask_types.tolist()
    if isinstance(mask_types, Sequence) and not isinstance(mask_types, str):
        if len(mask_types) != count:
            raise ValueError(
                f"attn_mask_type has {len(mask_types)} entries but there are {count} slices: "
                "give one for all, or one each"
            )
        return np.array([AttnMaskType.parse(t).to_int_type() for t in mask_types], np.int64)
    return np.full(count, AttnMaskType.parse(mask_types).to_int_type(), np.int64)
