"""A device that runs the programs of a kernel one after the other, and what kernels do with it."""

import itertools
import operator
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .multiprocessor import Barrier, Multiprocessor, Operation, require
from .tensors import Accumulator, Layout, Memory, Pointer, SharedMemory, Tensor, TensorDescriptor


class Device:
    """One multiprocessor, which starts anew for each program.

    Args:
        seed: Of all that is left to chance.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._multiprocessor = Multiprocessor(self._rng)
        self._grid: tuple[int, ...] = ()
        self._program: tuple[int, ...] = ()

    def launch(self, kernel: Callable[..., None], grid: tuple[int, ...], args: Sequence[Any]) -> None:
        values = [_argument(x) for x in args]
        self._grid = grid
        for self._program in itertools.product(*map(range, grid)):
            self._multiprocessor = Multiprocessor(self._rng)
            kernel(*values)

    def program_id(self, axis: int) -> Tensor:
        return Tensor(torch.tensor(self._program[axis], dtype=torch.int32))

    def num_programs(self, axis: int) -> Tensor:
        return Tensor(torch.tensor(self._grid[axis], dtype=torch.int32))

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Layout) -> SharedMemory:
        fill = torch.nan if dtype.is_floating_point else -1
        slots = self._multiprocessor.allocate(shape[0])
        return SharedMemory(self._multiprocessor, slots, torch.full(list(shape), fill, dtype=dtype))

    def warp_specialize(
        self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], num_warps: list[int], registers: list[int]
    ) -> None:
        require(len(parts) - 1 == len(num_warps) == len(registers), "the first part has the kernel's own warps")
        self._multiprocessor.run(
            [(f"{function.__name__} {n}", partial(function, *args)) for n, (function, args) in enumerate(parts)]
        )

    def fence_async_shared(self) -> None:
        self._multiprocessor.fence()

    def init_barrier(self, barrier: SharedMemory, count: int) -> None:
        (slot,) = barrier.slots
        require(slot.barrier is None, "a barrier is initialised once")
        self._multiprocessor.store([slot])
        slot.barrier = Barrier(count)

    def arrive(self, barrier: SharedMemory, *, count: int) -> None:
        self._multiprocessor.pause("arriving")
        barrier.barrier.arrive(count)

    def expect(self, barrier: SharedMemory, size: int) -> None:
        self._multiprocessor.pause("announcing bytes")
        barrier.barrier.expect(size)

    def wait(self, barrier: SharedMemory, parity: Any) -> None:
        parity = operator.index(parity)
        self._multiprocessor.pause(f"waiting for parity {parity}", lambda: barrier.barrier.passed(parity))

    def load_tile(
        self, descriptor: TensorDescriptor, coord: list[Any], barrier: SharedMemory, result: SharedMemory
    ) -> None:
        source, target = descriptor.tile(coord, result)

        def perform() -> None:
            result.data.zero_()
            target.copy_(source)
            barrier.barrier.receive(descriptor.block_type.nbytes)

        self._multiprocessor.copy(Operation("a load", perform, writes=result.slots, signals=barrier.slots))

    def store_tile(self, descriptor: TensorDescriptor, coord: list[Any], tile: SharedMemory) -> None:
        target, source = descriptor.tile(coord, tile)
        self._multiprocessor.copy(Operation("a bulk store", partial(target.copy_, source), reads=tile.slots))

    def add_tile(self, descriptor: TensorDescriptor, coord: list[Any], tile: SharedMemory) -> None:
        target, source = descriptor.tile(coord, tile)
        self._multiprocessor.copy(Operation("a bulk addition", partial(target.add_, source), reads=tile.slots))

    def store_wait(self, pending: int) -> None:
        self._multiprocessor.wait_for_stores(pending)

    def warpgroup_mma(
        self, a: Any, b: SharedMemory, acc: Any, *, use_acc: bool = True, is_async: bool = False
    ) -> Accumulator:
        require(is_async, "only asynchronous products are emulated")
        (m, k), (k_b, n) = a.shape, b.shape
        require(k == k_b and acc.shape == [m, n] and a.dtype == b.dtype, f"product of {a.shape} and {b.shape}")
        operands = [*(a.slots if isinstance(a, SharedMemory) else ()), *b.slots]

        def perform() -> None:
            product = a.data.float() @ b.data.float()
            result.data = acc.data + product if use_acc else product

        result = Accumulator(acc, Operation("a product", perform, reads=operands))
        self._multiprocessor.multiply(result.operation)
        return result

    def warpgroup_mma_wait(self, pending: int, deps: list[Any]) -> Any:
        """What is done of ``deps`` are tensors now."""
        self._multiprocessor.wait_for_products(pending)
        done = (isinstance(x, Accumulator) and x.operation.waited_for for x in deps)
        results = tuple(Tensor(x.data, x.layout) if ready else x for x, ready in zip(deps, done, strict=True))
        return results[0] if len(results) == 1 else results


def _argument(x: Any) -> Any:
    """A kernel's argument as the kernel sees it."""
    if isinstance(x, TensorDescriptor):
        x.check()
        return x
    if isinstance(x, tuple):
        require(not any(isinstance(y, TensorDescriptor) for y in x), "descriptors cannot be in tuples")
        return type(x)(*map(_argument, x))
    return Pointer(Memory(x)) if isinstance(x, torch.Tensor) else x
