"""Perplexity on books: by window length, or by position. See README.md beside this file."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ropewalk.eval.prompts import encode_apart
from ropewalk.eval.subjects import Passage, Subject
from ropewalk.eval.tasks.base import Example, Metric, Outcome, PreparedTask, Scoring, Settings
from ropewalk.eval.texts import Text, sha256, texts

Mode = Literal["sliding", "positions"]


class PerplexitySettings(Settings):
    """Of the perplexity task.

    Args:
        text: name of a set of texts.
        mode: "sliding" for windows of each length, "positions" for one text of each length.
        stride: tokens that a window adds to the one before it, which it scores (appendix D.1: 256).
        windows: of each book and length, at most, spread over the book; 0 for all, so that every token is scored.
        bucket: positions that are summed up in one, in the mode "positions".
        books: at most.
        tokens: of each book, from its beginning, that are looked at; None for all.
        lengths: of the windows or texts, in tokens, special ones included.
        seed: of the choice of books.
        sha256: of the books' texts; the task fills it in, so that a run does not go on with other ones.
    """

    text: str = "pg19"
    mode: Mode = "sliding"
    stride: int = Field(default=256, ge=1)
    windows: int = Field(default=16, ge=0)
    bucket: int = Field(default=1024, ge=1)
    books: int = Field(default=3, ge=1)
    tokens: int | None = Field(default=None, ge=2)
    lengths: tuple[int, ...] = Field(min_length=1)
    seed: int = 0
    sha256: str = ""

    @field_validator("lengths")
    @classmethod
    def _fit(cls, lengths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        stride, tokens = info.data.get("stride", 1), info.data.get("tokens")
        least = stride + 1 if info.data.get("mode") == "sliding" else 2
        if min(lengths) < least:
            why = f"longer than the stride of {stride} tokens" if least > 2 else "2 tokens or more"
            raise PydanticCustomError("lengths", "they must be {why}", {"why": why})
        if tokens is not None and max(lengths) > tokens:
            raise PydanticCustomError("lengths", "of each book there are {tokens} tokens", {"tokens": tokens})
        return lengths


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
    possible = (tokens - longest) // stride + 1
    chosen = range(possible) if count >= possible else [i * possible // count for i in range(count)]
    ends = [longest + stride * i for i in chosen]
    return [Window(end - length, end - stride, end) for end in ends]


@dataclass(frozen=True)
class Perplexity(PreparedTask):
    """The task under its settings.

    Args:
        data_dir: see `texts`; where texts lie is not part of what is asked for.

    Raises:
        TextsError: the texts do not exist or cannot be had.
    """

    settings: PerplexitySettings
    data_dir: InitVar[Path | None] = None
    name: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 1
    metrics: ClassVar[dict[str, Metric]] = {
        "perplexity": Metric("perplexity", higher_is_better=False, pooled=("nll", "tokens"))
    }
    _examples: dict[str, tuple[Text, int]] = field(default_factory=dict, init=False, repr=False)
    _tokens: dict[tuple[str, str], tuple[list[int], array[int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self, data_dir: Path | None) -> None:
        books = texts(self.settings.text, data_dir)
        # All are shuffled, so that more books are these and others.
        random.Random(self.settings.seed).shuffle(books)
        books = books[: self.settings.books]
        for length in self.settings.lengths:
            for book in books:
                self._examples[f"{length}-{book.name}"] = (book, length)
        object.__setattr__(self, "settings", self.settings.model_copy(update={"sha256": sha256(books)}))

    @property
    def longest(self) -> int:
        return max(self.settings.lengths)

    def examples(self) -> Iterator[Example]:
        for name, (_, length) in self._examples.items():
            yield Example(name, length, {"length": length})

    def prepare(self, example: Example, subject: Subject) -> Scoring:
        book, length = self._examples[example.name]
        special, tokens = self._encoded(book, subject)
        if len(special) + len(tokens) < self.longest:
            raise ValueError(f"{book.name} has {len(special) + len(tokens)} tokens, and {self.longest} are needed")
        if self.settings.mode == "positions":
            read = special + tokens[: length - len(special)]
            first = max(1, len(special))
            return Scoring(
                (Passage(read, first),),
                lambda scores: Outcome(length, _by_position(_finite(scores), first, self.settings.bucket)),
            )
        passages = tuple(
            # Nothing stands before the very first token.
            Passage(special + tokens[window.begin : window.end], max(1, len(special) + window.first - window.begin))
            for window in self._windows(len(tokens), length, len(special))
        )
        return Scoring(passages, lambda scores: Outcome(length, _pooled(_finite(scores))))

    def _encoded(self, book: Text, subject: Subject) -> tuple[list[int], list[int]]:
        """Special tokens, and a book's. Its windows are many, and reading them takes less time than encoding a book."""
        key = (subject.weights_hash, book.name)
        if key not in self._tokens:
            special, tokens = encode_apart(subject, book.text)
            self._tokens[key] = special, array("I", tokens[: self.settings.tokens])
        special, kept = self._tokens[key]
        return special, kept.tolist()

    def _windows(self, tokens: int, length: int, special: int) -> list[Window]:
        stride, count = self.settings.stride, self.settings.windows
        if length - special < stride:
            raise ValueError(f"{length} tokens, {special} of them special, are too few for a stride of {stride}")
        if count:
            return some_windows(tokens, length - special, stride, self.longest - special, count)
        return all_windows(tokens, length - special, stride)


def _finite(scores: Sequence[Sequence[float]]) -> list[float]:
    """Those of all passages. Raises ValueError: a score is no number, as with weights that overflow."""
    together = [score for one in scores for score in one]
    if not all(map(math.isfinite, together)):
        raise ValueError("the model gives probabilities that are not numbers, or 0")
    return together


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
