# SPDX-License-Identifier: Apache-2.0
"""The scores of a task: of some rows, in comparison with the unmodified model, and as they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ropewalk.eval.report.estimates import Estimate, average, difference, estimate, pooled
from ropewalk.eval.report.series import Series
from ropewalk.eval.results import Row
from ropewalk.eval.tasks import Metric, about, metrics_of

# Parts of cells that are known by name.
LENGTH, TASK = "length", "task"
_K = 1024

Value = int | float | str
# Values of parts of a cell, which rows are chosen by; without any, all rows are.
Selection = Mapping[str, Value]


@dataclass(frozen=True)
class Part:
    """What of the rows is looked at.

    Attributes:
        head: what to call it.
        cells: one, or several of which the mean is taken.
        group: of parts that belong together, beside each other in a table; "" for none.
    """

    head: str
    cells: tuple[Selection, ...] = ({},)
    group: str = ""

    @property
    def is_summary(self) -> bool:
        """Whether it is over all the others of a table."""
        return len(self.cells) > 1 or not any(self.cells)


ALL = Part("all")


def average_of(cells: Iterable[Selection]) -> Part:
    """The mean over cells, such as tasks, each of which counts the same."""
    return Part("average", tuple(cells))


# What the paper's rules say of a method on texts of a length: no position is past half the trained window (eq. 5);
# some is past the trained window (eq. 4); neither; or there is no rule to ask.
Verdict = Literal["recommended", "beyond", "within", "unknown"]


@dataclass(frozen=True)
class Seen:
    """What is known of a method on a part of its rows.

    Attributes:
        failed: examples that have no score.
    """

    its: Estimate | None
    failed: int = 0
    verdict: Verdict = "unknown"


@dataclass(frozen=True, kw_only=True)
class Score(Metric):
    """A score as it is shown.

    Attributes:
        name: in rows.
        is_share: all there is lies from 0 to 1.
        is_proportion: all there is is 0 or 1.
        percent: whether it is written as such.
    """

    name: str
    is_share: bool = False
    is_proportion: bool = False
    percent: bool = False

    @property
    def same(self) -> float:
        """What `difference` is where there is none."""
        return 0.0 if self.pooled is None else 1.0

    def of(self, one: Series, part: Part = ALL) -> Estimate | None:
        """Of several cells their mean, if there is something in each."""
        return _mean([self._in_cell(one, cell) for cell in part.cells])

    def difference(self, one: Series, other: Series, part: Part = ALL) -> Estimate | None:
        """By how much `one` is above `other`, from the examples that both were asked; of a pooled score the ratio."""
        return _mean([self._pairs_in_cell(one, other, cell) for cell in part.cells])

    def seen(self, one: Series, part: Part, verdict: Verdict = "unknown") -> Seen:
        """With what failed."""
        failed = sum(any(cell.items() <= row.cell.items() for cell in part.cells) for row in one.failed)
        return Seen(self.of(one, part), failed, verdict)

    def write(self, value: float, sign: bool = False) -> str:
        """Two decimals; three figures of what is very small or large, as a share is not."""
        if self.percent:
            return f"{100 * value:{'+' if sign else ''}.1f}"
        few = self.is_share or value == 0 or 0.1 <= abs(value) < 1e6
        return f"{value:{'+' if sign else ''}{'.2f' if few else '.3g'}}"

    def write_difference(self, value: float) -> str:
        return self.write(value, sign=self.pooled is None)

    def _in_cell(self, one: Series, cell: Selection) -> Estimate | None:
        rows = self._rows(one, cell)
        if not rows:
            return None
        columns = list(zip(*map(self._values, rows.values()), strict=True))
        clusters = [row.cluster for row in rows.values()]
        if self.pooled is None:
            return self._within(estimate(columns[0], self._is_proportion(columns[0]), clusters))
        sums, weights = columns
        return pooled(sums, weights, clusters)

    def _pairs_in_cell(self, one: Series, other: Series, cell: Selection) -> Estimate | None:
        mine, theirs = self._rows(one, cell), self._rows(other, cell)
        return self.of_pairs([(row, theirs[example]) for example, row in mine.items() if example in theirs])

    def of_pairs(self, pairs: Sequence[tuple[Row, Row]]) -> Estimate | None:
        """By how much the first of each two rows, which have the score, is above the second; or the ratio."""
        mine = [self._values(row) for row, _ in pairs]
        theirs = [self._values(row) for _, row in pairs]
        clusters = [row.cluster for row, _ in pairs]
        if self.pooled is None:
            firsts = [my for my, *_ in mine], [their for their, *_ in theirs]
            return difference(*firsts, self._is_proportion([*firsts[0], *firsts[1]]), clusters)
        apart = [my[0] - their[0] for my, their in zip(mine, theirs, strict=True)]
        return pooled(apart, [their[1] for their in theirs], clusters)

    def _is_proportion(self, values: Sequence[float]) -> bool:
        return self.is_share and all(value in (0.0, 1.0) for value in values)

    def _within(self, its: Estimate | None) -> Estimate | None:
        """A share is none below 0 or above 1."""
        if its is None or its.interval is None or not self.is_share:
            return its
        low, high = its.interval
        return replace(its, interval=(max(low, 0.0), min(high, 1.0)))

    def _values(self, row: Row) -> list[float]:
        """One, or of a pooled score the two that it is of."""
        return [row.scores[name] for name in self.pooled or (self.name,)]

    def _rows(self, one: Series, cell: Selection) -> dict[str, Row]:
        """Those that have the score, by the name of the example."""
        names = self.pooled or (self.name,)
        return {row.example: row for row in one.done_in(cell) if all(name in row.scores for name in names)}


def scores_of(task: str, series: Sequence[Series]) -> list[Score]:
    """Those to show: the ones that the task names, with its words; of a task that is not known, all there are."""
    rows = [row for one in series for row in one.done]
    known = metrics_of(task)
    found = dict.fromkeys(name for row in rows for name in row.scores)
    # What a task does not name is what its scores are computed of.
    names = [name for name in known if name in found] or ([] if known else list(found))
    return [_score(task, name, known.get(name), [row.scores[name] for row in rows if name in row.scores])
            for name in names]  # fmt: skip


def _score(task: str, name: str, metric: Metric | None, values: Sequence[float]) -> Score:
    is_share = all(0 <= value <= 1 for value in values) and (metric is None or metric.pooled is None)
    return Score(
        **(vars(metric) if metric else {"title": _in_words(name), "higher_is_better": None}),
        name=name,
        is_share=is_share,
        is_proportion=is_share and all(value in (0.0, 1.0) for value in values),
        percent=is_share and about(task).percent,
    )


def _mean(estimates: Sequence[Estimate | None]) -> Estimate | None:
    there = [one for one in estimates if one is not None]
    if len(there) < len(estimates):
        return None
    return there[0] if len(there) == 1 else average(there)


def values_of(key: str, series: Sequence[Series]) -> list[Value]:
    """All values of a part of the cells, numbers first and in order."""
    found = {row.cell[key] for one in series for row in one.rows if key in row.cell}
    return sorted(found, key=lambda value: (0, value, "") if isinstance(value, int | float) else (1, 0, value))


def numbers_of(key: str, series: Sequence[Series]) -> list[int | float]:
    return [value for value in values_of(key, series) if isinstance(value, int | float)]


def keys_of(series: Sequence[Series]) -> list[str]:
    """The parts of the cells, as the rows have them."""
    return list(dict.fromkeys(key for one in series for row in one.rows for key in row.cell))


def tokens(value: Value) -> str:
    """A length in few characters: 16k is 16384."""
    if isinstance(value, int) and value >= _K and value % _K == 0:
        return f"{value // _K}k"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _in_words(name: str) -> str:
    """A score that only its name is known of; lm-eval's say behind a comma how an answer was taken from a text."""
    score, _, taken_by = name.replace("_", " ").partition(",")
    return f"{score} ({taken_by})" if taken_by else score
