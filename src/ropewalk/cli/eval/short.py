"""`ropewalk eval short`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli import model_options
from ropewalk.cli.eval.run import Run, evaluate, settings_of, with_run_options


@with_run_options
def short(
    run: Run,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "arc_challenge,hellaswag,mmlu,truthfulqa_mc2,gsm8k",
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="The first so many of each task, of MMLU spread over its subjects. \\[default: all]"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that holds short/... \\[default: lm-eval loads from the hub]"),
    ] = None,
) -> None:
    """Short tasks, which a map should leave as they are (SelfExtend, short-context tasks).

    They are lm-eval's, with the shots of the Open LLM Leaderboard. A map without parameters is chosen for four trained
    windows.
    """
    from ropewalk.eval.tasks.short import BENCHMARKS, Short, ShortSettings

    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        model_options.choice("--tasks", name, BENCHMARKS)
    settings = settings_of(ShortSettings, tasks=names, questions=questions, seed=run.seed)

    def make() -> Short:
        task = Short(settings, data_dir)
        if task.shots_asked:
            print(
                f"note: the data folder has no training questions of {', '.join(task.shots_asked)}: their shots are "
                "other questions of those asked, so compare methods, and not with figures of elsewhere",
                file=sys.stderr,
            )
        return task

    evaluate(make, run)
