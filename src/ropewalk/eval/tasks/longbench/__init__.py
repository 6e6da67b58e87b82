"""LongBench, the sixteen tasks in English and code: long texts and a question. See README.md beside this file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, Outcome, PreparedTask, Settings, each_once
from ropewalk.eval.tasks.longbench.data import SUBSETS, LongBenchError, Record, Subset, files, records
from ropewalk.eval.tasks.longbench.metrics import check_installed, score

__all__ = ["KINDS", "SUBSETS", "LongBench", "LongBenchError", "LongBenchSettings", "Subset"]


class Kind(BaseModel):
    """One of LongBench's tasks.

    Attributes:
        prompt: with places for the context and the input.
        new_tokens: of the answer, at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    new_tokens: int


# In the order of SelfExtend's table 2.
KINDS: dict[str, Kind] = TypeAdapter(dict[str, Kind]).validate_python(
    json.loads(package_files(__name__).joinpath("prompts.json").read_text(encoding="utf-8"))
)
# LongBench asks these as plain text, of models that chat too: the examples in their prompts show the form.
_NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")

# More than chat templates put around a prompt, in tokens.
_TEMPLATE = 128
_CHARACTERS_A_TOKEN = 4


class LongBenchSettings(Settings):
    """Of the LongBench task.

    Args:
        tasks: names of LongBench's.
        subset: "full" for LongBench, "mini" for MiniLongBench.
        length: tokens of a prompt, at most, before the chat template; longer ones lose their middle.
        chat: whether a model that chats is asked as one, in the tasks where LongBench does so.
        sha256: of the tasks' files, one after the other; the task fills it in, so that a run goes on with no others.
    """

    tasks: tuple[str, ...] = Field(default=tuple(KINDS), min_length=1)
    subset: Subset = "full"
    length: int = Field(default=15500, ge=2)
    chat: bool = True
    sha256: str = ""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(tasks, KINDS, "LongBench has no task {name} here; it has {known}")


@dataclass(frozen=True)
class LongBench(PreparedTask):
    """The task under its settings.

    Args:
        data_dir: see `data.files`; where they lie is not part of what is asked for.

    Raises:
        LongBenchError: the examples cannot be had, or cannot be scored.
    """

    settings: LongBenchSettings
    data_dir: InitVar[Path | None] = None
    name: ClassVar[str] = "longbench"
    version: ClassVar[int] = 1
    metrics: ClassVar[dict[str, Metric]] = {"score": Metric("score")}
    _examples: dict[str, tuple[str, Record]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self, data_dir: Path | None) -> None:
        check_installed(self.settings.tasks)
        found = files(self.settings.tasks, self.settings.subset, data_dir)
        for task, file in found.items():
            for number, record in enumerate(records(file, task)):
                self._examples[f"{task}-{number}"] = (task, record)
        sha256 = hashlib.sha256(b"".join(found.values())).hexdigest()
        object.__setattr__(self, "settings", self.settings.model_copy(update={"sha256": sha256}))

    @property
    def longest(self) -> int:
        answer = max(KINDS[task].new_tokens for task in self.settings.tasks)
        return self.settings.length + answer + (_TEMPLATE if self.settings.chat else 0)

    def examples(self) -> Iterator[Example]:
        for name, (task, record) in self._examples.items():
            tokens = (len(record.context) + len(record.input)) // _CHARACTERS_A_TOKEN
            yield Example(name, min(tokens, self.settings.length), {"task": task})

    def prepare(self, example: Example, subject: Subject) -> Generation:
        task, record = self._examples[example.name]
        kind = KINDS[task]
        text = shortened(kind.prompt.format(context=record.context, input=record.input), self.settings.length, subject)
        token_ids = subject.encode(text, chat=self.settings.chat and task not in _NO_CHAT)

        def outcome(output: str) -> Outcome:
            worth = score(task, output, record.answers, record.all_classes or ())
            return Outcome(len(token_ids), {"score": worth}, " | ".join(record.answers), output)

        return Generation(Prompt(token_ids, kind.new_tokens), outcome)


def shortened(text: str, length: int, subject: Subject) -> str:
    """A text of more than `length` tokens without its middle: what is asked stands at its beginning and its end.

    Args:
        length: 2 tokens or more, special ones included.
    """
    token_ids = subject.encode(text)
    if len(token_ids) <= length:
        return text
    half = length // 2
    return subject.decode(token_ids[:half]) + subject.decode(token_ids[-half:])
