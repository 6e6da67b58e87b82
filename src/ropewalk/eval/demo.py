"""The demo: facts hidden in texts past a model's training window, asked of the model as it is and extended.

No output here: `ropewalk.cli.demo` shows what these functions return.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

from ropewalk.eval import haystack
from ropewalk.eval.haystack import Haystack
from ropewalk.integrations.transformers.extend import SlidingWindowChoice, extend
from ropewalk.integrations.transformers.generation import PrefillCost, generate
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.maps import PositionMap

Part = Literal["passkey", "book"]
Variant = Literal["unmodified", "extended"]
VARIANTS: tuple[Variant, ...] = ("unmodified", "extended")

# How deep the facts are hidden. Near the end the unmodified model has the easiest task, at the beginning the hardest.
PASSKEY_DEPTHS = (0.1, 0.5, 0.9)
BOOK_DEPTHS = (0.25,)

NEW_TOKENS = 12
CHUNK = 2048


@dataclass(frozen=True)
class Setup:
    """The model, and how it is extended."""

    loaded: LoadedModel
    position_map: PositionMap
    trained_window: int
    sliding_window: SlidingWindowChoice = "keep"


@dataclass(frozen=True)
class Trial:
    """One prompt, for both variants of the model."""

    part: Part
    haystack: Haystack


@dataclass(frozen=True)
class Reply:
    """What one variant of the model answered."""

    text: str
    right: bool
    seconds: float


@dataclass(frozen=True)
class Result:
    """A trial and both replies."""

    trial: Trial
    unmodified: Reply
    extended: Reply


@dataclass
class Clock:
    """Forecasts of how long each variant takes for a text, by a rehearsal and by the texts read since.

    Attributes:
        costs: measured on short texts; the square in them, attention's part, is what makes long ones slow.
        paces: seconds that the latest text took, by those forecast; at first of neither variant.
    """

    costs: dict[Variant, PrefillCost]
    paces: dict[Variant, float] = field(default_factory=dict)

    def add(self, variant: Variant, tokens: int, seconds: float) -> None:
        """A text of `tokens` tokens took so long."""
        forecast = self.costs[variant].seconds(tokens)
        if forecast > 0:
            self.paces[variant] = seconds / forecast

    def seconds(self, variant: Variant, tokens: int) -> float:
        """Forecast for a text of `tokens` tokens. Until a variant has read one, the other's pace is the best guess."""
        pace = self.paces.get(variant, next(iter(self.paces.values()), 1.0))
        return pace * self.costs[variant].seconds(tokens)

    def trial(self, trial: Trial) -> float:
        """Forecast for both variants."""
        return sum(self.seconds(variant, trial.haystack.tokens) for variant in VARIANTS)


def trials(loaded: LoadedModel, tokens: int, seed: int = 0) -> list[Trial]:
    """The prompts of both parts, of at most `tokens` tokens; the same seed gives the same prompts.

    Raises:
        ValueError: `tokens` is too few for the question alone.
    """

    def count(text: str) -> int:
        return len(loaded.tokenizer(text)["input_ids"])

    keys = [haystack.passkey(tokens, depth, count, seed + i) for i, depth in enumerate(PASSKEY_DEPTHS)]
    sentences = [haystack.book(tokens, depth, count, seed + i) for i, depth in enumerate(BOOK_DEPTHS)]
    return [Trial("passkey", key) for key in keys] + [Trial("book", sentence) for sentence in sentences]


def rehearse(setup: Setup, trial: Trial) -> Clock:
    """Measures how fast this machine reads, on two beginnings of a prompt, a twelfth and a fifth of it."""
    ids = _token_ids(setup.loaded, trial)
    costs: dict[Variant, PrefillCost] = {}
    for variant in VARIANTS:
        _ask(setup, variant, ids[:64], 1, None)  # the first pass also sets things up
        points = []
        for length in (max(1, len(ids) // 12), max(2, len(ids) // 5)):
            began = perf_counter()
            _ask(setup, variant, ids[:length], 1, None)
            points.append((length, perf_counter() - began))
        costs[variant] = PrefillCost.fit(points)
    return Clock(costs)


def run(
    setup: Setup,
    trial: Trial,
    clock: Clock,
    on_progress: Callable[[Variant, int, int], None],
) -> Result:
    """Asks both variants of the model the same prompt, greedily; adds their times to the clock."""
    ids = _token_ids(setup.loaded, trial)
    replies: dict[Variant, Reply] = {}
    for variant in VARIANTS:
        began = perf_counter()
        text = _ask(
            setup,
            variant,
            ids,
            NEW_TOKENS,
            lambda done, total, variant=variant: on_progress(variant, done, total),  # type: ignore[misc]
        )
        seconds = perf_counter() - began
        clock.add(variant, len(ids), seconds)
        replies[variant] = Reply(text, trial.haystack.is_right(text), seconds)
    return Result(trial, **replies)


def rights(results: list[Result]) -> dict[Variant, int]:
    """How many answers were right."""
    return {
        "unmodified": sum(result.unmodified.right for result in results),
        "extended": sum(result.extended.right for result in results),
    }


def verdict(results: list[Result], setup: Setup) -> str:
    """One plain sentence with the counts, whatever they are."""
    count = rights(results)
    shortest = min(result.trial.haystack.tokens for result in results)
    where = (
        f"In texts past the {setup.trained_window:,} tokens it was trained on"
        if shortest > setup.trained_window
        else f"In texts of {shortest:,} tokens and more (it was trained on {setup.trained_window:,})"
    )
    return (
        f"{where}, the unmodified model found {count['unmodified']} of {len(results)} hidden facts; "
        f"with {setup.position_map}, and no training, it found {count['extended']} of {len(results)}."
    )


def to_dict(results: list[Result]) -> list[dict[str, Any]]:
    """The results as plain data."""

    def reply(reply: Reply) -> dict[str, Any]:
        return {"answer": reply.text, "right": reply.right, "seconds": round(reply.seconds, 3)}

    return [
        {
            "part": result.trial.part,
            "depth": result.trial.haystack.depth,
            "prompt_tokens": result.trial.haystack.tokens,
            "tokens_back": result.trial.haystack.tokens_back,
            "target": result.trial.haystack.answer,
            "unmodified": reply(result.unmodified),
            "extended": reply(result.extended),
        }
        for result in results
    ]


def _ask(
    setup: Setup,
    variant: Variant,
    token_ids: list[int],
    new_tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> str:
    with ExitStack() as stack:
        if variant == "extended":
            stack.enter_context(
                extend(
                    setup.loaded.model,
                    setup.position_map,
                    trained_window=setup.trained_window,
                    sliding_window=setup.sliding_window,
                )
            )
        return generate(
            setup.loaded.model,
            setup.loaded.tokenizer,
            token_ids,
            max_new_tokens=new_tokens,
            chunk=CHUNK,
            stop="\n",
            on_progress=on_progress,
        ).text


def _token_ids(loaded: LoadedModel, trial: Trial) -> list[int]:
    return list(loaded.tokenizer(trial.haystack.prompt)["input_ids"])
