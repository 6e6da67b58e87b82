# SPDX-License-Identifier: Apache-2.0
"""Tasks whose prompts come in sets of so many lines or keys: what that is in tokens says the model's tokenizer."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import PrivateAttr

from ropewalk.eval.prompts import chats
from ropewalk.eval.subjects import Subject
from ropewalk.eval.tasks.base import PreparedTask
from ropewalk.eval.tasks.settings import Chat

Record = TypeVar("Record")


class PublishedTask(PreparedTask, Generic[Record]):
    """A task of such sets, each a file of records."""

    chat: Chat = True
    # Of each set the longest prompt, in tokens of who is asked.
    _tokens: dict[int, int] = PrivateAttr(default_factory=dict)

    @abstractmethod
    def read_files(self) -> dict[int, bytes]:
        """The file of each set, by its number of lines or keys."""

    @abstractmethod
    def records_of(self, size: int, content: bytes) -> list[Record]:
        """What a file holds. Raises DataError: it is not what it should be."""

    @abstractmethod
    def prompt(self, record: Record, chat: bool) -> str:
        """The prompt of a record, for a model that chats or one that goes on with a text."""

    @cached_property
    def _files(self) -> dict[int, bytes]:
        return self.read_files()

    @cached_property
    def records(self) -> dict[int, list[Record]]:
        return {size: self.records_of(size, content) for size, content in self._files.items()}

    @property
    def found(self) -> dict[str, Any]:
        return {"sha256": hashlib.sha256(b"".join(self._files.values())).hexdigest()}

    def chats(self, subject: Subject) -> bool:
        return self.chat and chats(subject)

    def encode(self, text: str, subject: Subject) -> list[int]:
        return subject.encode(text, self.chats(subject))

    def measure(self, subject: Subject) -> None:
        chat = self.chats(subject)
        for size, records in self.records.items():
            self._tokens[size] = max(len(subject.encode(self.prompt(one, chat), chat)) for one in records)

    def length(self, size: int) -> int:
        """Tokens of a set's longest prompt; its characters where nobody was asked yet, which are hardly fewer."""
        return self._tokens.get(size) or max(len(self.prompt(one, True)) for one in self.records[size])
