"""The two functions that transformers calls: one for the mask of a forward pass, one for the attention of a layer."""

from collections.abc import Mapping
from typing import Any

import torch

from magi_attention.api import calc_attn
from magi_attention.integrations.transformers.layer_masks import LayerMask, requested_mask
from magi_attention.integrations.transformers.llama4 import retune_temperature, tunes_temperature
from magi_attention.runtime.key import DistAttnRuntimeKey


def describe_mask(
    *, config: Any, local_size: int | None = None, attention_mask: Any = None, use_vmap: bool = False, **_: Any
) -> LayerMask:
    """In place of a dense mask, what the mask is: each layer gets it as its ``attention_mask`` and finds its key by it.

    Called by transformers' ``create_causal_mask``, ``create_sliding_window_causal_mask`` and
    ``create_chunked_causal_mask``.

    Raises:
        ValueError: If the mask is more than causal, in a window or in chunks.
    """
    if attention_mask is not None:
        raise ValueError(
            "attention_mask was given to a model with magi_attention: give it to dispatch_batch, which drops padding"
        )
    if use_vmap:
        raise ValueError("the model adds a function of its own to its mask, which magi_attention cannot see through")
    return requested_mask(config, local_size)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayerMask | None,
    *,
    magi_keys: Mapping[LayerMask, DistAttnRuntimeKey] | None = None,
    magi_positions: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer over the rows of all ranks, as transformers calls it.

    Args:
        module: The layer.
        query: ``(1, num_heads_q, local_seqlen, head_dim)``.
        key: ``(1, num_heads_kv, local_seqlen, head_dim)``.
        value: ``(1, num_heads_kv, local_seqlen, head_dim_v)``.
        attention_mask: What :func:`describe_mask` returned.
        magi_keys: The keys of the batch, from :func:`dispatch_batch` by way of the model's keyword arguments.
        magi_positions: ``(1, local_seqlen)``, each row's position in its document; in models, ``position_ids`` do not
            come as far as here.
        scaling: Factor of the scores.
        softcap: If given and not 0, scores ``x`` become ``softcap * tanh(x / softcap)``.
        dropout: Must be 0.
        is_causal: Must not be False, nor ``module.is_causal``.
        s_aux: Attention sinks, a score for each query head that takes its share of the softmax and gives nothing.
        **kwargs: What else the model passes along; nothing in it may change the result.

    Returns:
        The output, ``(1, local_seqlen, num_heads_q, head_dim_v)``, and None for the weights.

    Raises:
        TypeError: If the layer's mask was not made by :func:`describe_mask`.
        ValueError: If the keys are missing, or the layer asks for something that there is not.
    """
    if magi_keys is None or magi_positions is None:
        raise ValueError("no keys were given: call the model with what dispatch_batch returns, model(**local_batch)")
    if not isinstance(attention_mask, LayerMask):
        raise TypeError(f"attention_mask must be left to magi_attention, not {type(attention_mask).__name__}")
    if attention_mask not in magi_keys:
        raise ValueError(f"the model asks for {attention_mask}, but its config told of {list(magi_keys)} only")
    if dropout:
        raise ValueError(
            f"dropout of attention weights is not supported: set config.attention_dropout to 0, not {dropout}"
        )
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise ValueError(f"{type(module).__name__} is not causal: only decoders' self-attention is supported")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"queries of shape {tuple(query.shape)} and keys of shape {tuple(key.shape)} are not one packed sequence: "
            "call the model with what dispatch_batch returns, without a cache"
        )
    for name in ("position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with a {name}, which magi_attention has not")
    if tunes_temperature(module):
        query = retune_temperature(module, query, magi_positions)
    if torch.is_autocast_enabled(query.device.type):  # RoPE leaves q and k in float32 then, but not v
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out, _ = calc_attn(q, k, v, magi_keys[attention_mask], softmax_scale=scaling, softcap=softcap or 0.0, sink=s_aux)
    return out[None], None
