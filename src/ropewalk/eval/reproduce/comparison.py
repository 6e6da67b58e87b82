# SPDX-License-Identifier: Apache-2.0
"""The paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.eval import papers, results
from ropewalk.eval.report.scores import ALL, Part, scores_of, tokens, values_of
from ropewalk.eval.report.series import plain, shown, together
from ropewalk.eval.report.tables import Cell, Table
from ropewalk.eval.reproduce import Experiment, Run

_NOTE = (
    "Ours with its 95% confidence interval and n, the number of examples; the paper gives no intervals. A figure of "
    "the paper that lies outside of ours differs by more than chance."
)


def comparison(
    name: str,
    one: Experiment,
    done: Sequence[tuple[Run, results.Run]],
    departures: Sequence[str] = (),
) -> Table:
    """A line for each column of the paper's table, and for each method of each run ours, with the paper's before it
    where it has some.

    Args:
        departures: what was run otherwise than in the paper, or is not known of it.
    """
    there = [(run, its) for run, its in done if its.rows]
    series = [(run, one) for run, its in there for one in together([shown(its)])]
    scores = scores_of(one.task, [its for _, its in series])
    score = next((each for each in scores if each.name == one.score), scores[0])
    values = values_of(one.by, [its for _, its in series]) if one.by else []
    parts = [Part(tokens(value) if one.by == "length" else plain(value), ({one.by: value},)) for value in values]
    printed = {row.label: row.cells for row in papers.table(one.table).rows} if one.table else {}
    columns, cells = [one.by], [[Cell(part.head)] for part in parts or [ALL]]
    for run, its in series:
        row = run.rows.get(its.method, "")
        if row:
            columns.append(f"paper: {row}")
        columns.append(its.label if len(there) == 1 else f"{its.label}, {run.name}")
        for line, part in zip(cells, parts or [ALL], strict=True):
            if row:
                line.append(Cell(printed[row].get(str(part.cells[0].get(one.by, "")), "-")))
            ours = score.of(its, part)
            if ours is None:
                line.append(Cell("-"))
                continue
            interval = [" to ".join(map(score.write, ours.interval))] if ours.interval else []
            line.append(Cell(score.write(ours.mean), (*interval, f"n={ours.count}")))
    note = " ".join([_NOTE, *(f"Not the paper's, or not known of it: {each}." for each in departures)])
    return Table(f"{name}: {score.title}", tuple(columns), tuple(map(tuple, cells)), note)
