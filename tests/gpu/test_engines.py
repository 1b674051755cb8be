"""Every engine on a GPU against dense float64 attention, to the derived bound, forward and backward.

What kernels are compiled for (type, head_dim, heads, softcap, how many intervals a row has) is varied in few tests;
most use the same.
"""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels.engine import Engine
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.error_bound import assert_close_to_oracle
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from ..kernels.attention import Problem, check_bound, run_dense, run_engine, run_in_parts
from .waiting import no_wait_for_the_device

NAMED = sorted(named_masks(64))


def problem_on_gpu(
    engine: Engine,
    mask: AttnMask,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0,
    head_dim_v: int | None = None,
) -> Problem:
    """Numbers that every type holds; the test is skipped where the engine does not take them."""
    reason = engine.refusal(torch.device("cuda", 0), dtype, head_dim, head_dim if head_dim_v is None else head_dim_v)
    if reason is not None:
        pytest.skip(f"{engine.name} {reason}")
    problem = Problem.random(mask, torch.bfloat16, heads, head_dim, softcap, device="cuda", head_dim_v=head_dim_v)
    return problem.cast(dtype)


@pytest.mark.parametrize("seqlen", [300, 1024])
@pytest.mark.parametrize("name", NAMED)
def test_named_masks(engine: Engine, name: str, seqlen: int) -> None:
    problem = problem_on_gpu(engine, named_masks(seqlen)[name], heads=(8, 1), head_dim=128)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads"),
    [
        (torch.bfloat16, 64, (8, 8)),
        (torch.float16, 64, (8, 1)),
        (torch.float16, 128, (6, 2)),
        (torch.bfloat16, 128, (8, 8)),
        (torch.bfloat16, 96, (6, 2)),
        (torch.bfloat16, 192, (8, 1)),
        (torch.float16, 136, (3, 3)),
        (torch.float16, 256, (6, 2)),
        (torch.bfloat16, 256, (3, 1)),
        (torch.float32, 64, (6, 2)),
    ],
)
def test_types_and_shapes(engine: Engine, dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    problem = problem_on_gpu(engine, named_masks(1024)["varlen sliding window causal"], heads, head_dim, dtype)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize(
    ("name", "head_dim", "heads"),
    [
        ("varlen sliding window causal", 64, (24, 4)),
        ("varlen sliding window causal", 128, (32, 4)),
        ("varlen sliding window causal", 256, (12, 2)),
        ("varlen sliding window causal", 256, (16, 2)),
        ("full", 128, (24, 4)),
    ],
)
def test_more_heads_than_the_cache_holds(engine: Engine, name: str, head_dim: int, heads: tuple[int, int]) -> None:
    """On 132 multiprocessors hopper's backward pass walks these group after group, of unequal numbers of heads, in
    items of some of the heads that share a key head, or of pieces of windows."""
    problem = problem_on_gpu(engine, named_masks(1536)[name], heads, head_dim)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("name", ["varlen causal", "several intervals a row"])
def test_softcap(engine: Engine, name: str, head_dim: int) -> None:
    problem = problem_on_gpu(engine, named_masks(1024)[name], head_dim=head_dim, softcap=0.8)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "several intervals a row", "holes", "nothing"])
def test_sinks_and_highest_scores(engine: Engine, name: str, softcap: float) -> None:
    problem = problem_on_gpu(engine, named_masks(1024)[name], softcap=softcap).with_sink(torch.float32)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads"),
    [
        (torch.bfloat16, 128, (8, 1)),
        (torch.float16, 96, (3, 3)),
        (torch.bfloat16, 256, (6, 2)),
        (torch.float32, 64, (6, 2)),
    ],
)
def test_a_sink_or_highest_scores_alone(
    engine: Engine, dtype: torch.dtype, head_dim: int, heads: tuple[int, int]
) -> None:
    problem = problem_on_gpu(engine, named_masks(1024)["varlen sliding window causal"], heads, head_dim, dtype)
    both = problem.with_sink()
    for alone in (replace(problem, sink=both.sink), replace(problem, params=both.params)):
        # There are few gradients of sinks and few highest scores: float32 can be exact by chance.
        check_bound(run_engine(engine, alone), alone, run_dense(alone, torch.bfloat16))


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0)])
def test_sinks_without_rows_or_keys(engine: Engine, rows: int, keys: int) -> None:
    problem = problem_on_gpu(engine, AttnMask.from_slices([], [], "full", rows, keys)).with_sink()
    check_bound(run_engine(engine, problem), problem)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_generated_masks(engine: Engine, data: st.DataObject) -> None:
    problem = problem_on_gpu(engine, data.draw(masks(160)))
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("edge", [64, 128, 256])
@pytest.mark.parametrize("more_keys", [0, 5])
def test_lengths_around_tile_edges(engine: Engine, edge: int, more_keys: int) -> None:
    for rows in range(edge - 3, edge + 4):
        keys = rows + more_keys
        mask = AttnMask.from_slices([(0, rows)], [(0, keys)], "causal", rows, keys)
        problem = problem_on_gpu(engine, mask)
        check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 700), (700, 1)])
def test_few_rows_or_keys(engine: Engine, rows: int, keys: int) -> None:
    problem = problem_on_gpu(engine, AttnMask.from_slices([(0, rows)], [(0, keys)], "full", rows, keys))
    check_bound(run_engine(engine, problem), problem)


def test_documents_of_length_one(engine: Engine) -> None:
    problem = problem_on_gpu(engine, builders.varlen(list(range(301))))
    results = run_engine(engine, problem)
    check_bound(results, problem)
    assert torch.equal(results[0], problem.v.repeat_interleave(3, dim=1)), "attention to one key is its value"


def run_document_by_document(problem: Problem, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """``NAMES`` by the plain formula, all causal documents of one length at a time."""
    results = [torch.empty_like(x, dtype=dtype) for x in (problem.q, problem.dlse, problem.q, problem.k, problem.v)]
    results[1] = results[1].to(torch.promote_types(dtype, torch.float32))
    starts = torch.tensor([0, *accumulate(lengths)][:-1])
    for length in sorted(set(lengths)):
        rows = (starts[torch.tensor(lengths) == length][:, None] + torch.arange(length)).to(problem.q.device)
        q, k, v = (x[rows].to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
        group = q.shape[2] // k.shape[2]
        wide_k, wide_v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        scores = torch.einsum("nqhd,nkhd->nhqk", q, wide_k) * problem.params.softmax_scale
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
        out = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(3), wide_v)
        lse = scores.to(results[1].dtype).logsumexp(3)
        dlse = problem.dlse[:, rows].transpose(0, 1)
        grads = torch.autograd.grad((out, lse), (q, k, v), (problem.dout[rows].to(dtype), dlse.to(lse.dtype)))
        results[1][:, rows] = lse.detach().transpose(0, 1)
        for n, part in ((0, out.detach()), (2, grads[0]), (3, grads[1]), (4, grads[2])):
            results[n][rows] = part
    return results


def test_ten_thousand_tiny_documents(engine: Engine) -> None:
    lengths = [1 + n % 5 for n in range(10_000)]
    mask = builders.varlen([0, *accumulate(lengths)], causal=True)
    problem = problem_on_gpu(engine, mask)
    exact, plain = (run_document_by_document(problem, lengths, dtype) for dtype in (torch.float64, torch.bfloat16))
    for actual, oracle, low in zip(run_engine(engine, problem), exact, plain, strict=True):
        assert_close_to_oracle(actual, oracle, low)


def test_the_two_oracles_agree() -> None:
    lengths = [1 + n % 5 for n in range(50)]
    problem = Problem.random(builders.varlen([0, *accumulate(lengths)], causal=True), device="cuda")
    for a, b in zip(run_document_by_document(problem, lengths, torch.float64), run_dense(problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_more_elements_than_31_bits_count(engine: Engine) -> None:
    """The last of many documents, against itself alone."""
    if engine.name == "reference":
        pytest.skip("plain torch counts in 64 bits")
    length, heads, head_dim = 64, (64, 1), 128
    num_tokens = length * (2**31 // (length * heads[0] * head_dim) + 1)
    mask = builders.varlen(list(range(0, num_tokens + 1, length)), causal=True)
    small = problem_on_gpu(engine, builders.varlen([0, length], causal=True), heads, head_dim)

    def behind_zeros(x: Tensor, dim: int = 0) -> Tensor:
        large = x.new_zeros([num_tokens if n == dim else size for n, size in enumerate(x.shape)])
        large.narrow(dim, num_tokens - length, length).copy_(x)
        return large

    large = replace(small, mask=mask, **{x: behind_zeros(getattr(small, x)) for x in ("q", "k", "v", "dout")})
    large.dlse = behind_zeros(small.dlse, 1)
    assert large.q.numel() > 2**31
    results = run_engine(engine, large)
    check_bound([x.narrow(int(n == 1), num_tokens - length, length) for n, x in enumerate(results)], small)


def test_any_strides(engine: Engine) -> None:
    """The last dimension is not contiguous, then the first is the fastest but one, then there is padding."""
    problem = problem_on_gpu(engine, builders.causal(300))

    def padded(x: Tensor) -> Tensor:
        wide = x.new_full((x.shape[0] + 64, x.shape[1] + 2, x.shape[2] + 16), torch.nan)
        return wide[32:-32, 1:-1, : x.shape[2]].copy_(x)

    for layout in (
        lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        padded,
    ):
        moved = replace(problem, **{name: layout(getattr(problem, name)) for name in ("q", "k", "v", "dout")})
        moved.dlse = problem.dlse.T.contiguous().T
        assert not moved.q.is_contiguous()
        check_bound(run_engine(engine, moved), problem)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", [[300], [0, 64, 700]])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "several intervals a row", "holes"])
def test_parts_of_the_keys(engine: Engine, name: str, bounds: list[int], sink: bool) -> None:
    problem = problem_on_gpu(engine, named_masks(1024)[name])
    problem = problem.with_sink() if sink else problem
    check_bound(run_in_parts(engine, problem, bounds), problem)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bounds", [[300], [200, 300, 300], [300, 700]])
def test_queries_that_wait_for_a_later_part(engine: Engine, bounds: list[int], head_dim: int) -> None:
    """Documents of which some are in later parts only, and rows that attend nothing."""
    mask = AttnMask.from_slices([(0, 300), (350, 900)], [(0, 300), (300, 800)], "causal", 1000, 800)
    problem = problem_on_gpu(engine, mask, head_dim=head_dim)
    problem = replace(problem, params=replace(problem.params, return_max_logits=True))
    check_bound(run_in_parts(engine, problem, bounds), problem)


@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("name", ["full", "varlen causal", "several intervals a row", "holes"])
def test_large_head_dims(engine: Engine, name: str, head_dim: int, heads: tuple[int, int]) -> None:
    problem = problem_on_gpu(engine, named_masks(1024)[name], heads, head_dim).with_sink()
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [0, 64, 700]), problem)


@pytest.mark.parametrize("heads", [(8, 8), (6, 2)])
@pytest.mark.parametrize("name", ["full", "varlen causal", "several intervals a row", "holes"])
def test_values_of_another_head_dim(engine: Engine, name: str, heads: tuple[int, int]) -> None:
    """As in multi-head latent attention."""
    problem = problem_on_gpu(engine, named_masks(1024)[name], heads, 192, head_dim_v=128).with_sink()
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [0, 64, 700]), problem)


@pytest.mark.parametrize("head_dims", [(64, 128), (128, 64), (128, 192), (256, 128), (64, 256), (256, 192)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_other_values_of_another_head_dim(engine: Engine, head_dims: tuple[int, int], deterministic: bool) -> None:
    mask, (head_dim, head_dim_v) = named_masks(1024)["several intervals a row"], head_dims
    problem = problem_on_gpu(engine, mask, (6, 2), head_dim, torch.float16, 0.8, head_dim_v)
    problem.params = replace(problem.params, deterministic=deterministic, sm_margin=0 if deterministic else 100)
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [0, 64, 700]), problem)


def test_what_rows_that_attend_nothing_hold_does_not_matter(engine: Engine) -> None:
    mask = AttnMask.from_slices([(3, 140), (150, 260)], [(0, 130), (20, 160)], ["causal", "full"], 300, 160)
    problem = problem_on_gpu(engine, mask)
    empty = ~torch.from_numpy(mask.to_dense()).any(1).cuda()
    poisoned = replace(
        problem,
        dout=problem.dout.masked_fill(empty[:, None, None], 1000.0),
        dlse=problem.dlse.masked_fill(empty, torch.nan),
    )
    for results in (run_engine(engine, poisoned), run_in_parts(engine, poisoned, [100])):
        check_bound(results, problem)
        assert not results[0][empty].any() and not results[2][empty].any()


@pytest.mark.parametrize("name", ["dout", "dlse"])
def test_a_gradient_that_is_not_there_is_zero(engine: Engine, name: str) -> None:
    problem = problem_on_gpu(engine, builders.causal(300))
    without = replace(problem, **{name: None})
    setattr(problem, name, torch.zeros_like(getattr(problem, name)))
    check_bound(run_engine(engine, without), problem)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_deterministic_results_repeat_bit_by_bit(engine: Engine, head_dim: int) -> None:
    problem = problem_on_gpu(engine, named_masks(1024)["varlen causal"], heads=(8, 1), head_dim=head_dim).with_sink()
    problem.params = replace(problem.params, deterministic=True)
    first, *others = (run_engine(engine, problem) for _ in range(5))
    check_bound(first, problem)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_some_multiprocessors_left_to_others(engine: Engine, head_dim: int) -> None:
    problem = problem_on_gpu(engine, builders.causal(1024), head_dim=head_dim)
    problem.params = replace(problem.params, sm_margin=100)
    check_bound(run_engine(engine, problem), problem)


def test_programs_that_take_several_short_windows(engine: Engine) -> None:
    problem = problem_on_gpu(engine, builders.varlen(range(0, 2041, 60), causal=True), heads=(64, 32))
    problem.params = replace(problem.params, yields=True)
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [1000]), problem)


def functional(problem: Problem, engine: Engine, ranges: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """All of ``NAMES`` by the public function."""
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.sink)]
    (q, k, v, sink), (q_ranges, k_ranges, types) = leaves, ranges
    out, lse, max_logits = flex_flash_attn_func(
        q, k, v, q_ranges, k_ranges, attn_type_map=types, engine=engine.name, sink=sink, return_max_logits=True
    )
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (problem.dout, problem.dlse)), max_logits]


def ranges_of(mask: AttnMask) -> tuple[Tensor, Tensor, Tensor]:
    q_ranges, k_ranges, types = mask.to_ranges()
    codes = torch.tensor([t.to_int_type() for t in types], dtype=torch.int32)
    return q_ranges.to_tensor().cuda(), k_ranges.to_tensor().cuda(), codes.cuda()


def test_no_host_synchronisation_in_the_steady_state(engine: Engine) -> None:
    if engine.name == "reference":
        pytest.skip("it copies its tables at every call, which waits: it is no engine to train with on a GPU")
    problem = problem_on_gpu(engine, named_masks(1024)["varlen causal"]).with_sink(torch.float32)
    ranges = ranges_of(problem.mask)
    functional(problem, engine, ranges)
    with no_wait_for_the_device():
        results = functional(problem, engine, ranges)
    check_bound([x.detach() for x in results], problem)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own use
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch starts with one
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(engine: Engine, mode: str) -> None:
    """Each call has another mask, also where the rest of the graph is a CUDA graph."""
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, q_ranges: Tensor, k_ranges: Tensor, types: Tensor) -> list[Tensor]:
        out, lse = flex_flash_attn_func(q * 1, k, v, q_ranges, k_ranges, attn_type_map=types, engine=engine.name)
        return [out * 1, lse * 1]

    compiled = torch.compile(attend, fullgraph=True, mode=mode)
    for step in range(4):
        documents = [0, 100 + step, 300]
        problem = problem_on_gpu(engine, builders.varlen(documents, causal=True))
        leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out, lse = compiled(*leaves, *ranges_of(problem.mask))
        grads = torch.autograd.grad((out, lse), leaves, (problem.dout, problem.dlse))
        check_bound([out.detach().clone(), lse.detach().clone(), *grads], problem)
