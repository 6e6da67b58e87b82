"""`ropewalk eval longbench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli import model_options
from ropewalk.cli.eval.run import Run, evaluate, length_of, settings_of, with_run_options


@with_run_options
def longbench(
    run: Run,
    tasks: Annotated[
        str | None, typer.Option(help="Of LongBench, comma-separated, such as hotpotqa,qasper. \\[default: all 16]")
    ] = None,
    subset: Annotated[
        str, typer.Option(help="LongBench, or MiniLongBench, a small part of it.", metavar="full|mini")
    ] = "full",
    length: Annotated[
        str,
        typer.Option(
            help="Tokens of a prompt, at most; longer ones lose their middle. LongBench takes 3500, 7500, 15500 and "
            "31500 for windows of 4k, 8k, 16k and 32k."
        ),
    ] = "15500",
    chat: Annotated[
        bool, typer.Option(help="Ask a model that chats by its template, in the tasks where LongBench does so.")
    ] = True,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that holds longbench/full/TASK.jsonl, or longbench/minilongbench/TASK.jsonl. "
            "\\[default: loaded from the hub]",
        ),
    ] = None,
) -> None:
    """LongBench: questions, summaries, few-shot learning and code completion over long texts (SelfExtend, table 2)."""
    from ropewalk.eval.tasks.longbench import KINDS, SUBSETS, LongBench, LongBenchSettings

    model_options.choice("--subset", subset, SUBSETS)
    names = list(KINDS) if tasks is None else [name.strip() for name in tasks.split(",")]
    for name in names:
        model_options.choice("--tasks", name, KINDS)
    settings = settings_of(LongBenchSettings, tasks=names, subset=subset, length=length_of(length), chat=chat)
    evaluate(lambda: LongBench(settings, data_dir), run)
