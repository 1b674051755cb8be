"""Range tensors to engines' schedules, compiled once and found again without reading the tensors."""

import functools
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from magi_attention.kernels.captured import keep_if_captured
from magi_attention.kernels.engine import Engine
from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import IntArray
from magi_attention.mask.ranges import check_within

CAPACITY = 16
"""How many schedules are kept; the least recently used beyond that are dropped."""


@dataclass(frozen=True)
class MaskTensors:
    """The slices of a mask as tensors, and the size of the mask.

    Attributes:
        q_ranges: The range of each slice's queries, ``(n, 2)``.
        k_ranges: The range of its keys, ``(n, 2)``.
        attn_type_map: Its mask type, ``(n,)``; None for all full.
        num_rows: Number of queries.
        num_keys: Number of keys.
    """

    q_ranges: torch.Tensor
    k_ranges: torch.Tensor
    attn_type_map: torch.Tensor | None
    num_rows: int
    num_keys: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        given = (self.q_ranges, self.k_ranges)
        return given if self.attn_type_map is None else (*given, self.attn_type_map)


@dataclass(frozen=True)
class CompiledMask:
    """An engine's schedule, and the longest range of queries and of keys."""

    schedule: Any
    longest_q: int
    longest_k: int


class _Snapshot:
    """Which tensor was read, and when. It does not keep the tensor alive."""

    def __init__(self, x: torch.Tensor) -> None:
        self._tensor, self._version, self._address = weakref.ref(x), x._version, x.data_ptr()

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is that tensor, and nothing has been written to it since."""
        return self._tensor() is x and self._version == x._version and self._address == x.data_ptr()


class _SnapshotCache:
    """Compiled masks by the tensors that they were read from, for any number of threads."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Any, ...], tuple[list[_Snapshot], CompiledMask]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, engine: Engine, mask: MaskTensors) -> CompiledMask | None:
        name = self._name(engine, mask)
        with self._lock:
            snapshots, compiled = self._entries.get(name, ([], None))
            if compiled is None or not all(s.is_of(x) for s, x in zip(snapshots, mask.tensors, strict=True)):
                return None
            self._entries.move_to_end(name)
            return compiled

    def put(self, engine: Engine, mask: MaskTensors, snapshots: list[_Snapshot], compiled: CompiledMask) -> None:
        name = self._name(engine, mask)
        with self._lock:
            self._entries[name] = snapshots, compiled
            self._entries.move_to_end(name)
            while len(self._entries) > CAPACITY:
                self._entries.popitem(last=False)

    @staticmethod
    def _name(engine: Engine, mask: MaskTensors) -> tuple[Any, ...]:
        return engine, mask.num_rows, mask.num_keys, *map(id, mask.tensors)


_snapshots = _SnapshotCache()


def compile_mask(engine: Engine, mask: MaskTensors) -> CompiledMask:
    """The schedule of a mask.

    A mask is found again by its tensors, as long as nothing is written to them; else they are read, which waits for
    their device, and it is found by its slices. Inference tensors do not count writes, and are read every time.

    Raises:
        ValueError: If a range is reversed or out of bounds, a type is unknown, or two slices share a cell.
    """
    if any(x.is_inference() for x in mask.tensors):
        return _read_and_compile(engine, mask)
    compiled = _snapshots.find(engine, mask)
    if compiled is None:
        snapshots = [_Snapshot(x) for x in mask.tensors]
        compiled = _read_and_compile(engine, mask)
        _snapshots.put(engine, mask, snapshots, compiled)
    return keep_if_captured(compiled, mask.q_ranges.device)


def _read_and_compile(engine: Engine, mask: MaskTensors) -> CompiledMask:
    q_ranges, k_ranges = _read(mask.q_ranges), _read(mask.k_ranges)
    codes = np.zeros(len(q_ranges), np.int64) if mask.attn_type_map is None else _read(mask.attn_type_map)
    unknown = np.flatnonzero((codes < 0) | (codes > 3))
    if len(unknown):
        n = unknown[0]
        raise ValueError(f"attn_type_map[{n}] is {codes[n]}: use 0 full, 1 causal, 2 inverse causal or 3 bi-causal")
    for name, ranges, rows in (("q", q_ranges, mask.num_rows), ("k", k_ranges, mask.num_keys)):
        check_within(ranges, f"{name}_ranges", rows, f"{name} has {rows} tokens, which come first, before heads")
    slices = (q_ranges.tobytes(), k_ranges.tobytes(), codes.tobytes())
    return _compile(engine, slices, mask.num_rows, mask.num_keys)


@functools.lru_cache(CAPACITY)
def _compile(engine: Engine, slices: tuple[bytes, bytes, bytes], num_rows: int, num_keys: int) -> CompiledMask:
    """Compile slices, given as the bytes of int64 arrays so that equal ones are found again."""
    q_ranges, k_ranges = (np.frombuffer(x, np.int64).reshape(-1, 2) for x in slices[:2])
    mask = AttnMask.from_slices(q_ranges, k_ranges, np.frombuffer(slices[2], np.int64).tolist(), num_rows, num_keys)
    longest_q, longest_k = (int((x[:, 1] - x[:, 0]).max(initial=0)) for x in (q_ranges, k_ranges))
    return CompiledMask(engine.schedule(mask.bands, num_rows, num_keys), longest_q, longest_k)


def _read(x: torch.Tensor) -> IntArray:
    return x.cpu().numpy().astype(np.int64)
