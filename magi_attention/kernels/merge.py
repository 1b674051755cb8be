"""Partial attention results over disjoint sets of keys, made one."""

import torch

from magi_attention.kernels.parts import Part, State


def add_part(
    out_part: torch.Tensor,
    lse_part: torch.Tensor,
    max_part: torch.Tensor | None,
    dtype: torch.dtype,
    part: Part | None,
    state: State | None,
) -> State:
    """The state of queries after one more part of the keys, whose results are in the accumulation type.

    For engines that keep the sums of all queries until the last part, and round them then.

    Args:
        out_part: ``(tokens, heads, head_dim_v)``; of the first part it becomes the sums.
        lse_part: ``(heads, tokens)``.
        max_part: The highest scores, shaped as ``lse_part``; None where they are not asked for.
        dtype: The type of the output.
        part: Which part it is; None for all keys.
        state: The state before, changed in place; None before the first part.
    """
    if state is None:
        sums = None if part is None or part.is_last else out_part
        out = out_part.to(dtype) if sums is None else torch.empty_like(out_part, dtype=dtype)
        return State(out, lse_part, sums, max_part)
    assert part is not None
    if state.sums is None:  # no query goes on
        return state
    merge_states(state.sums, state.lse, out_part, lse_part)
    if state.row_max is not None and max_part is not None:
        torch.maximum(state.row_max, max_part, out=state.row_max)
    if part.is_last:
        state.out.copy_(state.sums)
    return state


def merge_states(out: torch.Tensor, lse: torch.Tensor, out_part: torch.Tensor, lse_part: torch.Tensor) -> None:
    """Merge the result over more keys into ``out`` and ``lse``, in place.

    With ``lse' = log(exp(lse) + exp(lse_part))`` the result over all keys is
    ``out' = exp(lse - lse') * out + exp(lse_part - lse') * out_part`` (Rabe & Staats 2021, https://arxiv.org/abs/2112.05682;
    over devices: Liu et al. 2023, ring attention, https://arxiv.org/abs/2310.01889). Where one side attends nothing,
    ``lse`` -inf, the other side is kept bit by bit. A sink is such a part, too: its ``out`` is 0.

    Args:
        out: ``(tokens, heads, head_dim_v)``, in the accumulation type.
        lse: Natural log-sum-exp, ``(heads, tokens)``.
        out_part: Of a shape that broadcasts to that of ``out``.
        lse_part: Of a shape that broadcasts to that of ``lse``.
    """
    merged = torch.logaddexp(lse, lse_part)
    reference = merged.masked_fill(merged == -torch.inf, 0)  # both weights become exp(-inf - 0) = 0
    weight, weight_part = (x.sub(reference).exp_().T.unsqueeze(2) for x in (lse, lse_part))
    out.mul_(weight).addcmul_(out_part, weight_part)
    lse.copy_(merged)
