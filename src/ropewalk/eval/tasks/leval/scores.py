# SPDX-License-Identifier: Apache-2.0
"""What answers to L-Eval's exams say, and whether it is right: by the rules of its auto_eval.py and em.py.

Every score takes an answer and what L-Eval gives as right, and is from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LETTERS = "ABCD"
_PART = 0.25


def right_letters(target: str) -> frozenset[str]:
    """Of a question with options; the target begins with them, such as "C", "ACD" or "(B) because ..."."""
    return frozenset(target.split()[0]) & frozenset(LETTERS) or frozenset("A")


def one_letter(answer: str, target: str) -> float:
    """The first of the letters A to D that is in the answer; A if there is none."""
    answer = answer.strip()
    if not answer:
        return 0.0
    # Nothing but several letters in a row are several answers.
    found = answer if answer in LETTERS else next((char for char in answer if char in LETTERS), "A")
    return _overlap(frozenset(found), right_letters(target))


def several_letters(answer: str, target: str) -> float:
    """All letters that the answer gives; a quarter where they are right and not all that are."""
    answer = answer.strip()
    return _overlap(_letters_in(answer), right_letters(target)) if answer else 0.0


def _letters_in(answer: str) -> frozenset[str]:
    """Several letters at its beginning; or those that stand before a space, "." or ")"; or the first run of them."""
    beginning = re.match(f"[{LETTERS}]*", answer)
    first = beginning[0] if beginning else ""
    if len(first) > 1:
        return frozenset(first)
    # A model that goes on asks itself the next question.
    rest = answer[len(first) :].partition("Question")[0]
    found = frozenset(first) | frozenset(re.findall(rf"[{LETTERS}](?=[\s.)])", rest))
    run = re.search(f"[{LETTERS}]+", rest)
    return found or frozenset(run[0] if run else "A")


def _overlap(found: frozenset[str], right: frozenset[str]) -> float:
    return 1.0 if found == right else _PART if found < right else 0.0


def number(answer: str, target: str) -> float:
    """What follows "The answer is", or the last number of the first paragraph."""
    found, right = _number_in(answer), _number_in(target)
    return float(bool(found) and float(found) == float(right))


def _number_in(text: str) -> str:
    """Its digits before a decimal point; what stands between them, such as a comma or a sign, counts for nothing."""
    said = re.search(r"The answer is (\S+)", text)
    words = text.partition("\n\n")[0].split(" ")
    word = said[1] if said else next((word for word in reversed(words) if re.search("[0-9]", word)), "")
    return re.sub("[^0-9]", "", word.partition(".")[0])


def truth(answer: str, target: str) -> float:
    """The first word that holds "true" or "false"."""
    said = re.search("true|false", answer.lower())
    return float(said is not None and said[0] == target.lower())


def code(answer: str, target: str) -> float:
    """Whether the result is among the last words, or among the first behind "the final output"; or the same number."""
    right, words = _tidy_code(target), _tidy_code(answer)
    for filler in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        words = words.replace(filler, "")
    several = len(target.split()) + 3
    _, said, behind = words.rpartition("the final output")
    taken = re.split(r"\s+", behind)[:several] if said else re.split(r"\s+", words)[-several:]
    found = " ".join(taken)
    try:
        return float(float(found) == float(right))
    except ValueError:
        return float(_squeezed(right) in _squeezed(found))


def _tidy_code(text: str) -> str:
    """Without what the same value may be written with or without."""
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    return text.replace("] [", "][").replace("[ [", "[[").replace("] ]", "]]")


def _squeezed(text: str) -> str:
    return text.lower().replace(" ", "")


SCORES: dict[str, Callable[[str, str], float]] = {
    "coursera": several_letters,
    "gsm100": number,
    "quality": one_letter,
    "tpo": one_letter,
    "sci_fi": truth,
    "codeU": code,
}
