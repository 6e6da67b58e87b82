"""Tables of the scores: methods by a part of the cells, as the papers lay them out, and methods in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ropewalk.eval.report.about import About
from ropewalk.eval.report.estimates import Estimate
from ropewalk.eval.report.runs import Series, baseline, plain
from ropewalk.eval.report.scores import (
    ALL,
    LENGTH,
    TASK,
    Part,
    Score,
    Selection,
    average_of,
    keys_of,
    scores_of,
    tokens,
    values_of,
)
from ropewalk.eval.report.tables import Cell, Table

NOISE = "≈"
# With their intervals they fit the width of a page.
_MOST_COLUMNS = 7


@dataclass(frozen=True)
class _Column:
    """What a column shows, and the group of columns that it belongs to; "" for none."""

    part: Part
    group: str = ""

    @property
    def is_summary(self) -> bool:
        """Whether it is over all the others."""
        return self.part == ALL or len(self.part.cells) > 1


def score_tables(task: str, series: Sequence[Series], words: About) -> Iterator[Table]:
    """Tables of each score by each part of the cells that varies, or by none; and of the differences by the first.

    A wide table is several, each with some of its columns.
    """
    varying = [key for key in keys_of(series) if len(values_of(key, series)) > 1]
    keys: list[str | None] = [key for key in varying if words.by is None or key in words.by]
    for score in scores_of(task, series):
        for number, key in enumerate(keys or [None]):
            columns = _columns(score, key, series, words)
            caption = f"{score.title[:1].upper()}{score.title[1:]}{f' by {key}' if key else ''}"
            yield from _table(caption, columns, _score_rows(score, series, columns), _score_note(score, columns))
            rows = _difference_rows(score, series, columns)
            if rows and number == 0:
                caption += f": {'ratio' if score.pooled else 'difference'} to the unmodified model"
                yield from _table(caption, columns, rows, _difference_note(score))


def _columns(score: Score, key: str | None, series: Sequence[Series], words: About) -> list[_Column]:
    if key is None:
        return [_Column(ALL)]
    values = values_of(key, series)
    group_of = {value: group for group, its in words.groups.items() for value in its}
    if key == TASK:
        order = list(group_of)
        values = [value for value in values if any(score.of(one, Part("", ({key: value},))) for one in series)]
        values.sort(key=lambda value: order.index(str(value)) if value in group_of else len(order))
    cells: list[Selection] = [{key: value} for value in values]
    heads = [tokens(value) if key == LENGTH else plain(value) for value in values]
    groups = [group_of.get(str(value), "") for value in values]
    columns = [_Column(Part(head, (cell,)), group) for head, cell, group in zip(heads, cells, groups, strict=True)]
    if key == TASK:
        return [*columns, _Column(average_of(cells))] if len(cells) > 1 else columns
    # The same text read at several lengths is not several texts.
    return columns if score.pooled else [*columns, _Column(ALL)]


def _score_rows(score: Score, series: Sequence[Series], columns: Sequence[_Column]) -> list[list[Cell]]:
    rows = []
    for one in series:
        other, cells = baseline(one, series), [Cell(one.label)]
        for column in columns:
            apart = score.difference(one, other, column.part) if other else None
            cells.append(_cell(score.of(one, column.part), score.write, apart is not None and apart.holds(score.same)))
        rows.append(cells)
    return rows


def _difference_rows(score: Score, series: Sequence[Series], columns: Sequence[_Column]) -> list[list[Cell]]:
    """Of the methods that can be compared with the unmodified model."""
    rows = []
    for one in series:
        if (other := baseline(one, series)) is not None:
            apart = [score.difference(one, other, column.part) for column in columns]
            cells = [_cell(its, score.write_difference, its is not None and its.holds(score.same)) for its in apart]
            rows.append([Cell(one.label), *cells])
    return rows


def _cell(its: Estimate | None, write: Callable[[float], str], is_noise: bool) -> Cell:
    if its is None:
        return Cell("-")
    interval = [" to ".join(write(end) for end in its.interval)] if its.interval else []
    return Cell(write(its.mean), (*interval, f"n={its.count}"), NOISE if is_noise else "")


def _table(caption: str, columns: Sequence[_Column], rows: Sequence[Sequence[Cell]], note: str) -> Iterator[Table]:
    """In as many tables as its columns need; the last has the note."""
    bands = list(_bands(columns))
    first = 1
    for number, band in enumerate(bands):
        stop = first + len(band)
        groups = [(name, len(list(its))) for name, its in groupby(column.group for column in band)]
        yield Table(
            caption=caption + (", continued" if number else ""),
            columns=("method", *(column.part.head for column in band)),
            rows=tuple((row[0], *row[first:stop]) for row in rows),
            note=note if number == len(bands) - 1 else "",
            groups=tuple(groups) if any(name for name, _ in groups) else (),
            has_summary=len(columns) > 1 and band[-1].is_summary,
        )
        first = stop


def _bands(columns: Sequence[_Column]) -> Iterator[list[_Column]]:
    """As many columns as fit, side by side; groups stay whole if they can."""
    band: list[_Column] = []
    for name, its in groupby(columns, lambda column: column.group):
        group = list(its)
        for number, column in enumerate(group):
            is_torn = bool(name) and number == 0 and len(band) + len(group) > _MOST_COLUMNS
            if band and (is_torn or len(band) == _MOST_COLUMNS):
                yield band
                band = []
            band.append(column)
    yield band


def _score_note(score: Score, columns: Sequence[_Column]) -> str:
    kind = "Wilson's score interval" if score.is_proportion else "from Student's t"
    mean = "Mean, in percent" if score.percent else "Mean"
    if score.pooled is not None:
        mean, kind = f"Over all {score.pooled[1]} of the examples together", "from the spread over examples"
    way = {None: "", True: "; more is better", False: "; less is better"}[score.higher_is_better]
    note = f"{mean}; below it the 95% confidence interval ({kind}) and n, the number of examples{way}."
    if any(len(column.part.cells) > 1 for column in columns):
        note += " In the average every task counts the same, however many examples it has."
    return note


def _difference_note(score: Score) -> str:
    what, kind = "What a method adds to the unmodified model's", "Student's, of the pairs"
    if score.is_proportion:
        kind = "Newcombe's for paired proportions"
    if score.pooled is not None:
        what, kind = "How many times the unmodified model's", "from the spread over the pairs"
    return (
        f"{what}{', in percentage points' if score.percent else ''}. Every example is compared with itself under the "
        "unmodified model, so that hard and easy ones weigh the same on both sides; below, the 95% confidence interval "
        f"({kind}) and n, the number of pairs. {NOISE} marks, here and above, no difference that n examples can show: "
        f"the interval holds {score.same:g}. Where there is no difference at all, one number in twenty lacks the mark."
    )
