# SPDX-License-Identifier: Apache-2.0
"""The figures of a task, from its rows alone: what of them varies says which there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.curves import BARS, MOST_LINES, Line, curves
from ropewalk.eval.report.drawing import POSITION, Figure, Picture
from ropewalk.eval.report.heat_maps import HeatMap, heat_maps
from ropewalk.eval.report.scores import LENGTH, Part, Score, keys_of, numbers_of, scores_of, tokens
from ropewalk.eval.report.series import Series
from ropewalk.eval.report.sweeps import Sweep, sweep_figure, sweeps_of
from ropewalk.eval.tasks import About

_DASHED = "The dashed vertical line is the length that the model was trained on."


def figures_of(task: str, series: Sequence[Series], words: About) -> list[Figure]:
    """Those of a task's first score, the one that it names first; none if the rows have nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    scores = scores_of(task, series)
    if not scores:
        return []
    sweeps = sweeps_of(series)
    found = [sweep_figure(f"{task}-sweep-{number}", scores[0], sweep, series)
             for number, sweep in enumerate(sweeps, start=1)]  # fmt: skip
    left = _without_large(sweeps, series)
    found += [_by_cells(task, scores[0], left, words), _by_position(task, scores[0], left)]
    return [figure for figure in found if figure is not None]


def _without_large(sweeps: Sequence[Sweep], series: Sequence[Series]) -> list[Series]:
    """Methods but those of sweeps that have more than one picture can tell apart: a sweep's own figure shows them."""
    shown = [one for sweep in sweeps if len(sweep.settings) > MOST_LINES for one in sweep.settings]
    left = [one for one in series if one not in shown]
    return [] if shown and all(one.method == UNMODIFIED for one in left) else left


def _by_cells(task: str, score: Score, series: Sequence[Series], words: About) -> Figure | None:
    """Heat maps over the first two numbers of the cells that vary, or curves over the only one."""
    over = tuple([key for key in keys_of(series) if len(numbers_of(key, series)) > 1][:2])
    if not over:
        return None
    x, across = over[0], numbers_of(over[0], series)
    if len(over) == 2:
        maps = [_map_by_cells(score, one, *over, across, numbers_of(over[1], series)) for one in series]
        pictures = heat_maps(task, maps, score, *over)
        general = (
            f"One picture for each method: the {score.title} by {over[0]} and {over[1]}, the darker the better, and "
            "the number of examples."
        )
    else:
        parts = [(at, score, Part("", ({x: at},))) for at in across]
        walls = across if x == LENGTH else ()
        pictures = _a_line_each(task, f"{score.title} by {x}", score, series, parts, walls, x=x, ticks=across)
        general = f"One line for each method: the {score.title} by {x}."
    caption = [words.reading if words.reading and words.over == over else general]
    if len(over) == 1:
        caption.append(BARS)
    if x == LENGTH and _windows(series, across):
        caption.append(_DASHED)
    return Figure(f"By {' and '.join(over)}", " ".join(caption), tuple(pictures))


def _map_by_cells(score: Score, one: Series, x: str, y: str, across: Sequence[float], down: Sequence[float]) -> HeatMap:
    whole = score.of(one)
    mean = f"{score.title} {score.write(whole.mean)} over {whole.count} texts" if whole else "no text was done"
    # Between the lengths that the model was trained on and the others, if there are others.
    walls = [(sum(length <= window for length in across), what)
             for window, what in (_windows([one], across) if x == LENGTH else ())]  # fmt: skip
    return HeatMap(
        title=one.label,
        subtitle=mean,
        alt=f"Heat map of {score.title} by {x} and {y} for {one.label}: {mean}",
        squares={(at, line): score.seen(one, Part("", ({x: at, y: line},))) for at in across for line in down},
        wall=next(iter(walls), None),
    )


def _a_line_each(
    name: str,
    alt: str,
    score: Score,
    series: Sequence[Series],
    of: Sequence[tuple[float, Score, Part]],
    walls: Sequence[float],
    **options: Any,
) -> Iterator[Picture]:
    """Curves, as many in a picture as can be told apart, with the unmodified model in each.

    Args:
        of: numbers, and what there is at each: a score of a part of the rows.
        walls: numbers among which the trained window is marked.
        options: of `curves`.
    """
    plain = [one for one in series if one.method == UNMODIFIED]
    others = [one for one in series if one.method != UNMODIFIED]
    # It is grey, but if there are several, which have colors too.
    has_one_plain = len(plain) == 1
    few = MOST_LINES if has_one_plain else max(1, MOST_LINES - len(plain))
    starts = range(0, max(len(others), 1), few)
    for number, start in enumerate(starts, start=1):
        group = [*plain, *others[start : start + few]]
        colors = [None, *range(len(group))] if has_one_plain else range(len(group))
        lines = [Line(one.label, {x: its.seen(one, part) for x, its, part in of}, color)
                 for one, color in zip(group, colors, strict=False)]  # fmt: skip
        yield curves(
            name=f"{name}-{number}" if len(starts) > 1 else name,
            alt=f"{alt}, a line for each of {len(group)} methods",
            lines=lines,
            score=score,
            walls=_windows(group, walls),
            **options,
        )


def _by_position(task: str, score: Score, series: Sequence[Series]) -> Figure | None:
    """A pooled score whose sums rows have for each part of the text too, as NAME_BEGIN; of the longest texts."""
    if score.pooled is None:
        return None
    lengths = numbers_of(LENGTH, series)
    cell = {LENGTH: lengths[-1]} if lengths else {}
    names = {name for one in series for row in one.done_in(cell) for name in row.scores}
    begins = sorted(int(name.rpartition("_")[2]) for name in names if re.fullmatch(rf"{score.pooled[0]}_\d+", name))
    if len(begins) < 2:
        return None
    name, weight = score.pooled
    parts = [(begin, replace(score, pooled=(f"{name}_{begin}", f"{weight}_{begin}")), Part("", (cell,)))
             for begin in begins]  # fmt: skip
    pictures = _a_line_each(
        f"{task}-positions", f"{score.title} by position in the text", score, series, parts, walls=begins,
        x=POSITION, ticks=_round_positions(begins[-1]), band=True,
    )  # fmt: skip
    caption = (
        f"How well the tokens at a position are predicted, with all before them read: to the right the {score.title} "
        "further on in the text. A line that rises past the trained window tells that the method does not read so far. "
        "Where a line has a band, it says how far the value may be off by chance, with 95% confidence, for want of "
        "more texts."
    )
    return Figure("By position", caption, tuple(pictures))


def _round_positions(last: int) -> list[int]:
    """At most nine of them, a power of two apart."""
    step = 1
    while last > 8 * step:
        step *= 2
    return list(range(0, last + 1, step))


def _windows(series: Sequence[Series], positions: Sequence[float]) -> list[tuple[float, str]]:
    """The trained windows that lie among the positions, each once."""
    windows = dict.fromkeys(one.run.config.trained_window for one in series)
    return [(window, f"trained window, {tokens(window)}") for window in windows
            if window is not None and positions and min(positions) <= window < max(positions)]  # fmt: skip
