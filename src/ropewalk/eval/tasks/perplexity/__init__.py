# SPDX-License-Identifier: Apache-2.0
"""Perplexity on books: by window length, or by position. See README.md beside this file."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from ropewalk.eval.prompts import encode_apart
from ropewalk.eval.subjects import Hashes, Passage, Subject
from ropewalk.eval.tasks.base import Example, Metric, Outcome, PreparedTask, Scoring, spread
from ropewalk.eval.tasks.settings import Lengths, folder_of_data, refused
from ropewalk.eval.texts import Text, sha256, texts


@dataclass(frozen=True)
class Window:
    """A part of a text: what is read, and what of it is scored; indices of tokens.

    Attributes:
        begin: of what is read.
        first: of what is scored.
        end: of both, itself not in them.
    """

    begin: int
    first: int
    end: int


def all_windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Windows that score every token once, with up to `length` tokens read: the first scores all that it reads.

    Args:
        tokens: of the text, `length` or more.
    """
    ends = [*range(length, tokens, stride), tokens]
    return [Window(0, 0, ends[0]), *(Window(end - length, before, end) for before, end in pairwise(ends))]


def some_windows(tokens: int, length: int, stride: int, longest: int, count: int) -> list[Window]:
    """At most `count` windows, evenly over the text, that score the same tokens for every length up to `longest`.

    Args:
        tokens: of the text, `longest` or more.
    """
    ends = range(longest, tokens + 1, stride)
    return [Window(end - length, end - stride, end) for end in spread(ends, count)]


# Settings that each mode does not ask for: positions are those of a book's first tokens, and as many as are read.
_IDLE = {
    "sliding": ("bucket",),
    "start": ("books", "windows", "bucket"),
    "positions": ("stride", "windows", "tokens"),
}


class Perplexity(PreparedTask):
    """Perplexity on books, by length or by position (SelfExtend, appendix D.1)."""

    name = "perplexity"
    metrics: ClassVar = {"perplexity": Metric("perplexity", higher_is_better=False, pooled=("nll", "tokens"))}

    text: str = Field("pg19", description="Set of texts: pg19, or alice, which comes with the package.")
    data_dir: Path | None = folder_of_data("pg19/test_books/*.txt")
    mode: Literal["sliding", "start", "positions"] = Field(
        "sliding",
        description="Windows of each length, spread over a few books; or, as in the paper, over the start of all "
        "books, as long as the longest; or one text of each length by position.",
    )
    stride: int = Field(256, ge=1, description="Tokens that a window adds to the one before it, which it scores.")
    windows: int = Field(
        16, ge=0, description="Of each book and length, spread over the book; 0 for all, as with --mode start."
    )
    bucket: int = Field(1024, ge=1, description="Positions that are summed up, with --mode positions.")
    books: int = Field(3, ge=1, description="At most, drawn from the set by --seed; with --mode start all.")
    tokens: int | None = Field(None, ge=2, description="Of each book, from its beginning; all if not given.")
    lengths: Lengths = Field(
        (4096, 8192, 16384, 32768), description="Tokens of the windows or texts, comma-separated; 16k is 16384."
    )
    seed: int = 0
    _encodings: dict[tuple[Hashes, str], tuple[list[int], array[int]]] = PrivateAttr(default_factory=dict)

    @field_validator("lengths")
    @classmethod
    def _fit(cls, lengths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        stride, tokens = info.data.get("stride", 1), info.data.get("tokens")
        least = 2 if info.data.get("mode") == "positions" else stride + 1
        if min(lengths) < least:
            why = f"longer than the stride of {stride} tokens" if least > 2 else "2 tokens or more"
            raise refused(f"must be {why}", min(lengths))
        if tokens is not None and max(lengths) > tokens:
            raise refused(f"must be no more than the {tokens} tokens of each book", max(lengths))
        return lengths

    @property
    def without_effect(self) -> Mapping[str, str]:
        idle = dict.fromkeys(_IDLE[self.mode], f"--mode {self.mode}")
        return idle | (dict.fromkeys(("data_dir", "books", "seed"), "--text alice") if self.text == "alice" else {})

    @cached_property
    def _books(self) -> list[Text]:
        books = texts(self.text, self.data_dir)
        # All are shuffled, so that more books are these and others.
        random.Random(self.seed).shuffle(books)
        return books if self.mode == "start" else books[: self.books]

    @property
    def found(self) -> dict[str, str]:
        return {"sha256": sha256(self._books)}

    @classmethod
    def cluster_of(cls, example: str) -> str:
        """The book."""
        return example.partition("-")[2]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def examples(self) -> Iterator[Example]:
        for length in self.lengths:
            for book in self._books:
                yield Example(f"{length}-{book.name}", length, {"length": length}, book)

    def prepare(self, example: Example, subject: Subject) -> Scoring:
        book, length = example.about, example.tokens
        special, tokens = self._encoded(book, subject)
        if len(special) + len(tokens) < self.longest:
            raise ValueError(f"{book.name} has {len(special) + len(tokens)} tokens, and {self.longest} are needed")
        if self.mode == "positions":
            read = special + tokens[: length - len(special)]
            first = max(1, len(special))
            return Scoring(
                (Passage(read, first),),
                lambda scores: Outcome(length, _by_position(scores[0], first, self.bucket)),
            )
        passages = tuple(
            # Nothing stands before the very first token.
            Passage(special + tokens[window.begin : window.end], max(1, len(special) + window.first - window.begin))
            for window in self._windows(len(tokens), length, len(special))
        )
        return Scoring(passages, lambda scores: Outcome(length, _pooled([*chain.from_iterable(scores)])))

    def _encoded(self, book: Text, subject: Subject) -> tuple[list[int], list[int]]:
        """Special tokens, and a book's. Its windows are many, and reading them takes less time than encoding a book."""
        key = (subject.hashes, book.name)
        if key not in self._encodings:
            special, tokens = encode_apart(subject, book.text)
            kept = self.longest - len(special) if self.mode == "start" else None
            self._encodings[key] = special, array("I", tokens[: self.tokens or kept])
        special, stored = self._encodings[key]
        return special, stored.tolist()

    def _windows(self, tokens: int, length: int, special: int) -> list[Window]:
        stride, count = self.stride, 0 if self.mode == "start" else self.windows
        if length - special < stride:
            raise ValueError(f"{length} tokens, {special} of them special, are too few for a stride of {stride}")
        if count:
            return some_windows(tokens, length - special, stride, self.longest - special, count)
        return all_windows(tokens, length - special, stride)


def _pooled(scores: Sequence[float]) -> dict[str, float]:
    """Negative log-likelihood in nats, tokens, and the perplexity."""
    nll = -math.fsum(scores)
    return {"nll": nll, "tokens": len(scores), "perplexity": math.exp(nll / len(scores))}


def _by_position(scores: Sequence[float], first: int, bucket: int) -> dict[str, float]:
    """`_pooled`, and its sums for each bucket under the position where it begins; `first` is the first score's."""
    sums = _pooled(scores)
    for begin in range(0, first + len(scores), bucket):
        inside = scores[max(0, begin - first) : max(0, begin - first + bucket)]
        if inside:
            sums |= {f"nll_{begin}": -math.fsum(inside), f"tokens_{begin}": len(inside)}
    return sums
