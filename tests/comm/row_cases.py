"""What the tests of packing and adding rows share: which rows travel, and tensors laid out in every way."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from magi_attention.comm.row_exchange import RowRouting, pack
from magi_attention.comm.row_sums import RowSums, add_rows
from magi_attention.planning.routing import GroupCollectivePlan

Packer = Callable[[list[torch.Tensor], torch.Tensor | None, torch.dtype], torch.Tensor]
Adder = Callable[[list[torch.Tensor], torch.Tensor, RowSums], None]

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "one of three in a row": lambda x: torch.cat((x, x, x + 1), dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "one of three in a head": lambda x: torch.cat((x, x, x + 1), dim=2)[:, :, x.shape[2] : 2 * x.shape[2]],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "head_dim not last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "equal heads": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
    "flat": lambda x: x.flatten(1),
}


@dataclass(frozen=True)
class RowCase:
    """Rows of two tensors that travel, and parts that come home.

    Attributes:
        num_rows: Local rows.
        sent: The rows that go to each rank.
        shapes: Heads and head_dim of each tensor.
        layouts: How each lies in memory, of ``LAYOUTS``.
        dtype: Of the tensors.
        wire_dtype: Of the matrix.
        seed: Of the numbers.
    """

    num_rows: int
    sent: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, int], ...] = ((2, 64), (2, 64))
    layouts: tuple[str, ...] = ("contiguous", "contiguous")
    dtype: torch.dtype = torch.float32
    wire_dtype: torch.dtype = torch.float32
    seed: int = 0

    def exchange(self, device: str = "cpu") -> RowRouting:
        """Which rows go out, and where what comes home belongs."""
        send_rows = np.array([row for rows in self.sent for row in rows], np.int64)
        counts = tuple(map(len, self.sent))
        return RowRouting.on_device(
            GroupCollectivePlan(send_rows, counts, (0,) * len(counts), None), torch.device(device)
        )

    def tensors(self, device: str = "cpu") -> list[torch.Tensor]:
        """Random tensors, the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        plain = [torch.randn(self.num_rows, *shape, generator=generator) for shape in self.shapes]
        return [LAYOUTS[name](x.to(device, self.dtype)) for x, name in zip(plain, self.layouts, strict=True)]


def check_pack(case: RowCase, packer: Packer, device: str = "cpu") -> None:
    """What ``packer`` makes of chosen rows and of all rows is bit by bit what torch makes of them."""
    for rows, rows_there in ((case.exchange().send_rows, case.exchange(device).send_rows), (None, None)):
        expected = pack(case.tensors(), rows, case.wire_dtype)
        got = packer(case.tensors(device), rows_there, case.wire_dtype)
        assert got.dtype == case.wire_dtype
        assert torch.equal(got.cpu(), expected), case


def check_add(case: RowCase, adder: Adder, device: str = "cpu") -> None:
    """What ``adder`` adds up is bit by bit what torch adds up."""
    exchange = case.exchange()
    matrix = pack(case.tensors(), exchange.send_rows, case.wire_dtype)
    matrix = matrix * torch.linspace(1, 2, matrix.shape[1]).to(matrix.dtype)  # or the parts of a row would be equal
    matrix += torch.arange(len(matrix))[:, None].to(matrix.dtype)
    dtype = torch.promote_types(case.dtype, torch.float32)
    before = [torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape) for x in case.tensors()]
    expected, got = [x.clone() for x in before], [x.to(device, copy=True) for x in before]
    add_rows(expected, matrix, exchange.sums)
    adder(got, matrix.to(device), case.exchange(device).sums)
    for x, y, start in zip(expected, got, before, strict=True):
        assert torch.equal(x, y.cpu()), case
        assert len(matrix) == 0 or not torch.equal(x, start)


def row_cases(
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), max_rows: int = 40
) -> st.SearchStrategy[RowCase]:
    """Cases with rows that go to several ranks or to none, with ranks that get none, and with widths of every kind."""

    @st.composite
    def case(draw: st.DrawFn) -> RowCase:
        num_rows = draw(st.integers(0, max_rows))
        row = st.integers(0, num_rows - 1) if num_rows else st.nothing()
        sent = draw(st.lists(st.sets(row).map(sorted).map(tuple), min_size=1, max_size=5))
        count = draw(st.integers(1, 3))
        shape = st.tuples(st.integers(1, 3), st.sampled_from((1, 5, 8, 72, 128)))
        shapes = tuple(draw(st.lists(shape, min_size=count, max_size=count)))
        layouts = tuple(draw(st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=count, max_size=count)))
        dtype, wire_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
        return RowCase(num_rows, tuple(sent), shapes, layouts, dtype, wire_dtype, draw(st.integers(0, 99)))

    return case()


ALL_TO_THREE = (tuple(range(33)),) * 3
NAMED = {
    "nothing travels": RowCase(7, ((), (), ())),
    "no rows": RowCase(0, ((), ())),
    "one row": RowCase(1, ((0,),)),
    "all rows to all ranks": RowCase(33, ALL_TO_THREE),
    "more columns than a block": RowCase(9, ((1, 2, 5), (0, 2, 8)), ((8, 128), (9, 128))),
    "a bfloat16 wire": RowCase(33, ALL_TO_THREE, wire_dtype=torch.bfloat16),
    "bfloat16": RowCase(33, ALL_TO_THREE, dtype=torch.bfloat16, wire_dtype=torch.bfloat16),
    "float16": RowCase(33, ALL_TO_THREE, dtype=torch.float16, wire_dtype=torch.float16),
    "float64": RowCase(33, ALL_TO_THREE, dtype=torch.float64, wire_dtype=torch.float64),
    "slices of a fused qkv": RowCase(33, ALL_TO_THREE, layouts=("one of three in a row", "one of three in a head")),
}
