"""One of each kind of mask, over the same number of tokens."""

import numpy as np

from magi_attention.mask import AttnMask, builders


def named_masks(seqlen: int) -> dict[str, AttnMask]:
    """Masks of ``seqlen`` queries and keys by name: every builder, and shapes that no builder makes.

    The documents are uneven: the first has one token, the second none.
    """
    cu_seqlens = sorted(min(n, seqlen) for n in (0, 1, 1, 1 + seqlen // 7, 1 + seqlen // 2, seqlen))
    lengths = np.diff(cu_seqlens)
    window = seqlen // 9 + 1
    a, b = seqlen // 3, seqlen - seqlen // 4
    node_lengths = np.diff(sorted(min(n, seqlen) for n in (0, 1, 1 + a // 2, a, b, seqlen))).tolist()
    return {
        "full": builders.full(seqlen),
        "causal": builders.causal(seqlen),
        "varlen full": builders.varlen(cu_seqlens),
        "varlen causal": builders.varlen(cu_seqlens, causal=True),
        "sliding window": builders.sliding_window(seqlen, (window, window // 2)),
        "sliding window causal": builders.sliding_window(seqlen, (window, 0)),
        "varlen sliding window causal": builders.sliding_window(cu_seqlens, (window, 0)),
        "global sliding window": builders.global_sliding_window(cu_seqlens, (window, window // 3), 3),
        "global sliding window causal": builders.global_sliding_window(cu_seqlens, (window, 0), 3, causal=True),
        "prefix lm": builders.prefix_lm(cu_seqlens, lengths // 3),
        "block causal": builders.block_causal(cu_seqlens, window),
        "block causal window": builders.block_causal(seqlen, window // 2 + 1, window=1),
        "chunked causal": builders.block_causal(cu_seqlens, window, window=0, causal=True),
        "shared prefix": builders.shared_prefix(cu_seqlens[3], lengths[3:]),
        "prefix tree": builders.prefix_tree(list(zip([-1, 0, 0, 1, -1], node_lengths, strict=True))),
        "holes": AttnMask.from_slices([(a, b)], [(0, a)], "inv_causal", seqlen, seqlen),
        "several intervals a row": AttnMask.from_slices(
            [(0, b), (0, a), (a, seqlen)],
            [(0, a // 2), (a, b), (b, seqlen)],
            ["full", "bi_causal", "causal"],
            seqlen,
            seqlen,
        ),
        "nothing": AttnMask.from_slices([], [], "full", seqlen, seqlen),
    }
