# SPDX-License-Identifier: Apache-2.0
"""Facts hidden in texts past a model's training window, asked of the model as it is and extended.

Each text is read once by either, and then asked for all that is hidden in it. No output here: `ropewalk.cli.demo` shows
what these functions return.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from ropewalk.data import alice
from ropewalk.eval import haystack
from ropewalk.eval.fitting import most_that_fit
from ropewalk.integrations.transformers.extend import extend
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.integrations.transformers.reading import read
from ropewalk.maps import PositionMap
from ropewalk.maps.query_scaling import QueryScalingKind
from ropewalk.presets import SlidingWindowChoice

Part = Literal["passkey", "book"]
Variant = Literal["unmodified", "extended"]
VARIANTS: tuple[Variant, ...] = ("unmodified", "extended")

# How deep the facts are hidden. Near the end the unmodified model has the easiest task, at the beginning the hardest.
PASSKEY_DEPTHS = (0.05,)
BOOK_DEPTHS = (0.05, 0.2, 0.6, 0.9)
# The first text is shorter, so that there is something to see early.
_FIRST = 0.75

NEW_TOKENS = 8
CHUNK = 2048
# Units that are counted first, for how many tokens one has.
_FIRST_GUESS = 32


@dataclass(frozen=True)
class Setup:
    """The model, and how it is extended."""

    loaded: LoadedModel
    position_map: PositionMap
    trained_window: int
    sliding_window: SlidingWindowChoice = "keep"
    query_scaling: QueryScalingKind | None = None


@dataclass(frozen=True)
class Fact:
    """What is hidden in a text.

    Attributes:
        needle: the sentence or line.
        question: what is asked.
        prompt: what is asked and how the answer begins, which the model goes on from.
        answer: what should be answered.
        depth: how far into the text it was asked to be hidden, from 0 (the beginning) to 1 (the end).
        tokens_back: tokens from the needle to the end of the text.
    """

    needle: str
    question: str
    prompt: str
    answer: str
    depth: float
    tokens_back: int

    def is_right(self, reply: str) -> bool:
        """Whether a reply gives the answer; see `haystack.gives`."""
        return haystack.gives(reply, self.answer)


@dataclass(frozen=True)
class Text:
    """A text with facts hidden in it, of so many tokens."""

    part: Part
    text: str
    tokens: int
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Reply:
    """What one variant of the model answered."""

    text: str
    right: bool
    seconds: float


@dataclass(frozen=True)
class Result:
    """A fact, the text that it was hidden in, and both replies."""

    fact: Fact
    text: Text
    unmodified: Reply
    extended: Reply


def texts(loaded: LoadedModel, tokens: int, trained_window: int, seed: int = 0) -> list[Text]:
    """The texts of both parts; the same seed hides the same.

    Args:
        loaded: whose tokens are counted.
        tokens: of the second text and a question about it, at most. The first has three quarters of them where that is
            past the trained window, and as many where it is not.
        trained_window: of the model.
        seed: of what is hidden.

    Raises:
        ValueError: `tokens` is too few for what is hidden and asked.
    """
    chance = random.Random(seed)
    first = int(tokens * _FIRST)
    keys = [_pass_key(chance) for _ in PASSKEY_DEPTHS]
    facts = [_invented(*fact, chance) for fact in chance.sample(haystack.FACTS, len(BOOK_DEPTHS))]
    filler, paragraphs = [haystack.FILLER] * tokens, alice().strip().split("\n\n")
    length = first if first > trained_window else tokens
    return [
        _hide("passkey", keys, PASSKEY_DEPTHS, haystack.HEAD, filler, "\n", length, loaded),
        _hide("book", facts, BOOK_DEPTHS, "", paragraphs, "\n\n", tokens, loaded),
    ]


def run(
    setup: Setup,
    text: Text,
    on_progress: Callable[[Variant], Callable[[int, int], None]],
    on_result: Callable[[Result], None],
) -> list[Result]:
    """Has a text read and asked about by both variants of the model, greedily.

    Args:
        setup: which those are.
        text: to read.
        on_progress: gives, for a variant, what to call as it reads; see `generation.prefill`.
        on_result: called with each pair of replies as soon as there is one.
    """
    unmodified = _replies(setup, "unmodified", text, on_progress, lambda reply: None)
    results: list[Result] = []

    def pair(reply: Reply) -> None:
        number = len(results)
        results.append(Result(text.facts[number], text, unmodified[number], reply))
        on_result(results[-1])

    _replies(setup, "extended", text, on_progress, pair)
    return results


def rights(results: Sequence[Result]) -> dict[Variant, int]:
    """How many answers were right."""
    return {
        "unmodified": sum(result.unmodified.right for result in results),
        "extended": sum(result.extended.right for result in results),
    }


def verdict(results: Sequence[Result], setup: Setup) -> str:
    """One plain sentence with the counts, whatever they are."""
    count = rights(results)
    shortest = min(result.text.tokens for result in results)
    where = (
        f"In texts past the {setup.trained_window:,} tokens it was trained on"
        if shortest > setup.trained_window
        else f"In texts of {shortest:,} tokens and more (it was trained on {setup.trained_window:,})"
    )
    return (
        f"{where}, the unmodified model found {count['unmodified']} of {len(results)} hidden facts; "
        f"with {setup.position_map}, and no training, it found {count['extended']} of {len(results)}."
    )


def to_dict(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as plain data."""

    def reply(reply: Reply) -> dict[str, Any]:
        return {"answer": reply.text, "right": reply.right, "seconds": round(reply.seconds, 3)}

    return [
        {
            "part": result.text.part,
            "text_tokens": result.text.tokens,
            "depth": result.fact.depth,
            "tokens_back": result.fact.tokens_back,
            "target": result.fact.answer,
            "unmodified": reply(result.unmodified),
            "extended": reply(result.extended),
        }
        for result in results
    ]


# What a fact is before it is hidden: needle, question, prompt, answer.
_Hidden = tuple[str, str, str, str]


def _pass_key(chance: random.Random) -> _Hidden:
    key = str(chance.randrange(10_000, 100_000))
    question = "What is the pass key?"
    return f"The pass key is {key}. Remember it. {key} is the pass key.", question, f"{question} The pass key is", key


def _invented(needle: str, question: str, beginning: str, answers: Sequence[str], chance: random.Random) -> _Hidden:
    answer = chance.choice(answers)
    return needle.format(answer), question, f"Question: {question}\nAnswer: {beginning}", answer


def _hide(
    part: Part,
    hidden: Sequence[_Hidden],
    depths: Sequence[float],
    head: str,
    units: Sequence[str],
    separator: str,
    tokens: int,
    loaded: LoadedModel,
) -> Text:
    """The needles between the units, as many of them as fit with the longest question."""

    def count(text: str) -> int:
        return len(loaded.tokenizer(text)["input_ids"])

    def written(number: int) -> str:
        chosen = list(units[:number])
        for depth, (needle, *_) in sorted(zip(depths, hidden, strict=True), reverse=True):
            # Later ones first, so that those before them stay where they are.
            chosen.insert(round(depth * number), needle)
        return head + separator.join(chosen)

    limit = tokens - max(count(f"\n\n{prompt}") for _, _, prompt, _ in hidden)
    if (least := count(written(0))) > limit:
        raise ValueError(
            f"a text of {tokens} tokens is too short: what is hidden and asked has {least + tokens - limit}"
        )
    text = written(most_that_fit(lambda number: count(written(number)), limit, len(units), _FIRST_GUESS, least))
    total = count(text)
    facts = [
        Fact(needle, question, prompt, answer, depth, total - count(text[: text.index(needle)]))
        for depth, (needle, question, prompt, answer) in zip(depths, hidden, strict=True)
    ]
    return Text(part, text, total, tuple(facts))


def _replies(
    setup: Setup,
    variant: Variant,
    text: Text,
    on_progress: Callable[[Variant], Callable[[int, int], None]],
    on_reply: Callable[[Reply], None],
) -> list[Reply]:
    """Of one variant to all questions; the time of the first includes the reading."""
    loaded, replies = setup.loaded, []
    with ExitStack() as stack:
        if variant == "extended":
            stack.enter_context(
                extend(
                    loaded.model,
                    setup.position_map,
                    trained_window=setup.trained_window,
                    sliding_window=setup.sliding_window,
                    query_scaling=setup.query_scaling,
                )
            )
        began = perf_counter()
        # As plain text: small models answer in other words under their chat template.
        reading = read(
            loaded.model, loaded.tokenizer, text.text, chat=False, chunk=CHUNK, on_progress=on_progress(variant)
        )
        for fact in text.facts:
            answer = reading.ask(fact.prompt, max_new_tokens=NEW_TOKENS, stop="\n").text
            now = perf_counter()
            replies.append(Reply(answer, fact.is_right(answer), now - began))
            began = now
            on_reply(replies[-1])
    return replies
