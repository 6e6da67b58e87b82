# SPDX-License-Identifier: Apache-2.0
"""What the papers print, to stand beside what is measured here: tables with their rows, and what each figure shows.

The rows are data, `data/papers/NAME.csv`, with every cell as it is printed; `data/papers/index.toml` says of each table
where its rows were seen, how they were made, which cells contradict another source or each other, and what is missing.
A cell that nobody has seen is not there: nothing is filled in.
"""

from __future__ import annotations

import csv
import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ropewalk.names import named, unknown

_FOLDER = files("ropewalk.data").joinpath("papers")
_MEAN = "mean"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Paper(_Record):
    """A paper.

    Attributes:
        by: its authors and year, in short.
        arxiv: its number.
        fetch: where it is to be had, and how much of it was read for these files.
    """

    title: str
    by: str
    arxiv: str
    fetch: str


class Source(_Record):
    """Where something was seen.

    Attributes:
        kind: "paper", printed there; "authors", in their repository; "quoted", in the table of others; "thread", what
            users of the authors' code say; "project", Ropewalk's own pages, which is to be confirmed.
        what: it is, and how it was read.
        url: empty for Ropewalk's own.
    """

    kind: Literal["paper", "authors", "quoted", "thread", "project"]
    what: str
    url: str


class Setting(_Record):
    """How a model was run for a table.

    Attributes:
        model: as in the rows.
        parameters: of the map, as in a method's parentheses: "group_size=16, window=1024"; empty for none.
        source: that says so, by name.
        length: of the row it is for, as there; empty for all.
        note: what else belongs to it.
    """

    model: str
    parameters: str
    source: str
    length: str = ""
    note: str = ""


class Erratum(_Record):
    """A cell that is not to be trusted.

    Attributes:
        label: of its row.
        column: of the cell; "mean" for one that the cells of the row do not have.
        note: what is against it.
    """

    label: str
    column: str
    note: str


class Row(_Record):
    """A row of a table.

    Attributes:
        label: what the table calls it; one of its kind.
        model: that was run, by one name in all tables; `hub_name` says where it is.
        method: of Ropewalk, by name and without parameters; "retrieval" for a text of which parts were looked up.
        length: of the prompts, as printed ("16k"); empty where it is unknown.
        sources: that have this row, by name; the first has all of the cells but those that only another has.
        cells: by column, as printed ("68.50"); only those that were seen.
        mean: over `Table.mean_of`, as printed; None where there is none.
    """

    label: str
    model: str
    method: str
    length: str
    sources: tuple[str, ...]
    cells: dict[str, str]
    mean: str | None = None

    def value(self, column: str) -> float | None:
        """What is printed, as a number; None where nothing was seen."""
        return float(self.cells[column]) if column in self.cells else None


class Table(_Record):
    """A table of a paper, or of its authors' repository.

    Attributes:
        id: "PAPER/NAME", such as "selfextend/table-2".
        number: in the paper; empty where it has none or it is unknown.
        status: "complete", all that the source has; "partial"; "missing", no row.
        shows: what, in our words.
        data, metric, decoding: of the experiment; "" or a word that says so where it is unknown.
        settings: of maps, as far as they are known.
        sources: of rows and settings, by name.
        mean_of: columns that the mean of a row is over; empty for all of the table.
        missing: what it would take to be complete.
        errata: cells not to be trusted.
        columns: of the cells, in the table's order, by the names of Ropewalk's tasks where it has them.
        rows: in the table's order.
    """

    id: str
    number: str = ""
    status: Literal["complete", "partial", "missing"]
    shows: str
    data: str = ""
    metric: str = ""
    decoding: str = ""
    settings: tuple[Setting, ...] = ()
    sources: tuple[str, ...] = ()
    mean_of: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    errata: tuple[Erratum, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    def row(self, label: str) -> Row:
        """Raises ValueError: the table has no such row."""
        for row in self.rows:
            if row.label == label:
                return row
        raise ValueError(unknown("row", label, (row.label for row in self.rows)))

    def erratum(self, label: str, column: str) -> Erratum | None:
        """What is against a cell, if anything."""
        return next((one for one in self.errata if (one.label, one.column) == (label, column)), None)


class Figure(_Record):
    """A figure of a paper. None has values that could be read.

    Attributes:
        id: "PAPER/figure-NUMBER".
        shows: what, in our words.
        data, settings: of the experiment.
        x, y: what the axes are.
        sources: of this description, by name.
        missing: what is unknown.
    """

    id: str
    shows: str
    data: str = ""
    settings: str = ""
    x: str = ""
    y: str = ""
    sources: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


class _Table(Table):
    id: str = ""
    file: str = ""


class _Figure(Figure):
    id: str = ""


class _Index(_Record):
    papers: dict[str, Paper]
    sources: dict[str, Source]
    hub: dict[str, str]
    tables: dict[str, _Table]
    figures: dict[str, _Figure]


@cache
def _index() -> _Index:
    return _Index.model_validate(tomllib.loads(_FOLDER.joinpath("index.toml").read_text(encoding="utf-8")))


def papers() -> dict[str, Paper]:
    """By the name that the ids of their tables and figures begin with."""
    return dict(_index().papers)


def sources() -> dict[str, Source]:
    """By name."""
    return dict(_index().sources)


def hub_name(model: str) -> str | None:
    """The repository on the hub of a row's model; None for one that is not there, or not known."""
    return _index().hub.get(model)


@cache
def tables() -> dict[str, Table]:
    """All tables, by id; also those without a row, which say what to fetch."""
    found = {}
    for name, entry in _index().tables.items():
        read = _rows(entry.file) if entry.file else {}
        fields = entry.model_dump(exclude={"file"}) | {"id": name, **read}
        found[name] = Table.model_validate(fields)
    return found


@cache
def figures() -> dict[str, Figure]:
    """All figures, by id."""
    return {name: Figure.model_validate(entry.model_dump() | {"id": name}) for name, entry in _index().figures.items()}


def table(name: str) -> Table:
    """A table by its id, such as "selfextend/table-2".

    Raises:
        ValueError: there is no such table.
    """
    return named("table", name, tables())


def figure(name: str) -> Figure:
    """A figure by its id, such as "selfextend/figure-3".

    Raises:
        ValueError: there is no such figure.
    """
    return named("figure", name, figures())


def _rows(file: str) -> dict[str, tuple[str, ...] | tuple[Row, ...]]:
    reader = csv.DictReader(_FOLDER.joinpath(file).read_text(encoding="utf-8").splitlines(), strict=True)
    about = {"label", "model", "method", "length", "sources"}
    columns = tuple(name for name in reader.fieldnames or () if name not in {*about, _MEAN})
    rows = tuple(
        Row(
            **{name: line[name] for name in about - {"sources"}},
            sources=tuple(line["sources"].split()),
            cells={column: line[column] for column in columns if line[column]},
            mean=line.get(_MEAN) or None,
        )
        for line in reader
    )
    return {"columns": columns, "rows": rows}
