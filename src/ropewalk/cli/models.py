# SPDX-License-Identifier: Apache-2.0
"""`ropewalk models`: what was tested on which architecture."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from importlib.resources import files
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ropewalk.cli.errors import UserError

_COLORS = {"right": "green", "refused": "yellow"}


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Architectures, as transformers calls them, or patterns.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows of the test instead of a table.")] = False,
) -> None:
    """Show which architectures can be extended, how each was tested, and why others are refused."""
    chosen = [row for row in rows() if not names or any(_matches(row, name) for name in names)]
    if not chosen:
        raise UserError(f"no architecture is called {' or '.join(names or [])}: `ropewalk models` shows all")
    if as_json:
        print(json.dumps(chosen, indent=2))
        return
    table = Table(
        "architecture", "under a map", "positions", "implementations", "error", "notes", box=None, padding=(0, 1)
    )
    for row in chosen:
        color = _COLORS.get(row["outcome"], "red")
        table.add_row(
            escape(row["name"]),
            f"[{color}]{row['outcome']}[/]",
            escape(row["positions"]),
            ", ".join(row["implementations"]),
            f"{row['error']:.0e}" if row["outcome"] == "right" else "",
            escape(notes(row)),
        )
    console = Console()
    console.print(table)
    console.print(f"\n{_summary(chosen)}", highlight=False)


HOW = (
    "Right is what the model itself computes at the positions of each band, and the same in chunks, token by token, "
    "with a static cache and in a padded batch; the error is the largest difference, in standard deviations of the "
    "logits."
)


def _summary(chosen: list[dict[str, Any]]) -> str:
    counts = Counter(row["outcome"] for row in chosen)
    versions = sorted({version for row in chosen for version in row["transformers"]})
    counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    return f"{counted}. Tiny models with random weights, transformers {' and '.join(versions)}. {HOW}"


def rows() -> list[dict[str, Any]]:
    """The rows of the last test of all architectures (`make test-matrix`), one an architecture.

    `transformers` is what became of it under each version that was tested, the newest first; all else is the newest's.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in files("ropewalk.data").joinpath("models.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        version, known = row["transformers"], found.get(row["name"])
        if known is None:
            found[row["name"]] = {**row, "transformers": {version: row["outcome"]}}
        else:
            known["transformers"][version] = row["outcome"]
    return list(found.values())


def _matches(row: dict[str, Any], name: str) -> bool:
    return any(fnmatch.fnmatch(row[key], name) for key in ("name", "model_type"))


def notes(row: dict[str, Any]) -> str:
    """What else there is to say of one of `rows`: why it is refused, what was not asked, under which version."""
    said = [row["message"]] if row["message"] else []
    if row["window"] == "disable":
        said.append("with sliding_window='disable'")
    said += [f"{name} {why}" for name, why in row["checks"].items() if isinstance(why, str)]
    said += [f"{outcome} with transformers {version}" for version, outcome in row["transformers"].items()
             if outcome != row["outcome"]]  # fmt: skip
    return "; ".join(said)
