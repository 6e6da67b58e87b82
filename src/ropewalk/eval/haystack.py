# SPDX-License-Identifier: Apache-2.0
"""Short facts to hide in a long text and ask for at the end. Pure text: no model, no framework.

Pass keys are those of Mohtashami and Jaggi 2023 (arXiv 2305.16300), in our own words; invented facts are for a book.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from ropewalk.eval.fitting import most_that_fit

# Number of tokens of a text, special tokens included.
TokenCounter = Callable[[str], int]

# Units that are counted first, for how many tokens one has: few are counted fast.
_FIRST_GUESS = 32

# Each line of filler is one unit of text, as each paragraph of a book is: the needle has a line of its own. A small
# model answers a needle that hides inside of a line much worse.
HEAD = "A pass key is given somewhere in the text below. Find it and remember it: it is asked at the end.\n\n"
FILLER = "The sea is wide. The hill is high. The bread is warm. On we walk, away and home again."

# What is hidden, what is asked, how the answer begins, and the answers to choose from. None of them is to be guessed
# (asked for a favourite fruit, a small model rather names a common one), and none is a word of the book.
FACTS = (
    (
        "The baker of Hollowmere hides his spare key under a {}.",
        "Where does the baker of Hollowmere hide his spare key?",
        "The baker of Hollowmere hides his spare key under a",
        ("pumpkin", "saddle", "lantern", "barrel", "violin", "blanket"),
    ),
    (
        "The secret password of the clockmaker of Tindle Street is {}.",
        "What is the secret password of the clockmaker of Tindle Street?",
        "The secret password of the clockmaker of Tindle Street is",
        ("walnut", "copper", "violin", "falcon", "marble", "saffron"),
    ),
    (
        "The secret number of the lighthouse keeper of Farrow Point is {}.",
        "What is the secret number of the lighthouse keeper of Farrow Point?",
        "The secret number of the lighthouse keeper of Farrow Point is",
        ("4917", "7352", "8264", "3581", "6749", "2936"),
    ),
    (
        "The treasure of Captain Brindle is buried beneath the old {} bridge.",
        "Where is the treasure of Captain Brindle buried?",
        "The treasure of Captain Brindle is buried beneath the old",
        ("copper", "willow", "granite", "marble", "cedar", "iron"),
    ),
)


@dataclass(frozen=True)
class Haystack:
    """A prompt with one fact hidden in it.

    Attributes:
        prompt: the whole text; the model's continuation begins with the answer.
        needle: the sentence or line that was hidden.
        question: what is asked at the end.
        answer: what should be answered.
        depth: how far into the text it was asked to be hidden, from 0 (the beginning) to 1 (the end).
        tokens: length of the prompt.
        tokens_back: tokens from the hidden answer's first character to the end of the prompt.
    """

    prompt: str
    needle: str
    question: str
    answer: str
    depth: float
    tokens: int
    tokens_back: int

    def is_right(self, reply: str) -> bool:
        """Whether a reply gives the answer; see `gives`."""
        return gives(reply, self.answer)


def gives(reply: str, answer: str) -> bool:
    """Whether a reply gives an answer: as a word of its own in the first line, whatever its case."""
    lines = reply.strip().splitlines()
    return bool(lines) and re.search(rf"\b{re.escape(answer)}\b", lines[0], re.IGNORECASE) is not None


def passkey(
    tokens: int,
    depth: float,
    count: TokenCounter,
    seed: int = 0,
    digits: int = 5,
    head: str = HEAD,
    filler: str = FILLER,
) -> Haystack:
    """A random pass key in lines of filler that repeat; the prompt ends with "The pass key is".

    Args:
        tokens: length of the prompt; it ends up at most a line shorter.
        depth: where to hide the key, from 0 (the beginning) to 1 (the end).
        count: number of tokens of a text.
        seed: of the key.
        digits: of the key; the first is not 0.
        head: what the prompt begins with.
        filler: the line that repeats.

    Raises:
        ValueError: `depth` is out of range, or `tokens` is too few for the question alone.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be from 0 to 1, got {depth}")
    key = str(random.Random(seed).randrange(10 ** (digits - 1), 10**digits))
    needle, question = f"The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key?"
    line = f"{filler}\n"

    def parts(lines: int) -> tuple[str, str]:
        """So many lines with the needle behind the first that end at the depth or beyond."""
        before = int(-(-depth * (lines * len(line)) // len(line)))
        return head + before * line, "\n".join((needle, *[filler] * (lines - before), f"{question} The pass key is"))

    def length(lines: int) -> int:
        return count("".join(parts(lines)))

    least = length(0)
    if least > tokens:
        raise ValueError(f"a prompt of {tokens} tokens is too short: the question alone has {least}")
    before, after = parts(most_that_fit(length, tokens, tokens, _FIRST_GUESS, least))
    prompt = before + after
    total = count(prompt)
    back = total - count(before + after.partition(key)[0])
    return Haystack(prompt, needle, question, key, depth, total, back)
