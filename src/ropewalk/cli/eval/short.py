"""`ropewalk eval short`: short tasks, by lm-eval, under one or more methods."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropewalk.cli import model_options
from ropewalk.cli.errors import UserError
from ropewalk.cli.eval.run import Run, progress, say, sharing, with_run_options

if TYPE_CHECKING:
    from ropewalk.eval.tasks.short import HarnessTask

# A map without parameters is chosen for texts of so many trained windows: the paper's 16k for a model trained on 4k.
_TIMES = 4


@with_run_options
def short(
    run: Run,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "arc_challenge,hellaswag,mmlu,truthfulqa_mc2,gsm8k",
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that holds short/... \\[default: lm-eval loads from the hub]"),
    ] = None,
) -> None:
    """Short tasks, which a map should leave as they are (SelfExtend, short-context tasks).

    They are lm-eval's, with the shots of the Open LLM Leaderboard. --limit counts the questions of each task, and of
    each subject of MMLU, from the first on. A map without parameters is chosen for four trained windows.
    """
    from ropewalk.eval import methods as ways
    from ropewalk.eval import runner
    from ropewalk.eval.results import Config, Results, ResultsError
    from ropewalk.eval.tasks import short as task

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    for name in names:
        model_options.choice("--tasks", name, task.BENCHMARKS)
    loading = run.loading()
    try:
        ways.parse_all(run.methods, 1, 8192)  # a mistyped one is found before anything is loaded
        with sharing(run) as share, model_options.running(loading.verbose):
            loaded = task.load(names, data_dir)
            _say_shots(loaded)
            subject, window = loading()
            chosen = ways.parse_all(run.methods, _TIMES * window, window)
            config = Config(
                task=task.NAME,
                version=task.VERSION,
                settings=task.settings_of(loaded).model_dump(mode="json"),
                methods=tuple(method.name for method in chosen),
                model=subject.name,
                model_hash=subject.weights_hash,
                seed=run.seed,
                trained_window=window,
            )
            results = Results(run.output, config, share.index)
            facts = runner.facts_of(subject, run.seed)
            facts = facts.model_copy(update={"versions": facts.versions | task.versions()})
            with progress(share) as on_row:
                counts = task.run(
                    loaded,
                    chosen,
                    subject,
                    task.language_model(subject, window, run.batch_size),
                    results,
                    facts,
                    limit=run.limit,
                    batch_size=run.batch_size,
                    on_row=on_row,
                    share=share,
                )
    except (ResultsError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    say(counts, run.output, share)


def _say_shots(tasks: Sequence[HarnessTask]) -> None:
    """Says on stderr where shots are not from the data that they should be from."""
    taken = dict.fromkeys(task.benchmark for task in tasks if task.shots_are_asked)
    if taken:
        print(
            f"note: the data folder has no training questions of {', '.join(taken)}: their shots are other questions "
            "of those asked, so compare methods, and not with figures of elsewhere",
            file=sys.stderr,
        )
