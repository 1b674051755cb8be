"""The plans that keys stand for, least recently used first out."""

import atexit
from collections import OrderedDict

from magi_attention.mask.integers import as_int
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.runtime import DistAttnRuntime

DEFAULT_CAPACITY = 128

ON_DEVICES = 16
"""Of how many plans devices hold what runs are made of: some megabytes for a million tokens."""


class RuntimeCache:
    """Maps keys to runtimes. Forgetting one frees its plan; a backward pass that still needs it keeps its own hold.

    Of all but the ones used last, the memory of devices is freed already.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.capacity = capacity
        self._runtimes: OrderedDict[DistAttnRuntimeKey, DistAttnRuntime] = OrderedDict()
        self._on_devices: OrderedDict[DistAttnRuntimeKey, DistAttnRuntime] = OrderedDict()
        self._most_recent: DistAttnRuntimeKey | None = None

    def __len__(self) -> int:
        return len(self._runtimes)

    def find(self, key: DistAttnRuntimeKey) -> DistAttnRuntime | None:
        """The runtime of ``key``, or None."""
        runtime = self._runtimes.get(key)
        if runtime is not None and key is not self._most_recent:
            self._use(key, runtime)
        return runtime

    def get(self, key: DistAttnRuntimeKey) -> DistAttnRuntime:
        """The runtime of ``key``.

        Raises:
            TypeError: If ``key`` is no key.
            ValueError: If its plan is not in the cache (any more).
        """
        if not isinstance(key, DistAttnRuntimeKey):
            raise TypeError(
                f"key must be a DistAttnRuntimeKey, as magi_attn_flex_key returns, not a {type(key).__name__}"
            )
        runtime = self.find(key)
        if runtime is None:
            raise ValueError(
                f"the plan of this key ({key.mask!r}, cp_size {key.cp_size}) is not in the cache: it was evicted by "
                f"the {self.capacity} keys used last, or made in another process. Make the key again, or raise the "
                "capacity with magi_attention.api.set_plan_cache_capacity"
            )
        return runtime

    def put(self, key: DistAttnRuntimeKey, runtime: DistAttnRuntime) -> None:
        """Add a runtime, as the most recent."""
        self._runtimes[key] = runtime
        self._use(key, runtime)
        self._evict()

    def set_capacity(self, capacity: int) -> None:
        """How many plans are kept; the least recently used beyond that are dropped.

        Raises:
            TypeError: If ``capacity`` is not an integer.
            ValueError: If it is less than 1.
        """
        capacity = as_int(capacity, "capacity")
        if capacity < 1:
            raise ValueError(f"the plan cache needs a capacity of at least 1, not {capacity}")
        self.capacity = capacity
        self._evict()

    def most_recent(self) -> DistAttnRuntimeKey:
        """The key last made or used.

        Raises:
            ValueError: If there is none yet.
        """
        if self._most_recent is None:
            raise ValueError("no key has been made yet: call magi_attn_varlen_key or magi_attn_flex_key first")
        return self._most_recent

    def clear(self) -> None:
        """Forget everything."""
        self._runtimes.clear()
        self._on_devices.clear()
        self._most_recent = None

    def _use(self, key: DistAttnRuntimeKey, runtime: DistAttnRuntime) -> None:
        self._most_recent = key
        for used in (self._runtimes, self._on_devices):
            used[key] = runtime
            used.move_to_end(key)
        if len(self._on_devices) > ON_DEVICES:
            self._on_devices.popitem(last=False)[1].free_devices()

    def _evict(self) -> None:
        while len(self._runtimes) > self.capacity:
            key, _ = self._runtimes.popitem(last=False)
            self._on_devices.pop(key, None)


runtimes = RuntimeCache()
# A group that is kept until the interpreter is gone may abort the process: its threads still let go of tensors then.
atexit.register(runtimes.clear)
