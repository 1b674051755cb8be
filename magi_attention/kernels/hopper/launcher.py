"""Launcher: a kernel, compiled once for each kind of arguments, and launched with little work for the host.

``kernel[grid](*args, **constants)`` does the same, with two differences that this is for. It describes all arguments in
words at each launch, which takes the host longer than some masks take the GPU. And it compiles for each integer whether
it is 1 and whether it is a multiple of 16, also inside of tuples, where ``do_not_specialize`` has no effect: integers
that change from mask to mask would have kernels compiled again and again in the middle of a training run. Here a kernel
is compiled for strides only, which tell how wide its loads and stores can be, and takes any value of other integers.
"""

import functools
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from magi_attention.kernels.hopper.pipeline import Rows

GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
ANY_INT = 3, (1 << 32) + 3
"""What stands for integers of 32 and of 64 bits when a kernel is compiled: neither 1 nor multiples of 16."""


class Tiles(TensorDescriptor):  # type: ignore[misc]
    """A descriptor for bulk copies of tiles, made by :func:`tiles`."""

    def __post_init__(self) -> None:
        """What a descriptor demands of its tensor holds for those that :mod:`launch` makes them of."""


class Launcher:
    """Launches a kernel, and compiles it at the first arguments of a kind.

    Args:
        kernel: Made by ``triton.jit`` or ``gluon.jit``. Its compile-time arguments are the last ones.
        options: Options of the compiler.
    """

    def __init__(self, kernel: Any, **options: int) -> None:
        self._kernel, self._options = kernel, options
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
        """Launch on the current device and stream.

        Args:
            grid: Number of programs along each axis.
            args: The arguments up to the compile-time ones: tensors, :class:`Tiles`, numbers, None, or named tuples
                of those.
            constants: The compile-time arguments, in the kernel's order.
        """
        device = triton.runtime.driver.active.get_current_device()
        kind = (device, *map(_kind, args), *constants.items())
        compiled = self._compiled.get(kind)
        if compiled is None:
            compiled = self._compiled[kind] = self._compile(args, constants)
        compiled[grid](*args, *constants.values())

    def _compile(self, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        names = self._kernel.arg_names
        assert names[len(args) :] == list(constants), f"{self._kernel.__name__} takes {names}, then {list(constants)}"
        assert [p.is_constexpr for p in self._kernel.params] == [False] * len(args) + [True] * len(constants)
        return self._kernel.run(*map(_with_any_ints, args), grid=(1, 1, 1), warmup=True, **constants, **self._options)


def tiles(x: torch.Tensor, tile: tuple[int, ...]) -> Tiles:
    """For bulk copies of tiles of ``x``, whose shape has no 0, whose last stride is 1, and whose start and other
    strides are at multiples of 16 bytes."""
    return Tiles(x, x.shape, x.stride(), *_block(x.dtype, tile))


def rows(x: torch.Tensor) -> Rows:
    """For loads and stores of single rows of ``x`` ``(tokens, heads, head_dim)``, whose last stride is 1."""
    return Rows(x, x.stride(0), x.stride(1))


@functools.cache
def _block(dtype: torch.dtype, tile: tuple[int, ...]) -> tuple[list[int], gl.NVMMASharedLayout]:
    return list(tile), gl.NVMMASharedLayout.get_default_for(list(tile), GLUON_TYPES[dtype])


def _kind(x: Any) -> Any:
    """What a kernel is compiled for, of an argument: all that Triton tells apart, but for integers that may be any."""
    kind = type(x)  # most are exactly of these types, and this is the host's time
    if kind is int:
        return _is_long(x)
    if kind is torch.Tensor:
        return x.dtype, x.data_ptr() % 16 == 0
    if kind is Tiles:
        return x.base.dtype, *x.block_shape
    if kind is float or x is None:
        return kind
    if kind is Rows:
        return _kind(x.ptr), _kind_of_stride(x.token_stride), _kind_of_stride(x.head_stride)
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    raise TypeError(f"a kernel takes no {kind.__name__}")


def _kind_of_stride(n: int) -> tuple[bool, bool, bool]:
    return n == 1, n % 16 == 0, _is_long(n)


def _is_long(n: int) -> bool:
    return not -(1 << 31) <= n < 1 << 31


def _with_any_ints(x: Any) -> Any:
    """The argument, integers that may be any replaced by such as are nothing special."""
    if isinstance(x, Rows):
        return x
    if isinstance(x, tuple):
        return type(x)(*map(_with_any_ints, x))
    return ANY_INT[_is_long(x)] if isinstance(x, int) else x
