"""`ropewalk eval leval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from ropewalk.cli import model_options
from ropewalk.cli.eval.run import Run, evaluate, length_of, settings_of, with_run_options


@with_run_options
def leval(
    run: Run,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Exams, comma-separated: coursera, gsm100, quality, tpo, sci_fi, codeU. "
            "\\[default: all that the mode takes, but codeU]"
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Answers in words, or the likelihood of each option.", metavar="generate|options")
    ] = "generate",
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that holds leval/closed/*.jsonl. \\[default: loaded from the hub]"),
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of the longest prompt; 16k is 16384.")] = "16k",
    new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer in words, at most.")] = 512,
    chat: Annotated[bool, typer.Option(help="Ask as a message where the model has a chat template.")] = True,
) -> None:
    """L-Eval's exams, questions about long documents (SelfExtend, table 3)."""
    from ropewalk.eval.tasks.leval import LEval, LEvalSettings, Mode, default_tasks
    from ropewalk.eval.tasks.leval.exams import NAMES

    model_options.choice("--mode", mode, get_args(Mode))
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else default_tasks(mode)  # type: ignore[arg-type]
    for name in names:
        model_options.choice("--tasks", name, NAMES)
    settings = settings_of(
        LEvalSettings, mode=mode, tasks=names, length=length_of(length), new_tokens=new_tokens, chat=chat
    )

    def make() -> LEval:
        task = LEval(settings, data_dir)
        for name, count in task.left_out.items():
            print(f"{name}: questions left out because several options are right: {count}", file=sys.stderr)
        return task

    evaluate(make, run)
