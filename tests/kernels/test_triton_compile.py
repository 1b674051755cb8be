"""The triton engine's kernels, compiled for GPUs that are not there: they compile, and they keep to the registers.

The engine is run with a kernel in each kernel's place that keeps what it is launched with, and that is compiled.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from magi_attention.kernels import triton as engine
from magi_attention.kernels.params import AttnParams
from magi_attention.kernels.triton import backward_kernels, forward_kernel, tuning
from magi_attention.testing.mask_zoo import named_masks

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

# Bytes that a thread may store to memory for want of registers. Where there are some, all smaller tiles are slower on
# paper: more loads for each product.
LAYERED = "96, softcap, several intervals"
# Bytes that a thread may store to memory for want of registers, as the compiler of Triton 3.6 leaves them.
SPILLS = {
    (80, "64", "dkdv_kernel"): 32,
    (90, "128", "dkdv_kernel"): 36,
    (80, LAYERED, "forward_kernel"): 92,
    (80, LAYERED, "dq_kernel"): 532,
    (90, LAYERED, "forward_kernel"): 28,
    (90, LAYERED, "dq_kernel"): 40,
    (90, LAYERED, "dkdv_kernel"): 196,
}

CASES = {
    "64": (named_masks(256)["causal"], AttnParams(1.0), 64, torch.bfloat16),
    "128": (named_masks(256)["causal"], AttnParams(1.0), 128, torch.bfloat16),
    "256": (named_masks(256)["causal"], AttnParams(1.0), 256, torch.bfloat16),
    LAYERED: (named_masks(256)["several intervals a row"], AttnParams(1.0, 30.0), 96, torch.float16),
}


class Recorder:
    """Stands for a kernel, and keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.launch: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(grid)
        return self._keep

    def _keep(self, *args: Any, **kwargs: Any) -> None:
        self.launch = args, kwargs


def type_of(x: Any) -> Any:
    """Triton's name of the type of an argument."""
    if isinstance(x, tuple):
        return type(x)(*map(type_of, x))
    if isinstance(x, torch.Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
        return "*" + names[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"


def divisible(x: Any, path: tuple[int, ...]) -> dict[tuple[int, ...], list[list[Any]]]:
    """What Triton finds at a launch: tensors and numbers that are multiples of 16."""
    if isinstance(x, tuple):
        return {name: value for n, y in enumerate(x) for name, value in divisible(y, (*path, n)).items()}
    number = x.data_ptr() if isinstance(x, torch.Tensor) else x
    return {path: [["tt.divisibility", 16]]} if isinstance(number, int) and number % 16 == 0 else {}


def compile_launch(kernel: Any, launch: tuple[tuple[Any, ...], dict[str, Any]], capability: int) -> Any:
    args, kwargs = launch
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    assert set(arguments) == set(kernel.arg_names)
    signature, attributes = {}, {}
    for n, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else type_of(arguments[name])
        if name not in constants:
            attributes |= divisible(arguments[name], (n,))
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(ptx: str) -> int:
    """How many bytes a thread stores to memory for want of registers."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    command = [str(PTXAS), "--verbose", f"--gpu-name={target[1]}", "--output-file=/dev/null", "-"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr.lower(), done.stderr
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert spilled is not None
    return int(spilled[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("capability", "shared_memory"), [(80, 99 * 1024), (90, 227 * 1024)])
def test_kernels_compile_and_keep_to_the_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, shared_memory: int, case: str
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(tuning, "compute_capability", lambda device: capability // 10)
    mask, params, head_dim, dtype = CASES[case]
    compiled, recorders = {}, {}
    modules = {"forward_kernel": forward_kernel, "dq_kernel": backward_kernels, "dkdv_kernel": backward_kernels}
    for name, module in modules.items():
        compiled[name], recorders[name] = getattr(module, name), Recorder()
        monkeypatch.setattr(module, name, recorders[name])
    q, k = (torch.zeros(256, heads, head_dim, dtype=dtype) for heads in (16, 2))
    tiles = engine.schedule(mask.bands, 256, 256)
    lse = engine.forward(q, k, k, tiles, params)[1]
    engine.backward(q, q, k, k, lse, lse, tiles, params)
    spills = {}
    for name, kernel in compiled.items():
        binary = compile_launch(kernel, recorders[name].launch, capability)
        spills[name] = spilled_bytes(binary.asm["ptx"])
        assert binary.metadata.shared <= shared_memory, name
    noted = {name: SPILLS.get((capability, case, name), 0) for name in spills}
    assert all(spills[name] <= noted[name] for name in spills), (spills, noted)
