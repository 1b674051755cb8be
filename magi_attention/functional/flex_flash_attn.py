"""flex_flash_attn_func: attention on one device with any mask made of slices."""

from typing import Any

import torch

from magi_attention.functional.ops import forward_op
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.validate import check_qkv, check_sink
from magi_attention.mask.integers import as_flag, as_int
from magi_attention.mask.ranges import AttnRanges


def flex_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    attn_type_map: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    disable_fwd_atomic_reduction: bool = False,
    auto_range_merge: bool = False,
    *,
    engine: str | None = None,
    sink: torch.Tensor | None = None,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Attention with a mask made of slices: queries ``q_ranges[n]`` attend keys ``k_ranges[n]`` as
    ``attn_type_map[n]`` says.

    Slices may share queries, and share keys, in any order, but no (query, key) cell belongs to two of them: a query's
    softmax runs once over all keys that its slices give it. A query of no slice attends nothing. Inputs must be finite,
    also queries that attend nothing and keys that nobody attends. On a GPU, calls with one mask belong on one stream,
    or on streams that wait for each other.

    The mask is compiled on the CPU, and kept for the next calls. Calls with the same range tensors do not read them
    again unless something was written to them; other tensors are read, which waits for their GPU. Writing through
    ``.data`` or through memory shared with other libraries is not seen. Under ``torch.compile`` the graph does not
    break and the mask may change from call to call; a CUDA graph captured by hand keeps the mask that it saw.

    Args:
        q: Queries, ``(tokens, heads_q, head_dim)``; float32, float64, bfloat16 or float16, any strides.
        k: Keys, ``(keys, heads_kv, head_dim)``. Query head ``h`` attends key head ``h // (heads_q // heads_kv)``.
        v: Values, ``(keys, heads_kv, head_dim_v)``. Their head_dim may differ from that of queries and keys, as in
            multi-head latent attention.
        q_ranges: The half-open range ``(start, end)`` of each slice's queries, int32 or int64 ``(n, 2)``, on
            the device of ``q``.
        k_ranges: The same of its keys.
        max_seqlen_q: The length of the longest range in ``q_ranges``, or more. It is only checked: the tiles are made
            from the ranges themselves.
        max_seqlen_k: The same for ``k_ranges``.
        attn_type_map: The mask type of each slice, int32 or int64 ``(n,)``: 0 full, 1 causal (the last query of the
            slice sees its last key), 2 inverse causal (the first query sees the first key), 3 bi-causal (both). None
            for all full.
        softmax_scale: Factor of the scores, ``head_dim ** -0.5`` by default.
        softcap: If not 0, scores ``x`` become ``softcap * tanh(x / softcap)``.
        deterministic: Whether gradients must be equal bit by bit from run to run. ``out`` and ``lse`` always are.
        sm_margin: How many multiprocessors of a GPU to leave to other kernels, such as communication. It has an effect
            on engines whose kernels stay on the multiprocessors from beginning to end: hopper, not triton or reference.
        disable_fwd_atomic_reduction: A promise that no query is in two slices, which saves other implementations
            atomic operations. There are none here: a query's slices are always computed together. Ignored.
        auto_range_merge: Ask to join slices of the same queries before computing. They always are. Ignored.
        engine: The name of the engine that computes. None chooses by device, dtype and head_dims, see
            :func:`magi_attention.kernels.explain`.
        sink: An attention sink for each query head: a score that joins the softmax of each query and has no value,
            ``(heads_q,)``, float32 or of the dtype of ``q`` (Xiao et al. 2023, https://arxiv.org/abs/2309.17453;
            learnable: gpt-oss, https://arxiv.org/abs/2508.10925). It is neither scaled nor capped; its gradient is the
            sum over all queries.
        return_max_logits: Whether to return ``max_logits``, too.

    Returns:
        ``out``, ``(tokens, heads_q, head_dim_v)``, typed as ``q``, and ``lse``, the natural log-sum-exp of each query's
        scores and its sink, ``(heads_q, tokens)``, float32, or float64 when ``q`` is. A query that attends nothing has
        ``out`` 0, and ``lse`` -inf and no gradient; with a sink, ``lse`` is the sink. Both are differentiable.

        With ``return_max_logits`` also ``max_logits``: for each query head, the highest of the scores that go into the
        softmaxes of its queries, without the sink, ``(heads_q,)``, typed as ``lse``; -inf where nothing is attended.
        It is not differentiable. It is what QK-clip asks for (Kimi K2, https://arxiv.org/abs/2507.20534).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes, devices or options do not fit, no engine computes such attention, a range is reversed or
            out of bounds, or two slices share a cell; the message names the slices.
    """
    check_qkv(q, k, v)
    check_sink(sink, q)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    params = AttnParams(scale, softcap, deterministic, sm_margin, return_max_logits)
    as_flag(disable_fwd_atomic_reduction, "disable_fwd_atomic_reduction")
    as_flag(auto_range_merge, "auto_range_merge")
    _check_integers("q_ranges", q_ranges, q.device, ndim=2)
    _check_integers("k_ranges", k_ranges, q.device, ndim=2)
    if attn_type_map is not None:
        _check_integers("attn_type_map", attn_type_map, q.device, ndim=1)
        if len(attn_type_map) != len(q_ranges):
            entries, count = len(attn_type_map), len(q_ranges)
            raise ValueError(f"attn_type_map has {entries} entries, but q_ranges has {count} ranges: give one each")
    if engine is not None and not isinstance(engine, str):
        raise TypeError(f"engine must be a name or None, not {engine!r}")
    out, lse, max_logits = forward_op(
        q,
        k,
        v,
        sink,
        q_ranges,
        k_ranges,
        attn_type_map,
        None if max_seqlen_q is None else as_int(max_seqlen_q, "max_seqlen_q"),
        None if max_seqlen_k is None else as_int(max_seqlen_k, "max_seqlen_k"),
        params.softmax_scale,
        params.softcap,
        params.deterministic,
        params.sm_margin,
        params.return_max_logits,
        engine,
    )
    return (out, lse, max_logits) if return_max_logits else (out, lse)


def _check_integers(name: str, x: Any, device: torch.device, ndim: int) -> None:
    """Refuse what is no integer tensor of shape ``(n, 2)`` or ``(n,)``; its values are checked when they are read."""
    if not isinstance(x, torch.Tensor):
        hint = ": use its to_tensor(q.device)" if isinstance(x, AttnRanges) else ""
        raise TypeError(f"{name} must be an int32 tensor, not {type(x).__name__}{hint}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, but is on {x.device}")
    if x.ndim != ndim or (ndim == 2 and x.shape[1] != 2):
        raise ValueError(f"{name} must have shape {'(n, 2)' if ndim == 2 else '(n,)'}, got {tuple(x.shape)}")
