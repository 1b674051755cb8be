"""flex_flash_attn_func: attention on one device with any mask made of slices."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from magi_attention.kernels.engine import AttnParams, Engine, choose_engine
from magi_attention.kernels.merge import compute_delta
from magi_attention.kernels.tile_schedule import TileSchedule
from magi_attention.kernels.validate import check_qkv
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray
from magi_attention.mask.integers import as_int


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with a mask made of slices: queries ``q_ranges[n]`` attend keys ``k_ranges[n]`` as
    ``attn_type_map[n]`` says.

    Slices may share queries, and share keys, in any order, but no (query, key) cell belongs to two of them: a query's
    softmax runs once over all keys that its slices give it. A query of no slice attends nothing. The mask is compiled
    on the CPU, and kept for the next calls with the same ranges; reading ranges from a GPU waits for it.

    Args:
        q: Queries, ``(tokens, heads_q, head_dim)``; float32, float64, bfloat16 or float16, any strides.
        k: Keys, ``(keys, heads_kv, head_dim)``. Query head ``h`` attends key head ``h // (heads_q // heads_kv)``.
        v: Values, shaped as ``k``.
        q_ranges: The half-open range ``(start, end)`` of each slice's queries, int32 ``(n, 2)``, on the device of
            ``q``.
        k_ranges: The same of its keys.
        max_seqlen_q: The length of the longest range in ``q_ranges``, or more. It is only checked: the tiles are made
            from the ranges themselves.
        max_seqlen_k: The same for ``k_ranges``.
        attn_type_map: The mask type of each slice, int32 ``(n,)``: 0 full, 1 causal (the last query of the slice sees
            its last key), 2 inverse causal (the first query sees the first key), 3 bi-causal (both). None for all full.
        softmax_scale: Factor of the scores, ``head_dim ** -0.5`` by default.
        softcap: If not 0, scores ``x`` become ``softcap * tanh(x / softcap)``.
        deterministic: Ask for gradients that are equal bit by bit from run to run. They always are.
        sm_margin: How many multiprocessors of a GPU to leave to other kernels, such as communication. The
            reference engine, which launches no kernels of its own, ignores it.
        disable_fwd_atomic_reduction: A promise that no query is in two slices, which saves other implementations
            atomic operations. There are none here: a query's slices are always computed together. Ignored.
        auto_range_merge: Ask to join slices of the same queries before computing. They always are. Ignored.

    Returns:
        ``out``, shaped and typed as ``q``, and ``lse``, the natural log-sum-exp of each query's scores, ``(heads_q,
        tokens)``, float32, or float64 when ``q`` is. A query that attends nothing has ``out`` 0, ``lse`` -inf, and no
        gradient. Both are differentiable.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes, devices or options do not fit, a range is reversed or out of bounds, or two slices
            share a cell; the message names the slices.
    """
    check_qkv(q, k, v)
    params = AttnParams(q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale, softcap)
    if as_int(sm_margin, "sm_margin") < 0:
        raise ValueError(f"sm_margin must be at least 0, got {sm_margin}")
    slices = [_read(x, name, q.device, 2) for name, x in (("q_ranges", q_ranges), ("k_ranges", k_ranges))]
    count = len(slices[0])
    codes = np.zeros(count, np.int64) if attn_type_map is None else _read(attn_type_map, "attn_type_map", q.device, 1)
    _check_codes(codes, count)
    engine = choose_engine(q)
    schedule = _schedule(engine, *(x.tobytes() for x in (*slices, codes)), q.shape[0], k.shape[0])
    for name, given, ranges in (("q", max_seqlen_q, slices[0]), ("k", max_seqlen_k, slices[1])):
        longest = int((ranges[:, 1] - ranges[:, 0]).max(initial=0))
        if given is not None and as_int(given, f"max_seqlen_{name}") < longest:
            raise ValueError(f"max_seqlen_{name} is {given}, but the longest range of {name}_ranges has {longest}")
    out, lse = _FlexFlashAttn.apply(q, k, v, engine, schedule, params)
    return out, lse


class _FlexFlashAttn(torch.autograd.Function):
    """``(q, k, v)`` to ``(out, lse)``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        engine: Engine,
        schedule: TileSchedule,
        params: AttnParams,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = engine.forward(q, k, v, schedule, params)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.engine, ctx.schedule, ctx.params = engine, schedule, params
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = compute_delta(out, dout, dlse)
        grads = ctx.engine.backward(dout, q, k, v, lse, delta, ctx.schedule, ctx.params)
        return *(grad.to(q.dtype) for grad in grads), None, None, None


@lru_cache(maxsize=16)
def _schedule(
    engine: Engine, q_ranges: bytes, k_ranges: bytes, codes: bytes, num_rows: int, num_keys: int
) -> TileSchedule:
    """Compile slices, given as the bytes of int64 arrays so that equal ones are found again."""
    q, k = (np.frombuffer(x, np.int64).reshape(-1, 2) for x in (q_ranges, k_ranges))
    mask = AttnMask.from_slices(q, k, np.frombuffer(codes, np.int64).tolist(), num_rows, num_keys)
    return engine.schedule(mask.bands, num_rows, num_keys)


def _read(x: torch.Tensor, name: str, device: torch.device, ndim: int) -> IntArray:
    """Integers of shape ``(n, 2)`` or ``(n,)`` from a tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be an int32 tensor, not {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, but is on {x.device}")
    if x.ndim != ndim or (ndim == 2 and x.shape[1] != 2):
        raise ValueError(f"{name} must have shape {'(n, 2)' if ndim == 2 else '(n,)'}, got {tuple(x.shape)}")
    return x.cpu().numpy().astype(np.int64)


def _check_codes(codes: IntArray, count: int) -> None:
    if len(codes) != count:
        raise ValueError(f"attn_type_map has {len(codes)} entries, but q_ranges has {count} ranges: give one each")
    unknown = np.flatnonzero((codes < 0) | (codes > 3))
    if len(unknown):
        n = unknown[0]
        raise ValueError(f"attn_type_map[{n}] is {codes[n]}: use 0 full, 1 causal, 2 inverse causal or 3 bi-causal")
