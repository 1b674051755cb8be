"""Compile the kernels of a GPU engine for a GPU that is not there, and say what the compiler made of them.

The engine is run on the CPU, and what it launches is compiled with the very arguments, but not launched. So variants
follow the engine's code; the results mean nothing.

``python -m tests.kernels.compile_kernels RELEASE ENGINE CASE ...`` prints a :class:`Compiled` a line, as JSON. Each
case has a process of its own, so that none finds a kernel compiled for another.
"""

import io
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from magi_attention.kernels import hopper
from magi_attention.kernels import triton as by_tiles
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.parts import Part
from magi_attention.mask import AttnMask, builders

PROCESSES = 2
TOKENS = 512
CAUSAL = builders.causal(TOKENS)
# Queries with two intervals of keys, and keys with two intervals of queries.
LAYERED = AttnMask.from_slices([(0, 100), (0, 100), (400, 512)], [(0, 50), (300, 512), (0, 50)], "full", TOKENS, TOKENS)


@dataclass(frozen=True)
class Case:
    """One way to call an engine.

    Attributes:
        head_dim: Dimensions of a head of queries and keys.
        dtype: Of the inputs.
        group: Query heads that share a key head.
        softcap: See :class:`~magi_attention.kernels.params.AttnParams`.
        mask: Of ``TOKENS`` queries and keys.
        parts: Whether keys come in parts, so that results are float32 and are merged.
        sink: Whether there is a sink, and the highest scores are asked for.
        capability: Of the GPU, times ten.
        head_dim_v: Dimensions of a head of values; None for those of keys.
    """

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    group: int = 6
    softcap: float = 0.0
    mask: AttnMask = CAUSAL
    parts: bool = False
    sink: bool = False
    capability: int = 90
    head_dim_v: int | None = None


HALF = torch.float16
HOPPER_CASES = {
    "128": Case(128),
    "64": Case(64),
    "128, layered": Case(128, mask=LAYERED),
    "128, fp16, group of 5, softcap": Case(128, HALF, 5, 30.0),
    "128, sink": Case(128, sink=True),
    "128, parts, sink": Case(128, parts=True, sink=True),
    "64, fp16, softcap, layered, parts": Case(64, HALF, 6, 30.0, LAYERED, parts=True),
    "96, odd group, softcap, layered, parts": Case(96, torch.bfloat16, 3, 30.0, LAYERED, parts=True),
    "256": Case(256),
    "192, fp16, odd group, softcap, layered": Case(192, HALF, 3, 30.0, LAYERED),
    "256, parts, sink": Case(256, parts=True, sink=True),
    "136, layered, parts": Case(136, mask=LAYERED, parts=True),
    "192 and 128": Case(192, group=1, head_dim_v=128),
    "192 and 128, parts, group of 6": Case(192, parts=True, head_dim_v=128),
    "256 and 128, fp16, softcap, layered": Case(256, HALF, 6, 30.0, LAYERED, head_dim_v=128),
}
TRITON_CASES = {
    "64": Case(64, group=8, parts=True),
    "128": Case(128, group=8, parts=True),
    "256": Case(256, group=8, parts=True),
    "136, fp16, one head a key head": Case(136, HALF, 1, parts=True),
    "128, sink": Case(128, group=8, parts=True, sink=True),
    "96, fp16, softcap, layered": Case(96, HALF, 8, 30.0, LAYERED, parts=True),
}
CASES = {
    "hopper": HOPPER_CASES,
    "triton": {f"sm_{c}, {name}": replace(case, capability=c) for c in (80, 90) for name, case in TRITON_CASES.items()},
}


NUMBERED_SWITCHES = ("PART", "MEMBERS")
"""Compile-time arguments that are numbers and change what a kernel does, not only how large its tiles are."""


WITH_LOOPS = ("128", "256", "192, fp16, odd group, softcap, layered", "256, parts, sink", "192 and 128")
"""Cases whose machine code is looked at, which takes time."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as the compiler left it.

    Attributes:
        case: Where it is launched.
        kernel: Its name, and which of its switches are on, or what they are.
        switches: Its compile-time arguments that are True or False, and those in ``NUMBERED_SWITCHES``.
        shared: Bytes of shared memory.
        spilled: Bytes that a thread stores to memory for want of registers.
        complaints: What the assembler warns of, and where it makes products of matrices wait (C7510 to C7518).
        loops: Of each loop with products of matrices, in Gluon kernels of the cases in ``WITH_LOOPS``: how many
            instructions, how many of them are such products, and how many access memory for want of registers.
    """

    case: str
    kernel: str
    switches: dict[str, int]
    shared: int
    spilled: int
    complaints: list[str]
    loops: list[tuple[int, int, int]]


class NoDriver:
    """Stands where Triton looks for a GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(engine: str, name: str) -> list[Compiled]:
    """Call all functions of an engine, but for the backward pass where its kernels are those of another case: with a
    sink."""
    module, case = {"hopper": hopper, "triton": by_tiles}[engine], CASES[engine][name]
    heads_kv, head_dim_v = 2, case.head_dim_v or case.head_dim
    q, k, v, dout = (
        torch.zeros(TOKENS, heads, dim, dtype=case.dtype)
        for heads, dim in (
            (heads_kv * case.group, case.head_dim),
            (heads_kv, case.head_dim),
            (heads_kv, head_dim_v),
            (heads_kv * case.group, head_dim_v),
        )
    )
    params = AttnParams(1.0, case.softcap, return_max_logits=case.sink)
    sink = torch.zeros(heads_kv * case.group) if case.sink else None
    part = Part(np.ones(TOKENS, np.bool_), waits=np.zeros(TOKENS, np.bool_)) if case.parts else None
    schedule = module.schedule(case.mask.bands, TOKENS, TOKENS, part)
    dtype = None if case.parts else case.dtype
    with compile_launches(name, case.capability) as compiled:
        state = module.forward(q, k, v, schedule, params, sink=sink)
        if case.parts:
            module.forward(q, k, v, schedule, params, state)
        if case.sink:
            return compiled
        out, lse = state.out, state.lse
        grads = module.start_backward(out, dout, lse, lse, params, case.head_dim)
        module.backward(grads, q, k, v, schedule, params, dtype)
        if case.mask is CAUSAL and not case.parts:
            # The hopper engine has another kernel for windows that have the same number of tiles.
            full = module.schedule(builders.full(TOKENS).bands, TOKENS, TOKENS)
            module.backward(grads, q, k, v, full, params, dtype)
        module.finish_backward(grads, params, case.dtype)
    return compiled


@contextmanager
def compile_launches(case: str, capability: int) -> Iterator[list[Compiled]]:
    """Compile what is launched inside, instead of launching it."""
    compiled = []
    compile_or_launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        with redirect_stdout(io.StringIO()) as log:
            binary = compile_or_launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        numbered = {name: kwargs[name] for name in NUMBERED_SWITCHES if name in kwargs}
        switches = {name: value for name, value in kwargs.items() if isinstance(value, bool)}
        label = " ".join(
            [
                kernel.__name__,
                *(name for name, on in switches.items() if on),
                *(f"{name}={value}" for name, value in numbered.items()),
            ]
        )
        spilled, complaints = read_log(log.getvalue())
        loops = find_loops(binary.asm["cubin"]) if kernel.is_gluon() and case in WITH_LOOPS else []
        compiled.append(Compiled(case, label, switches | numbered, binary.metadata.shared, spilled, complaints, loops))
        return mock.MagicMock()  # what is launched, if the caller asked to compile only

    multiprocessors = SimpleNamespace(multi_processor_count=1)  # which few items keep busy
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(triton.runtime.driver, "_active", NoDriver(capability)),
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(triton.knobs.compilation, "always_compile", True),  # or there may be no log
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: multiprocessors),
        mock.patch.object(by_tiles.tuning, "compute_capability", lambda device: capability // 10),
    ):
        yield compiled


def read_log(log: str) -> tuple[int, list[str]]:
    """What the assembler says: bytes spilled, and complaints."""
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled is not None, log
    return int(spilled[1]), [line for line in log.splitlines() if re.search(r"(?i)warning|\(C751[0-8]\)", line)]


def find_loops(cubin: bytes) -> list[tuple[int, int, int]]:
    """The loops with products: what lies between a jump backwards and its target in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        disassemble = [triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    loops: list[tuple[int, int, int]] = []
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels:
                body = instructions[labels[jump[1]] :]
                products = sum("HGMMA" in x for x in body)
                if products:
                    loops.append((len(body), products, sum("STL" in x or "LDL" in x for x in body)))
    return loops


def main(release: str, engine: str, *cases: str) -> None:
    assert triton.__version__ == release, f"found Triton {triton.__version__}, and not {release}"
    with multiprocessing.get_context("fork").Pool(PROCESSES, maxtasksperchild=1) as pool:
        for compiled in pool.imap(partial(compile_case, engine), cases, chunksize=1):
            for each in compiled:
                print(json.dumps(asdict(each)))


if __name__ == "__main__":
    main(*sys.argv[1:])
