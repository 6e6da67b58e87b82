# SPDX-License-Identifier: Apache-2.0
"""What every task is: examples with names, and a score for each; its settings are its fields."""

from __future__ import annotations

import inspect
import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from ropewalk.eval.subjects import Passage, Prompt, Subject, batches
from ropewalk.eval.tasks.settings import no_effect, refused
from ropewalk.thinking import answer_begins
from ropewalk.token_counts import MOST_TOKENS

T = TypeVar("T")

_MOST_EXAMPLES = 1_000_000


@dataclass(frozen=True)
class Example:
    """One example, not yet written out: that may take long, and is done when its turn comes.

    Attributes:
        name: unique among the task's examples.
        tokens: about how long it is, for the order and the forecast.
        cell: what it is one of, such as a length and a depth.
        about: what its task needs to write it out.
        cluster: what was sampled that it is one of, where its name does not tell (`Task.cluster_of`).
    """

    name: str
    tokens: int
    cell: dict[str, int | float | str]
    about: Any = field(default=None, compare=False, repr=False)
    cluster: str | None = None


def grid(
    lengths: Collection[int], depths: Iterable[float], samples: int, spans: Callable[[int], int] = lambda length: 1
) -> list[Example]:
    """So many examples of each length and depth, about a depth and the number of a sample.

    Args:
        spans: of each depth of a text of such a length: there are so many samples in each.

    Raises:
        ValueError: they are more than anybody waits for.
    """
    apart = {f"{depth:.3f}": depth for depth in depths}
    count = sum(map(spans, lengths)) * len(apart) * samples
    if count > _MOST_EXAMPLES:
        raise ValueError(
            f"{len(lengths)} lengths, {len(apart)} depths and {samples} samples are {count} examples, and at most "
            f"{_MOST_EXAMPLES} are asked: take fewer --samples"
        )
    return [
        Example(f"{length}-{depth:.3f}-{i}", length, {"length": length, "depth": round(depth, 3)}, (depth, i))
        for length in lengths
        for depth in apart.values()
        for i in range(samples * spans(length))
    ]


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` of them, evenly from all: the first examples would be the shortest alone."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


@dataclass(frozen=True)
class Outcome:
    """What an example gave."""

    prompt_tokens: int
    scores: dict[str, float]
    target: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Generation:
    """An example written out: a prompt, what is to be answered, and what an answer is worth.

    Attributes:
        scores: of an answer without the thought before it; of an empty one where the thought has no end.
    """

    prompt: Prompt
    target: str
    scores: Callable[[str], dict[str, float]]

    def outcome(self, output: str, in_thought: bool) -> Outcome:
        """Of what the model wrote, which may begin inside a thought."""
        at = answer_begins(output, in_thought)
        answer = "" if at is None else output[at:]
        scores = self.scores(answer.partition(self.prompt.stop)[0] if self.prompt.stop else answer)
        if in_thought or at != 0:
            scores[UNFINISHED] = float(at is None)
        return Outcome(len(self.prompt.token_ids), scores, self.target, output)


@dataclass(frozen=True)
class Scoring:
    """An example written out: passages, and what the log-likelihoods of each one's tokens are worth."""

    passages: tuple[Passage, ...]
    outcome: Callable[[Sequence[Sequence[float]]], Outcome]


@dataclass(frozen=True)
class Metric:
    """A score: its name in words, and which way is better; None where that is not known.

    Attributes:
        pooled: for a score that is exp(a / b) of two others, their names: of several examples it is exp(sum a / sum b).
            Neither is negative, and b, such as a number of tokens, is 1 or more. Other scores are from 0 to 1, and of
            several examples it is their mean.
    """

    title: str
    higher_is_better: bool | None = True
    pooled: tuple[str, str] | None = None


# Of every task that models answer in words: of those that thought first, how many were still thinking at the end.
UNFINISHED = "unfinished_thought"
SHARED = {UNFINISHED: Metric("thoughts without an end", higher_is_better=False)}


class About(BaseModel):
    """A task in words, for a page of its results; from about.toml in its folder.

    Attributes:
        title: its name for people.
        measures: what it measures, in a sentence or two.
        reading: how to read its figure over these parts of the cells; empty for general words.
        over: those parts.
        by: what of the cells there is a table for; None for all.
        sampled: what was sampled, where examples share it: "documents" for the questions about some.
        examples: settings whose numbers, of lists their lengths, multiply to the examples of each method, for folders
            that do not say how many there are; of none, it is not known.
        groups: of its tasks, where it is several, in the order of a table's columns.
        percent: whether its scores, from 0 to 1, are written in percent, as is usual for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    measures: str
    reading: str = ""
    over: tuple[str, ...] = ("length", "depth")
    by: tuple[str, ...] | None = None
    sampled: str = ""
    examples: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = {}
    percent: bool = False


class Task(BaseModel, ABC):
    """A task with its settings, its fields. The same settings, seed and data give the same examples.

    A field's description is the help of its option. Where it reads data, it does so once, when it is first asked for
    examples or settings. The first paragraph of a task's docstring is the help of its command.

    Args:
        data_dir: folder of data sets on this machine, for tasks that read some; where they lie is no setting.
        seed: of everything random; no option of its own, as every run has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, ignored_types=(cached_property,))

    name: ClassVar[str]
    metrics: ClassVar[dict[str, Metric]]

    @field_validator("*")
    @classmethod
    def _possible(cls, value: Any, info: ValidationInfo) -> Any:
        """No setting is a number that would only be found out as a slip once memory or time has run out."""
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int) and one > MOST_TOKENS and info.field_name != "seed":
                raise refused(f"must be at most {MOST_TOKENS}", one)
        return value

    @model_validator(mode="after")
    def _all_have_effect(self) -> Self:
        """Whoever gives a setting that changes nothing expects something else than what is run."""
        for name, why in self.without_effect.items():
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise no_effect(name, why)
        return self

    @property
    def without_effect(self) -> Mapping[str, str]:
        """Settings that change nothing beside the others, and those that make it so, as options are written: none of
        the first may be given."""
        return {}

    @classmethod
    def about(cls) -> About | None:
        """What a page says of it; None for general words."""
        path = Path(inspect.getfile(cls)).with_name("about.toml")
        return About(**tomllib.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    @property
    def version(self) -> int:
        """Another one where, with these settings, its examples ask or its scores say something else."""
        return 1

    @classmethod
    def cluster_of(cls, example: str) -> str:
        """What was sampled that an example of this name is one of: those of one share a text or a place in it, and
        their scores go together. By default each was sampled by itself."""
        return example

    @classmethod
    def unheeded(cls) -> tuple[str, ...]:
        """Options of every run that change nothing of this task's. By default the seed, where it has none."""
        return () if "seed" in cls.model_fields else ("seed",)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest example, its answer included; None if all fit the trained window."""
        return None

    @property
    def found(self) -> dict[str, Any]:
        """What its data are, so that a run does not go on with others: a part of the settings that nobody gives."""
        return {}

    @property
    def notes(self) -> Sequence[str]:
        """What whoever runs the task should know of it."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        """All that identifies the examples, as plain data."""
        return {**self.model_dump(mode="json", exclude={"data_dir"}), **self.found}

    def read(self) -> None:
        """Reads its data, where there are some: the same as what needs them first would do.

        Raises:
            DataError: data do not exist, or are not what they should be.
            ValueError: there is nothing to ask.
        """
        if not list(self.examples()):
            raise ValueError(f"{self.name} has nothing to ask with these options and data: choose others")
        _ = self.settings

    def measure(self, subject: Subject) -> None:
        """Counts in the subject's tokens what `examples` and `longest` then say of lengths; there may be nothing.

        Where it was not asked to, those say what is known without a subject.
        """

    @abstractmethod
    def examples(self) -> Iterable[Example]:
        """All examples, in the order of their definition."""

    def batches(self, examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
        """Those that are asked together: by default so many."""
        return batches(examples, size)

    @abstractmethod
    def outcomes(self, examples: Sequence[Example], subject: Subject) -> list[Outcome]:
        """Asks a batch of examples: what each gave, in their order."""


class PreparedTask(Task):
    """A task that writes each example out by itself; those of a batch are asked together."""

    @abstractmethod
    def prepare(self, example: Example, subject: Subject) -> Generation | Scoring:
        """Writes the example out in the subject's tokens. All examples of a task are of one kind."""

    def again(self, example: Example, output: str, subject: Subject) -> Outcome:
        """What an output that was recorded is worth, without asking: as after a change of the scores.

        Raises:
            ValueError: it is no answer in words, of which nothing else is needed.
        """
        its = self.prepare(example, subject)
        if not isinstance(its, Generation):
            raise ValueError(
                f"{self.name} scores likelihoods with these settings, and rows do not keep those: ask again"
            )
        return its.outcome(output, subject.in_thought(its.prompt))

    def outcomes(self, examples: Sequence[Example], subject: Subject) -> list[Outcome]:
        prepared = [self.prepare(example, subject) for example in examples]
        generations = [one for one in prepared if isinstance(one, Generation)]
        scorings = [one for one in prepared if isinstance(one, Scoring)]
        if generations and scorings:
            raise TypeError(f"{self.name} has examples of both kinds")
        if generations:
            answers = subject.answers([one.prompt for one in generations])
            return [
                one.outcome(answer, subject.in_thought(one.prompt))
                for one, answer in zip(generations, answers, strict=True)
            ]
        found = subject.log_likelihoods([passage for one in scorings for passage in one.passages])
        if not all(map(math.isfinite, chain.from_iterable(found))):
            # As with weights that overflow.
            raise ValueError("the model gives probabilities that are not numbers, or 0")
        scores = iter(found)
        return [one.outcome([next(scores) for _ in one.passages]) for one in scorings]
