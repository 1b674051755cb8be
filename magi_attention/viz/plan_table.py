"""A plan as a table for the terminal."""

from rich.table import Table

from magi_attention.planning import AttnPlan
from magi_attention.planning.load_balance import min_heap
from magi_attention.planning.lower_bound import rows_moved_lower_bound
from magi_attention.planning.report import RankReport


def plan_table(plan: AttnPlan, ranks: list[RankReport]) -> Table:
    """One line a rank: tokens, unmasked area, rows received and sent, and the stages they come in."""
    total = max(plan.mask.area, 1)
    others = plan.dispatch.local_seqlen * (plan.cp_size - 1)
    table = Table(title=f"{plan.mask!r} over {plan.cp_size} ranks, chunks of {plan.dispatch.chunk_size}")
    for name in ("rank", "tokens", "area", "of mean", "local", "rows received", "of all-gather", "rows sent", "stages"):
        table.add_column(name, justify="right")
    for r in ranks:
        table.add_row(
            str(r.rank),
            f"{r.tokens:,}",
            f"{r.area:,}",
            f"{r.area * plan.cp_size / total:.3f}",
            f"{r.local_area / max(r.area, 1):.0%}",
            f"{r.recv_rows:,}",
            f"{r.recv_rows / others:.0%}" if others else "-",
            f"{r.send_rows:,}",
            " + ".join(f"{s.recv_rows:,}" for s in r.stages) or "-",
        )
    return table


def rows_table(plan: AttnPlan) -> Table:
    """Rows received by all ranks together, beside what other ways to share the work receive."""
    cp_size, config = plan.cp_size, plan.config.dispatch_config
    ours = int(plan.routes.rows.sum())
    tolerance = getattr(config.alg, "tolerance", 0.0)
    bound = rows_moved_lower_bound(plan.mask, cp_size, plan.dispatch.chunk_size, tolerance)
    everything = plan.dispatch.padded_seqlen * (cp_size - 1)
    table = Table(title="key/value rows received, all ranks together")
    for name in ("", "rows", "shards a rank"):
        table.add_column(name, justify="right")
    for name, rows in (
        ("this plan", ours),
        ("lower bound at this balance", bound),
        ("heap over chunk areas", plan.work.rows_moved(min_heap(plan.work, cp_size))),
        ("all-gather or ring", everything),
    ):
        table.add_row(name, f"{rows:,}", f"{rows / plan.dispatch.padded_seqlen:.2f}")
    return table
