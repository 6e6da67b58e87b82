"""What a reader who has not read the papers needs to know of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class About:
    """A task in words.

    Attributes:
        title: its name for people.
        measures: what it measures, in a sentence or two.
        reading: how to read its figure over these parts of the cells; empty for general words.
        over: those parts.
        by: what of the cells there is a table for; None for all.
        examples: how many examples of each method the settings ask for; None if that is not known.
        groups: of its tasks, where it is several, in the order of a table's columns.
        percent: whether its scores, from 0 to 1, are written in percent, as is usual for it.
    """

    title: str
    measures: str
    reading: str = ""
    over: tuple[str, ...] = ("length", "depth")
    by: tuple[str, ...] | None = None
    examples: Callable[[Mapping[str, Any]], int] | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    percent: bool = False


def about(task: str) -> About:
    """In general words where the task has none of its own."""
    title = task.replace("_", " ").replace("-", " ")
    general = "Every score is the mean over the examples that were done; all methods were asked the same examples."
    return ABOUT.get(task, About(title[:1].upper() + title[1:], general))


def _grid(settings: Mapping[str, Any]) -> int:
    return len(settings["lengths"]) * len(settings["depths"]) * int(settings["samples"])


ABOUT = {
    "passkey": About(
        title="Pass key retrieval",
        measures=(
            "A random number, the pass key, is hidden in a long text that has nothing to do with it, and the model is "
            "asked for it at the end. The score is the share of keys that it gives back exactly, from 0 (none) to 1 "
            "(all). A model that does not see the whole text misses the keys in the part that it does not see."
        ),
        reading=(
            "One picture for each method, all in the same colors. To the right the text gets longer, downwards the key "
            "is hidden nearer to its end; each square shows the share of keys that were found, the darker the better, "
            "and how many texts were asked. A method that can read the whole text is dark all over (figure 4 of the "
            "SelfExtend paper, Jin et al., 2024)."
        ),
        by=("length",),
        examples=_grid,
    ),
    "passkey-length": About(
        title="Pass keys of many digits",
        measures=(
            "A random number is hidden in a long text that has nothing to do with it, and the model is asked for it at "
            "the end. Here the text stays as long as it is and the number gets longer: a model that takes several far "
            "tokens to be in one place may find a long number and mix up its digits. The score is the share of "
            "numbers that it gives back exactly."
        ),
        reading=(
            "To the right the keys get longer; the higher a line, the more of them were given back (figure 6 of the "
            "SelfExtend paper)."
        ),
        over=("digits",),
        examples=lambda settings: len(settings["digits"]) * int(settings["samples"]),
    ),
    "perplexity": About(
        title="Perplexity on books",
        measures=(
            "The model reads a book and says at each place how likely the token is that comes next. Perplexity is how "
            "many tokens it hesitates between, as it were: 1 would be to know them all, and less is better. Past the "
            "length that a model was trained on it rises steeply, unless something is done."
        ),
        reading=(
            "To the right the model reads more text before the tokens that are scored; the lower, the better. A line "
            "that stays level or falls is as good as with a short text (figure 2 and table 1 of the SelfExtend paper)."
        ),
        over=("length",),
    ),
    "longbench": About(
        title="LongBench",
        measures=(
            "Sixteen tasks on long documents, from questions and summaries to code. Every task has its usual score, "
            "from 0 to 100, the more the better (table 2 of the SelfExtend paper)."
        ),
        groups={
            "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en"),
            "multi-document QA": ("hotpotqa", "2wikimqa", "musique"),
            "summarization": ("gov_report", "qmsum", "multi_news"),
            "few-shot": ("trec", "triviaqa", "samsum"),
            "synthetic": ("passage_count", "passage_retrieval_en"),
            "code": ("lcc", "repobench-p"),
        },
        percent=True,
    ),
    "short": About(
        title="Short tasks",
        measures=(
            "Well-known tasks whose texts fit into the trained window. A method that only changes what lies far apart "
            "should leave the scores as they are."
        ),
        by=("task",),
        percent=True,
    ),
    "needle": About(
        title="Needle in a haystack",
        measures=(
            "A sentence, the needle, is hidden in essays that have nothing to do with it, and the model is asked at "
            "the end for what it says. Recall is how much of it the answer holds, of three parts; an exact match holds "
            "all. Both go from 0 to 1. A model that does not see the whole text misses the needle in the part that it "
            "does not see."
        ),
        reading=(
            "One picture for each method, all in the same colors. To the right the text gets longer, downwards the "
            "needle is hidden nearer to its end. Each square shows how much was found there and, below it, the number "
            "of texts that were asked; the darker, the better. The layout is that of figure 10 of the SelfExtend paper "
            "(Jin et al., 2024)."
        ),
        by=("length",),
        examples=_grid,
    ),
    "leval": About(
        title="Exams about long documents",
        measures=(
            "The model reads a lecture, a story or solved problems and answers questions about them, each with one "
            "right answer. Where it answers in words, exact match is the percentage of right answers, from 0 to 100; "
            "of several right options a part counts as a quarter. Where it chooses among options, accuracy is how "
            "often the right one is the likeliest: by chance 25 of four options, and 50 of true and false. The exams "
            "are those of L-Eval (An et al., 2023), and the SelfExtend paper (Jin et al., 2024) has them in its table "
            "3."
        ),
        percent=True,
    ),
}
