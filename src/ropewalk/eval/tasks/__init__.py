"""The tasks, a folder each."""

from __future__ import annotations

from ropewalk.eval.tasks.base import Metric, Task
from ropewalk.eval.tasks.leval import LEval
from ropewalk.eval.tasks.longbench import LongBench
from ropewalk.eval.tasks.needle import Needle
from ropewalk.eval.tasks.passkey import Passkey
from ropewalk.eval.tasks.passkey_length import PasskeyLength
from ropewalk.eval.tasks.perplexity import Perplexity
from ropewalk.eval.tasks.short import Short

# A new task is one folder and one entry here: the command line, the runner and the pages then include it.
TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (Passkey, PasskeyLength, Perplexity, Needle, LEval, LongBench, Short)
}

__all__ = ["TASKS", "Metric", "Task"]
