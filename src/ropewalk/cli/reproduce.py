# SPDX-License-Identifier: Apache-2.0
"""`ropewalk reproduce NAME`: a table or a figure of the papers, by one command."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column
from rich.table import Table as Shown
from typer.core import TyperCommand

from ropewalk.cli.errors import UserError, did_you_mean
from ropewalk.cli.eval.run import MANY, RunOptions, prepared, sharing
from ropewalk.cli.model_options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    TrainedWindowOption,
    TrustRemoteCodeOption,
    VerboseOption,
)
from ropewalk.cli.paths import path
from ropewalk.cli.token_options import token_option
from ropewalk.files import replacing
from ropewalk.files import shown as written

if TYPE_CHECKING:
    from ropewalk.eval.report.tables import Table
    from ropewalk.eval.reproduce import Experiment, Run
    from ropewalk.eval.tasks import Task

_LIST = "list"
_COMPARISON = "comparison.md"
_DATA = "data_dir"
# Of a column, beside its text: a line and two blanks.
_BORDER = 3
_GATED = (
    "Models of meta-llama and some others are gated: ask for access on their pages, and give your token by 'hf auth "
    "login' or in HF_TOKEN."
)


class Command(TyperCommand):
    """Says of an option of `ropewalk eval` what there is here in its place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            from ropewalk.eval.tasks import TASKS

            option = str(getattr(error, "option_name", ""))
            name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
            if any(name in kind.model_fields for kind in TASKS.values()):
                raise UserError(f"there is no option {option}: settings are given as --set {name}=VALUE") from error
            if name in ("method", "preset"):
                raise UserError(
                    f"there is no option {option}: methods are the paper's, and 'ropewalk eval' takes others"
                ) from error
            raise


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as selfextend/table-2; list shows all.")],
    model: ModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=path, metavar="DIR", help="Folder of the results. \\[default: ./NAME]"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", parser=path, metavar="DIR", help="Folder of data sets. Without one, the hub's."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the task in the place of the paper's."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Examples of each method, spread over all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MANY, help="Prompts that are asked together.")] = 1,
    chunk: Annotated[int, token_option(help="Tokens of each text read in one pass.")] = 2048,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes that share the examples. \\[default: one a GPU]")
    ] = None,
    trained_window: TrainedWindowOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustRemoteCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run a table or a figure of the papers with the paper's settings, and show its figures beside ours.

    The same command goes on where it was stopped. On a model that the paper did not run, the same is asked of it
    unmodified and with what is recommended for its window; the papers' fine-tuned rivals run unmodified.
    """
    from ropewalk.eval import reproduce

    if name == _LIST:
        _show_all()
        return
    try:
        one = reproduce.experiment(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not one.is_measured:
        _show(name, one)
        return
    folder = output or Path(name.replace("/", "-"))
    overrides = dict(map(_setting, changes or []))
    runs = reproduce.runs_of(one, model, overrides)
    common = RunOptions(
        output=folder, method=None, limit=limit, batch_size=batch_size, chunk=chunk, processes=processes, model=model,
        trained_window=trained_window, dtype=dtype, device=device, trust_remote_code=trust_remote_code, verbose=verbose,
    )  # fmt: skip
    _check_page(name, folder)
    with _errors_of_here(one, model):
        tasks = [_task(one, run, data_dir) for run in runs]
        ask = prepared([(task, _options(common, run, task)) for task, run in zip(tasks, runs, strict=True)])
        try:
            with sharing(common) as share:
                if share.index == 0 and not any(row for run in runs for row in run.rows.values()):
                    print(f"note: {_not_the_papers(one, model)}", file=sys.stderr)
                counts = ask(share)
                if share.count > 1:
                    return
        except typer.Exit as ended:
            if ended.exit_code == 0:
                _compare(name, one, runs, folder, overrides)
            raise
    _compare(name, one, runs, folder, overrides)
    if any(each.failed for each in counts) and not any(each.done for each in counts):
        raise typer.Exit(3)


def _show(name: str, one: Experiment) -> None:
    """What a figure shows that measures nothing."""
    from ropewalk.cli import app
    from ropewalk.cli.eval.tasks import task_of
    from ropewalk.eval.reproduce import first_prompt, matrix
    from ropewalk.eval.tasks import TASKS

    print(f"{name}: {one.title}. Nothing is measured there.\n")
    if one.matrix:
        print(f"Relative positions, a line for each query, from the first key on:\n\n{matrix(*one.matrix)}\n")
    if one.prompt:
        prompt, right = first_prompt(task_of(TASKS[one.task], dict(one.settings)))
        print(f"{prompt}\n\nThe right answer is {right}. The prompt has {len(prompt):,} letters.")
        return
    print(f"{one.instead}\n", flush=True)
    app(one.instead.split()[1:])


def _check_page(name: str, folder: Path) -> None:
    """Raises UserError: the comparison could not be written, or would be in the place of something else."""
    page = folder / _COMPARISON
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output must be a folder, and {written(folder)!r} is none")
    if page.exists() and not (page.is_file() and page.read_bytes().startswith(f"**{name}: ".encode())):
        raise UserError(f"{written(page)} is no comparison of {name}: name another folder with --output")


@contextmanager
def _errors_of_here(one: Experiment, model: str | None) -> Iterator[None]:
    """Errors made for `ropewalk eval` say what can be done here, where settings of the task are given by --set, and
    methods are the paper's."""
    from ropewalk.eval.runner import MethodError
    from ropewalk.eval.tasks import TASKS
    from ropewalk.integrations.transformers.sources import ModelError

    settings = TASKS[one.task].model_fields.keys() - {_DATA}
    try:
        yield
    except UserError as error:
        message = re.sub(
            r"--([a-z]+(?:-[a-z]+)*)\b",
            lambda found: f"--set {found[1]}" if found[1].replace("-", "_") in settings else found[0],
            str(error),
        )
        if isinstance(cause := error.__cause__, MethodError):
            message = (
                f"{cause.problem}: the methods here are the paper's; give other "
                f"lengths by --set, or methods of your own to 'ropewalk eval {one.task} --method'"
            )
        elif isinstance(cause, ModelError) and model is not None and not Path(model).exists():
            message += f". {_GATED}"
        raise UserError(message) from error


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set must be NAME=VALUE, such as subset=mini, got {text!r}")
    return key.strip().replace("-", "_"), value.strip()


def _task(one: Experiment, run: Run, data_dir: Path | None) -> Task:
    from ropewalk.cli.eval.tasks import task_of
    from ropewalk.eval.tasks import TASKS

    kind = TASKS[one.task]
    settings: dict[str, Any] = dict(run.settings)
    known = [key for key in kind.model_fields if key != _DATA]
    for key in settings:
        if key == _DATA:
            raise UserError("--set: the folder of data sets is given by --data-dir")
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"--set: {one.task} has no setting {key!r}.{hint} It has {', '.join(known)}")
    if data_dir is not None and _DATA in kind.model_fields:
        settings[_DATA] = data_dir
    return task_of(kind, settings)


def _options(common: RunOptions, run: Run, task: Task) -> RunOptions:
    return replace(
        common,
        output=common.output / run.name,
        method=list(run.rows),
        trained_window=common.trained_window or run.trained_window,
        seed=getattr(task, "seed", 0),
    )


def _not_the_papers(one: Experiment, model: str | None) -> str:
    from ropewalk.eval.reproduce import lines_of, models_of

    if lines_of(one, model):
        return f"the paper's own figures of {model} are not there to be shown: they are in no table that could be read"
    ran = ", ".join(models_of(one))
    return (
        f"the paper did not run {model or 'the embedded model'}, so there are no figures beside its own. It ran {ran}"
    )


def _compare(name: str, one: Experiment, runs: list[Run], folder: Path, overrides: dict[str, str]) -> None:
    """Prints the tables, and writes them as Markdown."""
    from ropewalk.eval import results
    from ropewalk.eval.report import markdown_table
    from ropewalk.eval.reproduce.comparison import comparison

    done = [(run, results.read(folder / run.name)) for run in runs]
    tables = comparison(name, one, done, [f"{key} is {value}" for key, value in overrides.items()])
    if not tables:
        print("note: there is nothing to compare, as no example was answered", file=sys.stderr)
        return
    for table in tables:
        _print(table)
    page = folder / _COMPARISON
    with replacing(page) as unfinished:
        unfinished.write_text(
            "\n\n".join(paragraph for table in tables for paragraph in markdown_table(table)) + "\n", encoding="utf-8"
        )
    print(
        f"{written(page)}; figures and failures: ropewalk report {' '.join(written(folder / run.name) for run in runs)}"
    )


def _print(table: Table) -> None:
    """In as many tables as fit beside each other's first column without cutting words; the last has the note."""
    console = Console()
    texts = [["\n".join([f"{cell.text} {cell.mark}".rstrip(), *cell.details]) for cell in row] for row in table.rows]
    widths = [
        max(map(len, [*column.split(), *(line for row in texts for line in row[place].split("\n"))]))
        for place, column in enumerate(table.columns)
    ]
    bands = list(_bands(table.columns, widths, console.width))
    for number, band in enumerate(bands):
        shown = Shown(
            *(Column(table.columns[place], min_width=widths[place]) for place in (0, *band)),
            title=table.caption + (", continued" if number else ""),
            caption=table.note if number == len(bands) - 1 else None,
            title_justify="left",
            caption_justify="left",
        )
        for row in texts:
            shown.add_row(*(row[place] for place in (0, *band)))
        console.print(shown)


def _bands(columns: Sequence[str], widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Which columns stand beside each other behind the first one: the paper's always with ours."""
    left = room = width - widths[0] - _BORDER - 1
    band: list[int] = []
    unit: list[int] = []
    for place in range(1, len(columns)):
        unit.append(place)
        if columns[place].startswith("paper: ") and place + 1 < len(columns):
            continue
        size = sum(widths[one] + _BORDER for one in unit)
        if band and size > left:
            yield band
            band, left = [], room
        band, left, unit = band + unit, left - size, []
    yield band


def _show_all() -> None:
    from ropewalk.eval.reproduce import experiments, forecast, models_of, names, not_run

    # What goes on to another program goes line by line.
    width = Console().width if sys.stdout.isatty() else sys.maxsize

    def say(indent: int, text: str) -> None:
        more = " " * (indent + 4)
        print(textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=more, break_long_words=False,
                            break_on_hyphens=False))  # fmt: skip

    for name in names():
        if name in not_run():
            say(0, f"{name}: not run: {not_run()[name]}")
            continue
        one = experiments()[name]
        say(0, f"{name}: {one.title}")
        if not one.is_measured:
            say(4, f"nothing is measured; shown by: {one.instead or f'ropewalk reproduce {name}'}")
        for model in models_of(one):
            cost = forecast(one, model)
            told = "" if cost is None else f", about {cost[0]:.1f} h on one H100, {cost[1]:.0f} GiB"
            say(4, f"{model}{told}")
            for line in one.lines:
                if line.model == model:
                    settings = ", ".join(f"{key} {value}" for key, value in line.settings.items())
                    say(8, f"{line.method}{f' at {settings}' if settings else ''}")
        for each in one.unknown:
            say(4, f"not known of the paper: {each}")
    say(0, _GATED)
