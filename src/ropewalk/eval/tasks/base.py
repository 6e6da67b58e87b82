"""What every task is: examples with names, and a score for each; its settings are its fields."""

from __future__ import annotations

import inspect
import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ropewalk.eval.subjects import Passage, Prompt, Subject, batches
from ropewalk.names import did_you_mean

# Kind of an error of ours, which says what a setting must be and what it is.
OURS = "setting"
_K = 1024


def refused(expected: str, given: object, hint: str = "") -> PydanticCustomError:
    """An error of a validator: what a setting must be, as in "must be a number"."""
    return PydanticCustomError(OURS, "{text}", {"text": f"{expected}, got {given!r}{hint}"})


def _apart(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _once(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(values))


def _tokens(value: object) -> object:
    if not isinstance(value, str):
        return value
    digits = value.strip().lower()
    try:
        tokens = int(digits.removesuffix("k")) * (_K if digits.endswith("k") else 1)
    except ValueError:
        tokens = 0
    if tokens < 1:
        raise refused("must be whole numbers such as 4096 or 16k", value)
    return tokens


def _depths(value: object) -> object:
    """Numbers from 0 to 1, or of how many, evenly spread, there are to be."""
    if not isinstance(value, str):
        return value
    if value.strip().isdigit() and int(value) > 1:
        return evenly(int(value))
    try:
        depths = [float(part) for part in value.split(",")]
    except ValueError:
        depths = []
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise refused("must be numbers from 0 to 1, or how many there are", value)
    return depths


def evenly(count: int) -> tuple[float, ...]:
    """So many depths from 0 to 1."""
    return tuple(i / (count - 1) for i in range(count))


# Settings that may be given as text, as an option's value is; with words for what most tasks mean by them.
Tokens = Annotated[int, BeforeValidator(_tokens), Field(ge=1)]  # "16k"
Lengths = Annotated[  # "4k,8k"
    tuple[Tokens, ...],
    BeforeValidator(_apart),
    AfterValidator(_once),
    Field(min_length=1, description="Tokens of the prompts, comma-separated; 16k is 16384."),
]
Depths = Annotated[  # "10", "0.1,0.5"
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    BeforeValidator(_depths),
    Field(min_length=1, description="Where it is hidden, from 0 to 1, comma-separated; or a number of depths."),
]
Chat = Annotated[bool, Field(description="Ask as a message where the model has a chat template.")]
Names = Annotated[tuple[str, ...], BeforeValidator(_apart)]  # "qasper,trec"


def written(value: object) -> str:
    """A setting as an option's value."""
    if isinstance(value, tuple):
        depths = len(value) > 1 and value == evenly(len(value))
        return str(len(value)) if depths else ",".join(map(written, value))
    return str(value)


def each_once(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Names of what a task knows, each once and in the order in which it knows them, for a validator of settings.

    Raises:
        PydanticCustomError: there is one that it does not know.
    """
    names, known = [*names], [*known]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise refused(f"must be one of {', '.join(known)}", name, f".{hint}" if hint else "")
    return tuple(name for name in known if name in names)


@dataclass(frozen=True)
class Example:
    """One example, not yet written out: that may take long, and is done when its turn comes.

    Attributes:
        name: unique among the task's examples.
        tokens: about how long it is, for the order and the forecast.
        cell: what it is one of, such as a length and a depth.
        about: what its task needs to write it out.
    """

    name: str
    tokens: int
    cell: dict[str, int | float | str]
    about: Any = field(default=None, compare=False, repr=False)


def grid(lengths: Iterable[int], depths: Iterable[float], samples: int) -> list[Example]:
    """So many examples of each length and depth, about a depth and the number of a sample."""
    return [
        Example(f"{length}-{depth:.3f}-{i}", length, {"length": length, "depth": round(depth, 3)}, (depth, i))
        for length in lengths
        for depth in {f"{depth:.3f}": depth for depth in depths}.values()
        for i in range(samples)
    ]


@dataclass(frozen=True)
class Outcome:
    """What an example gave."""

    prompt_tokens: int
    scores: dict[str, float]
    target: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Generation:
    """An example written out: a prompt, what is to be answered, and what an answer is worth."""

    prompt: Prompt
    target: str
    scores: Callable[[str], dict[str, float]]


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


def folder_of_data(holds: str) -> Any:
    """The field `data_dir` of a task that reads data, from a folder that holds such files."""
    return Field(None, description=f"Folder that holds {holds}. Without one they are loaded from the hub.")


class About(BaseModel):
    """A task in words, for a page of its results; from about.toml in its folder.

    Attributes:
        title: its name for people.
        measures: what it measures, in a sentence or two.
        reading: how to read its figure over these parts of the cells; empty for general words.
        over: those parts.
        by: what of the cells there is a table for; None for all.
        examples: settings whose numbers, of lists their lengths, multiply to the examples of each method; of none, it
            is not known.
        groups: of its tasks, where it is several, in the order of a table's columns.
        percent: whether its scores, from 0 to 1, are written in percent, as is usual for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    measures: str
    reading: str = ""
    over: tuple[str, ...] = ("length", "depth")
    by: tuple[str, ...] | None = None
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
    version: ClassVar[int] = 1
    metrics: ClassVar[dict[str, Metric]]

    @classmethod
    def about(cls) -> About | None:
        """What a page says of it; None for general words."""
        path = Path(inspect.getfile(cls)).with_name("about.toml")
        return About(**tomllib.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

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
        """
        _ = list(self.examples()), self.settings

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

    def outcomes(self, examples: Sequence[Example], subject: Subject) -> list[Outcome]:
        prepared = [self.prepare(example, subject) for example in examples]
        generations = [one for one in prepared if isinstance(one, Generation)]
        scorings = [one for one in prepared if isinstance(one, Scoring)]
        if generations and scorings:
            raise TypeError(f"{self.name} has examples of both kinds")
        if generations:
            answers = subject.answers([one.prompt for one in generations])
            return [
                Outcome(len(one.prompt.token_ids), one.scores(answer), one.target, answer)
                for one, answer in zip(generations, answers, strict=True)
            ]
        found = subject.log_likelihoods([passage for one in scorings for passage in one.passages])
        if not all(map(math.isfinite, chain.from_iterable(found))):
            # As with weights that overflow.
            raise ValueError("the model gives probabilities that are not numbers, or 0")
        scores = iter(found)
        return [one.outcome([next(scores) for _ in one.passages]) for one in scorings]
