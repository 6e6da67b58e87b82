# SPDX-License-Identifier: Apache-2.0
"""How far something long is, and how long it will still take: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

# Tokens behind a text that was read before: fewer are a question, and read in a moment.
_SHORT = 512
# Takes what is done, what there is in all, and what is being done if that changes.
Advance = Callable[..., None]


def duration(seconds: float) -> str:
    """`45 s`, `4 min 10 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(number: float) -> str:
    """Bytes as `264 MiB` or `1.2 GiB`."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


@contextmanager
def progress(console: Console, label: str, unit: str, lines: int) -> Iterator[Advance]:
    """Shows progress while it runs, with rich's estimate of the time left; nothing of it stays on a terminal.

    Args:
        unit: what is counted, in the plural.
        lines: at most so many are written where there is no terminal.

    Yields:
        What to call with how much is done and how much there is, and what is being done now if that is another.
    """
    columns = (
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit),
        TimeRemainingColumn(compact=True),
    )
    written = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None, visible=False)

        def advance(done: int, total: int, now: str = label) -> None:
            nonlocal written
            bar.update(task, completed=done, total=total, description=now, visible=True, refresh=True)
            step = done * lines // total if total else 0
            if bar.disable and step > written:
                written = step
                left = bar.tasks[task].time_remaining
                about = f", about {duration(left)} left" if left else ""
                console.print(
                    f"{now}: {done:,} of {total:,} {unit}{about}", soft_wrap=True, highlight=False, markup=False
                )

        yield advance


@contextmanager
def reading(console: Console, label: str = "Reading", beginning: int = 0) -> Iterator[Advance]:
    """Shows a prefill's progress while it runs; gives the function to call with the tokens done and to be done.

    Of those, `beginning` were read before, and the rest may be too few to show.
    """
    with progress(console, label, "tokens", 5) as advance:
        yield lambda done, total: None if beginning and total - beginning < _SHORT else advance(done, total)
