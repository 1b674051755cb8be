"""Attention over four ranks with NCCL, which share GPUs if there are fewer: in one level, between two nodes of two, and
with heads split."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.config import DistAttnConfig, IntraNode, OverlapConfig
from magi_attention.mask import builders
from magi_attention.testing.mask_zoo import named_masks
from magi_attention.testing.rank_pool import RankPool

from ..runtime.attention_on_ranks import Problem, attend, make_key, waiting
from ..runtime.test_hierarchy import mesh_of
from .test_distributed import check_on_gpu, local_inputs, make_problem, on_gpu, step

HEADS = 16, 4  # four for each rank of a node; kernels are compiled for the ratio, which stays that of other tests
Nodes = tuple[int, int] | None
WAYS: list[tuple[Nodes, IntraNode]] = [
    (None, "sequence"),
    ((2, 2), "sequence"),
    ((2, 2), "heads"),
    ((1, 4), "heads"),
]
ids = [f"{'one level' if nodes is None else f'{nodes[0]} nodes'}, {intra_node}" for nodes, intra_node in WAYS]


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    with RankPool(4, timeout_seconds=200, backend="nccl") as pool:
        yield pool


CONFIGS = {
    f"degree {degree}": DistAttnConfig(overlap_config=OverlapConfig(degree=degree, min_chunk_size=64))
    for degree in (0, 1, 2)
}
CONFIGS["waiting"] = waiting(degree=3)


def config(name: str, intra_node: IntraNode) -> DistAttnConfig:
    return replace(CONFIGS[name], intra_node=intra_node)


def ranks_of(group: dist.ProcessGroup, nodes: Nodes) -> dist.ProcessGroup | DeviceMesh:
    return group if nodes is None else mesh_of(nodes)


def attend_all(rank: int, group: dist.ProcessGroup, problems: list[Problem], nodes: Nodes) -> list[list[Tensor]]:
    ranks = ranks_of(group, nodes)
    return [[x.cpu() for _, x in attend(on_gpu(p), make_key(p, ranks)).items()] for p in problems]


@pytest.mark.parametrize(("nodes", "intra_node"), WAYS, ids=ids)
@pytest.mark.parametrize("name", ["degree 0", "degree 1", "waiting"])
def test_named_masks(gpus: RankPool, nodes: Nodes, intra_node: IntraNode, name: str) -> None:
    problems = [make_problem(mask, config(name, intra_node), HEADS) for _, mask in sorted(named_masks(1300).items())]
    first, *others = gpus.run(attend_all, 4, problems, nodes)
    for n, (problem, results) in enumerate(zip(problems, first, strict=True)):
        assert all(torch.equal(a, b[n][i]) for b in others for i, a in enumerate(results))
        check_on_gpu(results, problem)


def repeat(rank: int, group: dist.ProcessGroup, problem: Problem, nodes: Nodes) -> bool:
    key, leaves, dout = local_inputs(on_gpu(problem), ranks_of(group, nodes))
    first = step(key, leaves, dout, deterministic=True)
    again = [step(key, leaves, dout, deterministic=True) for _ in range(5)]
    return all(torch.equal(a, b) for results in again for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize(("nodes", "intra_node"), WAYS, ids=ids)
def test_deterministic_runs_are_bitwise_equal(gpus: RankPool, nodes: Nodes, intra_node: IntraNode) -> None:
    assert all(gpus.run(repeat, 4, make_problem(builders.causal(4000), config("degree 2", intra_node), HEADS), nodes))


def several_shapes(rank: int, group: dist.ProcessGroup, problem: Problem) -> list[list[Tensor]]:
    """Each way to use the same GPUs, one after the other in one process, two of them again."""
    on_gpu(problem)
    results = []
    for nodes in (None, (2, 2), (4, 1), None, (2, 2)):
        key, leaves, dout = local_inputs(problem, ranks_of(group, nodes))
        results.append([x.cpu() for x in step(key, leaves, dout, deterministic=True)])
    return results


def test_groups_and_meshes_in_one_process(gpus: RankPool) -> None:
    problem = make_problem(builders.varlen([0, 500, 1300, 4000], causal=True), config("degree 1", "sequence"))
    for flat, two_level, nodes_of_one, flat_again, two_level_again in gpus.run(several_shapes, 4, problem):
        for a, b in ((flat, flat_again), (flat, nodes_of_one), (two_level, two_level_again)):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
