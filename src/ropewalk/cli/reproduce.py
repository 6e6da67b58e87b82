# SPDX-License-Identifier: Apache-2.0
"""`ropewalk reproduce NAME`: a table or a figure of the papers, by one command."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Shown

from ropewalk.cli.errors import UserError
from ropewalk.cli.eval.run import MANY, RunOptions, prepared, sharing
from ropewalk.cli.model_options import DeviceOption, DtypeOption, ModelOption, TrustRemoteCodeOption, VerboseOption
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
_GATED = (
    "Models of meta-llama and some others are gated: ask for access on their pages, and give your token by 'hf auth "
    "login' or in HF_TOKEN."
)


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
    if one.instead:
        print(f"{one.title}: nothing is measured there, and this shows the same:\n  {one.instead}")
        return
    folder = output or Path(name.replace("/", "-"))
    overrides = dict(map(_setting, changes or []))
    runs = reproduce.runs_of(one, model, overrides)
    common = RunOptions(
        output=folder, method=None, limit=limit, batch_size=batch_size, chunk=chunk, processes=processes, model=model,
        dtype=dtype, device=device, trust_remote_code=trust_remote_code, verbose=verbose,
    )  # fmt: skip
    asked = [prepared(_task(one, run, data_dir), _options(common, run)) for run in runs]
    if not any(row for run in runs for row in run.rows.values()):
        print(f"note: {_not_the_papers(one, model)}", file=sys.stderr)
    try:
        with sharing(common) as share:
            counts = [ask(share) for ask in asked]
            if share.count > 1:
                return
    except typer.Exit as ended:
        if ended.exit_code == 0:
            _compare(name, one, runs, folder, overrides, limit)
        raise
    _compare(name, one, runs, folder, overrides, limit)
    if any(each.failed for each in counts) and not any(each.done for each in counts):
        raise typer.Exit(3)


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
    for key in settings:
        if key not in kind.model_fields or key == "data_dir":
            raise UserError(f"--set: {one.task} has no setting {key!r}. It has {', '.join(kind.model_fields)}")
    if data_dir is not None and "data_dir" in kind.model_fields:
        settings["data_dir"] = data_dir
    return task_of(kind, settings)


def _options(common: RunOptions, run: Run) -> RunOptions:
    return replace(common, output=common.output / run.name, method=list(run.rows), trained_window=run.trained_window)


def _not_the_papers(one: Experiment, model: str | None) -> str:
    from ropewalk.eval.reproduce import lines_of, models_of

    if lines_of(one, model):
        return f"the paper's own figures of {model} are not there to be shown: they are in no table that could be read"
    ran = ", ".join(models_of(one))
    return (
        f"the paper did not run {model or 'the embedded model'}, so there are no figures beside its own. It ran {ran}"
    )


def _compare(
    name: str, one: Experiment, runs: list[Run], folder: Path, overrides: dict[str, str], limit: int | None
) -> None:
    """Prints the tables, and writes them as Markdown."""
    from ropewalk.eval import results
    from ropewalk.eval.report import markdown_table
    from ropewalk.eval.reproduce.comparison import comparison

    departures = [f"{key} is {value}" for key, value in overrides.items()]
    if limit is not None:
        departures.append(f"{limit} examples of each method")
    done = [(run, results.read(folder / run.name)) for run in runs]
    tables = comparison(name, one, done, [*departures, *one.unknown])
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
    shown = Shown(*table.columns, title=table.caption, caption=table.note, title_justify="left", caption_justify="left")
    for row in table.rows:
        shown.add_row(*("\n".join([f"{cell.text} {cell.mark}".rstrip(), *cell.details]) for cell in row))
    Console().print(shown)


def _show_all() -> None:
    from ropewalk.eval.reproduce import experiments, forecast, models_of

    for name, one in experiments().items():
        print(f"{name}: {one.title}")
        if one.instead:
            print(f"    nothing is measured there; the same is shown by: {one.instead}")
        for model in models_of(one):
            cost = forecast(one, model)
            told = "" if cost is None else f", about {cost[0]:.1f} h on one H100, {cost[1]:.0f} GiB"
            print(f"    {model}{told}")
            for line in one.lines:
                if line.model == model:
                    settings = ", ".join(f"{key} {value}" for key, value in line.settings.items())
                    print(f"        {line.method}{f' at {settings}' if settings else ''}")
        for each in one.unknown:
            print(f"    not known of the paper: {each}")
    print(_GATED)
