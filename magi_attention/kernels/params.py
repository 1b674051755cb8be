"""AttnParams: what changes how attention is computed, beside the tensors and the mask."""

import math
from dataclasses import dataclass
from numbers import Real

from magi_attention.mask.integers import as_flag, as_length


@dataclass(frozen=True)
class AttnParams:
    """How a score is made of a query and a key, and how an engine may go about it.

    With ``x = softmax_scale * (q . k)``, the score that goes into the softmax is ``x``, or ``softcap * tanh(x /
    softcap)`` where ``softcap`` is not 0 (Gemma 2, https://arxiv.org/abs/2408.00118).

    Attributes:
        softmax_scale: Factor of the scores, positive.
        softcap: Bound of the scores' absolute value; 0 for none.
        deterministic: Whether gradients must be equal bit by bit from run to run.
        sm_margin: How many multiprocessors of a GPU to leave to other kernels, such as communication.
        return_max_logits: Whether the highest scores are asked for, too.
        yields: Whether other kernels, such as communication, should find multiprocessors free from time to time.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of bounds or not finite.
    """

    softmax_scale: float
    softcap: float = 0.0
    deterministic: bool = False
    sm_margin: int = 0
    return_max_logits: bool = False
    yields: bool = False

    def __post_init__(self) -> None:
        for name in ("softmax_scale", "softcap"):
            value = getattr(self, name)
            if type(value) is not float:  # as it is at most calls, and this is the host's time
                if isinstance(value, bool) or not isinstance(value, Real):
                    raise TypeError(f"{name} must be a number, got {value!r}")
                object.__setattr__(self, name, float(value))
        if not 0 < self.softmax_scale < math.inf:  # comparisons, unlike math.isfinite, are traced by torch.compile
            raise ValueError(f"softmax_scale must be positive and finite, got {self.softmax_scale}")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be 0 (none) or positive and finite, got {self.softcap}")
        for name in ("deterministic", "return_max_logits"):
            object.__setattr__(self, name, as_flag(getattr(self, name), name))
        object.__setattr__(self, "sm_margin", as_length(self.sm_margin, "sm_margin"))
