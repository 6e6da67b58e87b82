# SPDX-License-Identifier: Apache-2.0
"""The paper's figures beside ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ropewalk.eval import papers, results
from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.score_tables import cell_of, difference_tables, noise_of
from ropewalk.eval.report.scores import ALL, Part, Score, scores_of, tokens, values_of
from ropewalk.eval.report.series import Series, asked_for, baseline, plain, shown, together
from ropewalk.eval.report.tables import Cell, Table
from ropewalk.eval.reproduce import Experiment, Run
from ropewalk.eval.tasks import about

_OURS = "Ours with its 95% confidence interval and n, the number of examples."
_THEIRS = "The paper gives no intervals. A figure of the paper that lies outside of ours differs by more than chance."
_NONE = "No figure of the paper stands beside: it did not run this model, or its rows could not be read."
# Methods that stand beside each other, however few lines they have.
_FEW = 3
_KINDS = {"authors": "its authors' repository", "quoted": "the table of others", "thread": "a thread"}


def comparison(
    name: str,
    one: Experiment,
    done: Sequence[tuple[Run, results.Run]],
    changed: Sequence[str] = (),
) -> list[Table]:
    """A line for each column of the paper's table, and for each method of each run ours, with the paper's before it
    where it has some, or a line for each of many methods where it has none; and by how much each method is above the
    unmodified model, of the examples that both were asked.

    Captions say where only a part of the examples was asked, and notes of which method how many; and which figures of
    the paper are contradicted.

    Args:
        changed: settings that are not the paper's.
    """
    there = [(run, its) for run, its in done if its.rows]
    # Of several runs each method with its run, as their settings differ.
    series = [(run, Series(_label(each, run, len(there)), each.method, each.run))
              for run, its in there for each in together([shown(its)])]  # fmt: skip
    ours = [its for _, its in series]
    scores, words = scores_of(one.task, ours), about(one.task)
    if not scores:
        return []  # every example failed
    values = values_of(one.by, ours) if one.by else []
    parts = [Part(tokens(value) if one.by == "length" else plain(value), ({one.by: value},)) for value in values]
    parts = parts or [ALL]
    pairs = [(its, other) for its in ours if (other := _other(its, ours)) is not None]
    lacks = _lacks(done)
    notes = [
        *([f"Of a part of the examples alone: {lacks}."] if lacks else []),
        *_failures(ours),
        *(["Not the paper's settings: " + "; ".join(changed) + "."] if changed else []),
        *(["Not known of the paper, and chosen here: " + "; ".join(one.unknown) + "."] if one.unknown else []),
    ]
    made = []
    for score in scores:
        its_parts = [
            part for part in parts if (one.scores.get(_value(one, part), one.score) or scores[0].name) == score.name
        ]
        if its_parts:
            title = f"{name}: {score.title}{', of a part of the examples' if lacks else ''}"
            made += [
                _beside(title, one, score, series, its_parts, pairs, notes),
                *difference_tables(title, score, its_parts, pairs, UNMODIFIED, words),
            ]
    return made


def _beside(
    title: str,
    one: Experiment,
    score: Score,
    series: Sequence[tuple[Run, Series]],
    parts: Sequence[Part],
    pairs: Sequence[tuple[Series, Series]],
    notes: Sequence[str],
) -> Table:
    words = about(one.task)
    theirs = papers.table(one.table) if one.table else None
    printed = {row.label: row for row in theirs.rows} if theirs else {}
    doubts: list[str] = []
    rows = [row for run, its in series if (row := run.row_of(its.method))]
    noise = {its.label: noise_of(score, its, other, parts) for its, other in pairs}
    columns, cells = [one.by], [[Cell(part.head)] for part in parts]
    for run, its in series:
        row = run.row_of(its.method)
        if row:
            columns.append(f"paper: {row}")
        columns.append(its.label)
        for line, part, mark in zip(cells, parts, noise.get(its.label, [""] * len(parts)), strict=True):
            if row and theirs:
                line.append(_printed(theirs, printed[row], _value(one, part), doubts))
            line.append(cell_of(score.of(its, part), score.write, mark, words))
    beside = [_THEIRS, *_seen(printed[row] for row in rows)] if rows else [_NONE]
    note = " ".join([_OURS, *beside, *notes, *doubts])
    if not rows and len(series) > max(len(parts), _FEW):  # such as a sweep
        lines = [(Cell(label), *its) for label, *its in zip(columns[1:], *(line[1:] for line in cells), strict=True)]
        return Table(title, (f"method, by {one.by}", *(part.head for part in parts)), tuple(lines), note)
    return Table(title, tuple(columns), tuple(map(tuple, cells)), note)


def _printed(table: papers.Table, row: papers.Row, column: str, doubts: list[str]) -> Cell:
    """The paper's figure; with the number of a note, which goes to `doubts`, where something is against it."""
    if column not in row.cells:
        return Cell("-")
    if (erratum := table.erratum(row.label, column)) is None:
        return Cell(row.cells[column])
    doubts.append(f"({len(doubts) + 1}) Contradicted: {column} of {row.label}. {erratum.note}")
    return Cell(row.cells[column], mark=f"({len(doubts)})")


def _seen(rows: Iterable[papers.Row]) -> Iterator[str]:
    """Where those figures of the paper were seen that nobody here has read in the paper itself."""
    known = papers.sources()
    where = dict.fromkeys(known[row.sources[0]] for row in rows)
    others = [f"{_KINDS[source.kind]}, {source.url}" for source in where if source.kind in _KINDS]
    if others:
        yield f"The paper's figures were read in {'; '.join(others)}."


def _lacks(done: Sequence[tuple[Run, results.Run]]) -> str:
    """Which methods of which runs were asked a part of their examples, and how many; empty where none was."""
    found: dict[str, list[str]] = {}
    methods = 0
    for run, its in done:
        asked, wanted = Counter(row.method for row in its.rows), asked_for(its)
        where = f", {run.name}" if len(done) > 1 else ""
        for method in its.config.methods:
            methods += 1
            if asked[method] < wanted:
                found.setdefault(f"{asked[method]:,} of {wanted:,}", []).append(method + where)
    if [len(its) for its in found.values()] == [methods]:
        return f"{next(iter(found))} of each method"
    return "; ".join(f"{part} of {each}" for part, its in found.items() for each in its)


def _failures(ours: Sequence[Series]) -> Iterator[str]:
    failed = [f"{len(its.failed):,} of {its.label}" for its in ours if its.failed]
    if failed:
        yield "Failed, and left out: " + "; ".join(failed) + "."


def _value(one: Experiment, part: Part) -> str:
    """Which of the paper's columns a part is."""
    return str(part.cells[0].get(one.by, ""))


def _label(one: Series, run: Run, runs: int) -> str:
    return one.label if runs == 1 else f"{one.label}, {run.name}"


def _other(one: Series, series: Sequence[Series]) -> Series | None:
    """What to compare with: the unmodified model of the same run or, as in the paper, the only one that was asked these
    examples in another way, such as with shorter texts."""
    plain = [other for other in series if other.method == UNMODIFIED]
    if one.method == UNMODIFIED:
        return None
    return baseline(one, series) or (plain[0] if len(plain) == 1 else None)
