"""Helpers around the interface."""

import numpy as np
import pytest
import torch

from magi_attention.api import functools
from magi_attention.mask import AttnMask, AttnMaskType, AttnRange, AttnRanges, builders


def dense(slices, total_q: int, total_k: int) -> np.ndarray:
    return AttnMask.from_slices(*slices, total_q, total_k).to_dense()


def test_pad_and_unpad() -> None:
    x = torch.arange(6).reshape(2, 3)
    assert functools.pad_at_dim(x, 1, 2, value=9).tolist() == [[0, 1, 2, 9, 9], [3, 4, 5, 9, 9]]
    assert functools.pad_at_dim(x, 0, 1, side="left").tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5]]
    for dim, side in ((0, "left"), (1, "right"), (-1, "left")):
        padded = functools.pad_at_dim(x, dim, 2, side=side)
        assert torch.equal(functools.unpad_at_dim(padded, dim, 2, side=side), x)
    with pytest.raises(ValueError, match="pad_size must not be negative"):
        functools.pad_at_dim(x, 0, -1)
    with pytest.raises(ValueError, match="pad_size must lie in 0 to 2"):
        functools.unpad_at_dim(x, 0, 3)
    with pytest.raises(ValueError, match=r"dim must be one of the 2 dimensions of x, \(2, 3\), not 2"):
        functools.pad_at_dim(x, 2, 1)
    with pytest.raises(ValueError, match="side must be"):
        functools.pad_at_dim(x, 0, 1, side="up")
    for pad in (functools.pad_at_dim, functools.unpad_at_dim):
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, not ndarray"):
            pad(x.numpy(), 0, 1)  # type: ignore[arg-type]


def test_apply_padding_adds_rows_that_attend_nothing() -> None:
    ranges = AttnRanges.from_ranges([(0, 4)])
    padded = functools.apply_padding(ranges, ranges, [AttnMaskType.CAUSAL], 4, 3)
    expected = np.zeros((7, 7), bool)
    expected[:4, :4] = np.tri(4, dtype=bool)
    np.testing.assert_array_equal(dense(padded, 7, 7), expected)
    assert len(ranges) == 1
    assert len(functools.apply_padding(ranges, ranges, [AttnMaskType.CAUSAL], 4, 0)[0]) == 1
    assert functools.apply_padding(ranges, ranges, "causal", 4, 3) == padded
    with pytest.raises(ValueError, match="attn_mask_type has 2 entries but there are 1 slices"):
        functools.apply_padding(ranges, ranges, ["causal", "full"], 4, 3)
    with pytest.raises(ValueError, match="pad_size must not be negative, got -3"):
        functools.apply_padding(ranges, ranges, "causal", 4, -3)


def test_batches() -> None:
    assert functools.squash_batch_dim(torch.zeros(2, 3, 4)).shape == (6, 4)
    with pytest.raises(ValueError, match="batch and a sequence dimension"):
        functools.squash_batch_dim(torch.zeros(3))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, not list"):
        functools.squash_batch_dim([[1]])  # type: ignore[arg-type]
    for infer in (functools.full_attention_to_varlen_attention, functools.infer_varlen_mask_from_batch):
        cu_q, cu_k = infer(3, 5)
        assert cu_q.tolist() == cu_k.tolist() == [0, 5, 10, 15] and cu_q.dtype == torch.int32
        with pytest.raises(ValueError, match="seq_len must not be negative, got -6"):
            infer(2, -6)
        with pytest.raises(TypeError, match=r"seq_len must be an integer, got 6\.5"):
            infer(2, 6.5)
        with pytest.raises(ValueError, match=r"batch_size .* 4 .* 536870912 is beyond int32"):
            infer(4, 1 << 29)


@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (0, 0), (3, 1), (-1, 0), (1, -1), (100, 100)])
@pytest.mark.parametrize(("q", "k"), [((0, 9), (0, 9)), ((3, 8), (1, 12)), ((0, 9), (4, 7))])
def test_sliding_window_in_a_rectangle(window: tuple[int, int], q: tuple[int, int], k: tuple[int, int]) -> None:
    slices = functools.infer_attn_mask_from_sliding_window(AttnRange(*q), AttnRange(*k), window)
    assert functools.infer_attn_mask_from_sliding_window(q, k, window) == slices
    left, right = (100 if w == -1 else w for w in window)
    expected = np.zeros((12, 12), bool)
    for i in range(*q):
        for j in range(*k):
            expected[i, j] = -left <= (j - k[1]) - (i - q[1]) <= right
    np.testing.assert_array_equal(dense(slices, 12, 12), expected)


def test_sliding_window_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"window_size\[0\] must be at least 0, or -1 for no limit, got -2"):
        functools.infer_attn_mask_from_sliding_window(AttnRange(0, 4), AttnRange(0, 4), (-2, 0))
    with pytest.raises(ValueError, match=r"window_size must be a pair \(left, right\), got 2"):
        functools.infer_attn_mask_from_sliding_window(AttnRange(0, 4), AttnRange(0, 4), 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"window_size\[0\] must be an integer, got 2\.9"):
        functools.infer_attn_mask_from_sliding_window(AttnRange(0, 4), AttnRange(0, 4), (2.9, 0))  # type: ignore[arg-type]


def test_from_cu_seqlens() -> None:
    cu = torch.tensor([0, 5, 17, 17, 30], dtype=torch.int32)
    cases = [
        (functools.infer_attn_mask_from_cu_seqlens(cu), builders.varlen(cu)),
        (functools.infer_attn_mask_from_cu_seqlens(cu, cu, causal=True), builders.varlen(cu, causal=True)),
        (
            functools.infer_attn_mask_from_cu_seqlens(cu, causal=True, window_size=(3, -1)),
            builders.sliding_window(cu, (3, 0)),
        ),
        (
            functools.infer_attn_mask_from_cu_seqlens(cu, window_size=(3, 1), global_window_size=2),
            builders.global_sliding_window(cu, (3, 1), 2),
        ),
    ]
    for (q, k, types, total_q, total_k), expected in cases:
        assert (total_q, total_k) == (30, 30)
        np.testing.assert_array_equal(dense((q, k, types), 30, 30), expected.to_dense())


def test_from_mask() -> None:
    matrix = builders.prefix_lm([0, 9, 20], [3, 4]).to_dense()
    np.testing.assert_array_equal(dense(functools.from_mask(matrix), 20, 20), matrix)
    np.testing.assert_array_equal(dense(functools.from_mask(torch.from_numpy(matrix)), 20, 20), matrix)


def test_hierarchical_mesh_checks_its_sizes() -> None:
    with pytest.raises(ValueError, match="2 \\* 3 must be world_size 4"):
        functools.init_hierarchical_mesh(4, 2, 3)
