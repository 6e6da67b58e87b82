"""How far a long prefill is, and how long it will still take: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

# On a terminal's stderr a bar, elsewhere at most this many lines.
_LINES = 5


def duration(seconds: float) -> str:
    """`45 s`, `4 min 10 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(number: float) -> str:
    """Bytes as `264 MiB` or `1.2 GiB`."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


@contextmanager
def reading(console: Console, label: str = "Reading") -> Iterator[Callable[[int, int], None]]:
    """Shows a prefill's progress while it runs; gives the function to call with the tokens done and to be done."""
    from ropewalk.integrations.transformers.generation import PrefillCost

    points: list[tuple[int, float]] = []
    began = perf_counter()

    def left(done: int, total: int) -> str:
        if done > 0:
            points.append((done, perf_counter() - began))
        if not points or done >= total:
            return ""
        cost = PrefillCost.fit(points)
        return f"about {duration(cost.seconds(total) - cost.seconds(done))} left"

    if not console.is_terminal:
        printed = 0

        def report(done: int, total: int) -> None:
            nonlocal printed
            text = left(done, total)
            step = done * _LINES // total if total else 0
            if step > printed:
                printed = step
                console.print(f"{label}: {done:,} of {total:,} tokens{', ' if text else ''}{text}", soft_wrap=True)

        yield report
        return

    columns = (
        SpinnerColumn("line"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens {task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None, left="", visible=False)

        def report_bar(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, left=left(done, total), visible=True, refresh=True)

        yield report_bar
