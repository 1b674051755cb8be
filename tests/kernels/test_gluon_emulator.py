"""The emulator notices what kernels must not do: in a ring of one tile, right and with mistakes, and one by one."""

import random
import re
from collections.abc import Callable

import pytest
import torch

from .gluon_emulator.device import Device
from .gluon_emulator.multiprocessor import Barrier, EmulationError, Multiprocessor, Operation
from .gluon_emulator.tensors import Layout, Memory, Pointer, Tensor, TensorDescriptor, load, store

TILES = 5
SEEDS = range(40)
LAYOUT = Layout()


def pass_tiles(seed: int, mistake: str = "") -> list[int]:
    """What the products of a consumer find where a producer has tiles copied to."""
    multiprocessor = Multiprocessor(random.Random(seed))
    (slot,) = multiprocessor.allocate(1)
    full, empty = Barrier(1), Barrier(1)
    tiles, found = [-1], []

    def wait(barrier: Barrier, parity: int) -> None:
        multiprocessor.pause("waiting", lambda: barrier.passed(parity))

    def arrive(count: int) -> None:
        multiprocessor.pause("arriving")
        empty.arrive(count)

    def bring(tile: int) -> None:
        tiles[0] = tile
        full.receive(8)

    def produce() -> None:
        for tile in range(TILES):
            if mistake != "loads into a full tile":
                wait(empty, tile & 1 if mistake == "wrong parity" else (tile & 1) ^ 1)
            multiprocessor.pause("announcing")
            full.expect(16 if mistake == "expects too much" else 8)
            multiprocessor.copy(Operation("a load", lambda n=tile: bring(n), writes=[slot]))

    def consume() -> None:
        for tile in range(TILES - (mistake == "leaves a tile")):
            if mistake != "reads an empty tile":
                wait(full, tile & 1)
            multiprocessor.multiply(Operation("a product", lambda: found.append(tiles[0]), reads=[slot]))
            if mistake == "arrives before its product is done":
                arrive(1)
            multiprocessor.wait_for_products(1 if mistake == "does not wait for its product" else 0)
            if mistake not in ("never arrives", "arrives before its product is done"):
                arrive(2 if mistake == "arrives twice" else 1)

    multiprocessor.run([("consumer", consume), ("producer", produce)])
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_works_whoever_is_faster(seed: int) -> None:
    assert pass_tiles(seed) == list(range(TILES))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("loads into a full tile", "read before a load is done|written before .'a product'. are done"),
        ("wrong parity", "deadlock:\nconsumer .*\nproducer "),
        ("expects too much", "deadlock"),
        ("leaves a tile", "nobody waited for .'a load'."),
        ("reads an empty tile", "read before a load is done|written before .'a product'. are done"),
        ("arrives before its product is done", "written before .'a product'. are done"),
        ("does not wait for its product", "written before .'a product'. are done|ends before its products"),
        ("never arrives", "deadlock"),
        ("arrives twice", "2 more arrive at a barrier where 1 are missing"),
    ],
)
def test_a_mistake_is_noticed(mistake: str, message: str) -> None:
    messages = []
    for seed in SEEDS:
        try:
            pass_tiles(seed, mistake)
        except EmulationError as error:
            messages.append(str(error))
    assert any(re.search(message, x) for x in messages), messages


def index(*numbers: int) -> Tensor:
    return Tensor(torch.tensor(numbers))


def test_memory_outside_of_a_tensor() -> None:
    """Behind its end, before its start, and between its rows; but masked elements may be anywhere."""
    x = torch.arange(20.0).view(4, 5)[1:3, 1:4]
    pointer = Pointer(Memory(x))
    assert load(pointer + index(0, 2, 7)).data.tolist() == [6, 8, 13]
    assert load(pointer + index(0, 900), mask=index(1, 0) == 1, other=-1.0).data.tolist() == [6, -1]
    for far in (-1, 3, 8):
        with pytest.raises(EmulationError, match="outside"):
            load(pointer + index(0, far))
        with pytest.raises(EmulationError, match="outside"):
            store(pointer + index(far), index(0), index(1) == 1)


def in_a_program(body: Callable[[], None], device: Device) -> None:
    device.launch(lambda: device.warp_specialize([(body, ())], [], []), (1,), ())


def test_a_product_is_not_read_before_it_was_waited_for() -> None:
    device = Device(0)

    def body() -> None:
        b = device.allocate_shared_memory(torch.bfloat16, [1, 8, 8], LAYOUT).index(0)
        b.store(Tensor(torch.eye(8).bfloat16()))
        device.fence_async_shared()
        a, acc = Tensor(torch.ones(8, 8, dtype=torch.bfloat16)), Tensor(torch.ones(8, 8))
        first = device.warpgroup_mma(a, b, acc, is_async=True)
        second = device.warpgroup_mma(a, b, first, is_async=True)
        for _ in range(2):
            with pytest.raises(EmulationError, match="before it was waited for"):
                acc + second
            second = device.warpgroup_mma_wait(1, [second])
        second = device.warpgroup_mma_wait(0, [second])
        assert ((acc + second).data == 4).all()

    in_a_program(body, device)


def test_tiles_that_reach_outside_of_the_tensor() -> None:
    """What is loaded from there is 0, and what is stored there is dropped."""
    device = Device(0)
    x = torch.arange(1.0, 25.0).view(3, 8)
    descriptor = TensorDescriptor(x, x.shape, x.stride(), [4, 4], LAYOUT)

    def body() -> None:
        tile = device.allocate_shared_memory(torch.float32, [1, 4, 4], LAYOUT).index(0)
        barrier = device.allocate_shared_memory(torch.int64, [1, 1], LAYOUT).index(0)
        device.init_barrier(barrier, 1)
        device.fence_async_shared()
        device.expect(barrier, 64)
        device.load_tile(descriptor, [-2, 4], barrier, tile)
        device.wait(barrier, 0)
        assert tile.load(None).data.tolist() == [[0] * 4, [0] * 4, [5, 6, 7, 8], [13, 14, 15, 16]]
        with pytest.raises(EmulationError, match="16 bytes"):
            device.load_tile(descriptor, [0, 2], barrier, tile)
        tile.store(Tensor(torch.zeros(4, 4)))
        with pytest.raises(EmulationError, match="fence"):
            device.add_tile(descriptor, [2, 4], tile)
        device.fence_async_shared()
        device.store_tile(descriptor, [2, 4], tile)
        device.store_wait(0)

    before = x.clone()
    in_a_program(body, device)
    before[2, 4:] = 0
    assert torch.equal(x, before)


def test_a_descriptor_of_what_bulk_copies_cannot_take() -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(EmulationError, match="strides"):
        Device(0).launch(lambda descriptor: None, (1,), (TensorDescriptor(x, x.shape, x.stride(), [4, 4], LAYOUT),))
