"""Prompts that hide one short fact in a long text and ask for it at the end. Pure text: no model, no framework.

Two kinds: a five-digit pass key in sentences that repeat (the passkey test of Mohtashami and Jaggi 2023,
arXiv 2305.16300, in our own words), and an invented sentence in a book.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ropewalk.data import alice
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
    key = str(random.Random(seed).randrange(10 ** (digits - 1), 10**digits))
    needle, question = f"The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key?"
    units = [filler] * max(tokens, 0)
    return _hide(needle, question, key, head, units, "\n", f"\n{question} The pass key is", tokens, depth, count)


def book(tokens: int, depth: float, count: TokenCounter, seed: int = 0, text: str | None = None) -> Haystack:
    """An invented sentence between two paragraphs of a book, from its beginning on; the prompt ends with a question.

    Args:
        tokens: length of the prompt; it ends up at most a paragraph shorter, and no longer than the book.
        depth: where to hide the sentence, from 0 (the beginning) to 1 (the end).
        count: number of tokens of a text.
        seed: of the sentence.
        text: the book; by default "Alice's Adventures in Wonderland".

    Raises:
        ValueError: `depth` is out of range, or `tokens` is too few for the question alone.
    """
    chance = random.Random(seed)
    needle, question, beginning, answers = chance.choice(FACTS)
    answer = chance.choice(answers)
    units = (alice() if text is None else text).strip().split("\n\n")
    tail = f"\n\nQuestion: {question}\nAnswer: {beginning}"
    return _hide(needle.format(answer), question, answer, "", units, "\n\n", tail, tokens, depth, count)


def _hide(
    needle: str,
    question: str,
    answer: str,
    head: str,
    units: Sequence[str],
    separator: str,
    tail: str,
    tokens: int,
    depth: float,
    count: TokenCounter,
) -> Haystack:
    """The needle between the units, as many of them as fit."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be from 0 to 1, got {depth}")

    def parts(number: int) -> tuple[str, str]:
        chosen = units[:number]
        ends = [0, *accumulate(len(unit) + len(separator) for unit in chosen)]
        at = bisect_left(ends, depth * ends[-1])
        return head + "".join(unit + separator for unit in chosen[:at]), separator.join((needle, *chosen[at:])) + tail

    def length(number: int) -> int:
        return count("".join(parts(number)))

    least = length(0)
    if least > tokens:
        raise ValueError(f"a prompt of {tokens} tokens is too short: the question alone has {least}")
    number = most_that_fit(length, tokens, len(units), _FIRST_GUESS, least)
    before, after = parts(number)
    prompt = before + after
    position = len(before) + after.index(answer)
    total = count(prompt)
    return Haystack(prompt, needle, question, answer, depth, total, total - count(prompt[:position]))
