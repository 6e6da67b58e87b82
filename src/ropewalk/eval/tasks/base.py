"""What every task is: examples with names, and a score for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from ropewalk.eval.subjects import Passage, Prompt, Subject

if TYPE_CHECKING:
    from ropewalk.eval.methods import Method


def each_once(names: Iterable[str], known: Iterable[str], problem: str) -> tuple[str, ...]:
    """Names of what a task knows, each once and in the order in which it knows them, for a validator of settings.

    Args:
        problem: what to say of a {name} that is not {known}.

    Raises:
        PydanticCustomError: there is such a name.
    """
    named, known = [*names], [*known]
    for name in named:
        if name not in known:
            raise PydanticCustomError("tasks", problem, {"name": repr(name), "known": ", ".join(known)})
    return tuple(name for name in known if name in named)


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
    def longest(self) -> int | None:
        """Tokens of the longest example, its answer included; None if all fit the trained window."""
        ...

    def examples(self) -> Iterable[Example]:
        """All examples, in the order of their definition."""
        ...

    def check(self, method: Method) -> None:
        """Raises ValueError: the examples cannot be asked under this method."""
        ...

    def outcomes(self, examples: Sequence[Example], subject: Subject) -> list[Outcome]:
        """Asks a batch of examples: what each gave, in their order."""
        ...


class PreparedTask(ABC):
    """A task that writes each example out by itself; those of a batch are asked together."""

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, example: Example, subject: Subject) -> Generation | Scoring:
        """Writes the example out in the subject's tokens. All examples of a task are of one kind."""

    def check(self, method: Method) -> None:  # noqa: B027
        """Every method will do."""

    def outcomes(self, examples: Sequence[Example], subject: Subject) -> list[Outcome]:
        prepared = [self.prepare(example, subject) for example in examples]
        generations = [one for one in prepared if isinstance(one, Generation)]
        scorings = [one for one in prepared if isinstance(one, Scoring)]
        if generations and scorings:
            raise TypeError(f"{self.name} has examples of both kinds")
        if generations:
            answers = subject.answers([one.prompt for one in generations])
            return [one.outcome(answer) for one, answer in zip(generations, answers, strict=True)]
        scores = iter(subject.log_likelihoods([passage for one in scorings for passage in one.passages]))
        return [one.outcome([next(scores) for _ in one.passages]) for one in scorings]
