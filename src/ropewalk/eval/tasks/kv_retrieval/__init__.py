# SPDX-License-Identifier: Apache-2.0
"""Key-value retrieval of Lost in the Middle: the value of one of many random keys. See README.md beside this file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, Field, model_validator

from ropewalk.eval.data_files import lines_of, read_published
from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric
from ropewalk.eval.tasks.published import PublishedTask
from ropewalk.eval.tasks.settings import Depths, Lengths, NewTokens, evenly

_SOURCE = "kv_retrieval_data of nelson-liu/lost-in-the-middle on GitHub"
# kv_retrieval.prompt of that repository, and kv_retrieval_with_query_aware_contextualization.prompt.
_TASK = "Extract the value corresponding to the specified key in the JSON object below."
_PLAIN = f'{_TASK}\n\nJSON data:\n{{data}}\n\nKey: "{{key}}"\nCorresponding value:'
_QUERY_AWARE = f'{_TASK}\n\nKey: "{{key}}"\n\nJSON data:\n{{data}}\n\nKey: "{{key}}"\nCorresponding value:'

# Of an answer, at most.
NEW_TOKENS = 100
# A pair that is moved to an end may be written with another token there, and so may the one that was at it.
_MOVED = 4


class Record(BaseModel):
    """Keys with their values as Lost in the Middle writes them, and the one that is asked for."""

    ordered_kv_records: list[tuple[str, str]] = Field(min_length=2)
    key: str
    value: str

    @model_validator(mode="after")
    def _there(self) -> Self:
        if len(dict(self.ordered_kv_records)) < len(self.ordered_kv_records):
            raise ValueError("a key is there twice")
        if (self.key, self.value) not in self.ordered_kv_records:
            raise ValueError(f"{self.key} with {self.value} is asked for and is not among the pairs")
        return self

    def pairs(self, depth: float) -> list[tuple[str, str]]:
        """All pairs, with the one that is asked for moved to a depth from 0 to 1."""
        asked = (self.key, self.value)
        others = [pair for pair in self.ordered_kv_records if pair != asked]
        place = int(depth * len(others))
        return [*others[:place], asked, *others[place:]]


class KVRetrieval(PublishedTask[Record]):
    """The value of one of many random keys, by length and depth (Lost in the Middle)."""

    name = "kv-retrieval"
    metrics: ClassVar = {"accuracy": Metric("accuracy")}

    keys: Lengths = Field((75, 140, 300), description="Pairs of a prompt, comma-separated: a set of 500 prompts each.")
    depths: Depths = evenly(5)
    query_aware: bool = Field(False, description="Say the key before the data too (query-aware contextualization).")
    new_tokens: NewTokens = None
    data_dir: Path | None = Field(
        None,
        description="Folder that holds kv_retrieval/kv-retrieval-N_keys.jsonl.gz, or a copy of "
        "nelson-liu/lost-in-the-middle from GitHub.",
    )

    def read_files(self) -> dict[int, bytes]:
        def read(keys: int) -> bytes:
            file = f"kv-retrieval-{keys}_keys.jsonl.gz"
            names = (f"kv_retrieval/{file}", f"kv_retrieval_data/{file}")
            return read_published(self.data_dir, names, f"{_SOURCE}, or leave it out of --keys")

        return {keys: read(keys) for keys in self.keys}

    @classmethod
    def cluster_of(cls, example: str) -> str:
        """A list of pairs, which is asked at every depth."""
        keys, _, number = example.split("-")
        return f"{keys}-{number}"

    def records_of(self, size: int, content: bytes) -> list[Record]:
        return lines_of(content, Record, f"kv-retrieval-{size}_keys.jsonl.gz")

    def prompt(self, record: Record, chat: bool, depth: float = 0) -> str:
        data = ",\n ".join(f'"{key}": "{value}"' for key, value in record.pairs(depth))
        return (_QUERY_AWARE if self.query_aware else _PLAIN).format(data=f"{{{data}}}", key=record.key)

    @property
    def longest(self) -> int:
        return max(map(self.length, self.records)) + _MOVED + (self.new_tokens or NEW_TOKENS)

    def examples(self) -> Iterator[Example]:
        for keys, records in self.records.items():
            length = self.length(keys)
            for depth in dict.fromkeys(round(depth, 3) for depth in self.depths):
                for number, record in enumerate(records):
                    cell: dict[str, int | float | str] = {"length": length, "depth": depth}
                    yield Example(f"{keys}-{depth:.3f}-{number}", length, cell, (record, depth))

    def prepare(self, example: Example, subject: Subject) -> Generation:
        record, depth = example.about
        text = self.prompt(record, self.chats(subject), depth)
        asked = Prompt(self.encode(text, subject), self.new_tokens or NEW_TOKENS)
        return Generation(asked, record.value, partial(scores, record.value))


def scores(value: str, answer: str) -> dict[str, float]:
    """Whether an answer holds the value, whatever their case."""
    return {"accuracy": float(value.lower() in answer.lower())}
