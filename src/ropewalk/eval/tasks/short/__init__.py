"""Short tasks: the five of the Open LLM Leaderboard that the SelfExtend paper ran, by lm-eval. See README.md beside
this file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ropewalk.eval.tasks.base import Settings
from ropewalk.eval.tasks.short.files import DataError
from ropewalk.eval.tasks.short.harness import BENCHMARKS, HarnessTask, language_model, load, versions
from ropewalk.eval.tasks.short.run import NAME, VERSION, run


class ShortSettings(Settings):
    """Of the short tasks, each by its name.

    Args:
        shots: solved examples in a prompt.
        shots_from: the part of the data that they are from; "" without any.
        questions: how many there are.
        texts: hash of the questions and of what the examples are taken from.
        versions: of the tasks, as lm-eval counts them.
    """

    shots: dict[str, int]
    shots_from: dict[str, str]
    questions: dict[str, int]
    texts: dict[str, str]
    versions: dict[str, str]


def settings_of(tasks: Sequence[HarnessTask]) -> ShortSettings:
    """What was loaded, in words and numbers."""
    parts: dict[str, list[HarnessTask]] = {}
    for task in tasks:
        parts.setdefault(task.benchmark, []).append(task)
    return ShortSettings(
        shots={name: its[0].shots for name, its in parts.items()},
        shots_from={name: its[0].shots_from for name, its in parts.items()},
        questions={name: sum(task.questions for task in its) for name, its in parts.items()},
        texts={
            name: hashlib.sha256("".join(task.texts_hash for task in its).encode()).hexdigest()
            for name, its in parts.items()
        },
        versions={name: its[0].version for name, its in parts.items()},
    )


__all__ = [
    "BENCHMARKS",
    "NAME",
    "VERSION",
    "DataError",
    "HarnessTask",
    "ShortSettings",
    "language_model",
    "load",
    "run",
    "settings_of",
    "versions",
]
