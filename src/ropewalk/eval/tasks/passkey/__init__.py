"""Pass key retrieval: a grid of lengths and depths, exact match. See README.md beside this file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import Field

from ropewalk.eval import haystack
from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, Outcome, PreparedTask, Settings

# The text of Mohtashami and Jaggi (arXiv 2305.16300), as the SelfExtend authors' examples have it.
HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class PasskeySettings(Settings):
    """Of the pass key task.

    Args:
        lengths: of the prompts, in tokens.
        depths: where the key is hidden, from 0 (the beginning) to 1 (the end).
        samples: prompts of each length and depth.
        span: tokens behind a depth among which the place is drawn (section 4.2: 400).
        digits: of the key.
        seed: of keys and places.
    """

    lengths: tuple[int, ...] = Field(min_length=1)
    depths: tuple[float, ...] = Field(default=tuple(i / 9 for i in range(10)), min_length=1)
    samples: int = Field(default=10, ge=1)
    span: int = Field(default=400, ge=0)
    digits: int = Field(default=5, ge=1, le=1000)
    seed: int = 0


@dataclass(frozen=True)
class Passkey(PreparedTask):
    """The task under its settings."""

    settings: PasskeySettings
    name: ClassVar[str] = "passkey"
    version: ClassVar[int] = 1
    metrics: ClassVar[dict[str, Metric]] = {"exact_match": Metric("exact match")}
    _examples: dict[str, tuple[int, float, int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        settings = self.settings
        for length in settings.lengths:
            for depth in settings.depths:
                for sample in range(settings.samples):
                    self._examples[f"{length}-{depth:.3f}-{sample}"] = (length, depth, sample)

    @property
    def longest(self) -> int:
        return max(self.settings.lengths) + answer_tokens(self.settings.digits)

    def examples(self) -> Iterator[Example]:
        for name, (length, depth, _) in self._examples.items():
            yield Example(name, length, {"length": length, "depth": round(depth, 3)})

    def prepare(self, example: Example, subject: Subject) -> Generation:
        length, depth, _ = self._examples[example.name]
        span = min(self.settings.span, length)
        # Of the name, so that an example does not change with what else is asked for.
        chance = random.Random(f"{self.settings.seed} {example.name}")
        place = (depth * (length - span) + chance.uniform(0, span)) / length
        return hidden(subject, length, place, self.settings.digits, chance)


def hidden(subject: Subject, length: int, place: float, digits: int, chance: random.Random) -> Generation:
    """A key of so many digits hidden in a text of `length` tokens, `place` from 0 to 1, and asked for."""
    prompt = haystack.passkey(
        length,
        place,
        lambda text: len(subject.encode(text)),
        seed=chance.randrange(1 << 32),
        digits=digits,
        head=HEAD,
        filler=FILLER,
    )

    def outcome(output: str) -> Outcome:
        return Outcome(prompt.tokens, {"exact_match": float(prompt.is_right(output))}, prompt.answer, output)

    return Generation(Prompt(subject.encode(prompt.prompt), answer_tokens(digits), stop="\n"), outcome)


def answer_tokens(digits: int) -> int:
    """Two a digit and a few more, whatever the tokenizer."""
    return 2 * digits + 6
