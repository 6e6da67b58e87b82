# SPDX-License-Identifier: Apache-2.0
"""LongBench, the sixteen tasks in English and code: long texts and a question. See README.md beside this file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field

from ropewalk.eval.data_files import beside, lines_of, read
from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, PreparedTask
from ropewalk.eval.tasks.longbench.scores import check_installed, score
from ropewalk.eval.tasks.settings import Names, NewTokens, Tokens, among, folder_of_data


class Kind(BaseModel):
    """One of LongBench's tasks.

    Attributes:
        prompt: with places for the context and the input.
        new_tokens: of the answer, at most.
    """

    prompt: str
    new_tokens: int


# In the order of SelfExtend's table 2.
KINDS = beside(__file__, Kind)
# LongBench asks these as plain text, of models that chat too: the examples in their prompts show the form.
_NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")

# More than chat templates put around a prompt, in tokens.
_TEMPLATE = 128
_CHARACTERS_A_TOKEN = 4


# Folders of data, and data sets of the hub.
_PLACES = {
    "full": ("longbench/full", "THUDM/LongBench"),
    "mini": ("longbench/minilongbench", "linggm/MiniLongBench"),
}


class Record(BaseModel):
    """An example as LongBench writes it.

    Attributes:
        context: the long text.
        input: what is asked about it; empty where the prompt says all.
        answers: each is right.
        all_classes: of which the answer is one, for trec.
    """

    context: str
    input: str
    answers: tuple[str, ...] = Field(min_length=1)
    all_classes: tuple[str, ...] | None = None


class LongBench(PreparedTask):
    """LongBench: questions, summaries, few-shot learning and code completion over long texts (SelfExtend, table 2)."""

    name = "longbench"
    metrics: ClassVar = {"score": Metric("score")}

    tasks: Annotated[Names, among(KINDS)] = Field(
        tuple(KINDS), min_length=1, description="Of LongBench, comma-separated."
    )
    subset: Literal["full", "mini"] = Field("full", description="LongBench, or MiniLongBench, a small part of it.")
    length: Tokens = Field(
        15500,
        ge=2,
        description="Tokens of a prompt, at most, before the chat template; longer ones lose their middle. LongBench "
        "takes 3500, 7500, 15500 and 31500 for windows of 4k, 8k, 16k and 32k.",
    )
    chat: bool = Field(True, description="Ask a model that chats by its template, where LongBench does so.")
    new_tokens: NewTokens = None
    data_dir: Path | None = folder_of_data("longbench/full/TASK.jsonl, or longbench/minilongbench/TASK.jsonl")

    @property
    def without_effect(self) -> Mapping[str, str]:
        return {"chat": f"--tasks {','.join(self.tasks)}"} if {*self.tasks} <= {*_NO_CHAT} else {}

    @cached_property
    def _files(self) -> dict[str, bytes]:
        check_installed(self.tasks)
        folder, repository = _PLACES[self.subset]
        return {task: read(self.data_dir, f"{folder}/{task}.jsonl", repository, "data.zip") for task in self.tasks}

    @cached_property
    def _examples(self) -> list[Example]:
        first: dict[str, str] = {}
        return [
            Example(
                name := f"{task}-{number}",
                min((len(record.context) + len(record.input)) // _CHARACTERS_A_TOKEN, self.length),
                {"task": task},
                record,
                # Questions about one text are of the first about it.
                cluster=first.setdefault(record.context, name),
            )
            for task, file in self._files.items()
            for number, record in enumerate(lines_of(file, Record, f"{task}.jsonl"))
        ]

    @property
    def found(self) -> dict[str, str]:
        return {"sha256": hashlib.sha256(b"".join(self._files.values())).hexdigest()}

    @property
    def longest(self) -> int:
        answer = self.new_tokens or max(KINDS[task].new_tokens for task in self.tasks)
        is_chat = self.chat and not self.without_effect
        return self.length + answer + (_TEMPLATE if is_chat else 0)

    def examples(self) -> list[Example]:
        return self._examples

    def prepare(self, example: Example, subject: Subject) -> Generation:
        task, record = str(example.cell["task"]), example.about
        kind = KINDS[task]
        text = shortened(kind.prompt.format(context=record.context, input=record.input), self.length, subject)
        token_ids = subject.encode(text, chat=self.chat and task not in _NO_CHAT)
        return Generation(
            Prompt(token_ids, self.new_tokens or kind.new_tokens),
            " | ".join(record.answers),
            lambda answer: {"score": score(task, answer, record.answers, record.all_classes or ())},
        )


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
