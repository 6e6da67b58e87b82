"""The tasks, a folder each. A new one is its folder and a line here."""

from __future__ import annotations

from ropewalk.eval.tasks.base import Example, Metric, Outcome, Settings, Task
from ropewalk.eval.tasks.passkey import Passkey
from ropewalk.eval.tasks.perplexity import Perplexity

TASKS: dict[str, type[Task]] = {"passkey": Passkey, "perplexity": Perplexity}

__all__ = ["TASKS", "Example", "Metric", "Outcome", "Passkey", "Perplexity", "Settings", "Task"]
