"""The Triton kernels that pack and add rows against their twins in torch, under Triton's interpreter.

No GPU is needed, and what they are compiled to is checked too.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from magi_attention.comm.row_exchange import pack
from magi_attention.comm.row_sums import RowSums
from magi_attention.kernels.engine import Engine

pytest.importorskip("triton")

from ..kernels.fake_cuda_driver import FakeCudaDriver
from ..kernels.triton_interpreter import FAR, Interpreter, interpreter
from ..kernels.triton_releases import RELEASES
from .row_cases import NAMED, RowCase, check_add, check_pack, row_cases


def pack_by_kernel(tensors: list[torch.Tensor], rows: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    from magi_attention.comm.row_kernels import pack_rows

    num_rows = len(tensors[0]) if rows is None else len(rows)
    matrix = torch.empty(num_rows, sum(x.shape[1:].numel() for x in tensors), dtype=dtype)
    pack_rows(tensors, rows, matrix)
    return matrix


def check_both(_: Engine, case: RowCase) -> None:
    from magi_attention.comm.row_kernels import add_rows

    check_pack(case, pack_by_kernel)
    check_add(case, add_rows)


def check_far_apart(_: Engine) -> None:
    """Rows, and then heads, that are more than 2^31 elements apart; only the pages that are written are ever there."""
    for shape, strides in (((34, 1, 8), (FAR, 8, 1)), ((3, 34, 8), (8, FAR, 1))):
        near = torch.randn(shape).half()
        far = torch.from_numpy(np.zeros(34 * FAR, np.float16)).as_strided(shape, strides).copy_(near)
        rows = torch.tensor([2, 0, len(near) - 1], dtype=torch.int32)
        assert torch.equal(pack_by_kernel([far], rows, torch.float16), pack([near], rows))


def add_in_falling_order(totals: list[torch.Tensor], matrix: torch.Tensor, sums: RowSums) -> None:
    from magi_attention.comm.row_kernels import add_rows

    groups = [sums.order[a:b].flip(0) for a, b in zip(sums.offsets[:-1], sums.offsets[1:], strict=True)]
    add_rows(totals, matrix, RowSums(sums.rows, sums.offsets, torch.cat(groups)))


def check_wrong_order(_: Engine) -> None:
    check_add(NAMED["a bfloat16 wire"], add_in_falling_order)


@pytest.fixture(scope="module")
def run() -> Iterator[Interpreter]:
    with interpreter() as process:
        yield process


@pytest.mark.parametrize("name", NAMED)
def test_named_cases(run: Interpreter, name: str) -> None:
    run.run(check_both, NAMED[name])


@settings(max_examples=60, deadline=None)
@given(case=row_cases((torch.float32, torch.bfloat16, torch.float16)))
def test_generated_cases(run: Interpreter, case: RowCase) -> None:
    run.run(check_both, case)


def test_offsets_have_64_bits(run: Interpreter) -> None:
    run.run(check_far_apart)


def test_a_mistake_is_seen(run: Interpreter) -> None:
    with pytest.raises(AssertionError):
        run.run(check_wrong_order)


@pytest.mark.parametrize(("release", "capability"), [(RELEASES[0], 80), *((release, 90) for release in RELEASES)])
def test_kernels_compile_to_wide_accesses(release: str, capability: int, tmp_path: Path) -> None:
    if release == "3.9.0" and sys.version_info < (3, 11):
        pytest.skip("Triton 3.9 is not built for Python 3.10")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    if release != version("triton"):
        environment["PYTHONPATH"] = str(Path(sys.prefix) / f"triton-{release}")
    command = [sys.executable, "-m", "tests.comm.compile_row_kernels", release, str(capability)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {x["kernel"] for x in kernels} == {"pack_kernel", "add_kernel"} and len(kernels) == 6
    for x in kernels:
        assert x["narrow_stores"] == 0 and x["wide_stores"] > 0 and x["wide_loads"] > 0, x
        assert x["spilled"] == 0 and x["shared"] <= 8192 and not x["complaints"], x


def test_all_numbers_of_rows_share_a_kernel() -> None:
    """Or a new mask would have kernels compiled in the middle of a training run."""
    import triton

    from magi_attention.comm import row_kernels

    driver = FakeCudaDriver(keep=0)
    k, v = torch.zeros(2, 40, 2, 64, dtype=torch.bfloat16)
    dk, dv = torch.zeros(2, 40, 2, 64)
    indices = torch.zeros(100, dtype=torch.int32)
    kernels = row_kernels.pack_kernel, row_kernels.add_kernel
    with (
        patch.object(triton.runtime.driver, "_active", driver),
        patch.object(kernels[0], "device_caches", defaultdict(kernels[0].create_binder)),
        patch.object(kernels[1], "device_caches", defaultdict(kernels[1].create_binder)),
    ):
        for n in (1, 2, 15, 16, 17, 32):
            index = indices[n : 2 * n]  # starts anywhere
            row_kernels.pack_rows((k, v), index, torch.empty(n, 256, dtype=k.dtype))
            row_kernels.add_rows((dk, dv), torch.empty(n, 256), RowSums(index, indices[1 : n + 2], index))
        compiled = [binary for kernel in kernels for binary in kernel.device_caches[0][0].values()]
        for binary in compiled:
            binary.module = None  # so that Triton does not ask another driver to unload it
    assert driver.num_compiled == len(compiled) == 2
