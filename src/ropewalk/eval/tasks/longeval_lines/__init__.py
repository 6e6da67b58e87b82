# SPDX-License-Identifier: Apache-2.0
"""LongEval's lines: many lines with a number each, and one is asked for. See README.md beside this file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, Field, model_validator

from ropewalk.eval.data_files import lines_of, read_published
from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric
from ropewalk.eval.tasks.published import PublishedTask
from ropewalk.eval.tasks.settings import Lengths, NewTokens

_SOURCE = "longeval/evaluation/lines/testcases of DachengLi1/LongChat on GitHub"
# How LongEval has a model answer that goes on with a text.
_CONTINUED = "Line <{name}>: <REGISTER_CONTENT> is"
# Of an answer, at most: of a reply, and of a text that goes on.
_REPLY, _CONTINUATION = 100, 15
# Of a number in an answer: Python reads none of some thousands, which a model that repeats itself may write.
_MOST_DIGITS = 1000


class Record(BaseModel):
    """A prompt as LongEval writes it.

    Attributes:
        random_idx: the line that is asked for: its name, and its place from 0.
    """

    prompt: str
    expected_number: int
    random_idx: tuple[str | int, int]
    num_lines: int

    @model_validator(mode="after")
    def _there(self) -> Self:
        if not 0 <= self.random_idx[1] < self.num_lines:
            raise ValueError(f"line {self.random_idx[1]} of {self.num_lines} is asked for")
        line = f"line {self.random_idx[0]}: REGISTER_CONTENT is <{self.expected_number}>\n"
        if line not in self.prompt:
            raise ValueError(f"{line.strip()!r} is asked for and is not in the prompt")
        return self

    @property
    def depth(self) -> float:
        """Where the line is, from 0 to 1."""
        return self.random_idx[1] / max(1, self.num_lines - 1)


class LongEvalLines(PublishedTask[Record]):
    """One of hundreds of lines, which are all alike, by length and depth (LongEval)."""

    name = "longeval-lines"
    metrics: ClassVar = {"accuracy": Metric("accuracy")}

    lines: Lengths = Field((200, 300, 400, 500, 600, 680), description="Of a prompt, comma-separated; 50 prompts each.")
    new_tokens: NewTokens = None
    data_dir: Path | None = Field(
        None,
        description="Folder that holds longeval/lines/N_lines.jsonl, or a copy of DachengLi1/LongChat from GitHub.",
    )

    def read_files(self) -> dict[int, bytes]:
        def read(lines: int) -> bytes:
            file = f"{lines}_lines.jsonl"
            names = (f"longeval/lines/{file}", f"longeval/evaluation/lines/testcases/{file}")
            return read_published(self.data_dir, names, f"{_SOURCE}, or leave it out of --lines")

        return {lines: read(lines) for lines in self.lines}

    def records_of(self, size: int, content: bytes) -> list[Record]:
        return lines_of(content, Record, f"{size}_lines.jsonl")

    def prompt(self, record: Record, chat: bool) -> str:
        return record.prompt + ("" if chat else _CONTINUED.format(name=record.random_idx[0]))

    @property
    def longest(self) -> int:
        return max(map(self.length, self.records)) + (self.new_tokens or _REPLY)

    def examples(self) -> Iterator[Example]:
        for lines, records in self.records.items():
            length = self.length(lines)
            for number, record in enumerate(records):
                # Tenths: each has about five of a set.
                yield Example(f"{lines}-{number}", length, {"length": length, "depth": round(record.depth, 1)}, record)

    def prepare(self, example: Example, subject: Subject) -> Generation:
        record: Record = example.about
        chat = self.chats(subject)
        asked = Prompt(
            self.encode(self.prompt(record, chat), subject),
            self.new_tokens or (_REPLY if chat else _CONTINUATION),
        )
        right = record.expected_number
        return Generation(asked, str(right), lambda answer: {"accuracy": float(last_number(answer) == right)})


def last_number(answer: str) -> int | None:
    """The last run of digits, as a number; None where there is none, or one longer than any that is asked for."""
    found = re.findall(r"\d+", answer)
    return int(found[-1]) if found and len(found[-1]) <= _MOST_DIGITS else None
