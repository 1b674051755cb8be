"""The contenders of bench_flex_attn.py: each attends one sequence on one GPU under the mask of a case.

A contender is made by a function of the case and the device. What it cannot do it says by raising
:class:`NotSupported`; anything else it raises is a failure, and the benchmark prints which. Libraries are imported
when a contender is made, so that one that is missing stops no other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from attention_cases import BLOCK, BlockLists, Case, Documents, Intervals, block_lists, cells_of_blocks, intervals
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class NotSupported(Exception):
    """The library has no such mask."""


@dataclass(frozen=True)
class Contender:
    """A way to attend.

    Attributes:
        attend: From q, k, v to out, differentiable.
        heads_first: Whether these are ``(heads, tokens, head_dim)`` and not ``(tokens, heads, head_dim)``, contiguous
            either way.
    """

    attend: Attend
    heads_first: bool = False


def magi(case: Case, device: str, engine: str, deterministic: bool = False) -> Contender:
    """This library."""
    q_ranges, k_ranges, types = case.mask.to_ranges()
    ranges = [x.to_tensor(device) for x in (q_ranges, k_ranges)]
    codes = torch.tensor([t.to_int_type() for t in types], dtype=torch.int32, device=device)
    options = {"attn_type_map": codes, "engine": engine, "deterministic": deterministic}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_flash_attn_func(q, k, v, *ranges, **options)[0]

    return Contender(attend)


def cudnn(case: Case, device: str) -> Contender:
    """cuDNN's attention by way of torch."""
    if case.documents is None or not case.documents.single or case.documents.window:
        raise NotSupported("full and causal only")
    causal = case.documents.causal

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal, enable_gqa=True)[0]

    return Contender(attend, heads_first=True)


def flex(case: Case, device: str) -> Contender:
    """torch's FlexAttention, compiled for every shape and kind of ``mask_mod``."""
    attention, block_mask = compiled_flex_attention(), flex_block_mask(case, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[None], k[None], v[None], block_mask=block_mask, enable_gqa=True)[0]

    return Contender(attend, heads_first=True)


@lru_cache(maxsize=1)
def compiled_flex_attention() -> Callable[..., Tensor]:
    """One function for all cases. Past the limit it would not compile but materialise the scores."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def flex_block_mask(case: Case, device: str) -> BlockMask | None:
    """The mask as ``create_block_mask`` would make it, from exact block lists and not by trying every cell."""
    mask_mod = flex_mask_mod(case, device)
    if mask_mod is None:
        return None
    lists = block_lists(cells_of_blocks(case.mask), case.seqlen, case.seqlen)
    return BlockMask.from_kv_blocks(
        *as_tensors(lists, device), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(case.seqlen, case.seqlen)
    )


def flex_mask_mod(case: Case, device: str) -> MaskMod | None:
    """The closed form where there is one, else two integers a row or a key; None where all is attended."""
    documents = case.documents
    if case.is_full:
        return None
    if documents is not None and documents.single:
        return _causal if documents.window is None else _causal_window(documents.window)
    spans = intervals(case.mask)
    start, end = bounds_of(spans, device)
    return _rows_intervals(start, end) if spans.of_rows else _keys_intervals(start, end)


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def _causal_window(window: int) -> MaskMod:
    return lambda b, h, q, k: (k <= q) & (q - k < window)


def _rows_intervals(start: Tensor, end: Tensor) -> MaskMod:
    return lambda b, h, q, k: (start[q] <= k) & (k < end[q])


def _keys_intervals(start: Tensor, end: Tensor) -> MaskMod:
    return lambda b, h, q, k: (start[k] <= q) & (q < end[k])


def flash_attn_4(case: Case, device: str) -> Contender:
    """flash-attn-4 with its own causal flag, window and documents."""
    documents = case.documents
    if documents is None:
        raise NotSupported("not a mask of documents, causal or a window")
    return _flash_attn_4_single(documents) if documents.single else _flash_attn_4_varlen(documents, device)


def _flash_attn_4_single(documents: Documents) -> Contender:
    from flash_attn.cute.interface import flash_attn_func

    options = _flash_attn_4_options(documents)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q[None], k[None], v[None], **options)[0][0]

    return Contender(attend)


def _flash_attn_4_varlen(documents: Documents, device: str) -> Contender:
    from flash_attn.cute.interface import flash_attn_varlen_func

    cu_seqlens = torch.tensor(documents.cu_seqlens, dtype=torch.int32, device=device)
    options = _flash_attn_4_options(documents)
    options |= {f"cu_seqlens_{x}": cu_seqlens for x in "qk"} | {f"max_seqlen_{x}": documents.max_seqlen for x in "qk"}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, **options)[0]

    return Contender(attend)


def _flash_attn_4_options(documents: Documents) -> dict[str, Any]:
    window = {} if documents.window is None else {"window_size": (documents.window - 1, 0)}
    return {"causal": documents.causal} | window


def flash_attn_4_mask_mod(case: Case, device: str) -> Contender:
    """flash-attn-4 with a ``mask_mod`` that reads two integers a row or a key, and exact block lists."""
    if case.is_full:
        raise NotSupported("nothing to mask")
    import fa4_mask_mods
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    spans, cells = intervals(case.mask), cells_of_blocks(case.mask)
    blocks, transposed_blocks = (
        BlockSparseTensorsTorch(
            *as_tensors(block_lists(x, case.seqlen, case.seqlen), device), block_size=(BLOCK, BLOCK)
        )
        for x in (cells, cells.T)
    )
    options = {
        "mask_mod": fa4_mask_mods.rows_intervals if spans.of_rows else fa4_mask_mods.keys_intervals,
        "aux_tensors": list(bounds_of(spans, device)),
        "block_sparse_tensors": blocks,
        "block_sparse_tensors_bwd": transposed_blocks,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q[None], k[None], v[None], **options)[0][0]

    return Contender(attend)


def bounds_of(spans: Intervals, device: str) -> tuple[Tensor, Tensor]:
    """Start and end of each interval, int32."""
    return torch.from_numpy(spans.start).to(device), torch.from_numpy(spans.end).to(device)


def as_tensors(lists: BlockLists, device: str) -> list[Tensor]:
    """Partial count and index, full count and index, for a batch of one and all heads."""
    arrays = (lists.partial_count, lists.partial_index, lists.full_count, lists.full_index)
    return [torch.from_numpy(x)[None, None].to(device) for x in arrays]


RIVALS: dict[str, Callable[[Case, str], Contender]] = {
    "cuDNN": cudnn,
    "FlexAttention": flex,
    "flash-attn-4": flash_attn_4,
    "flash-attn-4 mask_mod": flash_attn_4_mask_mod,
}
