"""Partial attention results over disjoint sets of keys, made one."""

import torch


def merge_states(out: torch.Tensor, lse: torch.Tensor, out_part: torch.Tensor, lse_part: torch.Tensor) -> None:
    """Merge the result over more keys into ``out`` and ``lse``, in place.

    With ``lse' = log(exp(lse) + exp(lse_part))`` the result over all keys is
    ``out' = exp(lse - lse') * out + exp(lse_part - lse') * out_part`` (Rabe & Staats 2021, https://arxiv.org/abs/2112.05682;
    over devices: Liu et al. 2023, ring attention, https://arxiv.org/abs/2310.01889). Where one side attends nothing,
    ``lse`` -inf, the other side is kept bit by bit.

    Args:
        out: ``(tokens, heads, head_dim)``, in the accumulation type.
        lse: Natural log-sum-exp, ``(heads, tokens)``.
        out_part: Shaped as ``out``.
        lse_part: Shaped as ``lse``.
    """
    merged = torch.logaddexp(lse, lse_part)
    reference = merged.masked_fill(merged == -torch.inf, 0)  # both weights become exp(-inf - 0) = 0
    weight, weight_part = (x.sub(reference).exp_().T.unsqueeze(2) for x in (lse, lse_part))
    out.mul_(weight).addcmul_(out_part, weight_part)
    lse.copy_(merged)
