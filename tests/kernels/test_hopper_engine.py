"""The hopper engine against dense float64 attention, to the derived bound, on a CPU that emulates Gluon.

Each test has another seed for the choice of who goes on: a part of a program, a copy or a product.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.kernels import parts as parts_module
from magi_attention.kernels.hopper.backward_items import Items
from magi_attention.kernels.parts import Part, State, make_parts
from magi_attention.mask import AttnMask, builders
from magi_attention.mask.bands import relocate
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.strategies import masks

from .attention import Problem, check_bound, run_engine, run_in_parts
from .gluon_emulator import EmulatedEngine

SEVERAL = "several intervals a row"


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> EmulatedEngine:
    """With few multiprocessors, so that programs take several items."""
    return EmulatedEngine(zlib.crc32(request.node.name.encode()), num_multiprocessors=3)


def make_problem(
    mask: AttnMask,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0,
    head_dim_v: int | None = None,
) -> Problem:
    """Numbers that both types hold."""
    return Problem.random(mask, torch.bfloat16, heads, head_dim, softcap, head_dim_v=head_dim_v).cast(dtype)


def documents(lengths: list[int], causal: bool = False) -> AttnMask:
    return builders.varlen([0, *accumulate(lengths)], causal=causal)


@pytest.mark.parametrize("name", sorted(named_masks(64)))
def test_named_masks(engine: EmulatedEngine, name: str) -> None:
    problem = make_problem(named_masks(200)[name])
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("head_dim", [128, 192, 256])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "block causal window", SEVERAL])
def test_many_tiles(engine: EmulatedEngine, name: str, head_dim: int) -> None:
    problem = make_problem(named_masks(440)[name], heads=(2, 1), head_dim=head_dim)
    check_bound(run_engine(engine, problem), problem)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    mask=masks(160),
    heads=st.sampled_from([(2, 1), (1, 1)]),
    head_dims=st.sampled_from([(64, 64), (128, 128), (192, 192), (256, 256), (192, 128), (64, 128)]),
)
def test_generated_masks(seed: int, mask: AttnMask, heads: tuple[int, int], head_dims: tuple[int, int]) -> None:
    problem = make_problem(mask, heads, head_dims[0], head_dim_v=head_dims[1])
    check_bound(run_engine(EmulatedEngine(seed, 2), problem), problem)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads"),
    [
        (torch.bfloat16, 64, (2, 2)),
        (torch.bfloat16, 64, (3, 1)),
        (torch.bfloat16, 128, (2, 2)),
        (torch.bfloat16, 128, (3, 1)),
        (torch.float16, 128, (4, 2)),
        (torch.bfloat16, 96, (4, 2)),
        (torch.float16, 96, (3, 1)),
        (torch.bfloat16, 40, (4, 1)),
    ],
)
def test_types_and_shapes(engine: EmulatedEngine, dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    problem = make_problem(named_masks(260)["varlen sliding window causal"], heads, head_dim, dtype)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("heads", [(2, 1), (1, 1)])
@pytest.mark.parametrize("name", ["varlen causal", SEVERAL])
def test_softcap(engine: EmulatedEngine, name: str, heads: tuple[int, int]) -> None:
    problem = make_problem(named_masks(260)[name], heads, softcap=0.8)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("name", ["varlen causal", SEVERAL, "holes", "nothing"])
def test_sinks_and_highest_scores(engine: EmulatedEngine, name: str, heads: tuple[int, int], softcap: float) -> None:
    problem = make_problem(named_masks(260)[name], heads, softcap=softcap).with_sink(torch.float32)
    check_bound(run_engine(engine, problem), problem)


def test_a_sink_or_highest_scores_alone(engine: EmulatedEngine) -> None:
    problem = make_problem(named_masks(260)["varlen causal"], (3, 1), 128)
    both = problem.with_sink()
    for alone in (replace(problem, sink=both.sink), replace(problem, params=both.params)):
        check_bound(run_engine(engine, alone), alone)


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0)])
def test_sinks_without_rows_or_keys(engine: EmulatedEngine, rows: int, keys: int) -> None:
    problem = make_problem(AttnMask.from_slices([], [], "full", rows, keys)).with_sink()
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("heads", [(2, 1), (1, 1)])
@pytest.mark.parametrize("rows", [61, 63, 64, 65, 127, 129, 130])
def test_lengths_around_tile_edges(engine: EmulatedEngine, rows: int, heads: tuple[int, int]) -> None:
    mask = AttnMask.from_slices([(0, rows)], [(0, rows + 2)], "causal", rows, rows + 2)
    problem = make_problem(mask, heads)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1)])
def test_few_rows_or_keys(engine: EmulatedEngine, rows: int, keys: int) -> None:
    problem = make_problem(AttnMask.from_slices([(0, rows)], [(0, keys)], "full", rows, keys))
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("heads", [(2, 1), (1, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_documents_around_tile_edges(engine: EmulatedEngine, heads: tuple[int, int], head_dim: int) -> None:
    problem = make_problem(documents([63, 127, 1, 64, 128, 65], causal=True), heads, head_dim)
    check_bound(run_engine(engine, problem), problem)


def test_documents_of_length_one(engine: EmulatedEngine) -> None:
    problem = make_problem(documents([1] * 140), (2, 2))
    results = run_engine(engine, problem)
    check_bound(results, problem)
    assert torch.equal(results[0], problem.v), "attention to one key is its value"


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", [[100], [0, 64, 190]])
@pytest.mark.parametrize("name", ["causal", SEVERAL, "holes"])
def test_parts_of_the_keys(engine: EmulatedEngine, name: str, bounds: list[int], sink: bool) -> None:
    problem = make_problem(named_masks(230)[name], head_dim=64 if name == "causal" else 128)
    problem = problem.with_sink() if sink else problem
    check_bound(run_in_parts(engine, problem, bounds), problem)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", [[90], [40, 90, 90], [90, 150]])
def test_queries_that_wait_for_a_later_part(engine: EmulatedEngine, bounds: list[int], sink: bool) -> None:
    """Documents of which some are in later parts only, and rows that attend nothing."""
    mask = AttnMask.from_slices([(0, 90), (100, 230)], [(0, 90), (90, 200)], "causal", 240, 200)
    problem = make_problem(mask)
    problem = replace(problem, params=replace(problem.params, return_max_logits=True))
    problem = problem.with_sink() if sink else problem
    check_bound(run_in_parts(engine, problem, bounds), problem)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("name", ["documents", "between others", "holes"])
def test_parts_that_are_apart_in_any_order(
    engine: EmulatedEngine, name: str, sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes its own queries and no other, whichever comes first."""
    slices = {
        "documents": ([(0, 90), (90, 230)], [(0, 90), (90, 230)]),
        "between others": ([(0, 60), (130, 230), (60, 130)], [(0, 60), (40, 90), (90, 230)]),
        "holes": ([(10, 60), (130, 200), (70, 71), (72, 120), (220, 230)], [(0, 90)] * 2 + [(90, 100)] * 3),
    }[name]
    problem = make_problem(AttnMask.from_slices(*slices, "full", 230, 230))
    problem = replace(problem, params=replace(problem.params, return_max_logits=True))
    problem = problem.with_sink() if sink else problem
    keys = [[0, 90], [90, 230]]
    bands = [relocate(problem.mask.bands, np.array([[0, 230]]), np.array([part])) for part in keys]
    monkeypatch.setattr(parts_module, "SELDOM", 0)
    parts = make_parts(bands, 230)
    assert all(part.apart for part in parts)
    check_bound(run_in_parts(engine, problem, [90]), problem)

    def attend(number: int, state: State | None) -> State:
        start, end = keys[number]
        schedule = engine.schedule(bands[number], 230, end - start, parts[number])
        k, v = problem.k[start:end], problem.v[start:end]
        return engine.forward(problem.q, k, v, schedule, problem.params, state, problem.sink)

    in_order = attend(1, attend(0, None))
    assert in_order.sums is None
    waits = torch.from_numpy(parts[0].waits)
    untouched = State(*(None if x is None else torch.full_like(x, 7.0) for x in in_order))
    later = State(*(None if x is None else x.clone() for x in untouched))
    attend(1, later)
    monkeypatch.setattr(State, "empty", lambda *args: untouched)
    first = attend(0, None)
    for state, mine, others in ((first, ~waits, waits), (later, waits, ~waits)):
        of_queries = zip(*((x.out, x.lse.T, x.row_max.T) for x in (state, in_order)), strict=True)
        for got, expected in of_queries:
            assert torch.equal(got[mine], expected[mine])
            assert (got[others] == 7).all(), "queries of the other part are left alone"


def test_sums_are_there_where_a_query_has_some(engine: EmulatedEngine) -> None:
    problem = make_problem(documents([90, 110]))
    sizes = []
    for bounds in ([90], [100]):
        keys = np.array([[[0, bounds[0]]], [[bounds[0], 200]]])
        bands = [relocate(problem.mask.bands, np.array([[0, 200]]), part) for part in keys]
        schedule = engine.schedule(bands[0], 200, bounds[0], make_parts(bands, 200)[0])
        k, v = (x[: bounds[0]] for x in (problem.k, problem.v))
        state = engine.forward(problem.q, k, v, schedule, problem.params)
        sizes.append(0 if state.sums is None else state.sums.numel())
    assert sizes == [0, problem.q.numel()]


def test_what_keys_add_nothing_to_is_kept_to_the_bit(engine: EmulatedEngine) -> None:
    """Rows of a window without keys, and rows without keys in a window with some."""
    problem = make_problem(AttnMask.from_slices([(70, 90)], [(0, 30)], "full", 200, 30), (2, 1))
    goes_on = torch.arange(200) >= 75
    part = Part(goes_on.numpy(), waits=np.zeros(200, np.bool_))
    schedule = engine.schedule(problem.mask.bands, 200, 30, part)
    begun, sums = torch.randn(2, 200), torch.randn(200, 2, 64)
    begun[:, 80:100] = -torch.inf
    before = State(torch.randn(200, 2, 64).bfloat16(), begun, sums)
    state = State(before.out.clone(), before.lse.clone(), sums.clone())
    engine.forward(problem.q, problem.k, problem.v, schedule, problem.params, state)
    whole = replace(schedule, part=None)
    alone, lse_alone, *_ = engine.forward(problem.q, problem.k, problem.v, whole, problem.params)
    weight = torch.sigmoid(lse_alone - before.lse).T.unsqueeze(2)
    merged = torch.lerp(sums, alone.float(), weight)
    merged[80:90] = alone[80:90].float()

    done = torch.ones(200, dtype=torch.bool)
    done[70:90] = False
    assert torch.equal(state.lse[:, done], before.lse[:, done])
    assert torch.equal(state.sums[done], sums[done]) and torch.equal(state.out[done], before.out[done])
    torch.testing.assert_close(state.lse[:, 70:90], torch.logaddexp(lse_alone, before.lse)[:, 70:90])
    torch.testing.assert_close(state.out[70:75].float(), merged[70:75], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state.sums[75:90], merged[75:90], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["full", "varlen causal", SEVERAL])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("items", [(1, None), (3, None), (1, 2)])
def test_query_heads_and_queries_of_an_item(
    engine: EmulatedEngine, name: str, head_dim: int, items: tuple[int, int | None]
) -> None:
    problem = make_problem(named_masks(260)[name], (6, 2), head_dim)
    members, most_tiles = items
    groups = (1, 2, 3) if members == 1 else (2,)
    engine.work.DeviceWalk.backward_items = lambda *args: Items(members, groups, most_tiles)
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [100]), problem)


@pytest.mark.parametrize("name", ["varlen causal", SEVERAL])
@pytest.mark.parametrize("head_dims", [(192, 192), (192, 128), (256, 256)])
@pytest.mark.parametrize("items", [(1, None), (3, None), (1, 1)])
def test_query_heads_and_queries_of_an_item_of_large_head_dims(
    engine: EmulatedEngine, name: str, head_dims: tuple[int, int], items: tuple[int, int | None]
) -> None:
    problem = make_problem(named_masks(150)[name], (6, 1), head_dims[0], head_dim_v=head_dims[1])
    members, most_tiles = items
    groups = (1, 2, 3) if members == 1 else (2,)
    engine.work.DeviceWalk.backward_items = lambda *args: Items(members, groups, most_tiles)
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [80]), problem)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "name", "softcap"),
    [
        (torch.bfloat16, 256, (2, 1), "varlen sliding window causal", 0.0),
        (torch.float16, 256, (2, 2), SEVERAL, 0.0),
        (torch.bfloat16, 256, (3, 1), "varlen causal", 0.8),
        (torch.bfloat16, 192, (4, 2), SEVERAL, 0.8),
        (torch.bfloat16, 136, (6, 1), "causal", 0.0),
        (torch.float16, 136, (3, 1), "varlen causal", 0.0),
        (torch.bfloat16, 136, (2, 1), "nothing", 0.0),
    ],
)
def test_large_head_dims(
    engine: EmulatedEngine, dtype: torch.dtype, head_dim: int, heads: tuple[int, int], name: str, softcap: float
) -> None:
    problem = make_problem(named_masks(200)[name], heads, head_dim, dtype, softcap)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize(("head_dim", "heads"), [(256, (2, 1)), (192, (1, 1))])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("name", ["causal", SEVERAL, "holes"])
def test_parts_of_the_keys_of_large_head_dims(
    engine: EmulatedEngine, name: str, sink: bool, head_dim: int, heads: tuple[int, int]
) -> None:
    problem = make_problem(named_masks(200)[name], heads, head_dim)
    problem = problem.with_sink() if sink else problem
    check_bound(run_in_parts(engine, problem, [0, 64, 150]), problem)


@pytest.mark.parametrize(
    ("dtype", "head_dims", "heads", "softcap"),
    [
        (torch.bfloat16, (192, 128), (2, 2), 0.0),
        (torch.float16, (192, 128), (6, 2), 0.8),
        (torch.bfloat16, (192, 64), (3, 1), 0.0),
        (torch.bfloat16, (128, 192), (2, 1), 0.0),
        (torch.bfloat16, (256, 128), (3, 1), 0.0),
        (torch.float16, (136, 256), (2, 1), 0.0),
        (torch.bfloat16, (256, 160), (2, 1), 0.0),
        (torch.bfloat16, (128, 64), (4, 2), 0.8),
        (torch.bfloat16, (64, 128), (3, 1), 0.0),
        (torch.float16, (40, 72), (4, 2), 0.0),
    ],
)
@pytest.mark.parametrize("name", ["varlen causal", SEVERAL])
def test_values_of_another_head_dim(
    engine: EmulatedEngine,
    name: str,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    heads: tuple[int, int],
    softcap: float,
) -> None:
    head_dim, head_dim_v = head_dims
    problem = make_problem(named_masks(200)[name], heads, head_dim, dtype, softcap, head_dim_v).with_sink()
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [0, 64, 150]), problem)


@pytest.mark.parametrize("heads", [(2, 1), (1, 1)])
@pytest.mark.parametrize("head_dim", [136, 256])
def test_documents_around_tile_edges_of_large_head_dims(
    engine: EmulatedEngine, heads: tuple[int, int], head_dim: int
) -> None:
    problem = make_problem(documents([63, 1, 64, 128, 65], causal=True), heads, head_dim)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (1, 1), (1, 200), (200, 1)])
def test_few_rows_or_keys_of_large_head_dims(engine: EmulatedEngine, rows: int, keys: int) -> None:
    problem = make_problem(AttnMask.from_slices([(0, rows)], [(0, keys)], "full", rows, keys), (2, 1), 256)
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("run", [run_engine, lambda engine, problem: run_in_parts(engine, problem, [100])])
def test_what_rows_that_attend_nothing_hold_does_not_matter(
    engine: EmulatedEngine, run: Callable[..., list[torch.Tensor]]
) -> None:
    mask = AttnMask.from_slices([(3, 140), (150, 210)], [(0, 130), (20, 160)], ["causal", "full"], 230, 160)
    problem = make_problem(mask)
    empty = ~torch.from_numpy(mask.to_dense()).any(1)
    poisoned = replace(
        problem,
        dout=problem.dout.masked_fill(empty[:, None, None], 1000.0),
        dlse=problem.dlse.masked_fill(empty, torch.nan),
    )
    results = run(engine, poisoned)
    check_bound(results, problem)
    assert not results[0][empty].any() and not results[2][empty].any()


@pytest.mark.parametrize("name", ["dout", "dlse"])
def test_a_gradient_that_is_not_there_is_zero(engine: EmulatedEngine, name: str) -> None:
    problem = make_problem(builders.causal(130), (2, 1))
    without = replace(problem, **{name: None})
    setattr(problem, name, torch.zeros_like(getattr(problem, name)))
    check_bound(run_engine(engine, without), problem)


def test_any_strides(engine: EmulatedEngine) -> None:
    """The last dimension is not contiguous, then the first is the fastest but one, then there is padding."""
    problem = make_problem(builders.causal(130), (2, 1))

    def padded(x: torch.Tensor) -> torch.Tensor:
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


@pytest.mark.parametrize("sm_margin", [3, 100])
def test_some_multiprocessors_left_to_others(engine: EmulatedEngine, sm_margin: int) -> None:
    problem = make_problem(named_masks(260)["varlen causal"])
    problem.params = replace(problem.params, sm_margin=sm_margin)
    check_bound(run_engine(engine, problem), problem)


def test_fewer_heads_at_a_time_than_there_are(engine: EmulatedEngine) -> None:
    problem = make_problem(builders.causal(200), (8, 4))
    engine.work.CACHED_BYTES = 8 * 200 * 64 * 2
    check_bound(run_engine(engine, problem), problem)


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_results_do_not_depend_on_who_is_faster(head_dims: tuple[int, int]) -> None:
    """Of those results that are not added up in memory, every bit; and nobody is in anybody's way."""
    problem = make_problem(named_masks(300)[SEVERAL], head_dim=head_dims[0], head_dim_v=head_dims[1])
    engines = [EmulatedEngine(seed, 2) for seed in range(8)]
    for engine in engines:
        engine.work.DeviceWalk.backward_items = lambda walk, heads_kv, group, *args: Items(group, (1,) * heads_kv)
    first, *others = (run_engine(engine, problem) for engine in engines)
    for results in (first, *others):
        check_bound(results, problem)
        assert all(torch.equal(results[n], first[n]) for n in (0, 1, 3, 4))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("members", [1, None])
@pytest.mark.parametrize("name", ["varlen causal", "holes", SEVERAL])
def test_batches_of_any_windows(engine: EmulatedEngine, name: str, members: int | None, heads: tuple[int, int]) -> None:
    """Three windows each, long ones too, and those of two groups of heads, and such as nobody attends in."""
    mask = named_masks(450)[name]
    problem = make_problem(mask, heads)
    problem.params = replace(problem.params, yields=True)
    engine.work.DeviceWalk.backward_items = lambda walk, heads_kv, group, *args: Items(
        members or group, (1,) * (heads_kv * group // (members or group))
    )
    engine.work.CACHED_BYTES = 4 * mask.total_seqlen_k * 64  # a head of keys in the forward kernel

    def in_batches(walk: Any, num_windows: int, groups: tuple[int, ...], *args: int) -> torch.Tensor:
        end = num_windows * sum(groups)
        return torch.tensor([(n, min(n + 3, end)) for n in range(0, end, 3)], dtype=torch.int32)

    engine.work.DeviceWalk.in_batches = in_batches
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [200]), problem)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_short_windows_share_programs(heads: tuple[int, int]) -> None:
    engine = EmulatedEngine(0, num_multiprocessors=1)
    problem = make_problem(documents([60, 1, 90, 7] * 6, causal=True), heads)
    problem.params = replace(problem.params, yields=True)
    engine.work.BACKWARD_BATCH = 128
    grids = []

    def grid(args: Any, programs: int) -> tuple[int, int, int]:
        grids.append((args.num_batches, args.num_items))
        return real_grid(args, programs)

    real_grid, engine.launch.grid = engine.launch.grid, grid
    check_bound(run_engine(engine, problem), problem)
    check_bound(run_in_parts(engine, problem, [450]), problem)
    whole = grids[:2]
    assert all(0 < num_programs < num_items for num_programs, num_items in whole), grids
