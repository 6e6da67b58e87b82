"""The figures of a task, from its rows alone: what of them varies says which there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.about import About
from ropewalk.eval.report.curves import BARS, MOST_LINES, Line, curves, points
from ropewalk.eval.report.drawing import Figure, Picture
from ropewalk.eval.report.heat_maps import Axis, colors_of, heat_map, scale, square
from ropewalk.eval.report.runs import Series, plain
from ropewalk.eval.report.scores import LENGTH, Part, Score, Value, keys_of, numbers_of, scores_of, tokens
from ropewalk.eval.report.sweeps import Sweep, sweep_figure, sweeps_of

_DEPTH = "depth"
_AXES = {LENGTH: "length of the text (tokens)", _DEPTH: "where it is hidden", "digits": "digits of the key"}
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
    large = [sweep for sweep in sweeps if len(sweep.settings) > MOST_LINES]
    shown = {id(setting.series) for sweep in large for setting in sweep.settings}
    left = [one for one in series if id(one) not in shown]
    return [] if large and all(one.method == UNMODIFIED for one in left) else left


def _by_cells(task: str, score: Score, series: Sequence[Series], words: About) -> Figure | None:
    """Heat maps over the first two numbers of the cells that vary, or curves over the only one."""
    over = tuple([key for key in keys_of(series) if len(numbers_of(key, series)) > 1][:2])
    if not over:
        return None
    x, across = over[0], numbers_of(over[0], series)
    if len(over) == 2:
        pictures = _maps_by_cells(task, score, series, *over)
        general = (
            f"One picture for each method: the {score.title} by {over[0]} and {over[1]}, the darker the better, and "
            "the number of examples."
        )
    else:
        pictures = _a_line_each(
            task, f"{score.title} by {x}", score, series, {at: (score, Part("", ({x: at},))) for at in across},
            walls=across if x == LENGTH else (), x_title=_AXES.get(x, x), ticks=across,
            tick_label=lambda value: _label(x, value), is_log=min(across) > 0,
        )  # fmt: skip
        general = f"One line for each method: the {score.title} by {x}."
    caption = [words.reading if words.reading and words.over == over else general]
    if len(over) == 1:
        caption.append(BARS)
    if x == LENGTH and _windows(series, across):
        caption.append(_DASHED)
    return Figure(f"By {' and '.join(over)}", " ".join(caption), tuple(pictures))


def _maps_by_cells(task: str, score: Score, series: Sequence[Series], x: str, y: str) -> Iterator[Picture]:
    across, down = numbers_of(x, series), numbers_of(y, series)
    parts = {(column, line): Part("", ({x: at, y: depth},))
             for column, at in enumerate(across) for line, depth in enumerate(down)}  # fmt: skip
    colors = colors_of(score, [score.of(one, part) for one in series for part in parts.values()])
    axes = _axis(x, across), _axis(y, down)
    for number, one in enumerate(series, start=1):
        whole = score.of(one)
        mean = f"{score.title} {score.write(whole.mean)} over {whole.count} texts" if whole else "no text was done"
        alt = f"Heat map of {score.title} by {x} and {y} for {one.label}: {mean}"
        # Between the lengths that the model was trained on and the others, if there are others.
        walls = [(sum(length <= window for length in across), what)
                 for window, what in (_windows([one], across) if x == LENGTH else ())]  # fmt: skip
        squares = {place: square(score, one, part) for place, part in parts.items()}
        yield heat_map(f"{task}-{number}", one.label, mean, alt, axes, squares, colors, next(iter(walls), None))
    yield scale(f"{task}-colors", colors)


def _axis(key: str, values: Sequence[Value]) -> Axis:
    return _AXES.get(key, key), [_label(key, value) for value in values]


def _a_line_each(
    name: str,
    alt: str,
    score: Score,
    series: Sequence[Series],
    of: Mapping[float, tuple[Score, Part]],
    walls: Sequence[float],
    **options: Any,
) -> Iterator[Picture]:
    """Curves, as many in a picture as can be told apart.

    Args:
        of: what there is at each number: a score of a part of the rows.
        walls: numbers among which the trained window is marked.
        options: of `curves`.
    """
    groups = _few_lines(series)
    for number, group in enumerate(groups, start=1):
        lines = [Line(one.label, points((x, its.of(one, part)) for x, (its, part) in of.items()), color)
                 for one, color in _colored(group)]  # fmt: skip
        yield curves(
            name=f"{name}-{number}" if len(groups) > 1 else name,
            alt=f"{alt}, a line for each of {len(group)} methods",
            lines=lines,
            score=score,
            walls=_windows(group, walls),
            **options,
        )


def _few_lines(series: Sequence[Series]) -> list[list[Series]]:
    """As many as one picture shows, with the unmodified model in each."""
    plain = [one for one in series if one.method == UNMODIFIED]
    others = [one for one in series if one.method != UNMODIFIED]
    # Several unmodified ones have colors too.
    few = MOST_LINES if len(plain) == 1 else max(1, MOST_LINES - len(plain))
    return [[*plain, *others[i : i + few]] for i in range(0, max(len(others), 1), few)]


def _colored(series: Sequence[Series]) -> list[tuple[Series, int | None]]:
    """With the color of each; grey for the unmodified model, unless there are several."""
    has_one_plain = sum(one.method == UNMODIFIED for one in series) == 1
    return [
        (one, None if has_one_plain and one.method == UNMODIFIED else number - has_one_plain)
        for number, one in enumerate(series)
    ]


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
    its = {begin: replace(score, pooled=(f"{name}_{begin}", f"{weight}_{begin}")) for begin in begins}
    pictures = _a_line_each(
        f"{task}-positions", f"{score.title} by position in the text", score, series,
        {begin: (score, Part("", (cell,))) for begin, score in its.items()},
        walls=begins, x_title="position in the text (tokens)", ticks=_round_positions(begins[-1]), tick_label=tokens,
        band=True,
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


def _label(key: str, value: Value) -> str:
    if key == LENGTH:
        return tokens(value)
    if key == _DEPTH and isinstance(value, int | float):
        return "start" if value == 0 else "end" if value == 1 else f"{value:.0%}"
    return plain(value)
