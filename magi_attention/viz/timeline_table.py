"""A predicted timeline as a table for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from magi_attention.planning.report import report_times
from magi_attention.planning.timeline import Timeline


def timeline_table(timeline: Timeline) -> Table:
    """One line a rank: milliseconds in which it computes, waits for rows under way, and waits for slower ranks.

    The three make up the pass on every rank. A star marks the slowest, which computes longest in both passes together.
    """
    forward, backward = report_times(timeline.forward), report_times(timeline.backward)
    computing = [f.compute + b.compute for f, b in zip(forward, backward, strict=True)]
    slowest = computing.index(max(computing))
    title = (
        f"predicted: forward {timeline.forward.seconds * 1e3:.3f} ms, backward {timeline.backward.seconds * 1e3:.3f} ms"
    )
    table = Table(title=title, caption="* the slowest rank", box=SIMPLE_HEAD)
    for name in ("rank", "forward\ncompute", "\nexposed", "\nidle", "backward\ncompute", "\nexposed", "\nidle"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, times in enumerate(zip(forward, backward, strict=True)):
        seconds = (part for of_pass in times for part in (of_pass.compute, of_pass.exposed, of_pass.idle))
        table.add_row(f"{'* ' if rank == slowest else ''}{rank}", *(f"{part * 1e3:.3f}" for part in seconds))
    return table
