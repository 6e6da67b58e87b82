# SPDX-License-Identifier: Apache-2.0
"""`ropewalk report DIR...`: a page of the results of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.errors import UserError
from ropewalk.cli.paths import path
from ropewalk.files import shown

_SUFFIX = ".html"


def command(
    folders: Annotated[list[Path], typer.Argument(parser=path, metavar="DIR", help="Folders of `ropewalk eval`.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=path,
            metavar="FILE",
            help="HTML page to write; beside it NAME.md, the same as Markdown, and its pictures.",
        ),
    ] = Path("report.html"),
) -> None:
    """Write a page of the results of evaluations: figures, tables, failures, and how they were made."""
    if output.suffix.lower() != _SUFFIX:
        raise UserError(f"--output must end in {_SUFFIX}, got {str(output)!r}")
    from ropewalk.eval import report
    from ropewalk.eval.results import ResultsError, read

    try:
        # A folder that is named twice is one.
        runs = [read(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
        page = report.build(runs)
    except ResultsError as error:
        raise UserError(str(error)) from error
    written, markdown = report.write(page, output)
    print(f"{sum(len(run.rows) for run in runs)} rows: {shown(written)} and {shown(markdown)}")
