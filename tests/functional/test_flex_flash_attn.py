"""flex_flash_attn_func: values, gradients, layouts, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
from magi_attention.mask import AttnMask, AttnRanges
from magi_attention.testing.dense_oracle import dense_attention, dense_mask, dense_max_logits, dense_scores
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks


def ranges_of(mask: AttnMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q_ranges, k_ranges, types = mask.to_ranges()
    codes = torch.tensor([t.to_int_type() for t in types], dtype=torch.int32)
    return q_ranges.to_tensor(), k_ranges.to_tensor(), codes


def inputs(rows: int, keys: int, dtype: torch.dtype = torch.float64, head_dim_v: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 4, 8), (keys, 2, 8), (keys, 2, head_dim_v))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def a_sink(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-1, 2, 4, dtype=dtype).requires_grad_()


def check(mask: AttnMask, sink: bool = False, head_dim_v: int = 8, **options: float) -> None:
    q_ranges, k_ranges, codes = ranges_of(mask)
    rows, keys = mask.total_seqlen_q, mask.total_seqlen_k
    leaves, oracle = ([*inputs(rows, keys, head_dim_v=head_dim_v), *([a_sink()] if sink else [])] for _ in range(2))
    q, k, v, *given = leaves
    options_and_sink = options | ({"sink": given[0]} if sink else {})
    out, lse = flex_flash_attn_func(q, k, v, q_ranges, k_ranges, attn_type_map=codes, **options_and_sink)
    dense = dense_mask(q_ranges.numpy(), k_ranges.numpy(), codes.numpy(), rows, keys)
    expected, expected_lse = dense_attention(*oracle[:3], dense, **options, sink=oracle[3] if sink else None)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-11)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    for o, lse_of, x in ((out, lse, leaves), (expected, expected_lse, oracle)):
        ((o * weights).sum() + lse_of[torch.isfinite(lse_of)].square().sum()).backward()
        assert all(t.grad is not None for t in x)
    for ours, theirs in zip(leaves, oracle, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks(name: str) -> None:
    check(named_masks(89)[name])


@settings(max_examples=60, deadline=None)
@given(masks(max_seqlen=40), st.sampled_from([8, 3, 11]))
def test_generated_masks(mask: AttnMask, head_dim_v: int) -> None:
    check(mask, head_dim_v=head_dim_v)


def test_options() -> None:
    check(named_masks(50)["prefix lm"], softmax_scale=0.3, softcap=2.0)


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_sinks(name: str) -> None:
    check(named_masks(89)[name], sink=True, softcap=2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["varlen causal", "holes", "nothing"])
def test_highest_scores(name: str, dtype: torch.dtype) -> None:
    mask = named_masks(89)[name]
    q_ranges, k_ranges, codes = ranges_of(mask)
    q, k, v = inputs(89, 89, dtype)
    out, lse, max_logits = flex_flash_attn_func(
        q, k, v, q_ranges, k_ranges, attn_type_map=codes, softcap=2.0, return_max_logits=True, sink=a_sink(dtype)
    )
    assert out.requires_grad and lse.requires_grad and not max_logits.requires_grad
    expected = dense_max_logits(dense_scores(q.double(), k.double(), mask.to_dense(), softcap=2.0))
    torch.testing.assert_close(max_logits, expected.to(lse.dtype))


@pytest.mark.parametrize("rows", [0, 3])
def test_highest_scores_of_nothing(rows: int) -> None:
    nothing = torch.zeros(0, 2, dtype=torch.int32)
    *_, max_logits = flex_flash_attn_func(*inputs(rows, 4), nothing, nothing, return_max_logits=True)
    assert torch.equal(max_logits, torch.full((4,), -torch.inf, dtype=torch.float64))


RANGES = torch.tensor([[0, 5], [5, 9]], dtype=torch.int32)
CAUSAL = torch.tensor([1, 1], dtype=torch.int32)
BF16 = torch.bfloat16


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return flex_flash_attn_func(q, k, v, RANGES, RANGES, attn_type_map=CAUSAL, softcap=3.0)


def loss_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor,
    types: torch.Tensor,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    out, lse = flex_flash_attn_func(q, k, v, ranges, ranges, attn_type_map=types, sink=sink)
    return out.square().sum() + lse.sum()


@pytest.mark.parametrize("results", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["out", "lse", "both"])
def test_gradcheck(results: slice) -> None:
    assert torch.autograd.gradcheck(lambda *x: attend(*x)[results], inputs(9, 9))


@pytest.mark.parametrize("head_dim_v", [8, 3, 11])
@pytest.mark.parametrize("results", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["out", "lse", "both"])
def test_gradcheck_with_a_sink(results: slice, head_dim_v: int) -> None:
    """Query 9 attends nothing."""

    def attend_with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> object:
        return flex_flash_attn_func(q, k, v, RANGES, RANGES, attn_type_map=CAUSAL, softcap=3.0, sink=sink)[results]

    assert torch.autograd.gradcheck(attend_with_sink, [*inputs(10, 9, head_dim_v=head_dim_v), a_sink()])


@pytest.mark.parametrize("head_dim_v", [3, 11])
def test_without_a_gradient_of_the_output(head_dim_v: int) -> None:
    """There is nothing then to tell the head_dim of values by but the output."""
    q, k, v = inputs(9, 9, head_dim_v=head_dim_v)
    attend(q, k, v)[1].sum().backward()
    assert q.grad.shape == q.shape and q.grad.any() and k.grad.any() and not v.grad.any()


def test_a_sink_alone_has_a_gradient() -> None:
    sink = a_sink(torch.float32)
    q, k, v = (x.detach() for x in inputs(9, 9, torch.bfloat16))
    out, lse = flex_flash_attn_func(q, k, v, RANGES, RANGES, sink=sink)
    (out.float().sum() + lse.sum()).backward()
    assert sink.grad.dtype == torch.float32 and sink.grad.all()


def test_no_type_map_means_full() -> None:
    q, k, v = inputs(9, 9)
    full = torch.zeros(2, dtype=torch.int32)
    expected = flex_flash_attn_func(q, k, v, RANGES, RANGES, attn_type_map=full)
    assert all(torch.equal(a, b) for a, b in zip(flex_flash_attn_func(q, k, v, RANGES, RANGES), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_types(dtype: torch.dtype) -> None:
    out, lse = attend(*inputs(9, 9, dtype))
    assert out.dtype == dtype and out.shape == (9, 4, 8)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.shape == (4, 9)


def test_any_strides() -> None:
    q, k, v = (torch.randn(8, h, 9, dtype=torch.float64).permute(2, 1, 0).requires_grad_() for h in (4, 2, 2))
    out, lse = attend(q, k, v)
    expected, expected_lse = attend(*(x.contiguous() for x in (q, k, v)))
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    out.transpose(0, 2).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)


def test_options_that_change_no_result() -> None:
    q, k, v = inputs(9, 9)
    expected, _ = attend(q, k, v)
    for options in (dict(engine="reference"), dict(deterministic=True, sm_margin=8), dict(max_seqlen_q=5)):
        out, _ = flex_flash_attn_func(q, k, v, RANGES, RANGES, attn_type_map=CAUSAL, softcap=3.0, **options)
        assert torch.equal(out, expected)


def test_gradients_repeat_bit_by_bit() -> None:
    first, second = inputs(9, 9, torch.float32), inputs(9, 9, torch.float32)
    for leaves in (first, second):
        out, lse = attend(*leaves)
        (out.square().sum() + lse.square().sum()).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(first, second, strict=True))


def test_without_gradients() -> None:
    leaves = inputs(9, 9)
    out, _ = attend(*leaves)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again, _ = attend(*leaves)
        assert torch.equal(out, again) and not again.requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    plain, recomputed = ([*inputs(9, 9), a_sink()] for _ in range(2))
    loss_of(*plain[:3], RANGES, CAUSAL, plain[3]).backward()
    checkpoint(loss_of, *recomputed[:3], RANGES, CAUSAL, recomputed[3], use_reentrant=use_reentrant).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, recomputed, strict=True))


def refuse(error: type[Exception], message: str, **changes: object) -> None:
    q, k, v = inputs(9, 9)
    arguments: dict[str, object] = dict(q=q, k=k, v=v, q_ranges=RANGES, k_ranges=RANGES, attn_type_map=CAUSAL)
    with pytest.raises(error, match=message):
        flex_flash_attn_func(**{**arguments, **changes})  # type: ignore[arg-type]


def test_bad_ranges() -> None:
    refuse(ValueError, r"q_ranges\[1\].*out of bounds", q_ranges=torch.tensor([[0, 5], [5, 10]]))
    refuse(ValueError, r"k_ranges\[0\]", k_ranges=torch.tensor([[5, 0], [5, 9]]))
    refuse(ValueError, "q_ranges has 1 ranges but k_ranges has 2|attn_type_map", q_ranges=torch.tensor([[0, 5]]))
    refuse(
        ValueError,
        r"slice 0 .*slice 1 .*overlap",
        q_ranges=torch.tensor([[0, 5], [4, 9]]),
        k_ranges=torch.tensor([[0, 5], [0, 9]]),
    )
    refuse(
        ValueError,
        r"k_ranges\[1\] = \[5, 10\) is out of bounds: k has 9 tokens, which come first, before heads",
        k_ranges=torch.tensor([[0, 5], [5, 10]]),
    )
    refuse(TypeError, "q_ranges must be int32 or int64", q_ranges=RANGES.float())
    refuse(TypeError, "k_ranges must be an int32 tensor", k_ranges=[[0, 5], [5, 9]])
    refuse(ValueError, r"k_ranges must have shape \(n, 2\)", k_ranges=torch.zeros(2, 3, dtype=torch.int32))
    refuse(ValueError, "q_ranges must be on the device of q", q_ranges=RANGES.to("meta"))


def test_bad_type_map() -> None:
    refuse(ValueError, "attn_type_map has 1 entries", attn_type_map=CAUSAL[:1])
    refuse(ValueError, r"attn_type_map\[1\] is 4", attn_type_map=torch.tensor([0, 4]))
    refuse(ValueError, r"attn_type_map\[0\] is -1", attn_type_map=torch.tensor([-1, 0]))


def test_bad_options() -> None:
    refuse(ValueError, "max_seqlen_q is 4, but the longest range", max_seqlen_q=4)
    refuse(ValueError, "max_seqlen_k is 4, but the longest range", max_seqlen_k=4)
    refuse(ValueError, "softcap", softcap=-1.0)
    refuse(ValueError, "softmax_scale", softmax_scale=0.0)
    refuse(TypeError, "softcap must be a number", softcap="1")
    refuse(TypeError, r"q_ranges must be an int32 tensor, not AttnRanges: use its to_tensor", q_ranges=AttnRanges())
    refuse(TypeError, "max_seqlen_q must be an integer", max_seqlen_q=9.5)
    refuse(TypeError, "deterministic must be True or False", deterministic=None)
    refuse(ValueError, "engine must be one of", engine="fast")
    refuse(ValueError, "engine='triton' was asked for, but triton runs on CUDA GPUs", engine="triton")
    refuse(TypeError, "engine must be a name", engine=1)
    refuse(TypeError, "auto_range_merge must be True or False", auto_range_merge="yes")
    refuse(ValueError, "sm_margin must not be negative", sm_margin=-1)


def test_bad_sinks() -> None:
    refuse(TypeError, "sink must be a torch.Tensor or None, not list", sink=[0.0] * 4)
    refuse(TypeError, "sink must be float32 or of the dtype of q, torch.float64, got torch.bfloat16", sink=a_sink(BF16))
    refuse(ValueError, r"sink must have shape \(4,\), one score for each head of q, got \(2,\)", sink=a_sink()[:2])
    refuse(ValueError, r"sink must have shape \(4,\).*got \(4, 1\)", sink=a_sink()[:, None])
    refuse(ValueError, "sink must be on the device of q, cpu, but is on meta", sink=a_sink().to("meta"))
    refuse(TypeError, "return_max_logits must be True or False, got 1", return_max_logits=1)


def test_bad_tensors() -> None:
    q, k, v = inputs(9, 9)
    refuse((TypeError, ValueError), "dtype", k=k.float())
    refuse(ValueError, "head", k=torch.zeros(9, 3, 8).double(), v=torch.zeros(9, 3, 8).double())
    refuse(
        ValueError,
        r"k and v must have as many keys and heads, got shapes \(9, 2, 8\) and \(8, 2, 8\)",
        v=v[:8],
    )
    refuse(ValueError, "k and v must have as many keys and heads", v=v[:, :1])
    refuse(ValueError, r"v must have a head_dim of at least 1, got shape \(9, 2, 0\)", v=v[:, :, :0])
    refuse(ValueError, "q and k must have one head_dim, at least 1, got 8 and 3", k=k[:, :, :3])
    refuse(ValueError, "q", q=q[0])
    refuse(TypeError, "q", q=q.detach().long())
