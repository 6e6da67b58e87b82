"""`ropewalk eval TASK`: runs a task under one or more methods, and keeps a row an example. One module a task."""

from __future__ import annotations

import typer

from ropewalk.cli.eval.leval import leval
from ropewalk.cli.eval.longbench import longbench
from ropewalk.cli.eval.needle import needle
from ropewalk.cli.eval.passkey import passkey, passkey_length
from ropewalk.cli.eval.perplexity import perplexity
from ropewalk.cli.eval.short import short

app = typer.Typer(no_args_is_help=True, help="Run an experiment of the papers on a model.", rich_markup_mode="rich")
app.command("passkey")(passkey)
app.command("passkey-length")(passkey_length)
app.command("perplexity")(perplexity)
app.command("needle")(needle)
app.command("leval")(leval)
app.command("longbench")(longbench)
app.command("short")(short)
