# SPDX-License-Identifier: Apache-2.0
"""The command of a task: the options of a run, and one for each field of the task, which are read off the fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.markup import escape

from ropewalk.cli import model_options
from ropewalk.cli.errors import UserError
from ropewalk.cli.eval.run import RunOptions, evaluate
from ropewalk.cli.paths import path
from ropewalk.eval.tasks.base import Task
from ropewalk.eval.tasks.settings import OURS, written
from ropewalk.names import as_option

# Of the run, and a setting of the tasks that draw something.
_SEED = "seed"
# Of the run, about how and what the model is asked.
_OF_ASKING = ("method", "preset", "limit", "batch_size", "chunk", "processes")


def command_of(kind: type[Task]) -> Callable[..., None]:
    """The command of a kind of task, as typer takes it: it reads the options off the signature and the annotations."""
    of_runs = inspect.signature(RunOptions, eval_str=True).parameters
    options = [_option(name, field) for name, field in kind.model_fields.items() if name != _SEED]
    options += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in of_runs.values()]

    def command(context: typer.Context, **options: Any) -> None:
        given = {name: value for name, value in options.items() if _is_given(name, context) or name in of_runs}
        run = RunOptions(**{name: given.pop(name) for name in of_runs})
        idle: dict[str, str] = {}
        if run.rescore is not None:
            if run.output.exists() and run.output.samefile(run.rescore):
                raise UserError(f"--output must be another folder than that of --rescore, got {str(run.output)!r}")
            idle = dict.fromkeys(_OF_ASKING, "--rescore, which asks nothing")
        for name, why in {**dict.fromkeys(kind.unheeded(), kind.name), **idle}.items():
            if _is_given(name, context):
                raise UserError(f"{as_option(name)} has no effect with {why}: leave it out")
        if _is_given(_SEED, context):
            given[_SEED] = run.seed
        evaluate(task_of(kind, given), run)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (context, *options)}
    command.__doc__ = inspect.getdoc(kind)
    return command


def _is_given(name: str, context: typer.Context) -> bool:
    """Whether a command's option was given. Where it was not, a task has its own default, and nothing to refuse."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def task_of(kind: type[Task], settings: dict[str, Any]) -> Task:
    """A task with these settings, which may be text.

    Raises:
        UserError: one does not fit.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        detail = error.errors()[0]
        if not detail["loc"]:  # of several together
            raise UserError(detail["msg"]) from error
        name, given = str(detail["loc"][0]), detail["input"]
        option = as_option(name)
        if choices := get_literal(kind.model_fields[name].annotation):
            model_options.choice(option, str(given), choices)
        ours = detail["type"] == OURS
        raise UserError(f"{option} {detail['msg']}" if ours else f"{option}: {detail['msg']}, got {given!r}") from error


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """With the task's own default, as text; of a switch as it is."""
    switch = field.annotation is bool
    is_path = Path in get_args(field.annotation)
    option = as_option(name)
    info = typer.Option(
        f"{option}/--no-{option[2:]}" if switch else option,
        help=escape(field.description or ""),
        metavar=None if switch else _metavar(field.annotation),
        parser=path if is_path else None,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default if switch or field.default is None else written(field.default) or None,
        annotation=Annotated[bool if switch else Path | None if is_path else str | None, info],
    )


def _metavar(annotation: Any) -> str:
    kinds = {annotation, *get_args(annotation)}
    return "|".join(get_literal(annotation)) or ("DIR" if Path in kinds else "INTEGER" if int in kinds else "TEXT")


def get_literal(annotation: Any) -> tuple[str, ...]:
    """What a setting can be, where that is a choice."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()
