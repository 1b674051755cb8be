"""The operators ``magi_attention::flex_flash_attn`` and its backward, as ``torch.compile`` and autograd see them.

Operators take tensors and plain values only: a mask arrives as its range tensors, an engine by its name. What compiles
a mask and what launches kernels is hidden from tracing, and no engine is loaded before it computes.

They are registered with the dispatcher as they are: what ``torch.library.custom_op`` wraps around an operator costs the
host more time than launching a kernel does.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from magi_attention.functional.schedules import MaskTensors, compile_mask
from magi_attention.kernels.engine import Engine, choose_engine
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.reference import accumulation_dtype

Tensors = tuple[torch.Tensor, ...]


class Options(NamedTuple):
    """The plain values that both operators end with, in this order.

    Attributes:
        max_seqlen_q: A bound of the ranges of queries; None for none.
        max_seqlen_k: The same of keys.
        softmax_scale: As the others, see :class:`~magi_attention.kernels.params.AttnParams`.
        softcap: Bound of the scores.
        deterministic: Whether gradients must repeat.
        sm_margin: Multiprocessors to leave to others.
        engine: The engine's name; None to choose one.
    """

    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float
    softcap: float
    deterministic: bool
    sm_margin: int
    engine: str | None


class Call(NamedTuple):
    """What an operator computes with, beside tensors.

    Attributes:
        engine: What computes.
        schedule: The mask as the engine takes it.
        params: How scores are made.
    """

    engine: Engine
    schedule: Any
    params: AttnParams


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    attn_type_map: torch.Tensor | None,
    *values: Any,
) -> Tensors:
    """``out`` and ``lse``."""
    call = _prepare(q, MaskTensors(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0]), Options(*values))
    with _on_device(q.device):
        out, lse, _ = call.engine.forward(q, k, v, call.schedule, call.params)
    return out, lse


def _backward(dout: torch.Tensor | None, dlse: torch.Tensor | None, *rest: Any) -> Tensors:
    """``dq``, ``dk`` and ``dv``."""
    out, lse, q, k, v, q_ranges, k_ranges, attn_type_map, *values = rest
    call = _prepare(q, MaskTensors(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0]), Options(*values))
    engine, schedule, params = call
    with _on_device(q.device):
        grads = engine.start_backward(out, dout, lse, dlse, params)
        dk, dv = engine.backward(grads, q, k, v, schedule, params, k.dtype)
        return engine.finish_backward(grads, params, q.dtype), dk, dv


def _fake_forward(q: torch.Tensor, *others: Any) -> Tensors:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))


def _fake_backward(dout: Any, dlse: Any, out: Any, lse: Any, *others: Any) -> Tensors:
    return tuple(x.new_empty(x.shape) for x in others[:3])


class _Differentiable(torch.autograd.Function):
    """The forward operator with the backward operator as its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensors:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = forward_op(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *args[:6])
        ctx.values = args[6:]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grads = backward_op(dout, dlse, *ctx.saved_tensors, *ctx.values)
        return *grads, *(None,) * (3 + len(ctx.values))


_MASK = "Tensor q_ranges, Tensor k_ranges, Tensor? attn_type_map"
_OPTIONS = (
    "int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, float softcap, bool deterministic, int sm_margin, "
    "str? engine"
)
_SCHEMAS = (
    f"flex_flash_attn(Tensor q, Tensor k, Tensor v, {_MASK}, {_OPTIONS}) -> (Tensor, Tensor)",
    "flex_flash_attn_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"{_MASK}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):  # torch 2.8 may not have it
    _TAGS.append(torch.Tag.cudagraph_unsafe)  # a CUDA graph replays one mask, however the range tensors have changed

_LIBRARY = torch.library.Library("magi_attention", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=_TAGS)
_LIBRARY.impl("flex_flash_attn", _forward, "CompositeExplicitAutograd")  # on every device
_LIBRARY.impl("flex_flash_attn", _Differentiable.apply, "Autograd")
_LIBRARY.impl("flex_flash_attn_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("magi_attention::flex_flash_attn", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("magi_attention::flex_flash_attn_backward", _fake_backward, lib=_LIBRARY)

forward_op = torch.ops.magi_attention.flex_flash_attn.default
backward_op = torch.ops.magi_attention.flex_flash_attn_backward.default


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be that of the tensors."""
    if device.type not in ("cuda", "xpu"):
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if device.index == module.current_device() else module.device(device)


# What is looked up at every call, kept for every set of values; errors are raised anew.
_choose_engine = functools.lru_cache(choose_engine)
_make_params = functools.lru_cache(AttnParams)


def _prepare(q: torch.Tensor, mask: MaskTensors, options: Options) -> Call:
    engine = _choose_engine(q.device, q.dtype, q.shape[2], options.engine)
    compiled = compile_mask(engine, mask)
    for name, given, longest in (
        ("q", options.max_seqlen_q, compiled.longest_q),
        ("k", options.max_seqlen_k, compiled.longest_k),
    ):
        if given is not None and given < longest:
            raise ValueError(f"max_seqlen_{name} is {given}, but the longest range of {name}_ranges has {longest}")
    params = _make_params(options.softmax_scale, options.softcap, options.deterministic, options.sm_margin)
    return Call(engine, compiled.schedule, params)
