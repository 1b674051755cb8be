"""Integers and flags as callers give them, in Python, numpy or a tensor: checked, and turned into plain values.

To check an integer is to convert it: what a caller gave is not used again. Integers of numpy and torch would pass a
check and then count in their own way: ``-np.uint32(500)`` is 4294966796, and what is made of a tensor is a tensor.
"""

import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import IntArray

if TYPE_CHECKING:
    import torch

IntegersLike = Union[Sequence[int], NDArray[Any], "torch.Tensor"]


def as_int(value: Any, name: str) -> int:
    """A Python int from any integer but a bool.

    Raises:
        TypeError: If ``value`` is not an integer.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    if not is_bool:
        with suppress(TypeError):  # not all that has __index__ is an integer: a tensor of floats has it, too
            return operator.index(value)
    raise TypeError(f"{name} must be an integer, got {value!r}")


def as_flag(value: Any, name: str) -> bool:
    """A Python bool; what merely counts as true is more likely an argument in the wrong place.

    Raises:
        TypeError: If ``value`` is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def as_length(value: Any, name: str) -> int:
    """A Python int that is not negative.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is negative.
    """
    length = as_int(value, name)
    if length < 0:
        raise ValueError(f"{name} must not be negative, got {length}")
    return length


def as_size(value: Any, name: str) -> int:
    """A Python int that is at least 1.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is less than 1.
    """
    size = as_int(value, name)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, not {size}")
    return size


def as_limit(value: Any, name: str) -> int:
    """A Python int that is not negative, or -1 for no limit.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is below -1.
    """
    limit = as_int(value, name)
    if limit < -1:
        raise ValueError(f"{name} must be at least 0, or -1 for no limit, got {limit}")
    return limit


def as_window(window_size: IntegersLike) -> tuple[int, int]:
    """``(left, right)`` as Python ints, each at least 0, or -1 for no limit.

    Raises:
        TypeError: If one is not an integer.
        ValueError: If ``window_size`` is no pair, or one is below -1.
    """
    pair = window_size if isinstance(window_size, Sequence) else getattr(window_size, "tolist", lambda: None)()
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (as_limit(size, f"window_size[{n}]") for n, size in enumerate(pair))
    return left, right


def as_array(values: Any, name: str) -> NDArray[Any]:
    """Numbers in a nested sequence, array or tensor as an array; it may share memory with ``values``.

    Raises:
        ValueError: If nested sequences differ in length.
    """
    if hasattr(values, "cpu"):  # a tensor, perhaps of another device
        values = values.cpu()
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} must be rectangular, but its rows differ in length") from None


def as_int_array(values: Any, name: str) -> IntArray:
    """Integers in a nested sequence, array or tensor as an int64 array; it may share memory with ``values``.

    Raises:
        TypeError: If they are not integers.
        ValueError: If nested sequences differ in length.
    """
    array = as_array(values, name)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array.astype(np.int64, copy=False)


def as_lengths(values: IntegersLike, name: str) -> IntArray:
    """One row of lengths as an int64 array.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they are not one row, or one is negative.
    """
    lengths = as_int_array(values, name)
    if lengths.ndim != 1:
        raise ValueError(f"{name} must be one row of lengths, got shape {lengths.shape}")
    negative = np.flatnonzero(lengths < 0)
    if len(negative):
        raise ValueError(f"{name}[{negative[0]}] must not be negative, got {lengths[negative[0]]}")
    return lengths


def as_cu_seqlens(cu_seqlens: IntegersLike, name: str) -> IntArray:
    """Cumulative document lengths as an int64 array, checked.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they are not one row that begins at 0 and never decreases.
    """
    array = as_int_array(cu_seqlens, name)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must have shape (documents + 1,), got shape {array.shape}")
    if array[0] != 0:
        hint = "lengths of documents become borders by builders.cu_seqlens_from_lengths"
        raise ValueError(f"{name} must begin at 0, got {name}[0] = {array[0]}; {hint}")
    falls = np.flatnonzero(array[1:] < array[:-1])
    if len(falls):
        n = int(falls[0])
        raise ValueError(f"{name} must not decrease, got {name}[{n}] = {array[n]}, {name}[{n + 1}] = {array[n + 1]}")
    return array
