# SPDX-License-Identifier: Apache-2.0
"""The `ropewalk` command: one module a subcommand, none of which holds more than the handling of its arguments."""

from __future__ import annotations

from typing import Annotated

import typer

import ropewalk
from ropewalk.cli import chat, demo, eval, explain, generate, models, presets, report, reproduce
from ropewalk.cli.errors import Commands

app = typer.Typer(
    name="ropewalk", cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.command("demo")(demo.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("explain")(explain.command)
app.command("presets")(presets.command)
app.command("models")(models.command)
app.add_typer(eval.app, name="eval")
app.command("report")(report.command)
app.command("reproduce", cls=reproduce.Command)(reproduce.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ropewalk {ropewalk.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read far past a language model's training window, at inference time, without touching a weight."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the `ropewalk` command."""
    app(prog_name="ropewalk")
