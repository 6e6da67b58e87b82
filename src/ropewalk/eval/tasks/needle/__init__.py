# SPDX-License-Identifier: Apache-2.0
"""A needle in a haystack: one sentence in essays, over lengths and depths. See README.md beside this file."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, cycle
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from ropewalk.eval.prompts import chats, longest_part
from ropewalk.eval.subjects import Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, PreparedTask, grid
from ropewalk.eval.tasks.settings import Chat, Depths, Lengths, NewTokens, evenly, folder_of_data
from ropewalk.eval.texts import Text, sha256, texts

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
KEYS = ("sandwich", "Dolores Park", "sunny day")
NEW_TOKENS = 64

_QUESTION = "What is the best thing to do in San Francisco?"
_SYSTEM = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct"
_ONLY = "Don't give information outside the document or repeat your findings"
# The original's prompts for OpenAI's models, its three messages in one, and for models that continue a text.
_CHAT = f"{_SYSTEM}\n\n{{context}}\n\n{_QUESTION} {_ONLY}"
_PLAIN = (
    f"{_SYSTEM}\n\nHuman: <context>\n{{context}}\n</context>\n\n{_QUESTION} {_ONLY}\n\n"
    "Assistant: Here is the most relevant sentence in the context:"
)


class Needle(PreparedTask):
    """Needle in a haystack of essays, over lengths and depths (SelfExtend, appendix G, figure 10)."""

    name = "needle"
    metrics: ClassVar = {"recall": Metric("recall"), "exact_match": Metric("exact match")}

    text: str = Field("essays", description="Set of texts: essays, or alice, which comes with the package.")
    data_dir: Path | None = folder_of_data("needle/PaulGrahamEssays/*.txt")
    lengths: Lengths = (4096, 8192, 16384)
    depths: Depths = evenly(10)
    samples: int = Field(3, ge=1, description="Prompts of each length and depth; each begins with another text.")
    chat: Chat = True
    new_tokens: NewTokens = None
    seed: int = 0

    @cached_property
    def _texts(self) -> list[Text]:
        return texts(self.text, self.data_dir)

    @cached_property
    def _units(self) -> list[str]:
        return units(self._texts)

    @property
    def found(self) -> dict[str, str]:
        return {"sha256": sha256(self._texts)}

    @property
    def without_effect(self) -> Mapping[str, str]:
        return {"data_dir": "--text alice"} if self.text == "alice" else {}

    @classmethod
    def cluster_of(cls, example: str) -> str:
        """Its length and depth: needles at one place share their fate far more than those in one text."""
        return example.rpartition("-")[0]

    @property
    def longest(self) -> int:
        return max(self.lengths) + (self.new_tokens or NEW_TOKENS)

    def examples(self) -> list[Example]:
        return grid(self.lengths, self.depths, self.samples)

    def prepare(self, example: Example, subject: Subject) -> Generation:
        length, (depth, sample) = example.tokens, example.about
        chat = self.chat and chats(subject)
        template = _CHAT if chat else _PLAIN

        def encode(context: str) -> list[int]:
            return subject.encode(template.format(context=hidden(context, depth)), chat)

        # A word is rarely less than a token, so there are enough.
        haystack = repeated(self._units, self._start(sample), words=length)
        ids = encode(longest_part(haystack, lambda context: len(encode(context)), length))
        return Generation(Prompt(ids, self.new_tokens or NEW_TOKENS), NEEDLE, scores)

    def _start(self, sample: int) -> int:
        """The unit that a sample begins with; no two samples share one before all had their turn."""
        order = list(range(len(self._units)))
        random.Random(self.seed).shuffle(order)
        return order[sample % len(order)]


def units(haystack: Sequence[Text]) -> list[str]:
    """Where a haystack may begin: with each of several texts, or with each paragraph of a single one."""
    several = [text.text for text in haystack]
    parts = several if len(several) > 1 else several[0].split("\n\n")
    return [part.strip() for part in parts if part.strip()]


def repeated(units: Sequence[str], start: int, words: int) -> str:
    """All units from `start` on, the earlier ones after the last, and again until there are so many words."""
    taken, count = [], 0
    for unit in cycle(chain(units[start:], units[:start])):
        taken.append(unit)
        count += len(unit.split())
        if count >= words:
            break
    return "\n\n".join(taken)


def hidden(context: str, depth: float) -> str:
    """The needle in a text: behind the last sentence that ends before the depth, at 1 behind the whole text."""
    place = depth * len(context)
    ends = [0, *(end for found in re.finditer(r"[.!?][\"')\]]*(?=\s)", context) if (end := found.end()) <= place)]
    at = len(context) if depth == 1 else ends[-1]
    return f"{context[:at]}\n{NEEDLE}\n{context[at:]}"


def scores(answer: str) -> dict[str, float]:
    """The share of the needle's keys that an answer holds, as words of their own, and whether it holds all."""
    words = " ".join(answer.split())
    found = sum(re.search(rf"\b{key}\b", words, re.IGNORECASE) is not None for key in KEYS)
    return {"recall": found / len(KEYS), "exact_match": float(found == len(KEYS))}
