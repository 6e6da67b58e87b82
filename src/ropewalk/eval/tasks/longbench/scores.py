# SPDX-License-Identifier: Apache-2.0
"""What an answer is worth: the scores of LongBench's tasks, from 0 to 1. See README.md beside this file."""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import partial
from importlib import import_module
from typing import Any

from ropewalk.eval.data_files import DataError

# Of an answer and a reference.
Measure = Callable[[str, str], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"\d+")


def score(task: str, answer: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Of an answer by the task's own, for the reference that fits it best.

    Args:
        classes: that there are, for trec.
    """
    if task in _ONE_LINE:
        answer = answer.lstrip("\n").partition("\n")[0]
    measure = partial(classification, classes=classes) if task == "trec" else _SCORES[task]
    return max(measure(answer, reference) for reference in references)


def check_installed(tasks: Collection[str]) -> None:
    """Raises DataError: what scores one of the tasks is not installed. Known before a model answers anything."""
    if any(_SCORES.get(task) is rouge_l for task in tasks):
        _rouge()


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, as of SQuAD."""
    given, wanted = _words(answer), _words(reference)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L as the package `rouge` computes it; README.md says why no other.

    Raises:
        DataError: `rouge` is not installed.
    """
    if not answer.strip("."):  # `rouge` refuses it
        return 0.0
    measure = _rouge().Rouge(metrics=["rouge-l"], stats=["f"]).get_scores
    with _room_for(len(answer.split()) + len(reference.split())):
        return float(measure(answer, reference)[0]["rouge-l"]["f"])


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One by the number of classes that the answer names, if the right one is among them.

    A class whose name is a part of the right one's does not count.
    """
    named = [name for name in classes if name in answer and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def count(answer: str, reference: str) -> float:
    """Part of the numbers in the answer that are right."""
    numbers = _NUMBER.findall(answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str) -> float:
    """`count` for a reference such as "Paragraph 12"."""
    return count(answer, _NUMBER.findall(reference)[0])


def edit_similarity(answer: str, reference: str) -> float:
    """Of the answer's first line that looks like code, in hundredths: twice the characters that match, by all."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, code, reference).ratio()) / 100


def _words(text: str) -> list[str]:
    """In lower case, without ASCII punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


@contextmanager
def _room_for(words: int) -> Iterator[None]:
    """`rouge` goes a call deeper with each word of a sentence, and there are texts without a full stop."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + words)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _rouge() -> Any:
    try:
        return import_module("rouge")
    except ImportError as error:
        raise DataError("summaries are scored with rouge: pip install 'ropewalk[eval]'") from error


_SCORES: dict[str, Measure] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    **dict.fromkeys(("lcc", "repobench-p"), edit_similarity),
}
# After the first line these go on with a further example.
_ONE_LINE = ("trec", "triviaqa", "samsum")
