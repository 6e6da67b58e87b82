# SPDX-License-Identifier: Apache-2.0
"""`ropewalk eval TASK`: runs a task under one or more methods, and keeps a row an example. Each of `TASKS` is one."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ropewalk.cli.errors import UserError


class _Tasks(TyperGroup):
    """The tasks, which are loaded when one is asked for: not every command needs what they need."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        if not self.commands:
            try:
                from ropewalk.cli.eval.tasks import command_of
                from ropewalk.eval.tasks import TASKS
            except ImportError as error:
                raise UserError(f"{error.name} is not installed: run 'pip install \"ropewalk[eval]\"'") from error
            tasks = typer.Typer(rich_markup_mode="rich")
            tasks.callback()(lambda: None)  # a group, however few there are
            for name, kind in TASKS.items():
                tasks.command(name)(command_of(kind))
            self.commands.update(typer.main.get_command(tasks).commands)  # type: ignore[attr-defined]


app = typer.Typer(
    cls=_Tasks, no_args_is_help=True, help="Run an experiment of the papers on a model.", rich_markup_mode="rich"
)
