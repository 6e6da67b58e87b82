# SPDX-License-Identifier: Apache-2.0
"""The paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.eval import papers, results
from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.score_tables import cell_of, difference_tables, noise_of
from ropewalk.eval.report.scores import ALL, Part, Score, scores_of, tokens, values_of
from ropewalk.eval.report.series import Series, baseline, plain, shown, together
from ropewalk.eval.report.tables import Cell, Table
from ropewalk.eval.reproduce import Experiment, Run
from ropewalk.eval.tasks import about

_NOTE = (
    "Ours with its 95% confidence interval and n, the number of examples; the paper gives no intervals. A figure of "
    "the paper that lies outside of ours differs by more than chance."
)


def comparison(
    name: str,
    one: Experiment,
    done: Sequence[tuple[Run, results.Run]],
    departures: Sequence[str] = (),
) -> list[Table]:
    """A line for each column of the paper's table, and for each method of each run ours, with the paper's before it
    where it has some; and by how much each method is above the unmodified model, of the examples that both were asked.

    Args:
        departures: what was run otherwise than in the paper, or is not known of it.
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
    note = " ".join([_NOTE, *(f"Not the paper's, or not known of it: {each}." for each in departures)])
    made = []
    for score in scores:
        its_parts = [
            part for part in parts if (one.scores.get(_value(one, part), one.score) or scores[0].name) == score.name
        ]
        if its_parts:
            title = f"{name}: {score.title}"
            made += [
                _beside(title, one, score, series, its_parts, pairs, note),
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
    note: str,
) -> Table:
    words = about(one.task)
    printed = {row.label: row.cells for row in papers.table(one.table).rows} if one.table else {}
    noise = {its.label: noise_of(score, its, other, parts) for its, other in pairs}
    columns, cells = [one.by], [[Cell(part.head)] for part in parts]
    for run, its in series:
        row = run.rows.get(its.method, "")
        if row:
            columns.append(f"paper: {row}")
        columns.append(its.label)
        for line, part, mark in zip(cells, parts, noise.get(its.label, [""] * len(parts)), strict=True):
            if row:
                line.append(Cell(printed[row].get(_value(one, part), "-")))
            line.append(cell_of(score.of(its, part), score.write, mark, words))
    return Table(title, tuple(columns), tuple(map(tuple, cells)), note)


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
