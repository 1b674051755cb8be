"""The triton engine against dense float64 attention, under Triton's interpreter: nothing runs on a GPU here."""

import pickle
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels import reference
from magi_attention.kernels.merge import compute_delta, merge_states
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.triton import schedule
from magi_attention.kernels.triton.triton_schedule import Walk
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import K0, crop, shift
from magi_attention.testing.dense_oracle import dense_attention
from magi_attention.testing.error_bound import assert_close_to_oracle
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks
from tests.kernels.triton_interpreter import Interpreter, Tensors, interpreter

pytest.importorskip("triton")

CPU = torch.device("cpu")


class Problem(NamedTuple):
    """Random inputs of one attention, forward and backward."""

    mask: AttnMask
    params: AttnParams
    qkv: Tensors
    dout: torch.Tensor
    dlse: torch.Tensor


def make_problem(
    mask: AttnMask, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, softcap: float = 0.0
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        # Values that every type holds, so that a problem can be cast.
        return torch.randn(shape, generator=generator).bfloat16().to(dtype)

    heads_q, heads_kv = heads
    rows, keys = mask.total_seqlen_q, mask.total_seqlen_k
    q, k, v = draw(rows, heads_q, head_dim), draw(keys, heads_kv, head_dim), draw(keys, heads_kv, head_dim)
    dlse = draw(heads_q, rows).float()
    return Problem(mask, AttnParams(head_dim**-0.5, softcap), (q, k, v), draw(rows, heads_q, head_dim), dlse)


def dense_results(problem: Problem, dtype: torch.dtype) -> Tensors:
    """``out``, ``lse``, ``dq``, ``dk`` and ``dv`` by the plain formula in ``dtype``."""
    qkv = [x.to(dtype).requires_grad_() for x in problem.qkv]
    params = problem.params
    out, lse = dense_attention(*qkv, problem.mask.to_dense(), params.softmax_scale, params.softcap)
    grads = torch.autograd.grad((out, lse), qkv, (problem.dout.to(dtype), problem.dlse.to(lse.dtype)))
    return out.detach(), lse.detach(), *grads


def engine_results(run: Interpreter, problem: Problem, far: bool = False) -> Tensors:
    mask, params, qkv, dout, dlse = problem
    tiles = schedule(mask.bands, mask.total_seqlen_q, mask.total_seqlen_k)
    out, lse = run.forward(qkv, tiles, params, far)
    assert out.dtype == lse.dtype == torch.float32
    delta = compute_delta(out.to(dout.dtype), dout, dlse)
    grads = run.backward(dout, qkv, lse, delta, tiles, params, far)
    assert all(grad.dtype == torch.float32 for grad in grads)
    return out, lse, *grads


def reference_results(problem: Problem) -> Tensors:
    mask, params, qkv, dout, dlse = problem
    tiles = reference.schedule(mask.bands, mask.total_seqlen_q, mask.total_seqlen_k)
    out, lse = reference.forward(*qkv, tiles, params)
    return out, lse, *reference.backward(dout, *qkv, lse, compute_delta(out, dout, dlse), tiles, params)


def check(results: Tensors, problem: Problem, plain_dtype: torch.dtype | None = None) -> None:
    """Hold results to the derived bound; rounded to the type of the inputs, as users get them.

    In float32 the plain formula is that of the reference engine: it too has no more than a rounded log-sum-exp to make
    the probabilities of the backward pass from, and that is most of the error.
    """
    dtype = problem.dout.dtype
    oracle = dense_results(problem, torch.float64)
    plain_dtype = plain_dtype or dtype
    plain = reference_results(problem) if plain_dtype == torch.float32 else dense_results(problem, plain_dtype)
    for actual, expected, low in zip(results, oracle, plain, strict=True):
        rounded = actual if actual is results[1] else actual.to(dtype)
        assert_close_to_oracle(rounded, expected, low)


@pytest.fixture(scope="module")
def run() -> Iterator[Interpreter]:
    with interpreter() as process:
        yield process


@pytest.mark.parametrize("name", sorted(named_masks(8)))
def test_named_masks_in_float32(run: Interpreter, name: str) -> None:
    problem = make_problem(named_masks(75)[name], (4, 2), 16, torch.float32)
    check(engine_results(run, problem), problem)


@settings(max_examples=25, deadline=None)
@given(mask=masks(56))
def test_generated_masks(run: Interpreter, mask: AttnMask) -> None:
    # Tiles of float32 are the smallest. Where few cells are attended the plain formula in float32 can be exact by
    # chance, so that of bfloat16 is the measure here.
    problem = make_problem(mask, (2, 1), 16, torch.float32)
    check(engine_results(run, problem), problem, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.bfloat16, 64),
        (torch.float16, 96),
        (torch.bfloat16, 128),
        (torch.bfloat16, 192),
        (torch.float16, 256),
        (torch.float32, 40),
        (torch.float32, 96),
    ],
)
def test_dtypes_and_head_dims(run: Interpreter, dtype: torch.dtype, head_dim: int) -> None:
    problem = make_problem(builders.sliding_window([0, 1, 40, 170], (90, 0)), (2, 1), head_dim, dtype)
    check(engine_results(run, problem), problem)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 1), (12, 2), (9, 1), (17, 1)])
def test_grouped_heads(run: Interpreter, heads: tuple[int, int]) -> None:
    problem = make_problem(builders.causal(41), heads, 16, torch.float32)
    check(engine_results(run, problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "several intervals a row"])
def test_softcap(run: Interpreter, name: str, dtype: torch.dtype) -> None:
    problem = make_problem(named_masks(75)[name], (2, 1), 32, dtype, softcap=0.8)
    check(engine_results(run, problem), problem)


@pytest.mark.parametrize("num_keys", [1, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("num_rows", [1, 31, 33, 64])
def test_lengths_around_tile_edges(run: Interpreter, num_rows: int, num_keys: int) -> None:
    mask = AttnMask.from_slices([(0, num_rows)], [(0, num_keys)], "causal", num_rows, num_keys)
    problem = make_problem(mask, (1, 1), 16, torch.float32)
    check(engine_results(run, problem), problem, torch.bfloat16)


@pytest.mark.parametrize("length", [127, 128, 129, 191, 193])
def test_lengths_around_large_tile_edges(run: Interpreter, length: int) -> None:
    problem = make_problem(builders.causal(length), (1, 1), 16, torch.float16)
    check(engine_results(run, problem), problem)


def test_documents_of_length_one(run: Interpreter) -> None:
    problem = make_problem(builders.varlen(list(range(71))), (2, 2), 16, torch.float32)
    results = engine_results(run, problem)
    check(results, problem, torch.bfloat16)
    assert torch.equal(results[0], problem.qkv[2]), "attention to one key is its value"


@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(run: Interpreter, num_rows: int, num_keys: int) -> None:
    problem = make_problem(AttnMask.from_slices([], [], "full", num_rows, num_keys), (2, 1), 16, torch.float32)
    out, lse, *grads = engine_results(run, problem)
    assert torch.equal(out, torch.zeros(num_rows, 2, 16))
    assert torch.equal(lse, torch.full((2, num_rows), -torch.inf))
    for grad, x in zip(grads, problem.qkv, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_what_rows_that_attend_nothing_hold_does_not_matter(run: Interpreter) -> None:
    mask = AttnMask.from_slices([(3, 40), (50, 60)], [(0, 30), (20, 60)], ["causal", "full"], 64, 60)
    problem = make_problem(mask, (2, 1), 16, torch.float32)
    tiles = schedule(mask.bands, 64, 60)
    out, lse = run.forward(problem.qkv, tiles, problem.params)
    delta = compute_delta(out, problem.dout, problem.dlse)
    expected = run.backward(problem.dout, problem.qkv, lse, delta, tiles, problem.params)
    empty = ~torch.from_numpy(mask.to_dense()).any(1)
    assert empty.any()
    dout = problem.dout.masked_fill(empty[:, None, None], torch.nan)
    actual = run.backward(dout, problem.qkv, lse, delta.masked_fill(empty, torch.nan), tiles, problem.params)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not actual[0][empty].any()


@pytest.mark.parametrize("name", ["causal", "sliding window", "several intervals a row"])
def test_stages_of_keys(run: Interpreter, name: str) -> None:
    """Each half of the keys by itself: states merged, and gradients from the log-sum-exp over all keys."""
    problem = make_problem(named_masks(75)[name], (4, 2), 16, torch.float32)
    q, *kv = problem.qkv
    stages = []
    for start, end in ((0, 29), (29, 75)):
        bands = crop(problem.mask.bands, np.array([start]), np.array([end]), K0)[0]
        tiles = schedule(shift(bands, 0, -start), 75, end - start)
        stages.append(((q, *(x[start:end] for x in kv)), tiles))
    (out, lse), part = (run.forward(qkv, tiles, problem.params) for qkv, tiles in stages)
    merge_states(out, lse, *part)
    delta = compute_delta(out, problem.dout, problem.dlse)
    first, second = (run.backward(problem.dout, qkv, lse, delta, tiles, problem.params) for qkv, tiles in stages)
    keys = (torch.cat(pair) for pair in zip(first[1:], second[1:], strict=True))
    check((out, lse, first[0] + second[0], *keys), problem)


def test_strides(run: Interpreter) -> None:
    problem = make_problem(builders.causal(45), (4, 2), 16, torch.float32)
    transposed = problem._replace(
        qkv=tuple(x.movedim(2, 0).contiguous().movedim(0, 2) for x in problem.qkv),
        dout=problem.dout.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(x.is_contiguous() for x in (*transposed.qkv, transposed.dout))
    for a, b in zip(engine_results(run, problem), engine_results(run, transposed), strict=True):
        assert torch.equal(a, b)


def test_nothing_outside_the_tensors_is_read(run: Interpreter) -> None:
    def among_nan(x: torch.Tensor) -> torch.Tensor:
        wide = x.new_full((x.shape[0] + 64, x.shape[1] + 2, x.shape[2] + 16), torch.nan)
        inner = wide[32:-32, 1:-1, : x.shape[2]]
        return inner.copy_(x)

    problem = make_problem(builders.sliding_window([0, 7, 45], (20, 0)), (3, 1), 24, torch.float32)
    hedged = problem._replace(qkv=tuple(among_nan(x) for x in problem.qkv), dout=among_nan(problem.dout))
    for a, b in zip(engine_results(run, problem), engine_results(run, hedged), strict=True):
        assert torch.equal(a, b)


def test_more_than_2_to_31_elements(run: Interpreter) -> None:
    problem = make_problem(builders.causal(40), (2, 1), 256, torch.float16)
    for near, far in zip(engine_results(run, problem), engine_results(run, problem, far=True), strict=True):
        assert torch.equal(near, far)


def walked_cells(walk: Walk, num_cols: int, block_cols: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each cell is computed, and those of full tiles, when a walk is taken."""
    tiles, runs, starts, ends = (x.numpy() for x in walk[:4])
    computed, unmasked = (np.zeros((walk.num_rows, num_cols), np.int64) for _ in range(2))
    column = np.arange(num_cols)
    intervals = (column >= starts[:, :, None]) & (column < ends[:, :, None])
    for first, end, first_run, end_run, num_layers in tiles:
        for start, full_end, run_end in runs[first_run:end_run]:
            assert (full_end - start) % block_cols == 0
            assert start <= full_end <= run_end <= num_cols
            computed[first:end, start:full_end] += 1
            unmasked[first:end, start:full_end] += 1
            computed[first:end, full_end:run_end] += intervals[:num_layers, first:end, full_end:run_end].sum(0)
    return computed, unmasked


@settings(deadline=None)
@given(mask=masks(60), block_rows=st.integers(1, 20), block_cols=st.integers(1, 20))
def test_a_walk_computes_each_cell_once(mask: AttnMask, block_rows: int, block_cols: int) -> None:
    dense = mask.to_dense()
    tiles = schedule(mask.bands, *dense.shape)
    for walk, cells in (
        (tiles.by_queries(block_rows, block_cols, CPU), dense),
        (tiles.by_keys(block_rows, block_cols, CPU), dense.T),
    ):
        computed, unmasked = walked_cells(walk, cells.shape[1], block_cols)
        np.testing.assert_array_equal(computed, cells)
        rows = walk.tiles[:, :2].numpy()
        np.testing.assert_array_equal(np.sort(np.concatenate([np.arange(*r) for r in rows])), np.arange(len(cells)))
        assert (rows[:, 1] - rows[:, 0] <= block_rows).all()
        assert ((unmasked == 0) | cells).all()


def test_full_tiles_are_found_and_heavy_tiles_come_first() -> None:
    walk = schedule(builders.causal(64).bands, 64, 64).by_queries(16, 8, CPU)
    assert walk.tiles[:, 0].tolist() == [48, 32, 16, 0]
    assert walk.runs.tolist() == [[0, 0, 16], [0, 16, 32], [0, 32, 48], [0, 48, 64]]


def test_walks_are_kept_and_not_pickled() -> None:
    tiles = schedule(builders.causal(64).bands, 64, 64)
    size = len(pickle.dumps(tiles))
    walk = tiles.by_queries(16, 8, CPU)
    assert tiles.by_queries(16, 8, CPU) is walk
    assert len(pickle.dumps(tiles)) == size
    again = pickle.loads(pickle.dumps(tiles)).by_queries(16, 8, CPU)
    assert all(torch.equal(a, b) for a, b in zip(again[:4], walk[:4], strict=True))
