"""`ropewalk report DIR...`: a page of the results of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.errors import UserError

_SUFFIX = ".html"


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of `ropewalk eval`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="HTML page to write; beside it the same as Markdown.")
    ] = Path("report.html"),
) -> None:
    """Write a page of the results of evaluations: figures, tables, failures, and how they were made."""
    if output.suffix.lower() != _SUFFIX:
        raise UserError(f"--output must end in {_SUFFIX}, got {str(output)!r}")
    from ropewalk.eval import report
    from ropewalk.eval.results import ResultsError

    try:
        runs = [report.read(folder) for folder in _once(folders)]
        page = report.build(runs)
    except (ResultsError, ImportError) as error:
        raise UserError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the results cannot be read: {error}") from error
    try:
        written, markdown = report.write(page, output)
    except OSError as error:
        raise UserError(f"cannot write {str(output)!r}: {error.strerror or error}") from error
    print(f"{sum(len(run.rows) for run in runs)} rows: {written} and {markdown}")


def _once(folders: list[Path]) -> list[Path]:
    """A folder that is named twice is one."""
    return list({folder.resolve(): folder for folder in folders}.values())
