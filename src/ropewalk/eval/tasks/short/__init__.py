# SPDX-License-Identifier: Apache-2.0
"""Short tasks: the five of the Open LLM Leaderboard that the SelfExtend paper ran, by lm-eval. See README.md beside
this file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ropewalk.eval.data_files import DataError
from ropewalk.eval.subjects import Subject, batches
from ropewalk.eval.tasks.base import Example, Metric, Outcome, Task
from ropewalk.eval.tasks.settings import Names, NewTokens, among, folder_of_data
from ropewalk.eval.tasks.short.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from ropewalk.eval.tasks.short.harness import Loaded


class Short(Task):
    """Short tasks, which a map should leave as they are (SelfExtend, short-context tasks).

    They are lm-eval's, with the shots of the Open LLM Leaderboard. A map without parameters is chosen for four trained
    windows.
    """

    name = "short"
    # lm-eval's own: a report shows all that there are.
    metrics: ClassVar[dict[str, Metric]] = {}

    tasks: Annotated[Names, among(BENCHMARKS)] = Field(tuple(BENCHMARKS), min_length=1, description="Comma-separated.")
    questions: int | None = Field(
        None, ge=1, description="The first so many of each task, of MMLU spread over its subjects; all if not given."
    )
    new_tokens: NewTokens = None
    data_dir: Path | None = folder_of_data("short/...")
    seed: int = 0

    @classmethod
    def unheeded(cls) -> tuple[str, ...]:
        """lm-eval reads each text in one pass."""
        return (*super().unheeded(), "chunk")

    @property
    def without_effect(self) -> Mapping[str, str]:
        chosen, why = [BENCHMARKS[task] for task in self.tasks], f"--tasks {','.join(self.tasks)}"
        idle = {"new_tokens": any(one.in_words for one in chosen), "seed": any(one.shots for one in chosen)}
        return {name: why for name, is_asked in idle.items() if not is_asked}

    @cached_property
    def _loaded(self) -> list[Loaded]:
        try:
            from ropewalk.eval.tasks.short import harness
        except ImportError as error:
            raise DataError(
                f"the short tasks are lm-eval's, and {error.name} is not installed: "
                "run 'pip install \"ropewalk[lm-eval]\"'"
            ) from error
        return harness.load(self.tasks, self.data_dir, self.questions, self.new_tokens)

    @property
    def found(self) -> dict[str, Any]:
        """The version of lm-eval, the shots and what they are from, how many questions are asked, and what tells all
        questions and the definitions of the tasks from others."""
        parts = {name: list(its) for name, its in groupby(self._loaded, key=lambda task: task.benchmark)}
        hashes = {name: "".join(task.digest() for task in its) for name, its in parts.items()}
        return {
            "lm_eval": version("lm_eval"),
            "shots": {name: BENCHMARKS[name].shots for name in parts},
            "shots_from": {name: its[0].shots_from for name, its in parts.items()},
            "asked": {name: sum(task.asked for task in its) for name, its in parts.items()},
            "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in hashes.items()},
            "versions": {name: str(its[0].task.VERSION) for name, its in parts.items()},
        }

    @property
    def notes(self) -> list[str]:
        without = [task.benchmark for task in self._loaded if task.shots_from == BENCHMARKS[task.benchmark].asked]
        note = (
            f"the data folder has no training questions of {', '.join(dict.fromkeys(without))}: their shots are other "
            "questions of those asked, so compare methods, and not with figures of elsewhere"
        )
        return [note] if without else []

    def examples(self) -> Iterator[Example]:
        for task in self._loaded:
            cell: dict[str, int | float | str] = {"task": task.benchmark}
            if task.subject:
                cell["subject"] = task.subject
            for number in range(task.asked):
                # All as if of one length: those of a task are asked together.
                yield Example(f"{task.name}-{number}", 0, cell, (task, number))

    def batches(self, examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
        """Those of a task: lm-eval itself makes batches of them."""
        return batches(examples, max(1, len(examples)), lambda example: example.cell["task"])

    def outcomes(self, examples: Sequence[Example], subject: Subject) -> list[Outcome]:
        from ropewalk.eval.tasks.short import harness

        wanted: dict[Loaded, set[int]] = {}
        for example in examples:
            task, number = example.about
            wanted.setdefault(task, set()).add(number)
        found = harness.evaluate(subject, wanted, self.seed)
        return [found[task.name, number] for task, number in (example.about for example in examples)]
