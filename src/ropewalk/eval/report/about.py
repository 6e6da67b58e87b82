"""What a reader who has not read the papers needs to know of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class About:
    """A task in words.

    Attributes:
        title: its name for people.
        measures: what it measures, in a sentence or two.
        reading: how to read its figure; empty if it has none.
        by: what of the cells there is a table for; None for all.
        examples: how many examples of each method the settings ask for; None if that is not known.
    """

    title: str
    measures: str
    reading: str = ""
    by: tuple[str, ...] | None = None
    examples: Callable[[Mapping[str, Any]], int] | None = None


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
            "is hidden nearer to its end. Each square shows the share of keys that were found there and, below it, the "
            "number of texts that were asked; the darker, the better. A method that can read the whole text is dark "
            "all over. Where nothing was asked there is no square. The layout is that of figure 4 of the SelfExtend "
            "paper (Jin et al., 2024)."
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
            "One line for each method. To the right the keys get longer; the higher, the more of them were given back. "
            "Bars show how far a share may be off by chance, with 95% confidence."
        ),
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
            "One line for each method. To the right the model reads more text before the tokens that are scored; the "
            "lower, the better. A line that stays level or falls is as good as with a short text. Bars show how far a "
            "value may be off by chance, with 95% confidence, where there are three books or more."
        ),
    ),
}
