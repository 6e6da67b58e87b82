# SPDX-License-Identifier: Apache-2.0
"""What every `ropewalk eval TASK` has: the options of a run, and the run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ropewalk.cli import model_options
from ropewalk.cli.errors import UserError
from ropewalk.cli.eval import processes
from ropewalk.cli.map_options import preset_option
from ropewalk.cli.model_options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    TrainedWindowOption,
    TrustRemoteCodeOption,
    VerboseOption,
)
from ropewalk.cli.paths import path
from ropewalk.cli.progress import progress
from ropewalk.cli.token_options import check_tokens, token_option
from ropewalk.eval.share import ALL, Share
from ropewalk.files import printable, shown

if TYPE_CHECKING:
    from ropewalk.eval.methods import Method
    from ropewalk.eval.results import Config, Results
    from ropewalk.eval.runner import Counts, OnRow
    from ropewalk.eval.subjects import Hashes, Subject
    from ropewalk.eval.tasks import Task
    from ropewalk.integrations.transformers.models import LoadedModel
    from ropewalk.presets import Preset

# Kinds of failures that are told.
_TOLD = 5
# Where all texts fit the trained window, a map without parameters is chosen for texts of so many: the paper's 16k for a
# model trained on 4k.
_TIMES = 4
# Past these a number is a slip: a batch or a limit of more, processes on one machine. Seeds are those of every library.
MANY, _MOST_PROCESSES, _SEEDS = 1_000_000, 1024, 1 << 32
_PANEL = "Run"
_option = functools.partial(typer.Option, rich_help_panel=_PANEL)


@dataclass(frozen=True)
class RunOptions:
    """What was asked for that every task has. The options are read off the fields."""

    output: Annotated[Path, _option("--output", "-o", parser=path, metavar="DIR", help="Folder of the results.")]
    method: Annotated[
        list[str] | None,
        _option(
            "--method",
            metavar="METHOD",
            help="unmodified, a name such as yarn, or one with its parameters, such as "
            "'selfextend(group_size=8, window=1024)'; a set of values such as group_size={4, 8} runs each. Several "
            "times. \\[default: unmodified and selfextend]",
        ),
    ] = None
    preset: Annotated[
        str | None,
        _option(
            "--preset",
            metavar="NAME|FILE",
            help="One more method: what a preset says, built in (see ropewalk presets) or in a file. Its trained "
            "window goes for all methods, and without --method it is compared with unmodified alone.",
        ),
    ] = None
    limit: Annotated[int | None, _option(min=1, max=MANY, help="Examples of each method, spread over all.")] = None
    seed: Annotated[int, _option(min=0, max=_SEEDS - 1, help="Of everything random.")] = 0
    batch_size: Annotated[int, _option(min=1, max=MANY, help="Prompts or passages that are asked together.")] = 1
    chunk: Annotated[
        int,
        token_option(
            help="Tokens of each text read in one pass: more are faster on a GPU, fewer need less memory.",
            rich_help_panel=_PANEL,
        ),
    ] = 2048
    processes: Annotated[
        int | None,
        _option(min=1, max=_MOST_PROCESSES, help="Processes that share the examples. \\[default: one a GPU]"),
    ] = None
    rescore: Annotated[
        Path | None,
        _option(
            "--rescore",
            parser=path,
            metavar="DIR",
            help="Score the answers of this folder again, without asking anything: after a change of a task's scores.",
        ),
    ] = None
    model: ModelOption = None
    trained_window: TrainedWindowOption = None
    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"
    trust_remote_code: TrustRemoteCodeOption = False
    verbose: VerboseOption = False

    @property
    def methods(self) -> list[str]:
        """What was asked for, or what is compared by default."""
        return self.method or (["unmodified", "selfextend"] if self.preset is None else ["unmodified"])


def evaluate(task: Task, run: RunOptions) -> None:
    """Runs a task, in this process or in several that share its examples.

    Raises:
        Exit: every example failed, or the processes have ended.
    """
    if run.rescore is not None:
        _rescore(task, run, run.rescore)
        return
    ask = prepared([(task, run)])
    with sharing(run) as share:
        [counts] = ask(share)
    if counts.failed and not counts.done:
        raise typer.Exit(processes.ALL_FAILED)


def prepared(runs: Sequence[tuple[Task, RunOptions]]) -> Callable[[Share], list[Counts]]:
    """What asks a share of the examples of some tasks, all of one model, once options are known to be right.

    It reads all data, then loads the model, tries all methods on it and looks at all folders, and then asks the first
    example: nobody waits for one run to hear that another is refused.

    Raises:
        UserError: an option is wrong.
    """
    from ropewalk.eval import methods as ways

    [run, *_] = [run for _, run in runs]
    model_options.check(run.dtype, run.device)
    preset = preset_option(run.preset)
    check_tokens("--chunk", run.chunk)
    if run.trained_window is not None:
        check_tokens("--trained-window", run.trained_window)
    for _, each in runs:
        _check_output(each.output)
    try:
        for _, each in runs:
            ways.parse_all(each.methods, 1, 8192)  # a mistyped one is found before anything is loaded
        load = _loader(run, preset)
    except ValueError as error:
        raise UserError(str(error)) from error
    return functools.partial(_ask, runs, preset, load)


def _ask(
    runs: Sequence[tuple[Task, RunOptions]],
    preset: Preset | None,
    load: Callable[[int | None], tuple[Subject, int]],
    share: Share,
) -> list[Counts]:
    from ropewalk.eval import results

    try:
        with model_options.running(runs[0][1].verbose), ExitStack() as stack:
            for task, _ in runs:
                task.read()
            _tell(note for task, _ in runs for note in task.notes)
            ready = [_tried(task, run, preset, load) for task, run in runs]
            for one in ready:
                results.check(one.run.output, one.config)
            folders = [stack.enter_context(one.opened(share)) for one in ready]
            return [one.ask(folder) for one, folder in zip(ready, folders, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class _Ready:
    """A run of which all is known to be right but for its folder."""

    task: Task
    run: RunOptions
    methods: Sequence[Method]
    subject: Subject
    config: Config

    def opened(self, share: Share) -> Results:
        from ropewalk.eval.results import Results

        folder = Results(self.run.output, self.config, share, self.run.limit)
        _tell(f"{printable(line)}: the line stays, and its example is asked again" for line in folder.damaged)
        return folder

    def ask(self, results: Results) -> Counts:
        from ropewalk.eval import runner

        facts = runner.facts_of(self.task, self.subject, self.run.seed)
        with _progress(results.share) as on_row:
            counts = runner.run(self.task, self.methods, self.subject, results, facts, on_row)
        _say(counts, self.run.output, results.share)
        return counts


def _tried(
    task: Task, run: RunOptions, preset: Preset | None, load: Callable[[int | None], tuple[Subject, int]]
) -> _Ready:
    from ropewalk.eval import methods as ways
    from ropewalk.eval import runner

    subject, window = load(run.trained_window)
    task.measure(subject)
    longest = task.longest or _TIMES * window
    try:
        chosen = ways.parse_all(run.methods, longest, window)
    except ValueError as error:
        raise runner.MethodError(str(error)) from error
    if preset is not None and (own := ways.of_preset(preset, longest, window)) not in chosen:
        chosen.append(own)
    _tell(runner.check(chosen, subject, task.longest, window))
    return _Ready(task, run, chosen, subject, runner.config_of(task, chosen, subject, run.seed, window))


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output must be a folder, and {str(folder)!r} is none")


def _rescore(task: Task, run: RunOptions, folder: Path) -> None:
    """All rows of a folder with new scores, into another one.

    Raises:
        UserError: the folder cannot be read, is of other settings, or what it holds cannot be scored again.
    """
    from ropewalk.eval import results, runner

    model_options.check(run.dtype, run.device)
    _check_output(run.output)
    try:
        old = results.read(folder)
        load = _loader(run, None)
        with model_options.running(run.verbose):
            task.read()
            subject, window = load(run.trained_window)
            task.measure(subject)
            config = runner.config_of(task, [], subject, old.config.seed, window)
            config = config.model_copy(update={"methods": old.config.methods})
            results.check_same(old.config.model_copy(update={"version": config.version}), config, folder)
            rows = runner.rescore(task, old, subject, runner.facts_of(task, subject, old.config.seed))
            with results.Results(run.output, config) as there:
                for row in rows:
                    if row.key not in there.done:
                        there.add(row)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{len(rows)} answers scored again: {shown(run.output)}")


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _loader(run: RunOptions, preset: Preset | None) -> Callable[[int | None], tuple[Subject, int]]:
    """What loads the model, which is known to exist, when it is first asked, and says its trained window: the given
    one, or else its own."""
    from ropewalk.eval.subjects import Dummy, Model, hashes_of

    if run.model == "dummy":
        return lambda given: (
            Dummy(batch_size=run.batch_size),
            given or (preset.trained_window if preset else 8192),
        )
    source = model_options.find_model(run.model)

    @functools.cache
    def loaded() -> tuple[LoadedModel, Hashes]:
        its = model_options.load_model(source, run.dtype, run.device, run.trust_remote_code, run.verbose)
        return its, hashes_of(its)

    def load(given: int | None) -> tuple[Subject, int]:
        its, hashes = loaded()
        window = model_options.window_of(its, given, preset)
        return Model(its, window, hashes, run.batch_size, run.chunk), window

    return load


@contextmanager
def sharing(run: RunOptions) -> Iterator[Share]:
    """What this process does of the run. Where several are wanted, they are started instead, and the command ends.

    Raises:
        Exit: the processes have ended.
    """
    share = processes.share()
    if share is None:
        count = processes.wanted(run.processes, "cpu" if run.model == "dummy" else run.device)
        if count > 1:
            raise typer.Exit(processes.launch(count))
    else:
        processes.take_device()
    yield share or ALL


def _say(counts: Counts, output: Path, share: Share) -> None:
    for row, count in counts.failures[:_TOLD]:
        more = f" and {count - 1} more" if count > 1 else ""
        print(f"failed: {row.method}, {row.example}{more}: {printable(row.error or '')}", file=sys.stderr)
    if len(counts.failures) > _TOLD:
        print(f"failed: with {len(counts.failures) - _TOLD} other messages, see the rows", file=sys.stderr)
    before = f"{counts.done_before} were there already, " if counts.done_before else ""
    failed = f", {counts.failed} failed (run the same again to try those)" if counts.failed else ""
    # In one piece, as several processes may write at a time.
    print(f"{_place(share)}{before}{counts.done} examples done{failed}: {shown(output)}\n", end="")


def _place(share: Share) -> str:
    return f"{share}: " if share.count > 1 else ""


@contextmanager
def _progress(share: Share) -> Iterator[OnRow]:
    """On stderr; of several processes, the first's."""
    console = Console(file=sys.stderr, quiet=share.index > 0)
    with progress(console, "starting", "examples", 10) as advance:
        yield lambda row, done, total: advance(done, total, _place(share) + row.method)
