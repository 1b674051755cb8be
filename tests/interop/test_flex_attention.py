"""FlexAttention's mask_mods and BlockMasks become exactly their cells, or are refused with the tile to blame."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, noop_mask, or_masks

from magi_attention.interop import flex_attention, mask_from_block_mask, mask_from_mask_mod
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SEQLEN = 97
CU = [0, 10, 11, 40, 97]
DOCUMENT = torch.repeat_interleave(torch.arange(4), torch.tensor(np.diff(CU)))
PREFIX = torch.tensor([4, 0, 9, 30])
OFFSET = torch.tensor(CU)


def lookup(dense: np.ndarray) -> MaskMod:
    table = torch.from_numpy(dense)
    return lambda b, h, q_idx, kv_idx: table[q_idx, kv_idx]


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def same_document(b, h, q_idx, kv_idx):
    return DOCUMENT[q_idx] == DOCUMENT[kv_idx]


def prefix(b, h, q_idx, kv_idx):
    document = DOCUMENT[kv_idx]
    return kv_idx - OFFSET[document] < PREFIX[document]


def window(b, h, q_idx, kv_idx):
    return q_idx - kv_idx <= 12


def in_prefix_too(b, h, q_idx, kv_idx):
    return prefix(b, h, q_idx, q_idx) & prefix(b, h, q_idx, kv_idx)


# As users write them, beside the builder that says the same.
WRITTEN = {
    "causal": (causal, builders.causal(SEQLEN)),
    "full": (noop_mask, builders.full(SEQLEN)),
    "causal by torch.where": (
        lambda b, h, q, k: torch.where(q >= k, b.new_ones((), dtype=torch.bool), torch.zeros_like(h, dtype=torch.bool)),
        builders.causal(SEQLEN),
    ),
    "sliding window": (and_masks(causal, window), builders.sliding_window(SEQLEN, (12, 0))),
    "documents": (same_document, builders.varlen(CU)),
    "causal documents": (and_masks(causal, same_document), builders.varlen(CU, causal=True)),
    "prefix lm": (
        and_masks(same_document, or_masks(causal, in_prefix_too)),
        builders.prefix_lm(CU, PREFIX.tolist()),
    ),
    "blocks": (lambda b, h, q, k: q // 16 >= k // 16, builders.block_causal(SEQLEN, 16)),
    "nothing": (lambda b, h, q, k: b.new_zeros((), dtype=torch.bool), AttnMask.from_slices([], [], "full", 97, 97)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_masks_as_users_write_them(name: str) -> None:
    mask_mod, expected = WRITTEN[name]
    mask = mask_from_mask_mod(mask_mod, SEQLEN, SEQLEN, block_size=32)
    assert np.array_equal(mask.to_dense(), expected.to_dense())
    assert len(mask.bands) <= len(expected.bands)
    block_mask = create_block_mask(mask_mod, None, None, SEQLEN, SEQLEN, device="cpu", BLOCK_SIZE=16)
    assert mask_from_block_mask(block_mask) == mask


@pytest.mark.parametrize("name", sorted(named_masks(SEQLEN)))
def test_named_masks(name: str) -> None:
    expected = named_masks(SEQLEN)[name]
    mask = mask_from_mask_mod(lookup(expected.to_dense()), SEQLEN, SEQLEN)
    assert np.array_equal(mask.to_dense(), expected.to_dense()) and mask.area == expected.area


@given(masks(max_seqlen=48), st.integers(1, 20), st.integers(1, 20), st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_generated_masks(expected: AttnMask, block_q: int, block_k: int, cells_at_once: int) -> None:
    dense = expected.to_dense()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_CELLS_AT_ONCE", cells_at_once)
        mask = mask_from_mask_mod(lookup(dense), *dense.shape, block_size=block_q)
        blocks = create_block_mask(lookup(dense), None, None, *dense.shape, device="cpu", BLOCK_SIZE=(block_q, block_k))
        assert np.array_equal(mask.to_dense(), dense) and mask.area == dense.sum()
        assert mask_from_block_mask(blocks) == mask


def test_queries_and_keys_of_different_number() -> None:
    assert mask_from_mask_mod(causal, 3, 300, block_size=2).area == 6
    assert mask_from_mask_mod(causal, 0, 5).area == mask_from_mask_mod(causal, 5, 0).area == 0


def test_memory_stays_below_queries_times_keys() -> None:
    largest = 0

    def watched(b, h, q_idx, kv_idx):
        nonlocal largest
        largest = max(largest, q_idx.numel() * kv_idx.numel())
        return q_idx >= kv_idx

    mask = mask_from_mask_mod(watched, 4096, 4096)
    assert mask == builders.causal(4096)
    assert largest == 128 * 4096
    largest = 0
    mask_from_mask_mod(watched, 1, 1 << 23)
    assert largest == 1 << 22


def test_empty_and_full_blocks_are_not_evaluated() -> None:
    seen = []

    def watched(b, h, q_idx, kv_idx):
        seen.append((q_idx.flatten().tolist(), kv_idx.flatten().tolist()))
        return q_idx >= kv_idx

    block_mask = create_block_mask(causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    block_mask.mask_mod = watched
    assert mask_from_block_mask(block_mask) == builders.causal(64)
    diagonal = [list(range(n, n + 16)) for n in (0, 16, 32, 48)]
    assert seen == [(block, block) for block in diagonal]


def test_blocks_count_and_not_only_the_function() -> None:
    """What a BlockMask leaves out is not attended even where its function says so."""
    counts, indices = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    sparse = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=4, mask_mod=None)
    expected = np.ones((8, 8), bool)
    expected[:4, :4] = False
    assert np.array_equal(mask_from_block_mask(sparse).to_dense(), expected)


@pytest.mark.parametrize("seed", range(3))
def test_random_masks_are_refused(seed: int) -> None:
    dense = np.random.default_rng(seed).random((700, 800)) < 0.5
    message = r"700 x 800 cells needs more than max_slices = 100000 slices: tile \(q block \d, k block \d\)"
    with pytest.raises(ValueError, match=message):
        mask_from_mask_mod(lookup(dense), 700, 800)


def test_the_tile_that_is_not_bands_is_named() -> None:
    dense = builders.causal(512).to_dense()
    dense[130:250, 60:120] = np.random.default_rng(0).random((120, 60)) < 0.5
    message = r"tile \(q block 2, k block 1\), queries \[128, 192\) x keys \[64, 128\), is not made of bands, \d+ begin"
    with pytest.raises(ValueError, match=message):
        mask_from_mask_mod(lookup(dense), 512, 512, block_size=64, max_slices=500)
    blocks = create_block_mask(lookup(dense), None, None, 512, 512, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match=message):
        mask_from_block_mask(blocks, max_slices=500)
    assert np.array_equal(mask_from_mask_mod(lookup(dense), 512, 512).to_dense(), dense), (
        "within the default it is kept"
    )


def test_slices_are_counted_as_they_are_spelled() -> None:
    """A window is one band and three slices."""
    mask_mod, _ = WRITTEN["sliding window"]
    assert len(mask_from_mask_mod(mask_mod, 40, 40, max_slices=2).slices) == 2
    with pytest.raises(ValueError, match="max_slices = 1 slices"):
        mask_from_mask_mod(mask_mod, 40, 40, max_slices=1)


@pytest.mark.parametrize(
    ("mask_mod", "message"),
    [
        (lambda b, h, q, k: PREFIX[b] > k - q, "depends on its batch index b"),
        (lambda b, h, q, k: (q >= k) & (h < 2), "depends on its head index h"),
        (lambda b, h, q, k: q >= k if bool(h == 0) else q < k, "depends on its head index h"),
    ],
)
def test_masks_that_differ_by_batch_or_head_are_refused(mask_mod: MaskMod, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_from_mask_mod(mask_mod, 8, 8)
    block_mask = create_block_mask(causal, None, None, 8, 8, device="cpu")
    block_mask.mask_mod = mask_mod
    with pytest.raises(ValueError, match=message):
        mask_from_block_mask(block_mask)


@pytest.mark.parametrize(("batch", "heads"), [(2, None), (None, 3), (2, 3)])
def test_block_masks_of_several_entries_are_refused(batch: int | None, heads: int | None) -> None:
    block_mask = create_block_mask(causal, batch, heads, 8, 8, device="cpu")
    with pytest.raises(ValueError, match=rf"\(B, H\) = \({batch or 1}, {heads or 1}\)"):
        mask_from_block_mask(block_mask)


@pytest.mark.parametrize(
    ("mask_mod", "error", "message"),
    [
        (lambda b, h, q, k: q - k, TypeError, "must return a bool tensor.*not torch.int64"),
        (lambda b, h, q, k: True, TypeError, "must return a bool tensor.*not bool"),
        (lambda b, h, q, k: torch.ones(3, 8, dtype=torch.bool), ValueError, r"returned shape \(3, 8\).*\(8, 8\)"),
    ],
)
def test_wrong_results_are_refused(mask_mod: MaskMod, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mask_from_mask_mod(mask_mod, 8, 8)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="total_seqlen_k must not be negative, got -1"):
        mask_from_mask_mod(causal, 8, -1)
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        mask_from_mask_mod(causal, 8, 8, block_size=0)
    with pytest.raises(TypeError, match=r"must be a BlockMask.*not AttnMask"):
        mask_from_block_mask(builders.causal(8))  # type: ignore[arg-type]
