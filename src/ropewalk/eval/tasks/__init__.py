"""The tasks, a folder each. A new one is its folder and a line here."""

from __future__ import annotations

from ropewalk.eval.tasks.base import Example, Generation, Metric, Outcome, PreparedTask, Scoring, Settings, Task
from ropewalk.eval.tasks.leval import LEval
from ropewalk.eval.tasks.longbench import LongBench
from ropewalk.eval.tasks.needle import Needle
from ropewalk.eval.tasks.passkey import Passkey
from ropewalk.eval.tasks.passkey_length import PasskeyLength
from ropewalk.eval.tasks.perplexity import Perplexity
from ropewalk.eval.tasks.short import Short

TASKS: dict[str, type[Task]] = {
    "passkey": Passkey,
    "passkey-length": PasskeyLength,
    "perplexity": Perplexity,
    "needle": Needle,
    "leval": LEval,
    "longbench": LongBench,
    "short": Short,
}

__all__ = [
    "TASKS",
    "Example",
    "Generation",
    "LEval",
    "LongBench",
    "Metric",
    "Needle",
    "Outcome",
    "Passkey",
    "PasskeyLength",
    "Perplexity",
    "PreparedTask",
    "Scoring",
    "Settings",
    "Short",
    "Task",
]
