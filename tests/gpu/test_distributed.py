"""Attention over two ranks with NCCL: right, repeatable, captured, interleaved, and when a rank dies.

With one GPU the ranks share it: rows travel through sockets, and the kernels of one rank wait for those of the other.
"""

import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from magi_attention.api import calc_attn, dispatch, get_position_ids
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.kernels import reference
from magi_attention.mask import AttnMask, builders
from magi_attention.planning import plan_attention
from magi_attention.runtime.cache import runtimes
from magi_attention.runtime.program import RankProgram
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool, take_gpu

from ..kernels.attention import check_bound
from ..runtime.attention_on_ranks import Problem, attend_on_rank, make_key, waiting
from .waiting import no_wait_for_the_device

CONFIGS = {
    f"degree {degree}": DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=64))
    for degree in (0, 1, 3)
}
CONFIGS["waiting"] = waiting(degree=1)


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    with RankPool(2, timeout_seconds=200, backend="nccl") as pool:
        yield pool


def make_problem(
    mask: AttnMask, config: DistAttnConfig, heads: tuple[int, int] = (8, 2), head_dims: tuple[int, int] = (128, 128)
) -> Problem:
    head_dim, head_dim_v = head_dims
    return Problem.random(mask, torch.bfloat16, heads, head_dim, chunk_size=64, config=config, head_dim_v=head_dim_v)


def on_gpu(problem: Problem) -> Problem:
    for name in ("q", "k", "v", "dout", "dlse"):
        setattr(problem, name, getattr(problem, name).cuda())
    return problem


def check_on_gpu(results: list[Tensor], problem: Problem) -> None:
    """Against what a GPU makes of the problem in float64, since CPUs take seconds for it."""
    check_bound([x.cuda() for x in results], on_gpu(problem))


def run_problems(rank: int, group: dist.ProcessGroup, problems: list[Problem]) -> list[list[Tensor]]:
    return [[x.cpu() for _, x in attend_on_rank(rank, group, on_gpu(p)).items()] for p in problems]


@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_named_masks(gpus: RankPool, config: str) -> None:
    zoo = named_masks(700)
    problems = [make_problem(zoo[name], CONFIGS[config]) for name in sorted(zoo)]
    first, second = gpus.run(run_problems, 2, problems)
    for problem, ours, others in zip(problems, first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
        check_on_gpu(ours, problem)


@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_values_of_another_head_dim(gpus: RankPool, config: str) -> None:
    """As in multi-head latent attention."""
    masks = [named_masks(700)[name] for name in ("causal", "varlen causal")]
    problems = [make_problem(mask, CONFIGS[config], heads=(8, 8), head_dims=(192, 128)) for mask in masks]
    first, second = gpus.run(run_problems, 2, problems)
    for problem, ours, others in zip(problems, first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
        check_on_gpu(ours, problem)


def local_inputs(problem: Problem, group: dist.ProcessGroup) -> tuple[object, list[Tensor], Tensor]:
    key = make_key(problem, group)
    leaves = [dispatch(getattr(problem, name), key).requires_grad_() for name in ("q", "k", "v")]
    return key, leaves, dispatch(problem.dout, key)


def step(key: object, leaves: list[Tensor], dout: Tensor, **options: object) -> list[Tensor]:
    out, lse = calc_attn(*leaves, key, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def repeat(rank: int, group: dist.ProcessGroup, problem: Problem) -> bool:
    key, leaves, dout = local_inputs(on_gpu(problem), group)
    first = step(key, leaves, dout, deterministic=True)
    return all(
        torch.equal(a, b)
        for _ in range(5)
        for a, b in zip(first, step(key, leaves, dout, deterministic=True), strict=True)
    )


@pytest.mark.parametrize("config", sorted(CONFIGS))
@pytest.mark.parametrize("name", ["causal", "varlen causal"])
def test_deterministic_runs_are_bitwise_equal(gpus: RankPool, name: str, config: str) -> None:
    assert all(gpus.run(repeat, 2, make_problem(named_masks(4000)[name], CONFIGS[config])))


def without_synchronisation(rank: int, group: dist.ProcessGroup, problem: Problem) -> None:
    key, leaves, dout = local_inputs(on_gpu(problem), group)
    step(key, leaves, dout)
    with no_wait_for_the_device():
        step(key, leaves, dout)


@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_no_host_synchronisation_in_the_steady_state(gpus: RankPool, config: str) -> None:
    gpus.run(without_synchronisation, 2, make_problem(named_masks(2000)["varlen causal"], CONFIGS[config]))


def capture(rank: int, group: dist.ProcessGroup, problem: Problem) -> list[float]:
    """The largest difference of each result of a replayed CUDA graph, on new inputs, from those without a graph."""
    key, leaves, dout = local_inputs(on_gpu(problem), group)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(key, leaves, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(key, leaves, dout)
    runtimes.get(key).free_devices()  # as 16 other keys would have it do
    reused = [torch.full((n,), -1, device="cuda", dtype=torch.int32) for n in range(1, 4000, 7)]
    with torch.no_grad():
        for x in (*leaves, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    del reused
    return [(a.float() - b.float()).abs().max().item() for a, b in zip(captured, step(key, leaves, dout), strict=True)]


def own_keys_fill(problem: Problem) -> bool:
    """Whether ranks have two kernels at a time in the backward pass: on both, or on none."""
    plan = plan_attention(problem.mask, 2, problem.chunk_size, config=problem.config)
    assert plan.own_keys_fill.all() == plan.own_keys_fill.any()
    return bool(plan.own_keys_fill.all())


def runs_beside_own_keys(problem: Problem) -> bool:
    """The same of the forward pass."""
    plan = plan_attention(problem.mask, 2, problem.chunk_size, config=problem.config)
    group: Any = SimpleNamespace(exchange=lambda *args: None)
    programs = [
        RankProgram.prepare(plan.rank(rank), group, reference, torch.device("cpu"), one_host=True) for rank in range(2)
    ]
    assert programs[0].parts_apart == programs[1].parts_apart
    return programs[0].parts_apart


@pytest.mark.parametrize(("name", "fill"), [("causal", False), ("varlen causal", True)])
@pytest.mark.parametrize("config", ["degree 1", "degree 3", "waiting"])
def test_a_step_in_a_cuda_graph(gpus: RankPool, config: str, name: str, fill: bool) -> None:
    problem = make_problem(named_masks(1920)[name], CONFIGS[config])  # no padding, whose lse of -inf has no difference
    assert own_keys_fill(problem) == fill
    assert runs_beside_own_keys(problem) == (fill and config == "waiting")
    for differences in gpus.run(capture, 2, problem):
        assert differences[:2] == [0, 0] and max(differences) < 0.05, "dq is added up in any order"


def groups_of_their_own(rank: int, group: dist.ProcessGroup, problems: list[Problem]) -> list[list[Tensor]]:
    """Groups of the same ranks, all used in every step, forward in one order and backward in the other."""
    groups = [dist.new_group([0, 1]) for _ in problems]
    parts = [local_inputs(on_gpu(p), g) for p, g in zip(problems, groups, strict=True)]
    alone = [step(*part) for part in parts]
    for _ in range(20):
        outs = [calc_attn(*leaves, key)[0] for key, leaves, _ in parts]
        grads = [
            torch.autograd.grad(out, leaves, dout)
            for out, (_, leaves, dout) in reversed(list(zip(outs, parts, strict=True)))
        ][::-1]
    together = [[out.detach(), *grad] for out, grad in zip(outs, grads, strict=True)]
    return [
        [(a.float() - b.float()).abs().max().cpu() for a, b in zip(x, [y[0], *y[2:]], strict=True)]
        for x, y in zip(together, alone, strict=True)
    ]


@pytest.mark.parametrize("config", ["degree 1", "degree 3", "waiting"])
def test_groups_interleaved(gpus: RankPool, config: str) -> None:
    masks = named_masks(2000)["varlen sliding window causal"], named_masks(2000)["varlen causal"], builders.causal(2000)
    problems = [make_problem(mask, CONFIGS[config]) for mask in masks]
    assert [own_keys_fill(problem) for problem in problems] == [True, True, False]
    beside = config == "waiting"
    assert [runs_beside_own_keys(problem) for problem in problems] == [beside, beside, False]
    for parts in gpus.run(groups_of_their_own, 2, problems):
        for differences in parts:
            assert differences[0] == 0 and max(differences) < 0.05, "gradients are added up in any order"


def changing_masks(rank: int, group: dist.ProcessGroup, steps: int) -> tuple[list[float], list[int]]:
    """Seconds of each step, and the memory that tensors have after it."""
    times, memory = [], []
    generator = torch.Generator().manual_seed(0)  # the same documents on all ranks
    q, k, v = (torch.randn(8192, n, 128, dtype=torch.bfloat16, device="cuda") for n in (8, 2, 2))
    for _ in range(steps):
        start = time.perf_counter()
        cuts = torch.randint(1, 8192, (9,), generator=generator).unique().tolist()
        problem = make_problem(builders.varlen([0, *cuts, 8192], causal=True), CONFIGS["degree 1"], (1, 1))
        problem.q, problem.k, problem.v, problem.dout = q, k, v, q
        step(*local_inputs(problem, group))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        memory.append(torch.cuda.memory_allocated())
    return times, memory


def test_masks_that_change_in_every_step(gpus: RankPool) -> None:
    """500 masks: more than the cache of plans holds."""
    for times, memory in gpus.run(changing_masks, 2, 500):
        assert max(memory[-50:]) <= max(memory[200:250]) * 1.02
        assert sorted(times[-100:])[50] < 1.5 * sorted(times[100:200])[50]


def die_midway(rank: int, store: str, out: str) -> None:
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"  # or the watchdog goes on for a minute and more to say what it did
    take_gpu(rank, 2)
    timeout = datetime.timedelta(seconds=15)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    problem = on_gpu(make_problem(named_masks(2048)["varlen causal"], CONFIGS["degree 1"]))
    assert own_keys_fill(problem)
    key, leaves, dout = local_inputs(problem, dist.group.WORLD)
    step(key, leaves, dout)
    torch.cuda.synchronize()
    Path(f"{out}.{rank}").write_text("stepped")
    if rank == 1:
        os._exit(1)
    for _ in range(10):
        step(key, leaves, dout)
    torch.cuda.synchronize()  # the watchdog of NCCL's group ends the process
    Path(f"{out}.{rank}").write_text("went on")
    os._exit(0)


def test_a_rank_that_dies_ends_the_other_with_an_error(tmp_path: Path) -> None:
    context = mp.spawn(die_midway, (str(tmp_path / "store"), str(tmp_path / "state")), nprocs=2, join=False)
    for process in context.processes:
        process.join(timeout=140)
        assert process.exitcode not in (None, 0), "a rank hangs, or did not notice"
    assert (tmp_path / "state.0").read_text() == (tmp_path / "state.1").read_text() == "stepped"


def positions(rank: int, group: dist.ProcessGroup, problem: Problem) -> str:
    return get_position_ids(make_key(problem, group)).device.type


def test_positions_are_on_the_gpu(gpus: RankPool) -> None:
    assert gpus.run(positions, 2, make_problem(builders.causal(1000), CONFIGS["degree 1"])) == ["cuda"] * 2
