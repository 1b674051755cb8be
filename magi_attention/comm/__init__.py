"""Move rows between ranks as a routing says. Knows tensors and process groups, not masks or attention."""

from magi_attention.comm.all_gather import all_gather_rows
from magi_attention.comm.exchange import Exchange, FlatExchange
from magi_attention.comm.group_cast import GroupCast, group_cast
from magi_attention.comm.group_reduce import GroupReduce, group_reduce
from magi_attention.comm.hierarchical_exchange import HierarchicalExchange
from magi_attention.comm.reduce_scatter import reduce_scatter_rows
from magi_attention.comm.row_exchange import RowRouting

__all__ = [
    "Exchange",
    "FlatExchange",
    "GroupCast",
    "GroupReduce",
    "HierarchicalExchange",
    "RowRouting",
    "all_gather_rows",
    "group_cast",
    "group_reduce",
    "reduce_scatter_rows",
]
