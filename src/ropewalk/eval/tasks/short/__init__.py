"""Short tasks: the five of the Open LLM Leaderboard that the SelfExtend paper ran, by lm-eval. See README.md beside
this file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ropewalk.eval.infinite import Infinite
from ropewalk.eval.methods import Method
from ropewalk.eval.subjects import Subject
from ropewalk.eval.tasks.base import Example, Metric, Outcome, Settings, each_once
from ropewalk.eval.tasks.short.files import DataError
from ropewalk.eval.tasks.short.harness import BENCHMARKS, HarnessTask, ask, language_model, load, version

__all__ = ["BENCHMARKS", "DataError", "Short", "ShortSettings"]


class ShortSettings(Settings):
    """Of the short tasks.

    Args:
        tasks: by lm-eval's names.
        questions: the first so many of each task, of MMLU spread over its subjects; None for all.
        seed: of the shots.
        lm_eval: its version. The task fills in this and what follows, so that a run does not go on with others.
        shots: solved examples in a prompt, of each task by its name.
        shots_from: the part of the data that they are from; "" without any.
        asked: how many questions are asked.
        texts: hash of all questions and of what the shots are taken from.
        versions: of the tasks, as lm-eval counts them.
    """

    tasks: tuple[str, ...] = Field(default=tuple(BENCHMARKS), min_length=1)
    questions: int | None = Field(default=None, ge=1)
    seed: int = 0
    lm_eval: str = ""
    shots: dict[str, int] = Field(default_factory=dict)
    shots_from: dict[str, str] = Field(default_factory=dict)
    asked: dict[str, int] = Field(default_factory=dict)
    texts: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(tasks, BENCHMARKS, "there is no short task {name}; there are {known}")


@dataclass(frozen=True)
class Short:
    """The tasks under their settings.

    Args:
        data_dir: folder that holds short/...; None to load from the hub, as lm-eval does.

    Attributes:
        shots_asked: tasks whose shots are questions that are asked too, for want of others.

    Raises:
        DataError: data are missing or cannot be read.
        ImportError: lm-eval is not installed.
    """

    settings: ShortSettings
    data_dir: InitVar[Path | None] = None
    name: ClassVar[str] = "short"
    version: ClassVar[int] = 1
    # lm-eval's own: a report shows all that there are.
    metrics: ClassVar[dict[str, Metric]] = {}
    longest: ClassVar[None] = None
    shots_asked: list[str] = field(default_factory=list, init=False, repr=False)
    _questions: dict[str, tuple[HarnessTask, int]] = field(default_factory=dict, init=False, repr=False)
    _language_models: dict[Subject, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self, data_dir: Path | None) -> None:
        settings = self.settings
        tasks = load(settings.tasks, data_dir, settings.questions, settings.seed)
        for task in tasks:
            self._questions.update((f"{task.name}-{i}", (task, i)) for i in range(task.asked))
        self.shots_asked.extend(dict.fromkeys(task.benchmark for task in tasks if task.shots_are_asked))
        object.__setattr__(self, "settings", settings.model_copy(update=_found(tasks)))

    def examples(self) -> Iterator[Example]:
        for name, (task, _) in self._questions.items():
            # All as if of one length: in the order of their lengths, batches would hold a few questions of each task.
            yield Example(name, 0, task.cell)

    def check(self, method: Method) -> None:
        if isinstance(method.change, Infinite):
            raise ValueError(f"{method.name} reads texts block by block, which lm-eval's tasks do not: leave it out")

    def outcomes(self, examples: Sequence[Example], subject: Subject) -> list[Outcome]:
        if subject not in self._language_models:
            self._language_models[subject] = language_model(subject)
        questions = [(task, task.requests[i]) for task, i in (self._questions[one.name] for one in examples)]
        for _, its in groupby(questions, key=lambda question: question[0].benchmark):
            ask(self._language_models[subject], [request for _, requests in its for request in requests])
        return [task.outcome(requests, subject) for task, requests in questions]


def _found(tasks: Sequence[HarnessTask]) -> dict[str, Any]:
    """What was loaded, in words and numbers, as the settings have it."""
    parts = {name: list(its) for name, its in groupby(tasks, key=lambda task: task.benchmark)}
    hashes = {name: "".join(task.texts_hash for task in its) for name, its in parts.items()}
    return {
        "lm_eval": version(),
        "shots": {name: its[0].shots for name, its in parts.items()},
        "shots_from": {name: its[0].shots_from for name, its in parts.items()},
        "asked": {name: sum(task.asked for task in its) for name, its in parts.items()},
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in hashes.items()},
        "versions": {name: its[0].version for name, its in parts.items()},
    }
