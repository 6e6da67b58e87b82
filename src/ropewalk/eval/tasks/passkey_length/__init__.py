"""Pass keys of more and more digits, at one length of text. See README.md beside this file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import Field

from ropewalk.eval.subjects import Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, PreparedTask, Settings
from ropewalk.eval.tasks.passkey import answer_tokens, hidden


class PasskeyLengthSettings(Settings):
    """Of the task.

    Args:
        digits: of the keys (section 4.7).
        length: of the prompts, in tokens.
        samples: prompts of each number of digits.
        seed: of keys and places.
    """

    digits: tuple[int, ...] = Field(default=(5, 8, 16, 36, 48, 64, 100), min_length=1)
    length: int = Field(default=16384, ge=1)
    samples: int = Field(default=10, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class PasskeyLength(PreparedTask):
    """The task under its settings."""

    settings: PasskeyLengthSettings
    name: ClassVar[str] = "passkey-length"
    version: ClassVar[int] = 1
    metrics: ClassVar[dict[str, Metric]] = {"exact_match": Metric("exact match")}
    _examples: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for digits in self.settings.digits:
            for sample in range(self.settings.samples):
                self._examples[f"{digits}-{sample}"] = digits

    @property
    def longest(self) -> int:
        return self.settings.length + answer_tokens(max(self.settings.digits))

    def examples(self) -> Iterator[Example]:
        for name, digits in self._examples.items():
            yield Example(name, self.settings.length, {"digits": digits})

    def prepare(self, example: Example, subject: Subject) -> Generation:
        # Of the name, so that an example does not change with what else is asked for.
        chance = random.Random(f"{self.settings.seed} {example.name}")
        return hidden(subject, self.settings.length, chance.random(), self._examples[example.name], chance)
