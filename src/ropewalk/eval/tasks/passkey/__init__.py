# SPDX-License-Identifier: Apache-2.0
"""Pass key retrieval: a grid of lengths and depths, exact match. See README.md beside this file."""

from __future__ import annotations

import random
from typing import ClassVar

from pydantic import Field

from ropewalk.eval import haystack
from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, PreparedTask, grid
from ropewalk.eval.tasks.settings import Depths, Lengths, evenly

# The text of Mohtashami and Jaggi (arXiv 2305.16300), as the SelfExtend authors' examples have it.
HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Passkey(PreparedTask):
    """Pass key retrieval over lengths and depths (SelfExtend, section 4.2, figure 4)."""

    name = "passkey"
    metrics: ClassVar = {"exact_match": Metric("exact match")}

    lengths: Lengths = (4096, 8192, 16384)
    depths: Depths = evenly(10)
    samples: int = Field(10, ge=1, description="Prompts of each length and depth.")
    span: int = Field(400, ge=0, description="Tokens behind a depth among which the place is drawn.")
    digits: int = Field(5, ge=1, le=1000, description="Of the key.")
    seed: int = 0

    @classmethod
    def cluster_of(cls, example: str) -> str:
        """Its length and depth: keys near one place mostly share their fate."""
        return example.rpartition("-")[0]

    @property
    def longest(self) -> int:
        return max(self.lengths) + answer_tokens(self.digits)

    def examples(self) -> list[Example]:
        return grid(self.lengths, self.depths, self.samples)

    def prepare(self, example: Example, subject: Subject) -> Generation:
        length, (depth, _) = example.tokens, example.about
        span = min(self.span, length)
        # Of the name, so that an example does not change with what else is asked for.
        chance = random.Random(f"{self.seed} {example.name}")
        place = (depth * (length - span) + chance.uniform(0, span)) / length
        return hidden(subject, length, place, self.digits, chance)


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
    asked = Prompt(subject.encode(prompt.prompt), answer_tokens(digits), stop="\n")
    return Generation(asked, prompt.answer, lambda answer: {"exact_match": float(prompt.is_right(answer))})


def answer_tokens(digits: int) -> int:
    """Two a digit and a few more, whatever the tokenizer."""
    return 2 * digits + 6
