"""The tables of a report, as plain data: scores, failures, and how the results were made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ropewalk.eval.report.estimates import Estimate, estimate, pooled
from ropewalk.eval.report.runs import Run, Series, asked_for, baseline, plain
from ropewalk.eval.tasks import TASKS, Metric

NOISE = "≈"
_MESSAGES = 10
_K = 1024

Value = int | float | str


@dataclass(frozen=True)
class Cell:
    """A cell: what it says, smaller what belongs to that, and a mark."""

    text: str
    detail: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def metrics_of(task: str, series: Sequence[Series]) -> dict[str, Metric | None]:
    """The scores to show: those that the task names, with its words; of a task that is not known, all there are."""
    names = dict.fromkeys(name for one in series for row in one.rows for name in row.scores)
    known: Mapping[str, Metric] = TASKS[task].metrics if task in TASKS else {}
    # What a task does not name is what its metrics are computed of.
    return {name: known.get(name) for name in names if name in known or not known}


def title_of(name: str, metric: Metric | None) -> str:
    return metric.title if metric else name.replace("_", " ")


def is_proportion(metric: str, series: Sequence[Series]) -> bool:
    """Whether all there is of a score is 0 or 1."""
    return all(value in (0.0, 1.0) for one in series for value in one.scores(metric))


def values_of(key: str, series: Sequence[Series]) -> list[Value]:
    """All values of a part of the cells, numbers first and in order."""
    found = {row.cell[key] for one in series for row in one.rows if key in row.cell}
    return sorted(found, key=lambda value: (0, value, "") if isinstance(value, int | float) else (1, 0, value))


def tokens(value: Value) -> str:
    """A length in few characters: 16k is 16384."""
    if isinstance(value, int) and value >= _K and value % _K == 0:
        return f"{value // _K}k"
    return f"{value:,}" if isinstance(value, int) else str(value)


def score_tables(task: str, series: Sequence[Series], by: Sequence[str] | None) -> Iterator[Table]:
    """A table of each score by each part of the cells that varies; by none if there is no such part."""
    keys = list(dict.fromkeys(key for one in series for row in one.rows for key in row.cell))
    varying = [key for key in keys if len(values_of(key, series)) > 1 and (by is None or key in by)]
    for name, metric in metrics_of(task, series).items():
        by_part: list[str | None] = [*varying] or [None]
        for key in by_part:
            yield _scores(name, metric, key, series)


def _scores(name: str, metric: Metric | None, key: str | None, series: Sequence[Series]) -> Table:
    values = [] if key is None else values_of(key, series)
    proportion = is_proportion(name, series)
    rows = []
    for one in series:
        other = baseline(one, series)
        cells = [Cell(one.label)]
        for cell in [*({key: value} for value in values if key is not None), {}]:
            mine = estimate_of(name, metric, one, cell)
            theirs = estimate_of(name, metric, other, cell) if other else None
            cells.append(_cell(mine, theirs, proportion))
        rows.append(tuple(cells))
    heads = [tokens(value) if key == "length" else plain(value) for value in values]
    return Table(
        caption=f"{_first_upper(title_of(name, metric))}{f' by {key}' if key else ''}",
        columns=("method", *heads, "all"),
        rows=tuple(rows),
        note=_note(metric, proportion, compared=any(cell.mark for row in rows for cell in row)),
    )


def estimate_of(name: str, metric: Metric | None, one: Series, cell: Mapping[str, Value]) -> Estimate | None:
    """A score of a method in a cell; in none, over all."""
    if metric is not None and metric.pooled is not None:
        sums, weights = (one.scores(part, cell) for part in metric.pooled)
        return pooled(sums, weights)
    return estimate(one.scores(name, cell), is_proportion(name, [one]))


def _cell(mine: Estimate | None, theirs: Estimate | None, proportion: bool) -> Cell:
    if mine is None:
        return Cell("-")
    ends = [figure(end, proportion) for end in mine.interval or ()]
    between = f"{' to '.join(ends)}, " if ends else ""
    is_noise = theirs is not None and mine.overlaps(theirs)
    return Cell(figure(mine.mean, proportion), f"{between}n={mine.count}", NOISE if is_noise else "")


def figure(value: float, proportion: bool) -> str:
    """Two decimals; three figures of what is no proportion and very small or large."""
    return f"{value:.2f}" if proportion or value == 0 or 0.1 <= abs(value) < 1e6 else f"{value:.3g}"


def _note(metric: Metric | None, proportion: bool, compared: bool) -> str:
    way = "" if metric is None else "; more is better" if metric.higher_is_better else "; less is better"
    kind = "Wilson's score interval" if proportion else "from Student's t"
    mean = "Mean"
    if metric is not None and metric.pooled is not None:
        mean, kind = f"Over all {metric.pooled[1]} of the examples together", "from the spread over examples"
    note = f"{mean}, 95% confidence interval ({kind}), and n, the number of examples{way}."
    if compared:
        note += (
            f" {NOISE} marks what may be no more than chance: the interval overlaps that of the unmodified model in "
            "the same column. Compared example by example, a difference may still be real."
        )
    return note


def failure_table(series: Sequence[Series]) -> Table | None:
    """The most frequent messages; those that differ in numbers alone are counted together."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for one in series:
        for row in one.failed:
            kind = one.label, re.sub(r"\d+(\.\d+)?", "#", row.error or "")
            counts[kind] += 1
            first.setdefault(kind, row.error or "")
    if not counts:
        return None
    failed = {one.label: f"{len(one.failed)} of {len(one.rows)}" for one in series}
    kept = counts.most_common(_MESSAGES)
    rows = [(Cell(kind[0]), Cell(failed[kind[0]]), Cell(str(count)), Cell(first[kind])) for kind, count in kept]
    rest = sum(counts.values()) - sum(count for _, count in kept)
    note = "Messages that differ in numbers alone are counted together, under the first of them."
    if rest:
        note += f" {rest} more examples failed with rarer messages."
    return Table("Failed examples", ("method", "failed in all", "with this message", "message"), tuple(rows), note)


def made_table(run: Run) -> Table:
    """How a run was made. What changed on the way has all its values, each with its rows."""
    config, facts = run.config, [row.facts for row in run.rows]
    versions = [", ".join(f"{name} {version}" for name, version in sorted(one.versions.items())) for one in facts]
    counts = [
        f"{method}: {sum(row.method == method for row in run.rows)} of {asked_for(run)}{_failed(run, method)}"
        for method in dict.fromkeys([*config.methods, *run.methods])
    ]
    pairs = [
        ("model", config.model),
        ("hash of the weights", config.model_hash or "none"),
        ("device", _all([one.device for one in facts])),
        ("dtype", _all([one.dtype for one in facts])),
        ("versions", _all(versions)),
        ("commit", _all([one.commit or "none" for one in facts])),
        ("seed", str(config.seed)),
        ("task", f"{config.task}, version {config.version}"),
        *((f"setting: {name}", plain(value)) for name, value in config.settings.items()),
        *(("rows", count) for count in counts),
        ("time in all", _duration(sum(row.seconds for row in run.rows))),
    ]
    return Table(run.folder, ("what", "value"), tuple((Cell(name), Cell(value)) for name, value in pairs))


def _all(values: Sequence[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return values[0] or "none"
    return "; ".join(f"{value or 'none'} ({_plural(count, 'row')})" for value, count in counts.most_common())


def _failed(run: Run, method: str) -> str:
    failed = sum(row.method == method and row.error is not None for row in run.rows)
    return f", {failed} of them failed" if failed else ""


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
