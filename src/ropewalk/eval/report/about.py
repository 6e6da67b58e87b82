"""What a reader who has not read the papers needs to know of a task: its own words, or general ones."""

from __future__ import annotations

from ropewalk.eval.tasks import TASKS
from ropewalk.eval.tasks.base import About

__all__ = ["About", "about"]


def about(task: str) -> About:
    """In general words where the task has none of its own."""
    title = task.replace("_", " ").replace("-", " ")
    general = "Every score is the mean over the examples that were done; all methods were asked the same examples."
    words = TASKS[task].about() if task in TASKS else None
    return words or About(title=title[:1].upper() + title[1:], measures=general)
