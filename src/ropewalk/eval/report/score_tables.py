# SPDX-License-Identifier: Apache-2.0
"""Tables of the scores: methods by a part of the cells, as the papers lay them out, and methods in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.estimates import Estimate, power
from ropewalk.eval.report.scores import (
    ALL,
    LENGTH,
    TASK,
    Part,
    Score,
    average_of,
    keys_of,
    scores_of,
    tokens,
    values_of,
)
from ropewalk.eval.report.series import Series, baseline, differences, plain
from ropewalk.eval.report.tables import Cell, Table
from ropewalk.eval.tasks import About

NOISE = "≈"
# With their intervals they fit the width of a page.
_MOST_COLUMNS = 7


def score_tables(task: str, series: Sequence[Series], words: About) -> Iterator[Table]:
    """Tables of each score by each part of the cells that varies, or by none; and of the differences by the first.

    A wide table is several, each with some of its columns.
    """
    varying = [key for key in keys_of(series) if len(values_of(key, series)) > 1]
    keys: list[str | None] = [key for key in varying if words.by is None or key in words.by]
    pairs = [(one, other) for one in series if (other := baseline(one, series))]
    for score in scores_of(task, series):
        for number, key in enumerate(keys or [None]):
            parts = _parts(score, key, series, words)
            means = [(one.label, [score.of(one, part) for part in parts]) for one in series]
            noise = {one.label: noise_of(score, one, other, parts) for one, other in pairs}
            caption = f"{score.title[:1].upper()}{score.title[1:]}{f' by {key}' if key else ''}"
            rows = [_row(label, its, score.write, noise.get(label), words) for label, its in means]
            yield from _table(caption, parts, rows, _score_note(score, parts, means, words))
            if number == 0:
                yield from difference_tables(caption, score, parts, pairs, UNMODIFIED, words)
                if (pair := _best(score, parts[-1], series)) is not None:
                    yield from difference_tables(caption, score, parts, *pair, words)


def difference_tables(
    caption: str, score: Score, parts: Sequence[Part], pairs: Sequence[tuple[Series, Series]], to: str, words: About
) -> Iterator[Table]:
    """By how much the first of each pair is above the second, example by example; none without pairs.

    Args:
        to: what the second ones are: `UNMODIFIED`, or the label of the best.
    """
    apart = {one.label: _apart(score, one, other, parts) for one, other in pairs}
    apart = {label: its for label, its in apart.items() if any(one is not None for one in its)}
    if not apart:
        return
    model = "the unmodified model" if to == UNMODIFIED else f"the best, {to}"
    rows = [_row(label, its, score.write_difference, _noise(score, its), words) for label, its in apart.items()]
    caption += f": {'difference' if score.pooled is None else 'ratio'} to {model}"
    note = _difference_note(score) if to == UNMODIFIED else _best_note(score, parts[-1])
    yield from _table(caption, parts, rows, note + _power_note(score, parts, apart.values()))


def _apart(score: Score, one: Series, other: Series, parts: Sequence[Part]) -> list[Estimate | None]:
    return [score.difference(one, other, part) for part in parts]


def noise_of(score: Score, one: Series, other: Series, parts: Sequence[Part]) -> list[str]:
    """`NOISE` where a method is not told from another one, for each part."""
    return _noise(score, _apart(score, one, other, parts))


def _noise(score: Score, apart: Sequence[Estimate | None]) -> list[str]:
    return [NOISE if its is not None and its.holds(score.same) else "" for its in apart]


def _best(score: Score, part: Part, series: Sequence[Series]) -> tuple[list[tuple[Series, Series]], str] | None:
    """Of several methods asked the same, the best one of a part with each of the others, and its label."""
    changed = [one for one in series if one.method != UNMODIFIED]
    found = {one.label: (its.mean, one) for one in changed if (its := score.of(one, part)) is not None}
    if len(found) < 2 or score.higher_is_better is None or any(differences(one.run, changed[0].run) for one in changed):
        return None
    choose = max if score.higher_is_better else min
    best = choose(found.values(), key=itemgetter(0))[1]
    return [(one, best) for one in changed if one is not best], best.label


def _parts(score: Score, key: str | None, series: Sequence[Series], words: About) -> list[Part]:
    """What each column shows: a value of that part of the cells; and all of them, or their average."""
    if key is None:
        return [ALL]
    values = values_of(key, series)
    group_of = {value: group for group, its in words.groups.items() for value in its}
    if key == TASK:
        order = list(group_of)
        values = [value for value in values if any(score.of(one, Part("", ({key: value},))) for one in series)]
        values.sort(key=lambda value: order.index(str(value)) if value in group_of else len(order))
    parts = [
        Part(tokens(value) if key == LENGTH else plain(value), ({key: value},), group_of.get(str(value), ""))
        for value in values
    ]
    if key == TASK:
        return [*parts, average_of(part.cells[0] for part in parts)] if len(parts) > 1 else parts
    # The same text read at several lengths is not several texts.
    return parts if score.pooled else [*parts, ALL]


def _row(
    label: str,
    estimates: Sequence[Estimate | None],
    write: Callable[[float], str],
    noise: Sequence[str] | None,
    words: About,
) -> list[Cell]:
    marks = noise or [""] * len(estimates)
    return [Cell(label), *(cell_of(its, write, mark, words) for its, mark in zip(estimates, marks, strict=True))]


def cell_of(its: Estimate | None, write: Callable[[float], str], mark: str, words: About) -> Cell:
    if its is None:
        return Cell("-")
    interval = [" to ".join(write(end) for end in its.interval)] if its.interval else []
    sampled = [f"{words.sampled or 'clusters'}={its.clusters}"] if its.clusters < its.count else []
    return Cell(write(its.mean), (*interval, f"n={its.count}", *sampled), mark)


def _table(caption: str, parts: Sequence[Part], rows: Sequence[Sequence[Cell]], note: str) -> Iterator[Table]:
    """In as many tables as its columns need; the last has the note."""
    bands = list(_bands(parts))
    first = 1
    for number, band in enumerate(bands):
        stop = first + len(band)
        groups = [(name, len(list(its))) for name, its in groupby(part.group for part in band)]
        yield Table(
            caption=caption + (", continued" if number else ""),
            columns=("method", *(part.head for part in band)),
            rows=tuple((row[0], *row[first:stop]) for row in rows),
            note=note if number == len(bands) - 1 else "",
            groups=tuple(groups) if any(name for name, _ in groups) else (),
            has_summary=len(parts) > 1 and band[-1].is_summary,
        )
        first = stop


def _bands(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """As many columns as fit, side by side; groups stay whole if they can."""
    band: list[Part] = []
    for name, its in groupby(parts, lambda part: part.group):
        group = list(its)
        for number, part in enumerate(group):
            is_torn = bool(name) and number == 0 and len(band) + len(group) > _MOST_COLUMNS
            if band and (is_torn or len(band) == _MOST_COLUMNS):
                yield band
                band = []
            band.append(part)
    yield band


def _score_note(
    score: Score, parts: Sequence[Part], means: Sequence[tuple[str, Sequence[Estimate | None]]], words: About
) -> str:
    kind = "Wilson's score interval" if score.is_proportion else "from Student's t"
    if score.is_share and not score.is_proportion:
        kind = "from Student's t, or Wilson's score interval where all is 0 or 1"
    mean = "Mean, in percent" if score.percent else "Mean"
    if score.pooled is not None:
        mean, kind = f"Over all {score.pooled[1]} of the examples together", "from the spread over examples"
    way = {None: "", True: "; more is better", False: "; less is better"}[score.higher_is_better]
    note = f"{mean}; below it the 95% confidence interval ({kind}) and n, the number of examples{way}."
    if any(one is not None and one.clusters < one.count for _, its in means for one in its):
        sampled = words.sampled or "clusters"
        note += (
            f" What was sampled are {sampled}, and examples of one go together: how far a value may be off, here and "
            f"below, is taken from the spread over {sampled}. A hundred examples in ten may tell as little as ten; "
            "where all but one or two of these are alike they are taken to."
        )
    if any(len(part.cells) > 1 for part in parts):
        note += " In the average every task counts the same, however many examples it has."
    return note


def _difference_note(score: Score) -> str:
    what, kind = "What a method adds to the unmodified model's", "Student's, of the pairs"
    if score.is_proportion:
        kind = "Newcombe's for paired proportions"
    elif score.is_share:
        kind = "Student's, of the pairs, or Newcombe's where all is 0 or 1"
    if score.pooled is not None:
        what, kind = "How many times the unmodified model's", "from the spread over the pairs"
    return (
        f"{what}{', in percentage points' if score.percent else ''}. Every example is compared with itself under the "
        "unmodified model, so that hard and easy ones weigh the same on both sides; below, the 95% confidence interval "
        f"({kind}) and n, the number of pairs. {NOISE} marks, here and above, no difference that n examples can show: "
        f"the interval holds {score.same:g}. Where there is no difference at all, one number in twenty lacks the mark."
    )


def _best_note(score: Score, part: Part) -> str:
    where = f" in the column {part.head}" if part != ALL else " over all"
    return (
        f"As above, in comparison with the method that has the best figure{where}. What makes it the best may in part "
        f"be chance, so that the others are a little nearer than it seems; {NOISE} marks those that may be as good."
    )


def _power_note(score: Score, parts: Sequence[Part], apart: Iterable[Sequence[Estimate | None]]) -> str:
    """What differences these examples can show, over all of them or, where they have no summary, in their columns."""
    is_ratio = score.pooled is not None
    sought = 1.05 if is_ratio else 0.05
    chosen = [place for place, part in enumerate(parts) if part.is_summary] or range(len(parts))
    found = [its[place] for its in apart for place in chosen]
    powers = [both for its in found if its is not None and (both := power(its, sought, is_ratio)) is not None]
    if not powers:
        return " How far apart methods must be to be told apart is not known: there are too few examples, or all alike."
    # Those of the method that is hardest to tell.
    least, enough = map(max, zip(*powers, strict=True))
    where = f"In the column {parts[chosen[0]].head}" if len(chosen) < len(parts) else "In each column"
    what, unit = "ratio" if is_ratio else "difference", " points" if score.percent else ""
    return (
        f" {where} four of five such experiments would tell a true {what} of {score.write(least)}{unit} from none, "
        f"whichever method has it; to tell {score.write(sought)}{unit}, as far as examples are spread here, would take "
        f"about {_about(enough)} of them, sampled as these were."
    )


def _about(count: float) -> str:
    """Two figures of a number of examples."""
    whole = max(1, math.ceil(count))
    return f"{round(whole, 2 - len(str(whole))):,}"
