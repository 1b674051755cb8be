"""Llama 4's temperature tuning, which takes a token's row for its position."""

from typing import Any

import torch


def tunes_temperature(module: Any) -> bool:
    """Whether a layer scales its queries by their positions: Llama 4's layers without rotary embedding do."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope


def retune_temperature(module: Any, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Queries that were scaled as if rows were positions, scaled by their positions.

    Args:
        module: The layer, with its ``floor_scale`` and ``attn_scale``.
        query: ``(1, num_heads_q, rows, head_dim)``.
        positions: ``(1, rows)``.
    """

    def scale(position: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((position.float() + 1) / module.floor_scale)) * module.attn_scale + 1

    change = scale(positions[0]) / scale(torch.arange(query.shape[2], device=query.device))
    return (query * change[:, None]).to(query.dtype)
