# SPDX-License-Identifier: Apache-2.0
"""`ropewalk demo`: hidden facts in texts past the model's window, asked of the model as it is and extended."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text as Styled

from ropewalk.cli import model_options
from ropewalk.cli.errors import UserError
from ropewalk.cli.map_options import MapOptions, with_map_options
from ropewalk.cli.model_options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SlidingWindowOption,
    TrainedWindowOption,
    TrustRemoteCodeOption,
    VerboseOption,
)
from ropewalk.cli.progress import duration, reading
from ropewalk.cli.token_options import check_tokens, token_option
from ropewalk.files import shown
from ropewalk.integrations.transformers.versions import versions
from ropewalk.token_counts import MOST_TOKENS

if TYPE_CHECKING:
    from ropewalk import Preset
    from ropewalk.eval.hidden_facts import Part, Reply, Result, Setup, Text, Variant

# Any length and window for which every map exists: a mistyped map is found before the model is loaded.
_ANY_LENGTH, _ANY_WINDOW = 1, 8192

_PARTS: dict[Part, str] = {
    "passkey": "a pass key in lines of filler",
    "book": "invented sentences in Alice's Adventures in Wonderland",
}


@with_map_options()
def command(
    map_options: MapOptions,
    model: ModelOption = None,
    tokens: Annotated[int, token_option(help="Length of the longest text.")] = 12_000,
    seed: Annotated[int, typer.Option(help="Of the hidden facts.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trained_window: TrainedWindowOption = None,
    sliding_window: SlidingWindowOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hide facts in texts past the model's window, and ask for them: the model as it is, and extended."""
    model_options.check(dtype, device, sliding_window)
    check_tokens("--tokens", tokens, at_most=MOST_TOKENS)
    if trained_window is not None:
        check_tokens("--trained-window", trained_window)
    map_options.choose(_ANY_LENGTH, _ANY_WINDOW)
    source = model_options.find_model(model)
    began = perf_counter()
    with model_options.running(verbose):
        from ropewalk.eval import hidden_facts

        loaded = model_options.load_model(source, dtype, device, trust_remote_code, verbose)
        how = model_options.how(loaded, map_options, trained_window, sliding_window)
        window = how.trained_window
        target_length = tokens + hidden_facts.NEW_TOKENS
        setup = hidden_facts.Setup(loaded, how.choose(target_length), window, how.sliding_window, how.query_scaling)
        try:
            texts = hidden_facts.texts(loaded, tokens, window, seed)
        except ValueError as error:
            raise UserError(f"--tokens: {error}") from error
        screen = _Screen(as_json)
        with how.extended(loaded, setup.position_map, target_length) as extension:
            if verbose:
                screen.progress.print(str(extension), soft_wrap=True)
        screen.introduce(setup, tokens, target_length, how.preset)
        results: list[Result] = []
        with screen.bars:
            for number, text in enumerate(texts, 1):
                screen.begin(number, len(texts), text)
                results += hidden_facts.run(setup, text, screen.read, screen.show)
        seconds = perf_counter() - began
        verdict = hidden_facts.verdict(results, setup)
        screen.conclude(verdict, seconds)
        if as_json:
            report = _report(setup, results, tokens, target_length, seed, seconds, how.preset)
            print(json.dumps({**report, "verdict": verdict}, indent=2))


@dataclass
class _Screen:
    """Results go to stdout, unless that is for JSON; progress to stderr."""

    as_json: bool
    bars: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        self.results = Console(quiet=self.as_json, **options)
        self.progress = Console(stderr=True, **options)

    def introduce(self, setup: Setup, tokens: int, target_length: int, preset: Preset | None) -> None:
        loaded, window = setup.loaded, setup.trained_window
        name = shown(loaded.source.name)
        past = f", {tokens - window:,} past the end of that window" if tokens > window else ", inside of that window"
        self.results.print("Ropewalk demo", style="bold")
        self.results.print()
        self._pairs(
            (
                "model",
                f"{name} ({loaded.dtype}, {loaded.device}), trained on a window of {window:,} tokens",
            ),
            ("texts", f"up to {tokens:,} tokens{past}"),
            ("extended by", f"{setup.position_map}, for a target of {target_length:,} tokens"),
            *([("preset", str(preset))] if preset is not None else []),
        )
        if tokens <= window:
            self.results.print(
                f"\nNote: a text of {tokens:,} tokens fits into the model's window, so there is little to extend. "
                f"Pass --tokens {window * 3 // 2} to go past it."
            )

    def begin(self, number: int, of: int, text: Text) -> None:
        self.results.print()
        self.results.print(f"Text {number} of {of}: {_PARTS[text.part]}, {text.tokens:,} tokens", style="bold")

    def read(self, variant: Variant) -> Callable[[int, int], None]:
        """Shows how far a model is, until there is something else to show."""
        self.bars.close()
        return self.bars.enter_context(reading(self.progress, f"The {variant} model reads"))

    def show(self, result: Result) -> None:
        """One fact and both replies."""
        self.bars.close()
        fact = result.fact
        self.results.print()
        self._pairs(
            ("hidden", f'"{fact.needle}", {fact.depth:.0%} deep: {fact.tokens_back:,} tokens back'),
            ("asked", f'"{fact.question}"'),
        )
        for variant, reply in (("unmodified", result.unmodified), ("extended", result.extended)):
            self.results.print(Styled(f"  {variant:<12}").append(_reply(reply)))

    def conclude(self, verdict: str, seconds: float) -> None:
        self.results.print(f"\nTook {duration(seconds)}, loading included.")
        self.results.print(verdict, style="bold", soft_wrap=not self.results.is_terminal)

    def _pairs(self, *pairs: tuple[str, str]) -> None:
        """Labels and what they say, wrapped beside the labels."""
        indent = max(14, 4 + max(len(label) for label, _ in pairs))
        for label, value in pairs:
            lines = textwrap.wrap(value, max(20, self.results.width - indent))
            self.results.print(f"  {label}".ljust(indent) + f"\n{' ' * indent}".join(lines))


def _reply(reply: Reply) -> Styled:
    """What was answered, whether that is right, and how long it took."""
    shown = " ".join(reply.text.split())
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    mark = ("right", "bold green") if reply.right else ("wrong", "bold red")
    return Styled.assemble(f'"{shown}", ' if shown else "(nothing), ", mark, f", {duration(reply.seconds)}")


def _report(
    setup: Setup,
    results: Sequence[Result],
    tokens: int,
    target_length: int,
    seed: int,
    seconds: float,
    preset: Preset | None,
) -> dict[str, Any]:
    from ropewalk.eval import hidden_facts

    return {
        "model": setup.loaded.source.name,
        "trained_window": setup.trained_window,
        "tokens": tokens,
        "target_length": target_length,
        "map": setup.position_map.to_dict(),
        "preset": None if preset is None else str(preset),
        "seed": seed,
        "facts": hidden_facts.to_dict(results),
        "right": {**hidden_facts.rights(results), "of": len(results)},
        "seconds": round(seconds, 3),
        "device": setup.loaded.device,
        "dtype": setup.loaded.dtype,
        "versions": versions(),
    }
