"""`ropewalk demo`: hidden facts in texts past the model's window, asked of the model as it is and extended."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ropewalk.cli import model_options
from ropewalk.cli.errors import UserError
from ropewalk.cli.map_options import MapOptions, check_tokens, with_map_options
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
from ropewalk.cli.progress import duration
from ropewalk.integrations.transformers.versions import versions

if TYPE_CHECKING:
    from ropewalk.eval.demo import Clock, Part, Reply, Result, Setup, Trial, Variant

# Any length and window for which every map exists: a mistyped map is found before the model is loaded.
_ANY_LENGTH, _ANY_WINDOW = 1, 8192

_PARTS: dict[Part, tuple[str, str]] = {
    "passkey": ("a five-digit pass key in lines of filler", "pass key"),
    "book": ("an invented sentence in Alice's Adventures in Wonderland", "answer"),
}


@with_map_options()
def command(
    map_options: MapOptions,
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(help="Length of the texts.")] = 12_000,
    seed: Annotated[int, typer.Option(help="Of the hidden facts.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trained_window: TrainedWindowOption = None,
    sliding_window: SlidingWindowOption = "keep",
    trust_remote_code: TrustRemoteCodeOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hide facts in texts past the model's window, and ask for them: the model as it is, and extended."""
    model_options.check(dtype, device, sliding_window)
    check_tokens("--tokens", tokens)
    if trained_window is not None:
        check_tokens("--trained-window", trained_window)
    map_options.choose(_ANY_LENGTH, _ANY_WINDOW)
    source = model_options.find_model(model)
    began = perf_counter()
    with model_options.running(verbose):
        from ropewalk.eval import demo

        loaded = model_options.load_model(source, dtype, device, trust_remote_code, verbose)
        window = model_options.window_of(loaded, trained_window)
        target_length = tokens + demo.NEW_TOKENS
        setup = demo.Setup(loaded, map_options.choose(target_length, window), window, sliding_window)  # type: ignore[arg-type]
        try:
            trials = demo.trials(loaded, tokens, seed)
        except ValueError as error:
            raise UserError(f"--tokens: {error}") from error
        screen = _Screen(as_json)
        with model_options.extended(loaded, setup.position_map, target_length, window, sliding_window) as extension:
            if verbose:
                screen.progress.print(str(extension), soft_wrap=True)
        screen.introduce(setup, tokens, target_length)
        screen.progress.print("Measuring how fast this machine reads ...", soft_wrap=True)
        clock = demo.rehearse(setup, trials[0])
        screen.forecast(trials, clock)
        results: list[Result] = []
        for part in _PARTS:
            mine = [trial for trial in trials if trial.part == part]
            screen.begin(part, mine)
            for trial in mine:
                later = trials[len(results) + 1 :]
                with screen.run(trial, later, clock) as on_progress:
                    results.append(demo.run(setup, trial, clock, on_progress))
            screen.end(part, [result for result in results if result.trial.part == part])
        verdict = demo.verdict(results, setup)
        screen.conclude(verdict, perf_counter() - began)
        if as_json:
            report = _report(setup, results, tokens, target_length, seed, perf_counter() - began)
            print(json.dumps({**report, "verdict": verdict}, indent=2))


@dataclass
class _Screen:
    """Results go to stdout, unless that is for JSON; progress to stderr."""

    as_json: bool

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        self.results = Console(quiet=self.as_json, **options)
        self.progress = Console(stderr=True, **options)

    def introduce(self, setup: Setup, tokens: int, target_length: int) -> None:
        loaded, window = setup.loaded, setup.trained_window
        past = f", {tokens - window:,} past the end of that window" if tokens > window else ", inside of that window"
        self.results.print("Ropewalk demo", style="bold")
        self.results.print()
        self._pairs(
            (
                "model",
                f"{loaded.source.name} ({loaded.dtype}, {loaded.device}), trained on a window of {window:,} tokens",
            ),
            ("texts", f"{tokens:,} tokens{past}"),
            ("extended by", f"{setup.position_map}, for a target of {target_length:,} tokens"),
        )
        if tokens <= window:
            self.results.print(
                f"\nNote: a text of {tokens:,} tokens fits into the model's window, so there is little to extend. "
                f"Pass --tokens {window * 3 // 2} to go past it."
            )

    def forecast(self, trials: list[Trial], clock: Clock) -> None:
        self.results.print("\nHow long each part will take, by a short measurement on this machine:")
        lines = []
        for number, part in enumerate(_PARTS, 1):
            mine = [trial for trial in trials if trial.part == part]
            seconds = duration(sum(map(clock.trial, mine)))
            lines.append((f"part {number}", f"about {seconds} ({len(mine)} x 2 texts)"))
        self._pairs(*lines, ("in all", f"about {duration(sum(map(clock.trial, trials)))}"))

    def begin(self, part: Part, trials: list[Trial]) -> None:
        number = list(_PARTS).index(part) + 1
        self.results.print()
        self.results.print(f"Part {number} of {len(_PARTS)}: {_PARTS[part][0]}", style="bold")
        if part == "book":
            for trial in trials:
                self._pairs(("hidden", f'"{trial.haystack.needle}"'), ("asked", f'"{trial.haystack.question}"'))

    @contextmanager
    def run(self, trial: Trial, later: list[Trial], clock: Clock) -> Iterator[Callable[[Variant, int, int], None]]:
        """While a trial runs: a bar on a terminal, elsewhere a line for each variant."""
        where = f"{trial.haystack.depth:.0%} deep"
        began: dict[Variant, float] = {}

        def seconds_left(variant: Variant, done: int, total: int) -> tuple[float, float, float]:
            """Share of the work that is done, seconds left for this variant, and in all."""
            expected = clock.seconds(variant, total)
            share = clock.seconds(variant, done) / expected if expected else 1.0
            elapsed = perf_counter() - began.setdefault(variant, perf_counter())
            left = elapsed * (1 - share) / share if share > 0.15 else expected * (1 - share)
            rest = sum(map(clock.trial, later))
            return share, left, left + rest + (clock.seconds("extended", total) if variant == "unmodified" else 0)

        if not self.progress.is_terminal:

            def report(variant: Variant, done: int, total: int) -> None:
                in_all = seconds_left(variant, done, total)[2]
                if done == 0:
                    line = f"  {where}, {variant} model: reading; about {duration(in_all)} left in all"
                    self.progress.print(line, soft_wrap=True)

            yield report
            return

        columns = (
            SpinnerColumn("line"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.progress, transient=True) as progress:
            task = progress.add_task(where, total=1.0, left="")

            def report_bar(variant: Variant, done: int, total: int) -> None:
                share, left, in_all = seconds_left(variant, done, total)
                progress.update(
                    task,
                    description=f"{where}, {variant} model",
                    completed=share,
                    left=f"{duration(left)} left, {duration(in_all)} in all",
                    refresh=True,
                )

            yield report_bar

    def end(self, part: Part, results: list[Result]) -> None:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for header in ("  depth", "tokens\nback", "prompt\ntokens"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column(_PARTS[part][1])
        table.add_column("unmodified model", ratio=1)
        table.add_column("extended model", ratio=1)
        for result in results:
            hidden = result.trial.haystack
            table.add_row(
                f"{hidden.depth:.0%}",
                f"{hidden.tokens_back:,}",
                f"{hidden.tokens:,}",
                hidden.answer,
                _reply(result.unmodified),
                _reply(result.extended),
            )
        self.results.print()
        self.results.print(table)

    def conclude(self, verdict: str, seconds: float) -> None:
        self.results.print(f"\nTook {duration(seconds)}, loading included.")
        self.results.print(verdict, style="bold", soft_wrap=not self.results.is_terminal)

    def _pairs(self, *pairs: tuple[str, str]) -> None:
        """Labels and what they say, wrapped beside the labels."""
        indent = 4 + max(len(label) for label, _ in pairs)
        for label, value in pairs:
            lines = textwrap.wrap(value, max(20, self.results.width - indent))
            self.results.print(f"  {label}".ljust(indent) + f"\n{' ' * indent}".join(lines))


def _reply(reply: Reply) -> Text:
    """What was answered, and below it whether that is right."""
    shown = reply.text.strip()
    shown = shown if len(shown) <= 48 else shown[:45] + "..."
    mark = ("right", "bold green") if reply.right else ("wrong", "bold red")
    return Text.assemble(f'"{shown}"\n' if shown else "(nothing)\n", mark, f", {duration(reply.seconds)}")


def _report(
    setup: Setup, results: list[Result], tokens: int, target_length: int, seed: int, seconds: float
) -> dict[str, Any]:
    from ropewalk.eval import demo

    return {
        "model": setup.loaded.source.name,
        "trained_window": setup.trained_window,
        "tokens": tokens,
        "target_length": target_length,
        "map": setup.position_map.to_dict(),
        "seed": seed,
        "trials": demo.to_dict(results),
        "right": {**demo.rights(results), "of": len(results)},
        "seconds": round(seconds, 3),
        "device": setup.loaded.device,
        "dtype": setup.loaded.dtype,
        "versions": versions(),
    }
