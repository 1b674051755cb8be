"""Scales: the factors with which the GPU engines' kernels make scores of products."""

import math
from typing import NamedTuple

from magi_attention.kernels.params import AttnParams


class Scales(NamedTuple):
    """How scores, in units of ``log(2)``, are made of products: ``score * bounded(inner * product)``.

    With softcap, ``bounded`` is ``tanh`` and ``score`` has the cap. Without, ``bounded`` is the product itself,
    ``inner`` is not used, and ``score`` has the softmax scale. ``product`` is what gradients of products have left to
    be multiplied by.
    """

    inner: float
    score: float
    product: float

    @classmethod
    def of(cls, params: AttnParams) -> "Scales":
        """The factors that ``params`` ask for."""
        scale, cap = params.softmax_scale, params.softcap
        return cls(scale / cap if cap else 0.0, (cap or scale) / math.log(2), scale)
