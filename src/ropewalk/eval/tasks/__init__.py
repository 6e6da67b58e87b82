# SPDX-License-Identifier: Apache-2.0
"""The tasks, a folder each."""

from __future__ import annotations

from collections.abc import Mapping

from ropewalk.eval.tasks.base import SHARED, About, Metric, Task
from ropewalk.eval.tasks.kv_retrieval import KVRetrieval
from ropewalk.eval.tasks.leval import LEval
from ropewalk.eval.tasks.longbench import LongBench
from ropewalk.eval.tasks.longeval_lines import LongEvalLines
from ropewalk.eval.tasks.needle import Needle
from ropewalk.eval.tasks.passkey import Passkey
from ropewalk.eval.tasks.passkey_length import PasskeyLength
from ropewalk.eval.tasks.perplexity import Perplexity
from ropewalk.eval.tasks.short import Short

# A new task is one folder and one entry here: the command line, the runner and the pages then include it.
TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (Passkey, PasskeyLength, Perplexity, Needle, LongEvalLines, KVRetrieval, LEval, LongBench, Short)
}

__all__ = ["TASKS", "About", "Metric", "Task", "about", "metrics_of"]


def metrics_of(task: str) -> Mapping[str, Metric]:
    """What a task's scores are; nothing where that is not known, or the task gives whatever lm-eval does."""
    named = TASKS[task].metrics if task in TASKS else {}
    return {**named, **SHARED} if named else {}


def about(task: str) -> About:
    """What a reader who has not read the papers needs to know of a task, in general words where it has none."""
    title = task.replace("_", " ").replace("-", " ")
    general = "Every score is the mean over the examples that were done; all methods were asked the same examples."
    words = TASKS[task].about() if task in TASKS else None
    return words or About(title=title[:1].upper() + title[1:], measures=general)
