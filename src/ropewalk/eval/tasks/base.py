"""What every task is: examples with names, and a score for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from ropewalk.eval.subjects import Subject


class Settings(BaseModel):
    """Of a task; each has its own fields. The same settings and seed give the same examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Example:
    """One example, not yet written out: that may take long, and is done when its turn comes.

    Attributes:
        name: unique among the task's examples.
        tokens: about how long it is, for the order and the forecast.
        cell: what it is one of, such as a length and a depth.
    """

    name: str
    tokens: int
    cell: dict[str, int | float | str]


@dataclass(frozen=True)
class Outcome:
    """What an example gave."""

    prompt_tokens: int
    scores: dict[str, float]
    target: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Metric:
    """A score: its name in words, and which way is better.

    Attributes:
        pooled: for a score that is exp(a / b) of two others, their names: of several examples it is exp(sum a / sum b).
            Of other scores it is the mean.
    """

    title: str
    higher_is_better: bool = True
    pooled: tuple[str, str] | None = None


class Task(Protocol):
    """A task with its settings."""

    name: ClassVar[str]
    version: ClassVar[int]
    metrics: ClassVar[dict[str, Metric]]

    @property
    def settings(self) -> Settings: ...
    @property
    def longest(self) -> int:
        """Tokens of the longest example, its answer included."""
        ...

    def examples(self) -> Iterable[Example]:
        """All examples, in the order of their definition."""
        ...

    def run(self, example: Example, subject: Subject) -> Outcome:
        """Writes the example out, asks it, and scores the answer."""
        ...
