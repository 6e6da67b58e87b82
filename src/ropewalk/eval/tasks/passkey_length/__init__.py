# SPDX-License-Identifier: Apache-2.0
"""Pass keys of more and more digits, at one length of text. See README.md beside this file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic import Field

from ropewalk.eval.subjects import Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, PreparedTask
from ropewalk.eval.tasks.passkey import answer_tokens, hidden
from ropewalk.eval.tasks.settings import Chat, Lengths, NewTokens, Tokens

_CHARACTERS_A_TOKEN = 3


class PasskeyLength(PreparedTask):
    """Pass keys of more and more digits, at one length (SelfExtend, section 4.7, figure 6)."""

    name = "passkey-length"
    metrics: ClassVar = {"exact_match": Metric("exact match")}

    digits: Lengths = Field((5, 8, 16, 36, 48, 64, 100), description="Of the keys, comma-separated.")
    length: Tokens = Field(16384, description="Tokens of the prompts; 16k is 16384.")
    characters: Tokens | None = Field(
        None, description="Characters of the prompts, in the place of --length; the paper's have 16000."
    )
    samples: int = Field(10, ge=1, description="Prompts of each number of digits.")
    chat: Chat = False
    new_tokens: NewTokens = None
    seed: int = 0

    @property
    def without_effect(self) -> Mapping[str, str]:
        return {"length": f"--characters {self.characters}"} if self.characters else {}

    @property
    def longest(self) -> int:
        return self._tokens + answer_tokens(max(self.digits), self.chat, self.new_tokens)

    @property
    def _tokens(self) -> int:
        """Of a prompt; of one measured in characters as many as a usual tokenizer makes of them at most."""
        return self.characters // _CHARACTERS_A_TOKEN if self.characters else self.length

    def examples(self) -> Iterator[Example]:
        for digits in self.digits:
            for sample in range(self.samples):
                yield Example(f"{digits}-{sample}", self._tokens, {"digits": digits}, digits)

    def prepare(self, example: Example, subject: Subject) -> Generation:
        # Of the name, so that an example does not change with what else is asked for.
        chance = random.Random(f"{self.seed} {example.name}")
        length, place, digits = self.characters or self.length, chance.random(), example.about
        return hidden(subject, length, place, digits, chance, self.chat, self.new_tokens, self.characters is not None)
