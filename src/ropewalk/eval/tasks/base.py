"""What every task is: examples with names, and a score for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from ropewalk.eval.subjects import Passage, Prompt, Subject


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
class Generation:
    """An example written out: a prompt, and what an answer to it is worth."""

    prompt: Prompt
    outcome: Callable[[str], Outcome]


@dataclass(frozen=True)
class Scoring:
    """An example written out: passages, and what the log-likelihoods of each one's tokens are worth."""

    passages: tuple[Passage, ...]
    outcome: Callable[[Sequence[Sequence[float]]], Outcome]


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

    def prepare(self, example: Example, subject: Subject) -> Generation | Scoring:
        """Writes the example out in the subject's tokens. The runner asks, many at a time, and has them scored."""
        ...
