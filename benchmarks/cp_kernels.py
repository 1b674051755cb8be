"""Kernels of one GPU that the rivals of bench_cp.py attend with, as functions of ``(rows, heads, head_dim)``."""

from collections.abc import Callable

import gpu_rivals
import torch
from attention_cases import BLOCK, Case, block_lists, cells_of_blocks, intervals
from gpu_rivals import Attend, NotSupported
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from magi_attention.mask import AttnMask


def tokens_first(contender: gpu_rivals.Contender) -> Attend:
    """A contender on one GPU as such a function, without copies."""
    if not contender.heads_first:
        return contender.attend

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return contender.attend(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

    return attend


def flex(mask: AttnMask, device: torch.device) -> Attend:
    """FlexAttention of any number of rows and keys, from exact block lists.

    It reads two integers a row, or a key where a row has several intervals, for every mask: so it is compiled twice for
    a shape at the most.
    """
    rows, keys, spans = mask.total_seqlen_q, mask.total_seqlen_k, intervals(mask)
    start, end = gpu_rivals.bounds_of(spans, str(device))
    lists = gpu_rivals.as_tensors(block_lists(cells_of_blocks(mask), rows, keys), str(device))
    mask_mod = rows_attend(start, end) if spans.of_rows else keys_are_attended(start, end)
    block_mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(rows, keys))
    attention = gpu_rivals.compiled_flex_attention()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[None], k[None], v[None], block_mask=block_mask, enable_gqa=True)[0]

    return tokens_first(gpu_rivals.Contender(attend, heads_first=True))


def rows_attend(start: Tensor, end: Tensor) -> gpu_rivals.MaskMod:
    return lambda b, h, q, k: (start[q] <= k) & (k < end[q])


def keys_are_attended(start: Tensor, end: Tensor) -> gpu_rivals.MaskMod:
    return lambda b, h, q, k: (start[k] <= q) & (q < end[k])


def flex_where_needed(case: Case, device: torch.device) -> Attend:
    """FlexAttention of a whole mask that cuDNN does not have."""
    if case.documents is not None and case.documents.single and not case.documents.window:
        raise NotSupported("cuDNN has this mask, and is faster")
    return flex(case.mask, device)


def dense(mask: AttnMask, device: torch.device) -> Attend:
    """A dense mask, for short sequences on a CPU."""
    allowed = torch.from_numpy(mask.to_dense()).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=allowed, enable_gqa=True)[0]

    return tokens_first(gpu_rivals.Contender(attend, heads_first=True))


RECTANGULAR: dict[str, Callable[[AttnMask, torch.device], Attend]] = {"FlexAttention": flex, "dense": dense}
"""Kernels of any mask, of any number of rows and keys."""

WHOLE: dict[str, Callable[[Case, torch.device], Attend]] = {
    "flash-attn-4": lambda case, device: tokens_first(gpu_rivals.flash_attn_4(case, str(device))),
    "cuDNN": lambda case, device: tokens_first(gpu_rivals.cudnn(case, str(device))),
    "FlexAttention": flex_where_needed,
    "dense": lambda case, device: dense(case.mask, device),
}
"""Kernels of whole masks, each of those it has."""
