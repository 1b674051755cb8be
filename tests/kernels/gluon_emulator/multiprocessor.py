"""A multiprocessor of a Hopper GPU on a CPU: shared memory, barriers, partitions of warps, and what works beside them.

Partitions are threads, of which one runs at a time. Wherever one does something that others can notice, it is chosen by
chance who goes on: a partition that is not held up, a bulk copy, or a product of the tensor cores. So copies and
products come as late as can be, in one run or another. What nobody wrote is NaN, and it is an error to

* read what a copy may yet write, or to write what a copy or a product may yet read,
* have a copy or a product read what was stored without a fence in between,
* arrive at a barrier more often than it counts, or to leave copies or products behind at the end,
* wait for what cannot come.
"""

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


class EmulationError(Exception):
    """A kernel did what a GPU does not define, or what would hang."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise EmulationError(message)


class Abandoned(BaseException):
    """Ends a partition because another one failed."""


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced are there."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = 0
        self.phase = 0

    def arrive(self, count: int) -> None:
        require(count <= self.missing, f"{count} more arrive at a barrier where {self.missing} are missing")
        self.missing -= count
        self._end_phase()

    def expect(self, size: int) -> None:
        """Announce bytes, and arrive."""
        self.bytes += size
        self.arrive(1)

    def receive(self, size: int) -> None:
        self.bytes -= size
        self._end_phase()

    def passed(self, parity: int) -> bool:
        """Whether the last phase of this parity has ended; before the first phase comes one of parity 1."""
        return self.phase & 1 != parity

    def _end_phase(self) -> None:
        if self.missing == self.bytes == 0:
            self.missing = self.count
            self.phase += 1


@dataclass(eq=False)
class Slot:
    """A part of shared memory that is used as a whole."""

    barrier: Barrier | None = None
    readers: list[str] = field(default_factory=list)  # copies and products that are not done
    writer: str | None = None  # a copy that is not done
    storer: "Partition | None" = None  # who itself stored here last; None for the program before it parts
    fenced: bool = True  # and whether it has fenced since

    def check_read(self) -> None:
        require(self.writer is None, f"read before {self.writer} is done")

    def check_fenced(self) -> None:
        require(self.fenced, "a copy or product uses what was stored without a fence")

    def check_write(self) -> None:
        self.check_read()
        require(not self.readers, f"written before {self.readers} are done")


@dataclass(eq=False)
class Operation:
    """A copy or a product: issued by a partition, and done some time later."""

    what: str
    perform: Callable[[], object]
    reads: Sequence[Slot] = ()
    writes: Sequence[Slot] = ()
    signals: Sequence[Slot] = ()  # that have a barrier
    waited_for: bool = False

    def issue(self) -> None:
        for slot in self.reads:
            slot.check_read()
            slot.check_fenced()
            slot.readers.append(self.what)
        for slot in self.writes:
            slot.check_write()
            slot.writer = self.what
        for slot in self.signals:
            slot.check_fenced()

    def complete(self) -> None:
        self.perform()
        for slot in self.reads:
            slot.readers.remove(self.what)
        for slot in self.writes:
            slot.writer = None


@dataclass(eq=False)
class Partition:
    """Some warps with their own program counter."""

    name: str
    body: Callable[[], None]
    weight: float
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None
    ready: Callable[[], bool] = lambda: True
    reason: str = "start"
    frame: FrameType | None = None  # where it gave its reason
    done: bool = False
    products: deque[Operation] = field(default_factory=deque)  # of the tensor cores, which do them in order
    unwaited: deque[Operation] = field(default_factory=deque)  # products, done or not
    stores: list[Operation] = field(default_factory=list)  # copies from shared memory

    def where(self) -> str:
        """The kernel's lines at which it stands."""
        frame, lines = self.frame, []
        while frame is not None:
            if "/kernels/hopper/" in frame.f_code.co_filename:
                lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        return f"{self.name} at {' > '.join(reversed(lines))}, {self.reason}"


class Multiprocessor:
    """Runs one program."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._slots: list[Slot] = []
        self._copies: list[Operation] = []
        self._partitions: list[Partition] = []
        self._current: Partition | None = None
        self._finished = threading.Semaphore(0)
        self._failure: BaseException | None = None
        # Now and then, someone is much slower than the others.
        self._copy_weight, self._product_weight = self._weight(), self._weight()

    def _weight(self) -> float:
        return float(10 ** self._rng.uniform(-2, 0))

    def run(self, bodies: Sequence[tuple[str, Callable[[], None]]]) -> None:
        """Run partitions side by side until all are at their end."""
        self._partitions = [Partition(name, body, self._weight()) for name, body in bodies]
        for partition in self._partitions:
            partition.thread = threading.Thread(target=self._main, args=(partition,), daemon=True)
            partition.thread.start()
        self._hand_over()
        self._finished.acquire()
        for partition in self._partitions:
            assert partition.thread is not None
            partition.thread.join()
        self._current = None
        if self._failure is not None:
            raise self._failure
        require(not self._copies, f"nobody waited for {[x.what for x in self._copies]}")

    def allocate(self, num_slots: int) -> list[Slot]:
        """Shared memory to keep account of."""
        slots = [Slot() for _ in range(num_slots)]
        self._slots += slots
        return slots

    def pause(self, reason: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, and come back when ``ready``."""
        me = self._current
        if me is None:  # the program has not parted yet
            assert ready()
            return
        me.reason, me.ready, me.frame = reason, ready, sys._getframe()
        if self._hand_over() is not me:
            me.turn.acquire()
        me.frame = None
        if self._failure is not None:
            raise Abandoned

    @property
    def current(self) -> Partition:
        """The partition that runs."""
        assert self._current is not None, "copies and products belong to partitions"
        return self._current

    def store(self, slots: Sequence[Slot]) -> None:
        """Note that the partition stores to shared memory by itself."""
        self.pause("storing")
        for slot in slots:
            slot.check_write()
            slot.storer, slot.fenced = self._current, False

    def fence(self) -> None:
        """Let copies and products see what this partition has stored."""
        for slot in self._slots:
            slot.fenced |= slot.storer is self._current

    def copy(self, operation: Operation) -> None:
        """Start a copy."""
        self.pause(operation.what)
        operation.issue()
        self._copies.append(operation)
        if operation.reads:
            self.current.stores.append(operation)

    def wait_for_stores(self, pending: int) -> None:
        """Wait until all but ``pending`` of this partition's copies from shared memory have read it."""
        me = self.current
        self.pause(f"waiting for {len(me.stores)} stores", lambda: len(me.stores) <= pending)

    def multiply(self, operation: Operation) -> None:
        """Start a product."""
        self.pause(operation.what)
        operation.issue()
        self.current.products.append(operation)
        self.current.unwaited.append(operation)

    def wait_for_products(self, pending: int) -> None:
        """Wait until all but ``pending`` of this partition's products are done."""
        me = self.current
        self.pause(f"waiting for {len(me.products)} products", lambda: len(me.products) <= pending)
        while len(me.unwaited) > pending:
            me.unwaited.popleft().waited_for = True

    def _main(self, me: Partition) -> None:
        me.turn.acquire()
        try:
            if self._failure is None:
                me.body()
                require(not me.unwaited and not me.stores, f"{me.name} ends before its products and stores do")
        except Abandoned:
            pass
        except BaseException as error:
            self._failure = self._failure or error
        me.done = True
        self._hand_over()

    def _hand_over(self) -> Partition | None:
        """Choose who runs next, and let it."""
        try:
            chosen = self._choose()
        except BaseException as error:
            self._failure = self._failure or error
            chosen = self._choose()
        if chosen is None:
            self._finished.release()
        elif chosen is not self._current:
            self._current = chosen
            chosen.turn.release()
        return chosen

    def _choose(self) -> Partition | None:
        """A partition that can go on, after those copies and products that have their turn before it."""
        left = [p for p in self._partitions if not p.done]
        while left and self._failure is None:
            weights: list[tuple[Any, float]] = [(p, p.weight) for p in left if p.ready()]
            weights += [(p.products, self._product_weight) for p in left if p.products]
            weights += [(self._copies, self._copy_weight)] if self._copies else []
            if not weights:
                raise EmulationError("deadlock:\n" + "\n".join(p.where() for p in left))
            actors, weight = zip(*weights, strict=True)
            chosen = self._rng.choices(actors, weight)[0]
            if isinstance(chosen, Partition):
                return chosen
            if chosen is self._copies:
                self._do_a_copy()
            else:
                chosen[0].complete()
                chosen.popleft()
        return left[0] if left else None

    def _do_a_copy(self) -> None:
        copy = self._copies.pop(self._rng.randrange(len(self._copies)))
        copy.complete()
        for partition in self._partitions:
            if copy in partition.stores:
                partition.stores.remove(copy)
