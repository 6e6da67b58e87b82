# SPDX-License-Identifier: Apache-2.0
"""A page from folders of results: as one HTML file without anything outside it, and as Markdown with its pictures."""

from __future__ import annotations

import base64
import errno
import html
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote

import ropewalk
from ropewalk.eval.report.drawing import Figure
from ropewalk.eval.report.figures import figures_of
from ropewalk.eval.report.notices import notices
from ropewalk.eval.report.score_tables import score_tables
from ropewalk.eval.report.series import shown, together
from ropewalk.eval.report.tables import Cell, Table, failure_table, made_table
from ropewalk.eval.results import ResultsError, Run, read
from ropewalk.eval.tasks import TASKS, About, about
from ropewalk.files import read_bytes, replacing

__all__ = ["Report", "Section", "build", "read", "to_html", "to_markdown", "write"]

METHODS = (
    "A method is a way to run the same model: unmodified is the model as it is, every other name is a change of its "
    "tokens' positions, or of how many of them it sees, with its parameters. No weight is changed by any."
)
# The last line of a page in Markdown; one without it is somebody else's.
_SIGNED = "Made by ropewalk {version} from the rows of these folders alone."


@dataclass(frozen=True)
class Section:
    """One task: all that is shown of it."""

    about: About
    notices: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Report:
    """A page as plain data."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    made: tuple[Table, ...]
    version: str


def build(runs: Sequence[Run]) -> Report:
    """The page of these runs: a section for each task, in which the runs of the task are together.

    Raises:
        ResultsError: a run has no rows.
        ImportError: a figure needs matplotlib, which is not installed.
    """
    for run in runs:
        if not run.rows:
            why = f": {run.damaged[0]}" if run.damaged else " yet: run the evaluation first"
            raise ResultsError(f"{run.folder} has no rows{why}")
    runs = [shown(run) for run in runs]
    tasks = dict.fromkeys(run.config.task for run in runs)
    sections = tuple(
        # What a task of somebody else is called is no name for a file.
        _section(task, task if task in TASKS else f"task-{number}", [run for run in runs if run.config.task == task])
        for number, task in enumerate(tasks, start=1)
    )
    title = sections[0].about.title if len(sections) == 1 else "Evaluation"
    models = dict.fromkeys(run.config.model for run in runs)
    return Report(title, ", ".join(models), sections, tuple(map(made_table, runs)), ropewalk.__version__)


def _section(task: str, name: str, runs: Sequence[Run]) -> Section:
    series, words = together(runs), about(task)
    return Section(
        about=words,
        notices=tuple(notices(runs, series)),
        figures=tuple(figures_of(name, series, words)),
        tables=(*score_tables(task, series, words), *failure_table(series)),
    )


def to_html(report: Report) -> str:
    """One page, with its pictures inside it; all text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # As images of their own: in the page itself the names inside several SVGs would clash.
    environment.filters["data_uri"] = lambda svg: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    template = files(__name__).joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report, methods=METHODS)


def to_markdown(report: Report, pictures: str) -> str:
    """The same as Markdown.

    Args:
        pictures: folder of the pictures, as the file is to name it.
    """
    return "\n\n".join(_paragraphs(report, pictures)) + "\n"


def _paragraphs(report: Report, pictures: str) -> Iterator[str]:
    yield f"# {escaped(report.title)}: {escaped(report.subtitle)}"
    several = len(report.sections) > 1
    yield escaped(METHODS)
    for section in report.sections:
        if several:
            yield f"## {escaped(section.about.title)}"
        yield escaped(section.about.measures)
        if section.notices:
            yield "\n".join(f"- **Note.** {escaped(notice)}" for notice in section.notices)
        for figure in section.figures:
            yield f"**{escaped(figure.title)}**"
            yield escaped(figure.caption)
            yield "\n".join(f"![{escaped(one.alt)}](<{pictures}/{one.name}.svg>)" for one in figure.pictures)
        for table in section.tables:
            yield from markdown_table(table)
    yield "## How it was made"
    for table in report.made:
        yield from markdown_table(table)
    yield _SIGNED.format(version=escaped(report.version))


def markdown_table(table: Table) -> Iterator[str]:
    """A table's paragraphs: its caption, itself, and its note."""
    yield f"**{escaped(table.caption)}**"
    # Markdown has one line of heads: a group is named in each of its columns.
    groups = ["", *(f"{name}: " if name else "" for name, count in table.groups for _ in range(count))]
    columns = zip_longest(groups, table.columns, fillvalue="")
    head = [[escaped(group + column) for group, column in columns], ["---"] * len(table.columns)]
    body = [[_cell(cell) for cell in row] for row in table.rows]
    yield "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *body))
    if table.note:
        yield escaped(table.note)


def _cell(cell: Cell) -> str:
    mark = f" {cell.mark}" if cell.mark else ""
    return f"{escaped(cell.text)}{mark}" + (f" ({escaped(', '.join(cell.details))})" if cell.details else "")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    one_line = " ".join(text.split())
    marked = re.sub(r"([\\`*_\[\]{}|~#$^])", r"\\\1", html.escape(one_line, quote=False))
    # What many renderers take for an address.
    return re.sub(r"(?<=:)//|@|(?<=\bwww)\.", lambda found: "".join(f"&#{ord(one)};" for one in found[0]), marked)


def write(report: Report, page: Path) -> tuple[Path, Path]:
    """Writes DIR/NAME.html, DIR/NAME.md and the pictures of the latter, DIR/NAME_files/*.svg: all or none.

    Only the first is a name that somebody chose: in place of the others nothing is written but what this has made, and
    not where a symbolic link leads.

    Returns:
        The two pages.

    Raises:
        OSError: something cannot be written.
    """
    pictures, markdown = page.with_name(f"{page.stem}_files"), page.with_suffix(".md")
    drawn = [picture for section in report.sections for figure in section.figures for picture in figure.pictures]
    files = {page: to_html(report).encode(), markdown: to_markdown(report, quote(os.fsencode(pictures.name))).encode()}
    files |= {pictures / f"{picture.name}.svg": picture.svg for picture in drawn}
    _check_ours(markdown, pictures, files)
    with ExitStack() as stack:
        for path, written in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(replacing(path)).write_bytes(written)
    return page, markdown


def _check_ours(markdown: Path, pictures: Path, files: Iterable[Path]) -> None:
    """Raises OSError: something is in the way of what is named after the page."""
    is_ours = False
    for path in (markdown, pictures, *(path for path in files if path.parent == pictures)):
        if path.is_symlink():
            raise OSError(errno.EEXIST, "is a symbolic link, which is not followed: name another page", str(path))
        if path == markdown and path.exists():
            last = read_bytes(path).rstrip().rpartition(b"\n")[2].decode(errors="replace")
            is_ours = last.startswith(_SIGNED.partition("{")[0]) and last.endswith(_SIGNED.rpartition("}")[2])
        if path != pictures and path.exists() and not is_ours:
            raise OSError(errno.EEXIST, "is there and was not made by ropewalk report: name another page", str(path))
