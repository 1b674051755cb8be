"""Packing and adding rows on a GPU: bit by bit what the CPU makes, at every run, without waiting for the device."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from magi_attention.comm import GroupCast, GroupReduce, RowRouting
from magi_attention.comm.row_exchange import Transfer, pack
from magi_attention.comm.row_sums import RowSums, add_rows
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.planning import plan_attention
from magi_attention.testing.mask_zoo import named_masks

from ..comm.row_cases import LAYOUTS, NAMED, RowCase, check_add, check_pack, row_cases
from .waiting import no_wait_for_the_device

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name: str) -> None:
    check_pack(NAMED[name], pack, DEVICE)
    check_add(NAMED[name], add_rows, DEVICE)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts(layout: str) -> None:
    case = NAMED["all rows to all ranks"]
    check_pack(replace(case, layouts=(layout, layout), dtype=torch.bfloat16, wire_dtype=torch.bfloat16), pack, DEVICE)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=row_cases(DTYPES))
def test_generated_cases(case: RowCase) -> None:
    check_pack(case, pack, DEVICE)
    check_add(case, add_rows, DEVICE)


def transfers(sent: list[torch.Tensor], counts: list[tuple[int, ...]]) -> list[Transfer]:
    """What an all-to-all among the ranks of one device would bring to each, given its matrix and its counts."""
    parts = [matrix.split(rows) for matrix, rows in zip(sent, counts, strict=True)]
    done = cast(Any, SimpleNamespace(wait=lambda: None))
    return [Transfer(matrix, torch.cat([p[rank] for p in parts]), done) for rank, matrix in enumerate(sent)]


@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "varlen causal", "several intervals a row"])
def test_a_cast_and_a_reduce_of_all_ranks(name: str, wire_dtype: torch.dtype) -> None:
    """Every rank on one device, against the same on the CPU: received keys and values, and the sums at home."""
    cp_size = 4
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=2, min_chunk_size=4))
    plan = plan_attention(named_masks(301)[name], cp_size, 16, config=config)
    plans = [plan.rank(rank) for rank in range(cp_size)]
    assert plans[0].stages
    generator = torch.Generator().manual_seed(0)
    rows = plans[0].dispatch.local_seqlen
    keys = [torch.randn(2, rows, 2, 64, generator=generator).to(torch.bfloat16) for _ in plans]
    results: dict[str, list[torch.Tensor]] = {"cpu": [], DEVICE: []}
    for device, made in results.items():
        totals = [torch.ones(2, rows, 2, 64, device=device) for _ in plans]
        for stage in range(len(plans[0].stages)):
            exchanges = [RowRouting.on_device(p.stages[stage].collective, torch.device(device)) for p in plans]
            sent = [pack(kv.to(device).unbind(), x.send_rows) for kv, x in zip(keys, exchanges, strict=True)]
            shapes = (keys[0].shape[2:],) * 2
            casts = transfers(sent, [x.send_counts for x in exchanges])
            received = [GroupCast(t, x, shapes).wait() for t, x in zip(casts, exchanges, strict=True)]
            partial = [[x.float() * (1 + rank) / 4 for x in kv] for rank, kv in enumerate(received)]
            home = [pack(kv, x.wire_order, wire_dtype) for kv, x in zip(partial, exchanges, strict=True)]
            reduces = transfers(home, [x.recv_counts for x in exchanges])
            for transfer, x, total in zip(reduces, exchanges, totals, strict=True):
                GroupReduce(transfer, x).wait(into=total.unbind())
            made += [x for kv in received for x in kv]
        made += totals
    for x, y in zip(results["cpu"], results[DEVICE], strict=True):
        assert torch.equal(x, y.cpu())


def many_parts() -> tuple[torch.Tensor, torch.Tensor, RowSums]:
    """Totals of keys and values, the parts of their rows from seven ranks, and where these belong."""
    rows, ranks = 4096, 7
    rng = np.random.default_rng(0)
    sent = tuple(tuple(np.flatnonzero(rng.random(rows) < 0.5).tolist()) for _ in range(ranks))
    sums = RowCase(rows, sent).exchange(DEVICE).sums
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(len(sums.order), 2 * 4 * 128, generator=generator)
    return torch.randn(2, rows, 4, 128, generator=generator).to(DEVICE), matrix.to(DEVICE), sums


def test_sums_are_repeatable() -> None:
    totals, matrix, sums = many_parts()
    first = totals.clone()
    add_rows(first.unbind(), matrix, sums)
    for _ in range(10):
        again = totals.clone()
        add_rows(again.unbind(), matrix, sums)
        assert torch.equal(first, again)


def test_the_host_does_not_wait() -> None:
    totals, matrix, sums = many_parts()
    plan = plan_attention(named_masks(64)["causal"], 2, 4).rank(0).stages[0].collective
    for attempt in range(2):  # the first compiles
        with no_wait_for_the_device() if attempt else nullcontext():
            exchange = RowRouting.on_device(plan, torch.device(DEVICE))
            pack(totals.unbind(), exchange.send_rows, torch.bfloat16)
            add_rows(totals.unbind(), matrix, sums)


def test_offsets_have_64_bits() -> None:
    """A matrix of more than 2^31 elements, packed from a few rows and added up to fewer."""
    width, num_rows = 2048, (1 << 20) + 8
    x = torch.randn(64, width, device=DEVICE, dtype=torch.bfloat16)
    index = torch.arange(num_rows, dtype=torch.int32, device=DEVICE) % 64
    matrix = pack([x], index)
    assert matrix.numel() > 1 << 31
    assert torch.equal(matrix[-64:], x[index[-64:]])
    last = torch.arange(num_rows - 3, num_rows, dtype=torch.int32, device=DEVICE)
    rows, offsets = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([5], [0, 3]))
    total = torch.zeros(8, width, device=DEVICE)
    order = torch.cat((last, index[3:]))  # as many as the matrix has rows
    add_rows([total], matrix, RowSums(rows, offsets, order))
    assert torch.equal(total[5], matrix[-3].float() + matrix[-2].float() + matrix[-1].float())
    assert not total[[0, 1, 2, 3, 4, 6, 7]].any()
