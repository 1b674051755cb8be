"""A CUDA driver for Triton that launches nothing: kernels are compiled for an H100 that is not there.

All else is as on a GPU, up to the call of the driver: arguments are bound and specialised, descriptors are encoded by
Triton's own code, and compiled kernels are found again.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from magi_attention.functional import ops
from magi_attention.kernels import hopper
from magi_attention.kernels.hopper import launch, row_kernels

NUM_MULTIPROCESSORS = 132
LAUNCHERS = launch._forward, launch._backward, launch._wide_backward, row_kernels._start, row_kernels._finish


class Launch(NamedTuple):
    """What the driver was asked to do.

    Attributes:
        kernel: The kernel's name.
        grid: Number of programs along each axis.
        arguments: By name, compile-time ones too.
        source: What the kernel was compiled from: its ``signature`` has Triton's types of the arguments by name, its
            ``constants`` the values of some by path, and ``attrs`` by path what is promised of others, such as that
            they are multiples of 16.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    source: Any


class FakeCudaDriver:
    """Stands for Triton's active driver.

    Attributes:
        launches: The last ones.
        num_compiled: How many kernels were loaded.
    """

    def __init__(self, keep: int) -> None:
        self.launches: deque[Launch] = deque(maxlen=keep)
        self.num_compiled = 0
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            fill_tma_descriptor=lambda *args: args,  # up to Triton 3.6
            fill_tma_descriptor_tiled=lambda *args: args,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        descriptors = getattr(metadata, "tensordesc_meta", None)
        encode = nvidia.wrap_handle_tensordesc(lambda *args: None, source.signature, descriptors)
        # Up to Triton 3.6 a kernel's arguments follow those of the driver, later they are one tuple at the end.
        num_others = getattr(nvidia, "_BASE_ARGS_FORMAT_LEN", None)

        def run(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            args = rest[3:]  # after what hooks are told, and the hooks
            encode(*range(num_others), *args) if num_others else encode(args)
            named = dict(zip(source.fn.arg_names, args, strict=True))
            self.launches.append(Launch(metadata.name, (x, y, z), named, source))

        return run

    def _load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        self.num_compiled += 1
        return 1, 1, 168, 0, 1024  # module, function, registers, spilled bytes, most threads


@contextmanager
def fake_h100(keep: int = 200) -> Iterator[FakeCudaDriver]:
    """The hopper engine takes tensors of the CPU, and launches go to the driver that this gives.

    It keeps the last ``keep`` launches. It begins with no kernel compiled, and leaves none behind that a GPU's driver
    could get.
    """
    driver = FakeCudaDriver(keep)
    before = triton.runtime.driver._active
    with ExitStack() as stack:
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        triton.runtime.driver.set_active(driver)
        stack.callback(ops._choose_engine.cache_clear)
        stack.enter_context(patch.object(hopper, "refusal", lambda device, dtype, head_dim, head_dim_v: None))
        stack.enter_context(patch.object(launch, "_num_multiprocessors", lambda device: NUM_MULTIPROCESSORS))
        for launcher in LAUNCHERS:
            kernel = launcher._kernel
            stack.enter_context(patch.object(kernel, "device_caches", defaultdict(kernel.create_binder)))
            compiled = stack.enter_context(patch.dict(launcher._compiled, clear=True))
            stack.callback(_forget_modules, compiled)
        ops._choose_engine.cache_clear()
        yield driver


def _forget_modules(compiled: dict[Any, Any]) -> None:
    """So that Triton does not ask another driver to unload them."""
    for kernel in compiled.values():
        kernel.module = None
