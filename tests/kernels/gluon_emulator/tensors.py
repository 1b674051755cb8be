"""Tensors, pointers, descriptors and shared memory as Gluon's kernels know them, made of torch's tensors.

Layouts are carried along and mean nothing. Global memory is checked at each access: what is not masked is inside.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .multiprocessor import Barrier, Multiprocessor, Operation, Slot, require

LOW_PRECISION = torch.bfloat16, torch.float16


class Layout:
    """Any layout; what it says is kept as attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def get_default_for(cls, shape: Sequence[int], dtype: torch.dtype) -> "Layout":
        return cls(shape, dtype)


class SliceLayout(NamedTuple):
    dim: int
    parent: Any


class Constant:
    """What ``constexpr`` makes of a number: the number, which also has a ``value``."""

    def __new__(cls, value: float) -> Any:
        kind = type(value)
        return type("Constant", (kind,), {"value": property(kind)})(value)


def raw(x: Any) -> Any:
    require(not isinstance(x, Accumulator), "the result of a product is used before it was waited for")
    return x.data if isinstance(x, Tensor) else x


def layout_of(*args: Any) -> Any:
    return next((x.layout for x in args if isinstance(x, Tensor) and x.layout is not None), None)


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors and numbers, in that type in which torch computes; there is no arithmetic in 16 bits."""

    def compute(*args: Any) -> "Tensor":
        numbers = [raw(x) for x in args]
        require(not any(getattr(x, "dtype", None) in LOW_PRECISION for x in numbers), "arithmetic in 16 bits")
        return Tensor(function(*numbers), layout_of(*args))

    return compute


def reduction(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def reduce(x: "Tensor", axis: int) -> "Tensor":
        return Tensor(function(raw(x), axis), SliceLayout(axis, x.layout))

    return reduce


def reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


def natural(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function that of negative numbers is not the same in Python and in Triton."""

    def compute(a: torch.Tensor, b: Any) -> Any:
        require(bool((a >= 0).all()), "division of a negative number")
        return function(a, b)

    return compute


@dataclass(eq=False)
class Tensor:
    """A tensor, or, without dimensions, a number that was not known when the kernel was compiled."""

    data: torch.Tensor
    layout: Any = None

    __add__, __radd__ = elementwise(operator.add), elementwise(reflected(operator.add))
    __sub__, __rsub__ = elementwise(operator.sub), elementwise(reflected(operator.sub))
    __mul__, __rmul__ = elementwise(operator.mul), elementwise(reflected(operator.mul))
    __truediv__, __rtruediv__ = elementwise(operator.truediv), elementwise(reflected(operator.truediv))
    __floordiv__, __mod__ = elementwise(natural(operator.floordiv)), elementwise(natural(operator.mod))
    __and__, __or__, __rshift__ = elementwise(operator.and_), elementwise(operator.or_), elementwise(operator.rshift)
    __rand__, __ror__ = __and__, __or__
    __lt__, __le__, __gt__, __ge__ = (elementwise(f) for f in (operator.lt, operator.le, operator.gt, operator.ge))
    __eq__, __ne__ = elementwise(operator.eq), elementwise(operator.ne)
    __neg__, __invert__ = elementwise(operator.neg), elementwise(operator.invert)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def type(self) -> "Tensor":
        return self

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __getitem__(self, index: Any) -> "Tensor":
        return Tensor(self.data[index], self.layout.parent if isinstance(self.layout, SliceLayout) else None)

    def to(self, dtype: torch.dtype) -> "Tensor":
        return Tensor(self.data.to(dtype), self.layout)

    def reshape(self, shape: Sequence[int]) -> "Tensor":
        return Tensor(self.data.reshape(shape))

    def permute(self, order: Sequence[int]) -> "Tensor":
        return Tensor(self.data.permute(*order))

    def split(self) -> tuple["Tensor", "Tensor"]:
        first, second = self.data.unbind(-1)
        return Tensor(first), Tensor(second)


class Accumulator:
    """What an asynchronous product returns: nothing to compute with before it was waited for."""

    def __init__(self, like: "Tensor | Accumulator", operation: Operation) -> None:
        self.data = torch.empty(0)
        self.layout, self.shape, self.operation = like.layout, like.shape, operation

    @property
    def type(self) -> "Accumulator":
        return self


class Memory:
    """The elements of a tensor in global memory, as kernels that get a pointer to it see them."""

    def __init__(self, x: torch.Tensor) -> None:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        self.flat = x.as_strided((extent,), (1,))
        self.inside = torch.zeros(extent, dtype=torch.bool)
        self.inside.as_strided(x.shape, x.stride(), 0).fill_(True)

    def check(self, index: torch.Tensor) -> None:
        inside = (index >= 0) & (index < len(self.flat))
        require(bool(inside.all()) and bool(self.inside[index].all()), "access outside of a tensor")


@dataclass(frozen=True, eq=False)
class Pointer:
    memory: Memory
    offset: Any = 0

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.flat.dtype)


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Tensor:
    memory, layout = pointer.memory, layout_of(pointer.offset)
    index = torch.as_tensor(raw(pointer.offset))
    if mask is None:
        memory.check(index)
        return Tensor(memory.flat[index], layout)
    mask, index = torch.broadcast_tensors(raw(mask), index)
    memory.check(index[mask])
    result = torch.full(index.shape, other, dtype=memory.flat.dtype)
    result[mask] = memory.flat[index[mask]]
    return Tensor(result, layout)


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    memory = pointer.memory
    index, kept, data = torch.broadcast_tensors(raw(pointer.offset), raw(mask), raw(value))
    memory.check(index[kept])
    memory.flat[index[kept]] = data[kept].to(memory.flat.dtype)


@dataclass(eq=False)
class TensorDescriptor:
    """Tiles of a tensor, for bulk copies."""

    base: torch.Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]
    layout: Layout

    def check(self) -> None:
        """What a GPU demands."""
        size = self.dtype.itemsize
        require(self.base.data_ptr() % 16 == 0, "a descriptor's tensor begins at 16 bytes")
        require(all(n > 0 for n in self.shape), f"a descriptor's tensor has elements, and none has {self.shape}")
        require(all(x > 0 and x * size % 16 == 0 for x in self.strides[:-1]), f"strides {self.strides} in 16 bytes")
        require(self.strides[-1] == 1, f"strides {self.strides} end in 1")
        require(self.block_shape[-1] * size % 16 == 0, f"rows of {self.block_shape} in 16 bytes")
        require(all(n <= 256 for n in self.block_shape), f"a tile {self.block_shape} has at most 256 along each axis")

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def block_type(self) -> SimpleNamespace:
        size = torch.Size(self.block_shape).numel() * self.dtype.itemsize
        return SimpleNamespace(shape=self.block_shape, nbytes=size)

    def tile(self, coord: Sequence[Any], shared: "SharedMemory") -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the tile at ``coord`` that is inside of the tensor, there and in shared memory."""
        require(shared.shape == list(self.block_shape) and shared.dtype == self.dtype, "not a tile of this descriptor")
        coord = [operator.index(x) for x in coord]
        require(coord[-1] * self.dtype.itemsize % 16 == 0, f"a copy from {coord} does not start at 16 bytes")
        axes = list(zip(coord, self.shape, self.block_shape, strict=True))
        inside = tuple(slice(max(x, 0), max(min(x + block, n), 0)) for x, n, block in axes)
        tile = tuple(
            slice(part.start - x, max(part.stop, part.start) - x) for part, x in zip(inside, coord, strict=True)
        )
        everything = self.base.as_strided(self.shape, self.strides)
        return everything[inside], shared.data[tile]


@dataclass(frozen=True, eq=False)
class SharedMemory:
    """A view of shared memory: at first of several slots along the first axis, then of one."""

    multiprocessor: Multiprocessor
    slots: list[Slot]
    data: torch.Tensor

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, index: Any) -> "SharedMemory":
        require(0 <= index < len(self.slots) == len(self.data), f"index {index} of {len(self.slots)}")
        number = operator.index(index)
        return SharedMemory(self.multiprocessor, [self.slots[number]], self.data[number])

    def slice(self, start: int, length: int, dim: int = 0) -> "SharedMemory":
        return self._view(self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> "SharedMemory":
        return self._view(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> "SharedMemory":
        return self._view(self.data.view(shape))

    def load(self, layout: Any) -> Tensor:
        self.multiprocessor.pause("loading")
        for slot in self.slots:
            slot.check_read()
        return Tensor(self.data.clone(), layout)

    def store(self, value: Tensor) -> None:
        data = raw(value)
        require(data.shape == self.data.shape and data.dtype == self.dtype, "what is stored has other sizes or type")
        self.multiprocessor.store(self.slots)
        self.data.copy_(data)

    @property
    def barrier(self) -> Barrier:
        (slot,) = self.slots
        assert slot.barrier is not None
        return slot.barrier

    def _view(self, data: torch.Tensor) -> "SharedMemory":
        return SharedMemory(self.multiprocessor, self.slots, data)
