"""The sums of rows that come home, against dense arithmetic."""

import torch
from hypothesis import given, settings

from magi_attention.comm.row_exchange import pack
from magi_attention.comm.row_sums import add_rows

from .row_cases import RowCase, row_cases


@settings(max_examples=60, deadline=None)
@given(case=row_cases())
def test_every_part_is_added_to_its_row_once(case: RowCase) -> None:
    exchange = case.exchange()
    send_rows = exchange.send_rows
    numbers = torch.arange(1.0, len(send_rows) + 1, dtype=torch.float64)  # integers: sums are exact in any order
    totals = [
        torch.zeros(case.num_rows, 2, 3, dtype=torch.float64),
        torch.ones(case.num_rows, dtype=torch.float64)[:, None],
    ]
    add_rows(totals, numbers[:, None].expand(-1, 7).contiguous(), exchange.sums)
    is_part = send_rows[None, :] == torch.arange(case.num_rows)[:, None]
    expected = is_part.double() @ numbers
    assert torch.equal(totals[0], expected[:, None, None].expand(-1, 2, 3))
    assert torch.equal(totals[1], 1 + expected[:, None])


@settings(max_examples=60, deadline=None)
@given(case=row_cases())
def test_parts_are_ordered_by_row_then_by_rank(case: RowCase) -> None:
    exchange = case.exchange()
    sums, sent = exchange.sums, exchange.send_rows.tolist()
    assert sums.rows.dtype == sums.offsets.dtype == sums.order.dtype == torch.int32
    groups = [sums.order[a:b].tolist() for a, b in zip(sums.offsets[:-1], sums.offsets[1:], strict=True)]
    assert sums.rows.tolist() == sorted(set(sent))
    assert groups == [[i for i, row in enumerate(sent) if row == wanted] for wanted in sums.rows.tolist()]


def test_parts_are_added_rank_by_rank_in_the_type_of_the_total() -> None:
    """1e8 is lost or kept according to the order, and bfloat16 sums would lose all that is small."""
    sums = RowCase(2, ((0, 1), (0, 1), (0,))).exchange().sums
    parts = torch.tensor([[1e8], [2.0], [-1e8], [2.0**-9], [1.0]])
    total = torch.zeros(2, 1)
    add_rows([total], parts, sums)
    assert total.tolist() == [[1.0], [2 + 2.0**-9]]
    total = torch.ones(2, 1)  # comes first: lost in 1e8
    add_rows([total], parts, sums)
    assert total.tolist() == [[1.0], [3 + 2.0**-9]]
    total = torch.zeros(2, 1)
    add_rows([total], parts.bfloat16(), sums)
    assert total[1].item() == 2 + 2.0**-9


def test_packing_rounds_to_the_type_of_the_wire() -> None:
    x = torch.tensor([[1 + 2.0**-9, 3.0], [1 + 2.0**-7, -0.0]])
    assert torch.equal(pack([x], None, torch.bfloat16), x.bfloat16())
    assert pack([x, x[:, :1]], torch.tensor([1], dtype=torch.int32)).tolist() == [[1 + 2.0**-7, 0.0, 1 + 2.0**-7]]
