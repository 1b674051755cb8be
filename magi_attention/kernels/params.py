"""AttnParams: how a score is made of a query and a key."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AttnParams:
    """The options that change what attention computes.

    With ``x = softmax_scale * (q . k)``, the score that goes into the softmax is ``x``, or ``softcap * tanh(x /
    softcap)`` where ``softcap`` is not 0 (Gemma 2, https://arxiv.org/abs/2408.00118).

    Attributes:
        softmax_scale: Factor of the scores, positive.
        softcap: Bound of the scores' absolute value; 0 for none.

    Raises:
        TypeError: If one is not a number.
        ValueError: If one is out of bounds or not finite.
    """

    softmax_scale: float
    softcap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("softmax_scale", "softcap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise ValueError(f"softmax_scale must be positive and finite, got {self.softmax_scale}")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise ValueError(f"softcap must be 0 (none) or positive and finite, got {self.softcap}")
