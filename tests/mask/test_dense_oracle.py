"""The oracle itself: the four types drawn by hand, attention query by query, gradients by finite differences."""

import math

import numpy as np
import pytest
import torch

from magi_attention.testing.dense_oracle import dense_attention, dense_mask


@pytest.mark.parametrize(
    "mask_type, drawing",
    [
        ("full", ["111111", "111111", "111111", "111111"]),
        ("causal", ["111000", "111100", "111110", "111111"]),
        ("inv_causal", ["111111", "011111", "001111", "000111"]),
        ("bi_causal", ["111000", "011100", "001110", "000111"]),
    ],
)
def test_the_four_types(mask_type: str, drawing: list[str]) -> None:
    found = dense_mask([(1, 5)], [(2, 8)], [mask_type], 6, 9)
    assert found[1:5, 2:8].tolist() == [[c == "1" for c in row] for row in drawing]
    assert found.sum() == sum(row.count("1") for row in drawing)


@pytest.mark.parametrize(
    "mask_type, drawing",
    [
        ("causal", ["00", "00", "10", "11"]),
        ("inv_causal", ["11", "01", "00", "00"]),
        ("bi_causal", ["00", "00", "00", "00"]),
    ],
)
def test_more_queries_than_keys(mask_type: str, drawing: list[str]) -> None:
    found = dense_mask([(0, 4)], [(0, 2)], [mask_type], 4, 2)
    assert found.tolist() == [[c == "1" for c in row] for row in drawing]


def make_inputs(heads_q: int = 4, heads_kv: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, h, 8, dtype=torch.float64, generator=generator)
        for n, h in ((5, heads_q), (7, heads_kv), (7, heads_kv))
    )
    mask = torch.rand(5, 7, generator=generator).numpy() < 0.6
    mask[2] = False
    return q, k, v, mask


@pytest.mark.parametrize("softmax_scale, softcap", [(None, 0.0), (0.7, 0.0), (None, 1.5)])
def test_attention_one_query_at_a_time(softmax_scale: float | None, softcap: float) -> None:
    q, k, v, mask = make_inputs()
    out, lse = dense_attention(q, k, v, mask, softmax_scale, softcap)
    assert out.shape == (5, 4, 8) and lse.shape == (4, 5) and lse.dtype == torch.float64
    for i in range(5):
        for h in range(4):
            scores = []
            for j in np.flatnonzero(mask[i]):
                score = float(q[i, h] @ k[j, h // 2]) * (8**-0.5 if softmax_scale is None else softmax_scale)
                scores.append(softcap * math.tanh(score / softcap) if softcap else score)
            if not scores:
                assert lse[h, i] == -math.inf and not out[i, h].any()
                continue
            total = sum(math.exp(s) for s in scores)
            wanted = sum(
                math.exp(s) / total * v[j, h // 2] for s, j in zip(scores, np.flatnonzero(mask[i]), strict=True)
            )
            torch.testing.assert_close(out[i, h], wanted)
            assert float(lse[h, i]) == pytest.approx(math.log(total), rel=1e-12)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_through_out_and_lse(softcap: float) -> None:
    q, k, v, mask = make_inputs(2, 1)
    q, k, v = (x[..., :2].contiguous() for x in (q, k, v))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = dense_attention(q, k, v, mask, softcap=softcap)
        return out, lse[:, mask.any(axis=1)]

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v)])


def test_rows_that_attend_nothing_pass_no_gradient_on() -> None:
    q, k, v, _ = make_inputs()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*inputs, np.zeros((5, 7), np.bool_))
    assert torch.all(lse == -math.inf) and not out.any()
    for grad in torch.autograd.grad([out, lse], inputs, [torch.ones_like(out), torch.ones_like(lse)]):
        assert not grad.any() and torch.isfinite(grad).all()


def test_low_precision_inputs_keep_their_dtype() -> None:
    q, k, v, mask = make_inputs()
    out, lse = dense_attention(*(x.bfloat16() for x in (q, k, v)), mask)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
