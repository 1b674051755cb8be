"""The operators ``magi_attention::flex_flash_attn`` and its backward, as ``torch.compile`` and autograd see them.

Operators take tensors and plain values only: a mask arrives as its range tensors, an engine by its name. What compiles
a mask and what launches kernels is hidden from tracing, and no engine is loaded before it computes.

They are registered with the dispatcher as they are: what ``torch.library.custom_op`` wraps around an operator costs the
host more time than launching a kernel does.
"""

import functools
from typing import Any, NamedTuple

import torch

from magi_attention.functional.schedules import MaskTensors, compile_mask
from magi_attention.kernels.engine import Engine, choose_engine
from magi_attention.kernels.on_device import on_device
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.reference import accumulation_dtype
from magi_attention.kernels.second_derivative import no_second_derivative

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
        return_max_logits: Whether the highest scores are asked for.
        engine: The engine's name; None to choose one.
    """

    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float
    softcap: float
    deterministic: bool
    sm_margin: int
    return_max_logits: bool
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
    sink: torch.Tensor | None,
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    attn_type_map: torch.Tensor | None,
    *values: Any,
) -> Tensors:
    """``out``, ``lse``, and the highest scores, of which there are none when they are not asked for."""
    call = _prepare(q, v, MaskTensors(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0]), Options(*values))
    with on_device(q.device):
        state = call.engine.forward(q, k, v, call.schedule, call.params, sink=sink)
        max_logits = state.max_logits() if call.params.return_max_logits else state.lse.new_empty(0)
        return state.out, state.lse, max_logits


def _backward(dout: torch.Tensor | None, dlse: torch.Tensor | None, *rest: Any) -> Tensors:
    """``dq``, ``dk``, ``dv``, and ``dsink``, which is empty when there is no sink."""
    out, lse, q, k, v, sink, q_ranges, k_ranges, attn_type_map, *values = rest
    call = _prepare(q, v, MaskTensors(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0]), Options(*values))
    engine, schedule, params = call
    with on_device(q.device):
        grads = engine.start_backward(out, dout, lse, dlse, params, q.shape[2])
        dk, dv = engine.backward(grads, q, k, v, schedule, params, k.dtype)
        dsink = q.new_empty(0) if sink is None else engine.sink_grad(grads, sink, params)
        return engine.finish_backward(grads, params, q.dtype), dk, dv, dsink


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> Tensors:
    num_rows, num_heads, _ = q.shape
    out = q.new_empty((num_rows, num_heads, v.shape[2]))
    lse = q.new_empty((num_heads, num_rows), dtype=accumulation_dtype(q.dtype))
    return out, lse, lse.new_empty(num_heads if Options(*others[4:]).return_max_logits else 0)


def _fake_backward(dout: Any, dlse: Any, out: Any, lse: Any, *others: Any) -> Tensors:
    q, k, v, sink = others[:4]
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0) if sink is None else sink.new_empty(sink.shape)


class _Differentiable(torch.autograd.Function):
    """The forward operator with the backward operator as its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensors:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, max_logits = forward_op(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(max_logits)
        ctx.save_for_backward(out, lse, *args[:7])
        ctx.values = args[7:]
        return out, lse, max_logits

    @staticmethod
    @no_second_derivative
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        *grads, dsink = backward_op(dout, dlse, *ctx.saved_tensors, *ctx.values)
        return *grads, dsink if ctx.needs_input_grad[3] else None, *(None,) * (3 + len(ctx.values))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor q_ranges, Tensor k_ranges, Tensor? attn_type_map"
_OPTIONS = (
    "int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, float softcap, bool deterministic, int sm_margin, "
    "bool return_max_logits, str? engine"
)
_SCHEMAS = (
    f"flex_flash_attn({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    f"flex_flash_attn_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
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


# What is looked up at every call, kept for every set of values; errors are raised anew.
_choose_engine = functools.lru_cache(choose_engine)
_make_params = functools.lru_cache(AttnParams)


def _prepare(q: torch.Tensor, v: torch.Tensor, mask: MaskTensors, options: Options) -> Call:
    engine = _choose_engine(q.device, q.dtype, (q.shape[2], v.shape[2]), options.engine)
    compiled = compile_mask(engine, mask)
    for name, given, longest in (
        ("q", options.max_seqlen_q, compiled.longest_q),
        ("k", options.max_seqlen_k, compiled.longest_k),
    ):
        if given is not None and given < longest:
            raise ValueError(f"max_seqlen_{name} is {given}, but the longest range of {name}_ranges has {longest}")
    params = _make_params(*options[2:-1])
    return Call(engine, compiled.schedule, params)
