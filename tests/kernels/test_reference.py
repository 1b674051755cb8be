"""The reference engine against the dense oracle."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels import reference
from magi_attention.kernels.merge import merge_states
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .attention import Problem, check_bound, names_of, run_dense, run_engine, run_in_parts

ENGINE = reference


def check_fp64(problem: Problem) -> None:
    for name, actual, expected in zip(names_of(problem), run_engine(ENGINE, problem), run_dense(problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks(name: str, softcap: float) -> None:
    check_fp64(Problem.random(named_masks(301)[name], softcap=softcap))


@settings(max_examples=150, deadline=None)
@given(
    masks(max_seqlen=70),
    st.sampled_from([(1, 1), (3, 3), (4, 1), (6, 2)]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([4, 1, 7]),
)
def test_generated_masks(mask: AttnMask, heads: tuple[int, int], softcap: float, head_dim_v: int) -> None:
    check_fp64(Problem.random(mask, heads=heads, head_dim=4, softcap=softcap, head_dim_v=head_dim_v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "varlen full", "global sliding window causal", "several intervals a row"])
def test_low_precision_keeps_the_derived_bound(name: str, dtype: torch.dtype) -> None:
    problem = Problem.random(named_masks(411)[name], dtype=dtype, head_dim=32)
    check_bound(run_engine(ENGINE, problem), problem, run_dense(problem, dtype))


@pytest.mark.parametrize("head_dim_v", [24, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_with_values_of_another_head_dim(dtype: torch.dtype, head_dim_v: int) -> None:
    mask = named_masks(411)["varlen sliding window causal"]
    problem = Problem.random(mask, dtype, head_dim=32, head_dim_v=head_dim_v).with_sink()
    results = run_engine(ENGINE, problem)
    assert [x.shape[2] for x in (results[0], *results[2:5])] == [head_dim_v, 32, 32, head_dim_v]
    check_bound(results, problem, run_dense(problem, dtype))


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_heads_in_chunks(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.random(builders.causal(60), heads=(6, 3))
    monkeypatch.setattr(reference, "MAX_SCORES", heads_at_once * 2 * 60 * 60)
    check_fp64(problem)


def test_autocast_changes_nothing() -> None:
    problem = Problem.random(named_masks(100)["prefix lm"], dtype=torch.float32)
    expected = run_engine(ENGINE, problem)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_engine(ENGINE, problem)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_scores_far_below_the_highest() -> None:
    """Probabilities that are subnormal or 0."""
    problem = Problem.random(builders.causal(64), head_dim=1)
    problem.q.fill_(1.0)
    problem.k.copy_(torch.linspace(0, -1000, 64)[:, None, None])
    check_fp64(problem)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_sinks_and_highest_scores(name: str, softcap: float) -> None:
    check_fp64(Problem.random(named_masks(301)[name], softcap=softcap).with_sink())


@settings(max_examples=100, deadline=None)
@given(masks(max_seqlen=70), st.sampled_from([(1, 1), (3, 3), (4, 1), (6, 2)]), st.sampled_from([4, 1, 7]))
def test_sinks_and_highest_scores_of_generated_masks(mask: AttnMask, heads: tuple[int, int], head_dim_v: int) -> None:
    check_fp64(Problem.random(mask, heads=heads, head_dim=4, head_dim_v=head_dim_v).with_sink())


@pytest.mark.parametrize("sink_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_of_sinks(dtype: torch.dtype, sink_dtype: torch.dtype | None) -> None:
    problem = Problem.random(named_masks(200)["holes"], dtype=dtype, head_dim=32).with_sink(sink_dtype)
    results = run_engine(ENGINE, problem)
    check_bound(results, problem, run_dense(problem, dtype))
    assert results[5].dtype == (sink_dtype or dtype)


def test_a_query_that_attends_nothing_has_its_sink() -> None:
    problem = Problem.random(AttnMask.from_slices([], [], "full", 5, 7)).with_sink()
    out, lse, dq, dk, dv, dsink, max_logits = run_engine(ENGINE, problem)
    assert torch.equal(lse, problem.sink[:, None].expand(4, 5)) and torch.isneginf(max_logits).all()
    torch.testing.assert_close(dsink, problem.dlse.sum(1), rtol=1e-14, atol=0)
    assert not any(x.any() for x in (out, dq, dk, dv))


def test_sinks_far_below_and_above_all_scores() -> None:
    problem = Problem.random(named_masks(60)["holes"]).with_sink()
    problem.sink.copy_(torch.tensor([-800.0, -40.0, 40.0, 800.0]))
    check_fp64(problem)


def test_a_sink_of_minus_infinity_is_none() -> None:
    problem = Problem.random(named_masks(60)["holes"]).with_sink()
    problem.sink.fill_(-torch.inf)
    out, lse, dq, dk, dv, dsink, _ = run_engine(ENGINE, problem)
    problem.sink = None
    for actual, expected in zip((out, lse, dq, dk, dv), run_engine(ENGINE, problem), strict=False):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not dsink.any()


@pytest.mark.parametrize("head_dim_v", [8, 5, 12])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", [[115], [0, 70, 71]])
@pytest.mark.parametrize("name", ["varlen causal", "holes", "prefix tree"])
def test_parts_of_the_keys(name: str, bounds: list[int], sink: bool, head_dim_v: int) -> None:
    problem = Problem.random(named_masks(230)[name], head_dim_v=head_dim_v)
    problem = problem.with_sink() if sink else problem
    for actual, expected in zip(run_in_parts(ENGINE, problem, bounds), run_dense(problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_merging_with_nothing_is_exact() -> None:
    out, lse = torch.randn(3, 1, 2), torch.tensor([[0.5, -torch.inf, 2.0]])
    out[1] = 0
    merged, merged_lse = out.clone(), lse.clone()
    merge_states(merged, merged_lse, torch.zeros(3, 1, 2), torch.full((1, 3), -torch.inf))
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = torch.zeros(3, 1, 2), torch.full((1, 3), -torch.inf)
    merge_states(merged, merged_lse, out, lse)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_rows_that_attend_nothing_ignore_their_gradient() -> None:
    mask = AttnMask.from_slices([(2, 4)], [(0, 3)], "full", 6, 5)
    problem = Problem.random(mask)
    problem.dout[0], problem.dlse[:, 5] = torch.nan, torch.inf
    out, lse, dq, dk, dv = run_engine(ENGINE, problem)
    assert (out[[0, 1, 4, 5]] == 0).all() and torch.isneginf(lse[:, [0, 1, 4, 5]]).all()
    assert all(torch.isfinite(grad).all() for grad in (dq, dk, dv))
    assert (dq[[0, 1, 4, 5]] == 0).all() and (dk[3:] == 0).all() and (dv[3:] == 0).all()


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_tiny_shapes(rows: int, keys: int) -> None:
    mask = AttnMask.from_slices([(0, rows)], [(0, keys)], "full", rows, keys)
    for head_dim_v in (8, 3):
        check_fp64(Problem.random(mask, head_dim_v=head_dim_v))


@pytest.mark.parametrize("edge", [reference.BLOCK_Q, reference.BLOCK_K])
def test_lengths_around_tile_edges(edge: int) -> None:
    for length in (edge - 1, edge, edge + 1):
        check_fp64(Problem.random(builders.causal(length), heads=(2, 1), head_dim=4))


def test_large_scores_do_not_overflow() -> None:
    problem = Problem.random(builders.causal(64))
    problem.q *= 1e4
    assert all(torch.isfinite(x).all() for x in run_engine(ENGINE, problem))


MEMORY_PROGRAM = """
import resource, torch
from magi_attention.kernels import reference
from magi_attention.kernels.params import AttnParams
from magi_attention.mask import builders
torch.set_num_threads(1)
q = torch.randn(32768, 1, 16)
schedule = reference.schedule(builders.sliding_window(32768, (255, 0)).bands, 32768, 32768)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, lse, *_ = reference.forward(q, q, q, schedule, AttnParams(0.25))
grads = reference.start_backward(out, out, lse, None, AttnParams(0.25), 16)
reference.backward(grads, q, q, q, schedule, AttnParams(0.25))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear() -> None:
    """32,768 tokens in a narrow window: one byte a cell of the whole matrix would be a GiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 * 1024, "KiB"


def test_result_types() -> None:
    """They are what the accumulation type gives, rounded once."""
    problem = Problem.random(builders.causal(40), dtype=torch.bfloat16)
    q, k, v, params = problem.q, problem.k, problem.v, problem.params
    schedule = ENGINE.schedule(problem.mask.bands, 40, 40)
    wide, wide_lse, *_ = ENGINE.forward(q.float(), k.float(), v.float(), schedule, params)
    narrow, lse, *_ = ENGINE.forward(q, k, v, schedule, params)
    assert wide.dtype == lse.dtype == torch.float32
    assert torch.equal(narrow, wide.bfloat16()) and torch.equal(wide_lse, lse)
    grads = [ENGINE.start_backward(narrow, problem.dout, lse, problem.dlse, params, q.shape[2]) for _ in range(2)]
    wide_kv = ENGINE.backward(grads[0], q, k, v, schedule, params)
    narrow_kv = ENGINE.backward(grads[1], q, k, v, schedule, params, torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(wide_kv, narrow_kv, strict=True))
    dq = ENGINE.finish_backward(grads[0], params, torch.float32)
    assert torch.equal(ENGINE.finish_backward(grads[1], params, torch.bfloat16), dq.bfloat16())


@pytest.mark.parametrize("name", ["dout", "dlse"])
def test_a_gradient_that_is_not_there_is_zero(name: str) -> None:
    problem = Problem.random(named_masks(50)["holes"])
    setattr(problem, name, torch.zeros_like(getattr(problem, name)))
    expected = run_engine(ENGINE, problem)
    setattr(problem, name, None)
    assert all(torch.equal(a, b) for a, b in zip(run_engine(ENGINE, problem), expected, strict=True))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(softmax_scale=0.0), ValueError),
        (dict(softmax_scale=float("nan")), ValueError),
        (dict(softmax_scale="1"), TypeError),
        (dict(softmax_scale=1.0, softcap=-1.0), ValueError),
        (dict(softmax_scale=1.0, softcap=True), TypeError),
        (dict(softmax_scale=1.0, deterministic=1), TypeError),
        (dict(softmax_scale=1.0, return_max_logits=None), TypeError),
        (dict(softmax_scale=1.0, sm_margin=-1), ValueError),
        (dict(softmax_scale=1.0, sm_margin=0.5), TypeError),
    ],
)
def test_bad_parameters(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=list(options)[-1]):
        AttnParams(**options)
