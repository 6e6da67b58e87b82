# SPDX-License-Identifier: Apache-2.0
"""Pass key retrieval: a grid of lengths and depths, exact match. See README.md beside this file."""

from __future__ import annotations

import math
import random
from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from ropewalk.eval import haystack
from ropewalk.eval.prompts import chats
from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, PreparedTask, grid
from ropewalk.eval.tasks.settings import Chat, Depths, Lengths, NewTokens, evenly, refused, written

# The text of Mohtashami and Jaggi (arXiv 2305.16300), as the SelfExtend authors' examples have it.
HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Of an answer in a message, which says more than the key.
_WORDS = 64


class Passkey(PreparedTask):
    """Pass key retrieval over lengths and depths (SelfExtend, section 4.2, figure 4)."""

    name = "passkey"
    metrics: ClassVar = {"exact_match": Metric("exact match")}

    lengths: Lengths = (4096, 8192, 16384)
    depths: Depths = evenly(10)
    samples: int = Field(10, ge=1, description="Prompts of each length and depth; with --tiled of each span.")
    span: int = Field(400, ge=0, description="Tokens behind a depth among which the place is drawn.")
    tiled: bool = Field(
        False, description="Spans that follow each other over the whole text, as in the paper, not one at each depth."
    )
    digits: int = Field(5, ge=1, le=1000, description="Of the key.")
    chat: Chat = False
    new_tokens: NewTokens = None
    seed: int = 0

    @field_validator("tiled")
    @classmethod
    def _cover(cls, tiled: bool, info: ValidationInfo) -> bool:
        depths, span = info.data.get("depths", ()), info.data.get("span", 1)
        if tiled and (span < 1 or not (len(depths) == 1 or depths == evenly(len(depths)))):
            given = f"--span {span}" if span < 1 else f"--depths {written(depths)}"
            raise refused("needs a --span of 1 token or more, and a number of --depths, such as 10", given)
        return tiled

    @property
    def longest(self) -> int:
        return max(self.lengths) + answer_tokens(self.digits, self.chat, self.new_tokens)

    def examples(self) -> list[Example]:
        return grid(self.lengths, self.depths, self.samples, self._spans)

    def prepare(self, example: Example, subject: Subject) -> Generation:
        length, (depth, number) = example.tokens, example.about
        # Of the name, so that an example does not change with what else is asked for.
        chance = random.Random(f"{self.seed} {example.name}")
        if self.tiled:
            spans, part = self._spans(length), length / len(self.depths)
            place = depth * (length - part) + (number % spans + chance.random()) * part / spans
        else:
            span = min(self.span, length)
            place = depth * (length - span) + chance.uniform(0, span)
        return hidden(subject, length, place / length, self.digits, chance, self.chat, self.new_tokens)

    def _spans(self, length: int) -> int:
        """Of each depth."""
        return math.ceil(length / len(self.depths) / self.span) if self.tiled else 1


def hidden(
    subject: Subject,
    length: int,
    place: float,
    digits: int,
    chance: random.Random,
    chat: bool,
    new_tokens: int | None,
    in_characters: bool = False,
) -> Generation:
    """A key of so many digits hidden in a text of `length` tokens or characters, `place` from 0 to 1, and asked for."""
    chat = chat and chats(subject)

    def encode(text: str) -> list[int]:
        return subject.encode(text, chat)

    prompt = haystack.passkey(
        length,
        place,
        len if in_characters else lambda text: len(encode(text)),
        seed=chance.randrange(1 << 32),
        digits=digits,
        head=HEAD,
        filler=FILLER,
    )

    def scores(answer: str) -> dict[str, float]:
        # In a message it may stand on any line.
        return {"exact_match": float(prompt.is_right(" ".join(answer.split()) if chat else answer))}

    room = answer_tokens(digits, chat, new_tokens)
    return Generation(Prompt(encode(prompt.prompt), room, None if chat else "\n"), prompt.answer, scores)


def answer_tokens(digits: int, chat: bool, new_tokens: int | None) -> int:
    """What was asked for; or two a digit and a few more, whatever the tokenizer, and those of a message's words."""
    return new_tokens or 2 * digits + 6 + (_WORDS if chat else 0)
