"""The triton engine against dense float64 attention, under Triton's interpreter: nothing runs on a GPU here."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels.engine import Engine
from magi_attention.kernels.parts import Part, State
from magi_attention.kernels.triton import schedule
from magi_attention.kernels.triton.tile_walk import TileWalk, make_tile_walk
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .attention import Problem, check_bound, run_dense, run_engine, run_in_parts
from .triton_interpreter import Interpreter, interpreter, run_far_apart

pytest.importorskip("triton")

CPU = torch.device("cpu")


def make_problem(
    mask: AttnMask,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    softcap: float = 0.0,
    head_dim_v: int | None = None,
) -> Problem:
    """Numbers that every type holds."""
    return Problem.random(mask, torch.bfloat16, heads, head_dim, softcap, head_dim_v=head_dim_v).cast(dtype)


def check(results: list[torch.Tensor], problem: Problem, plain_dtype: torch.dtype | None = None) -> None:
    check_bound(results, problem, run_dense(problem, plain_dtype) if plain_dtype else None)


@pytest.fixture(scope="module")
def run() -> Iterator[Interpreter]:
    with interpreter() as process:
        yield process


@pytest.mark.parametrize("name", sorted(named_masks(8)))
def test_named_masks_in_float32(run: Interpreter, name: str) -> None:
    problem = make_problem(named_masks(75)[name], (4, 2), 16, torch.float32)
    check(run.run(run_engine, problem), problem)


@settings(max_examples=25, deadline=None)
@given(mask=masks(56), head_dim_v=st.sampled_from([16, 8, 24]))
def test_generated_masks(run: Interpreter, mask: AttnMask, head_dim_v: int) -> None:
    # Tiles of float32 are the smallest. Where few cells are attended the plain formula in float32 can be exact by
    # chance, so that of bfloat16 is the measure here.
    problem = make_problem(mask, (2, 1), 16, torch.float32, head_dim_v=head_dim_v)
    check(run.run(run_engine, problem), problem, torch.bfloat16)


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
    check(run.run(run_engine, problem), problem)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "head_dim_v", "softcap"),
    [
        (torch.bfloat16, 192, 128, 0.0),
        (torch.float16, 72, 40, 0.8),
        (torch.bfloat16, 64, 128, 0.8),
        (torch.float32, 40, 72, 0.0),
        (torch.float32, 24, 8, 0.8),
    ],
)
def test_values_of_another_head_dim(
    run: Interpreter, dtype: torch.dtype, head_dim: int, head_dim_v: int, softcap: float
) -> None:
    mask = builders.sliding_window([0, 1, 40, 130], (70, 0))
    problem = make_problem(mask, (3, 1), head_dim, dtype, softcap, head_dim_v).with_sink(torch.float32)
    plain_dtype = torch.bfloat16 if dtype == torch.float32 else None
    check(run.run(run_engine, problem), problem, plain_dtype)
    check(run.run(run_in_parts, problem, [0, 64, 65]), problem, plain_dtype)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 1), (12, 2), (9, 1), (17, 1)])
def test_grouped_heads(run: Interpreter, heads: tuple[int, int]) -> None:
    problem = make_problem(builders.causal(41), heads, 16, torch.float32)
    check(run.run(run_engine, problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "several intervals a row"])
def test_softcap(run: Interpreter, name: str, dtype: torch.dtype) -> None:
    problem = make_problem(named_masks(75)[name], (2, 1), 32, dtype, softcap=0.8)
    check(run.run(run_engine, problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("name", ["causal", "several intervals a row", "holes", "nothing"])
def test_sinks_and_highest_scores(run: Interpreter, name: str, softcap: float, dtype: torch.dtype) -> None:
    problem = make_problem(named_masks(75)[name], (6, 2), 16, dtype, softcap).with_sink(torch.float32)
    check(run.run(run_engine, problem), problem, torch.bfloat16)


@pytest.mark.parametrize("heads", [(3, 1), (9, 1)])
def test_a_sink_or_highest_scores_alone(run: Interpreter, heads: tuple[int, int]) -> None:
    problem = make_problem(named_masks(75)["varlen causal"], heads, 16, torch.float32)
    both = problem.with_sink()
    for alone in (replace(problem, sink=both.sink), replace(problem, params=both.params)):
        check(run.run(run_engine, alone), alone, torch.bfloat16)


@pytest.mark.parametrize("num_keys", [1, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("num_rows", [1, 31, 33, 64])
def test_lengths_around_tile_edges(run: Interpreter, num_rows: int, num_keys: int) -> None:
    mask = AttnMask.from_slices([(0, num_rows)], [(0, num_keys)], "causal", num_rows, num_keys)
    problem = make_problem(mask, (1, 1), 16, torch.float32)
    check(run.run(run_engine, problem), problem, torch.bfloat16)


@pytest.mark.parametrize("length", [127, 128, 129, 191, 193])
def test_lengths_around_large_tile_edges(run: Interpreter, length: int) -> None:
    problem = make_problem(builders.causal(length), (1, 1), 16, torch.float16)
    check(run.run(run_engine, problem), problem)


def test_documents_of_length_one(run: Interpreter) -> None:
    problem = make_problem(builders.varlen(list(range(71))), (2, 2), 16, torch.float32)
    results = run.run(run_engine, problem)
    check(results, problem, torch.bfloat16)
    assert torch.equal(results[0], problem.v), "attention to one key is its value"


@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(run: Interpreter, num_rows: int, num_keys: int) -> None:
    problem = make_problem(AttnMask.from_slices([], [], "full", num_rows, num_keys), (2, 1), 16, torch.float32)
    out, lse, *grads = run.run(run_engine, problem)
    assert torch.equal(out, torch.zeros(num_rows, 2, 16))
    assert torch.equal(lse, torch.full((2, num_rows), -torch.inf))
    for grad, x in zip(grads, (problem.q, problem.k, problem.v), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_what_rows_that_attend_nothing_hold_does_not_matter(run: Interpreter) -> None:
    mask = AttnMask.from_slices([(3, 40), (50, 60)], [(0, 30), (20, 60)], ["causal", "full"], 64, 60)
    problem = make_problem(mask, (2, 1), 16, torch.float32)
    expected = run.run(run_engine, problem)
    empty = ~torch.from_numpy(mask.to_dense()).any(1)
    assert empty.any()
    problem.dout[empty], problem.dlse[:, empty] = torch.nan, torch.nan
    actual = run.run(run_engine, problem)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not actual[2][empty].any()


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", [[29], [0, 40, 41]])
@pytest.mark.parametrize("name", ["causal", "sliding window", "several intervals a row", "holes"])
def test_parts_of_the_keys(run: Interpreter, name: str, bounds: list[int], sink: bool) -> None:
    problem = make_problem(named_masks(75)[name], (4, 2), 16, torch.float32)
    problem = problem.with_sink() if sink else problem
    # There are few gradients of sinks, and the reference can be exact by chance.
    check(run.run(run_in_parts, problem, bounds), problem, torch.bfloat16 if sink else None)


def add_part_to(engine: Engine, problem: Problem, goes_on: torch.Tensor, state: State) -> State:
    part = Part(goes_on.numpy(), waits=np.zeros(len(problem.q), np.bool_))
    tiles = engine.schedule(problem.mask.bands, len(problem.q), len(problem.k), part)
    return engine.forward(problem.q, problem.k, problem.v, tiles, problem.params, state)


@pytest.mark.parametrize("is_last", [False, True])
def test_what_keys_add_nothing_to_is_kept_to_the_bit(run: Interpreter, is_last: bool) -> None:
    """Rows of a tile without keys, and rows without keys in a tile with some."""
    problem = make_problem(AttnMask.from_slices([(40, 50)], [(0, 30)], "full", 96, 30), (2, 1), 16, torch.float32)
    begun, sums = torch.randn(2, 96), torch.randn(96, 2, 16)
    begun[:, 45:60], sums[45:60] = -torch.inf, 0
    state = State(torch.zeros_like(sums), begun.clone(), sums.clone())
    out, lse, total, _ = run.run(add_part_to, problem, torch.full((96,), not is_last), state)
    alone, lse_alone = run.run(run_engine, problem)[:2]
    kept = torch.ones(96, dtype=torch.bool)
    kept[40:50] = False
    assert torch.equal(out, total if is_last else torch.zeros_like(sums))
    assert torch.equal(total[kept], sums[kept]) and torch.equal(lse[:, kept], begun[:, kept])
    assert torch.equal(total[45:50], alone[45:50]) and torch.equal(lse[:, 45:50], lse_alone[:, 45:50])
    weight = torch.sigmoid(lse_alone - begun)[:, 40:45].T.unsqueeze(2)
    torch.testing.assert_close(total[40:45], torch.lerp(sums[40:45], alone[40:45], weight))
    torch.testing.assert_close(lse[:, 40:45], torch.logaddexp(lse_alone, begun)[:, 40:45])


@pytest.mark.parametrize("name", ["dout", "dlse"])
def test_a_gradient_that_is_not_there_is_zero(run: Interpreter, name: str) -> None:
    problem = make_problem(builders.causal(70), (2, 1), 16, torch.float32)
    setattr(problem, name, torch.zeros_like(getattr(problem, name)))
    expected = run.run(run_engine, problem)
    setattr(problem, name, None)
    assert all(torch.equal(a, b) for a, b in zip(run.run(run_engine, problem), expected, strict=True))


def test_result_types(run: Interpreter) -> None:
    """What is asked for in bfloat16 is what float32 gives, rounded once."""
    problem = make_problem(builders.causal(40), (2, 1), 16, torch.bfloat16)
    narrow, wide = run.run(run_engine, problem), run.run(run_in_parts, problem, [])
    assert narrow[1].dtype == torch.float32
    assert all(x.dtype == torch.bfloat16 for n, x in enumerate(narrow) if n != 1)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_strides(run: Interpreter) -> None:
    problem = make_problem(builders.causal(45), (4, 2), 16, torch.float32)
    q, k, v = (x.movedim(2, 0).contiguous().movedim(0, 2) for x in (problem.q, problem.k, problem.v))
    dout = problem.dout.transpose(0, 1).contiguous().transpose(0, 1)
    transposed = replace(problem, q=q, k=k, v=v, dout=dout, dlse=problem.dlse.T.contiguous().T)
    assert not any(x.is_contiguous() for x in (q, k, v, dout, transposed.dlse))
    for a, b in zip(run.run(run_engine, problem), run.run(run_engine, transposed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head_dim_v", [24, 8])
def test_nothing_outside_the_tensors_is_read(run: Interpreter, head_dim_v: int) -> None:
    def among_nan(x: torch.Tensor) -> torch.Tensor:
        wide = x.new_full((x.shape[0] + 64, x.shape[1] + 2, x.shape[2] + 16), torch.nan)
        inner = wide[32:-32, 1:-1, : x.shape[2]]
        return inner.copy_(x)

    mask = builders.sliding_window([0, 7, 45], (20, 0))
    problem = make_problem(mask, (3, 1), 24, torch.float32, head_dim_v=head_dim_v)
    hedged = replace(problem, **{name: among_nan(getattr(problem, name)) for name in ("q", "k", "v", "dout")})
    for a, b in zip(run.run(run_engine, problem), run.run(run_engine, hedged), strict=True):
        assert torch.equal(a, b)


def test_more_than_2_to_31_elements(run: Interpreter) -> None:
    problem = make_problem(builders.causal(40), (2, 1), 256, torch.float16)
    for near, far in zip(run.run(run_engine, problem), run.run(run_far_apart, problem), strict=True):
        assert torch.equal(near, far)


def walked_cells(walk: TileWalk, num_cols: int, block_cols: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each cell is computed, and those of full tiles, when a walk is taken."""
    tiles, runs, starts, ends = (x.numpy() for x in walk.tables[:4])
    computed, unmasked = (np.zeros((walk.tables.num_rows, num_cols), np.int64) for _ in range(2))
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
        (tiles.by_queries(make_tile_walk, block_rows, block_cols, CPU), dense),
        (tiles.by_keys(make_tile_walk, block_rows, block_cols, CPU), dense.T),
    ):
        computed, unmasked = walked_cells(walk, cells.shape[1], block_cols)
        np.testing.assert_array_equal(computed, cells)
        rows, runs_of = walk.tables.tiles[:, :2].numpy(), walk.tables.tiles[:, 2:4].numpy()
        np.testing.assert_array_equal(runs_of[:, 0] < runs_of[:, 1], np.arange(walk.num_tiles) < walk.num_busy)
        np.testing.assert_array_equal(np.sort(np.concatenate([np.arange(*r) for r in rows])), np.arange(len(cells)))
        assert (rows[:, 1] - rows[:, 0] <= block_rows).all()
        assert ((unmasked == 0) | cells).all()
        wide = 2 * block_cols - 1  # wherever the cuts between blocks are, there is a whole block in so many columns
        for first, end in rows:
            for column in range(cells.shape[1] - wide + 1):
                window = slice(first, end), slice(column, column + wide)
                assert not cells[window].all() or unmasked[window].any(), "a full block is not found"


def test_full_tiles_are_found_and_heavy_tiles_come_first() -> None:
    walk = schedule(builders.causal(64).bands, 64, 64).by_queries(make_tile_walk, 16, 8, CPU)
    assert walk.tables.tiles[:, 0].tolist() == [48, 32, 16, 0]
    assert walk.tables.runs.tolist() == [[0, 0, 16], [0, 16, 32], [0, 32, 48], [0, 48, 64]]
