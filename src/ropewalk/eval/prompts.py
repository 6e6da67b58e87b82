# SPDX-License-Identifier: Apache-2.0
"""What tasks share that write long prompts: how much of a text fits, and tokens with and without special ones."""

from __future__ import annotations

import re
from collections.abc import Callable

from ropewalk.eval.fitting import most_that_fit
from ropewalk.eval.subjects import Passage, Prompt, Subject

# Of English text: a first guess, soon replaced by the text's own.
_WORDS_PER_TOKEN = 0.75


def longest_part(text: str, count: Callable[[str], int], limit: int, tail: bool = False) -> str:
    """The longest head of a text, of whole words, whose prompt fits; all of it where that does.

    Args:
        text: to be cut.
        count: tokens of the prompt with such a part; of longer parts no fewer, or nearly so.
        limit: of those tokens.
        tail: the longest tail instead.

    Raises:
        ValueError: not even the prompt without any of the text fits.
    """
    words = [found.span() for found in re.finditer(r"\S+", text)]

    def part(number: int) -> str:
        if number in (0, len(words)):
            return text if number else ""
        return text[words[-number][0] :] if tail else text[: words[number - 1][1]]

    least = count("")
    if least > limit:
        raise ValueError(f"{limit} tokens are too few: the prompt has {least} without any of its text")
    room = limit - least
    # A word is rarely less than a token: with fewer words than room, all of them may well fit.
    guess = len(words) if len(words) <= room else int(_WORDS_PER_TOKEN * room)
    return part(most_that_fit(lambda number: count(part(number)), limit, len(words), guess, least))


def chats(subject: Subject) -> bool:
    """Whether the model knows how to write a message: it has a chat template."""
    return subject.encode("", chat=True) != subject.encode("")


def encode_apart(subject: Subject, text: str) -> tuple[list[int], list[int]]:
    """The special tokens that the model's texts begin with, and a text's tokens without special ones."""
    nothing, ids = subject.encode(""), subject.encode(text)
    before = 0
    while before < len(nothing) and nothing[before] == ids[before]:
        before += 1
    return ids[:before], ids[before : len(ids) - (len(nothing) - before)]


def answered(subject: Subject, prompt: str, answer: str, chat: bool) -> Passage:
    """A prompt with an answer, of which the answer alone is scored.

    Args:
        prompt: without a space at its end.
        answer: likewise, and without one at its beginning.
        chat: the prompt is a message and the answer the reply, to a model that `chats`; else both are one text.

    Raises:
        ValueError: the reply to a message begins with a thought.
    """
    if chat:
        ids = subject.encode(prompt, chat=True)
        if subject.in_thought(Prompt(ids, 1)):
            raise ValueError(
                "the model's chat template begins a thought, so nothing can be scored as its answer: let it answer in "
                "words, or ask it without the template"
            )
        return Passage(ids + encode_apart(subject, answer)[1], len(ids))
    special, before = encode_apart(subject, prompt)
    # As one text, because tokenizers put the space to the word behind it.
    _, both = encode_apart(subject, f"{prompt} {answer}")
    same = 0
    while same < len(before) and before[same] == both[same]:
        same += 1
    return Passage(special + both, len(special) + same)
