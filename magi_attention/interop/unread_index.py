"""Stand-ins for the batch and head index of a FlexAttention ``mask_mod``: to read one is an error."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# What gives the same whatever the index is: FlexAttention's own and_masks, or_masks and noop_mask need no more.
_VALUE_FREE = {
    torch.Tensor.new_empty,
    torch.Tensor.new_full,
    torch.Tensor.new_ones,
    torch.Tensor.new_zeros,
    torch.empty_like,
    torch.full_like,
    torch.ones_like,
    torch.zeros_like,
    torch.Tensor.device.__get__,
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
}


class UnreadIndex(torch.Tensor):
    """An index that a mask must not depend on."""

    meaning = "index"

    @classmethod
    def on(cls, device: torch.device | str) -> torch.Tensor:
        """The stand-in, a scalar of that device."""
        return torch.zeros((), dtype=torch.int64, device=device).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _VALUE_FREE:
            raise ValueError(
                f"mask_mod depends on its {cls.meaning}, but an AttnMask is the same for all batch entries and heads: "
                "make one mask for each, with the index fixed, as in "
                "`lambda b, h, q_idx, kv_idx: mask_mod(torch.tensor(0), torch.tensor(0), q_idx, kv_idx)`"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class BatchIndex(UnreadIndex):
    """Stands for ``b``."""

    meaning = "batch index b"


class HeadIndex(UnreadIndex):
    """Stands for ``h``."""

    meaning = "head index h"
