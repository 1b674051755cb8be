"""A plan as a table for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from magi_attention.planning import AttnPlan
from magi_attention.planning.load_balance import imbalance, min_heap
from magi_attention.planning.lower_bound import rows_moved_lower_bound
from magi_attention.planning.report import RankReport


def plan_table(plan: AttnPlan, ranks: list[RankReport]) -> Table:
    """One line a rank.

    Columns: local tokens; unmasked cells, over the mean, and the share that needs no remote row; key/value rows
    received, as a share of what an all-gather receives, and sent.
    """
    total = max(plan.mask.area, 1)
    table = Table(
        title=f"{plan.mask!r}\nover {plan.cp_size} ranks, chunks of {plan.dispatch.chunk_size}", box=SIMPLE_HEAD
    )
    for name in ("rank", "tokens", "area", "/ mean", "local", "received", "/ all", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in ranks:
        others = plan.dispatch_k.padded_seqlen - plan.dispatch_k.local_seqlens[r.rank]
        table.add_row(
            str(r.rank),
            f"{r.tokens:,}",
            f"{r.area:.4g}",
            f"{r.area * plan.cp_size / total:.3f}",
            f"{r.local_area / max(r.area, 1):.0%}",
            f"{r.recv_rows:,}",
            f"{r.recv_rows / others:.0%}" if others else "-",
            f"{r.send_rows:,}",
        )
    return table


def rows_table(plan: AttnPlan) -> Table:
    """Rows received by all ranks together, beside what other ways to share the work receive."""
    cp_size = plan.cp_size
    ours = int(plan.routes.rows.sum())
    tolerance = imbalance(plan.work, plan.dispatch.owner, cp_size) - 1
    bound = rows_moved_lower_bound(plan.mask, cp_size, plan.dispatch.chunk_size, tolerance)
    everything = plan.dispatch_k.padded_seqlen * (cp_size - 1)
    table = Table(title="rows received, all ranks together", box=SIMPLE_HEAD)
    for name in ("", "rows", "shards a rank"):
        table.add_column(name, justify="right")
    for name, rows in (
        ("this plan", ours),
        ("lower bound at this balance", bound),
        ("heap over chunk areas", plan.work.rows_moved(min_heap(plan.work, cp_size))),
        ("all-gather or ring", everything),
    ):
        table.add_row(name, f"{rows:,}", f"{rows / plan.dispatch_k.padded_seqlen:.2f}")
    return table
