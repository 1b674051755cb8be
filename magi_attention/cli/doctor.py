"""``magi-attention doctor``: what will run on this machine, and whether it computes attention."""

import argparse
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Iterator

import torch

import magi_attention
from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
from magi_attention.kernels import explain
from magi_attention.kernels.head_dims import spell
from magi_attention.mask import AttnMask, builders
from magi_attention.testing.dense_oracle import dense_attention
from magi_attention.testing.error_bound import beyond_bound

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]

HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Of keys and of values."""
CU_SEQLENS = [0, 1, 71, 200, 256]
RESULTS = ("out", "lse", "dq", "dk", "dv")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; it has no options."""
    doctor = commands.add_parser(
        "doctor",
        help="show what will run here, and test it",
        description="Show versions, devices and the engine chosen on each, and compare attention with the dense "
        "formula, forward and backward. Exit status 1 when that fails.",
    )
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is here, then test it."""
    for name, value in versions():
        print(f"{name:15} {value}")
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        print_engines(device)
    print("\nattention and its gradients against the dense formula:")
    passed = [print_test(device, dtype, dims) for device in devices for dtype, dims in cases_to_test(device)]
    print("all is well" if all(passed) else "attention does not work here; please report all of the above")
    return 0 if all(passed) else 1


def versions() -> Iterator[tuple[str, str]]:
    """What is installed, and each GPU."""
    yield "magi-attention", magi_attention.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed: pip install 'triton>=3.6'"
    for n in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(n)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        yield f"cuda:{n}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    if not torch.cuda.is_available():
        yield "cuda", "no device"


def print_engines(device: torch.device) -> None:
    """Which engine is chosen on a device and why, cases with the same answer together."""
    answers: dict[str, list[str]] = {}
    for dtype, dims in itertools.product((torch.bfloat16, torch.float32), HEAD_DIMS):
        answers.setdefault(explain(device, dtype, *dims), []).append(f"{short(dtype)} head_dim {spell(*dims)}")
    for answer, cases in answers.items():
        print(f"\non {device}, {', '.join(cases)}:")
        print("\n".join(f"  {line}" for line in answer.splitlines()))


def cases_to_test(device: torch.device) -> list[tuple[torch.dtype, tuple[int, int]]]:
    """Dtypes and head sizes to test. The CPU's engine computes all of them in the same way."""
    if device.type == "cpu":
        return [(torch.bfloat16, (64, 64))]
    return [*((torch.bfloat16, dims) for dims in HEAD_DIMS), (torch.float32, (64, 64))]


def print_test(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> bool:
    """Run one test and print its line."""
    start = time.perf_counter()
    try:
        complaint = self_test(device, dtype, head_dims)
    except Exception as error:  # a compiler or a driver may raise anything: that is what is to be found out
        complaint = f"{type(error).__name__}: {error}"
    verdict = "ok" if complaint is None else f"FAILED, {complaint}"
    print(f"  {device}, {short(dtype)} head_dim {spell(*head_dims)}: {verdict} ({time.perf_counter() - start:.1f} s)")
    return complaint is None


def self_test(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> str | None:
    """Compare attention over packed causal documents, forward and backward; None when it is as good as it should be.

    The error may be twice that of the plain formula in the same type. In float32 it is the reference engine's error
    that counts, since engines have only a rounded log-sum-exp to make the probabilities of the backward pass from.
    """
    mask = builders.varlen(CU_SEQLENS, causal=True)
    dense = torch.from_numpy(mask.to_dense())
    generator = torch.Generator().manual_seed(0)
    head_dim, head_dim_v = head_dims
    sizes = (4, head_dim), (2, head_dim), (2, head_dim_v), (4, head_dim_v)
    tensors = [torch.randn(mask.total_seqlen_q, *size, generator=generator) for size in sizes]
    inputs = [t.to(dtype) for t in tensors]
    actual = with_gradients(slices_of(mask, device), *(t.to(device) for t in inputs))
    exact = with_gradients(formula(dense), *(t.double() for t in inputs))
    yardstick = slices_of(mask, torch.device("cpu"), "reference") if dtype == torch.float32 else formula(dense)
    plain = with_gradients(yardstick, *inputs)
    for name, *of_each in zip(RESULTS, actual, exact, plain, strict=True):
        complaint = beyond_bound(*of_each)
        if complaint is not None:
            return f"{name}: {complaint}"
    return None


def slices_of(mask: AttnMask, device: torch.device, engine: str | None = None) -> Attention:
    """The library's attention with a mask."""
    q_ranges, k_ranges, mask_types = mask.to_ranges()
    types = torch.tensor([t.to_int_type() for t in mask_types], dtype=torch.int32, device=device)
    slices = q_ranges.to_tensor(device), k_ranges.to_tensor(device)
    return lambda q, k, v: flex_flash_attn_func(q, k, v, *slices, attn_type_map=types, engine=engine)


def formula(dense: torch.Tensor) -> Attention:
    """The dense formula with a mask."""
    return lambda q, k, v: dense_attention(q, k, v, dense)


def with_gradients(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """``out``, ``lse``, ``dq``, ``dk`` and ``dv``, on the CPU."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*inputs)
    return tuple(t.detach().cpu() for t in (out, lse, *torch.autograd.grad(out, inputs, dout)))


def short(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
