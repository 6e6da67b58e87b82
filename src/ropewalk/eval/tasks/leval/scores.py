# SPDX-License-Identifier: Apache-2.0
"""What answers to L-Eval's exams say, and whether it is right: by the rules of its auto_eval.py and em.py.

Every score takes an answer and what L-Eval gives as right, and is from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LETTERS = "ABCD"
_PART = 0.25


def right_letters(target: str) -> str:
    """Of a question with options; the target begins with them, such as "C", "ACD" or "(B) because ..."."""
    return "".join(char for char in target.split()[0] if char in LETTERS) or "A"


def one_letter(answer: str, target: str) -> float:
    """The first of the letters A to D that is in the answer; A if there is none."""
    if not answer.strip():
        return 0.0
    # Nothing but several letters in a row are several answers.
    return _overlap(answer if answer in LETTERS else next(filter(LETTERS.__contains__, answer), "A"), target)


def several_letters(answer: str, target: str) -> float:
    """All letters that the answer gives; a quarter where they are right and not all that are."""
    return _overlap(_letters_in(answer), target) if answer.strip() else 0.0


def _letters_in(answer: str) -> str:
    """Several letters at its beginning; or those that stand before a space, "." or ")"; or the first run of them."""
    if answer in LETTERS:
        return answer
    first = _run(answer, re.match)
    if len(first) > 1:
        return _in_order(first)
    # A model that goes on asks itself the next question.
    rest = answer[len(first) :].partition("Question")[0]
    return _in_order(first + "".join(re.findall(rf"[{LETTERS}](?=[\s.)])", rest))) or _run(rest, re.search) or "A"


def _run(text: str, find: Callable[[str, str], re.Match[str] | None]) -> str:
    found = find(f"[{LETTERS}]+", text)
    return found[0] if found else ""


def _in_order(letters: str) -> str:
    return "".join(sorted({*letters}))


def _overlap(found: str, target: str) -> float:
    right = right_letters(target)
    return 1.0 if found == right else _PART if {*found} <= {*right} else 0.0


def number(answer: str, target: str) -> float:
    """What follows "The answer is", or the last number of the first paragraph; the digits of any script are digits."""
    return _same(_number_in(answer), _number_in(target))


def _number_in(text: str) -> str:
    """Its digits before a decimal point; what stands between them, such as a comma or a sign, counts for nothing."""
    said = re.search(r"The answer is (\S+)", text)
    words = text.partition("\n\n")[0].split(" ")
    word = said[1] if said else next((word for word in reversed(words) if any(map(str.isdigit, word))), "")
    return "".join(filter(str.isdigit, word.partition(".")[0]))


def truth(answer: str, target: str) -> float:
    """The first word that holds "true" or "false"; true, where it holds both."""
    for word in answer.lower().split():
        if "true" in word or "false" in word:
            return float(("true" if "true" in word else "false") == target.lower())
    return 0.0


def code(answer: str, target: str) -> float:
    """Whether the result is among the last words, or among the first behind "the final output"; or the same number."""
    right, words = _tidy_code(target), _tidy_code(answer)
    for filler in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        words = words.replace(filler, "")
    several = len(target.split()) + 3
    _, said, behind = words.rpartition("the final output")
    taken = re.split(r"\s+", behind)[:several] if said else re.split(r"\s+", words)[-several:]
    return _same(" ".join(taken), right)


def _same(found: str, right: str) -> float:
    """Whether they are the same number or, where one is none, the right one is a part of what was found."""
    try:
        return float(float(found) == float(right))
    except ValueError:
        return float(right.lower().replace(" ", "") in found.lower().replace(" ", ""))


def _tidy_code(text: str) -> str:
    """Without what the same value may be written with or without."""
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    return text.replace("] [", "][").replace("[ [", "[[").replace("] ]", "]]")


SCORES: dict[str, Callable[[str, str], float]] = {
    "coursera": several_letters,
    "gsm100": number,
    "quality": one_letter,
    "tpo": one_letter,
    "sci_fi": truth,
    "codeU": code,
}
