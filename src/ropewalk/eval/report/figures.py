"""The figures of a task, from its rows alone: what of them varies says which there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.about import About
from ropewalk.eval.report.curves import BARS, MOST_LINES, Curves, Line, curves, points
from ropewalk.eval.report.drawing import Figure, Picture
from ropewalk.eval.report.heat_maps import HeatMap, colors_of, heat_map, scale, square
from ropewalk.eval.report.runs import Series, plain
from ropewalk.eval.report.scores import LENGTH, Part, Score, Value, keys_of, numbers_of, scores_of, tokens
from ropewalk.eval.report.sweep_figures import sweep_figure
from ropewalk.eval.report.sweeps import Sweep, sweeps_of

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
    varying = [key for key in keys_of(series) if len(numbers_of(key, series)) > 1]
    over = tuple(varying[:2])
    if not over:
        return None
    if len(over) == 2:
        pictures = list(_maps_by_cells(task, score, series, *over))
        general = (
            f"One picture for each method: the {score.title} by {over[0]} and {over[1]}, the darker the better, and "
            "the number of examples."
        )
    else:
        pictures = list(_curves_by_cells(task, score, series, *over))
        general = f"One line for each method: the {score.title} by {over[0]}."
    caption = [words.reading if words.reading and words.over == over else general]
    if len(over) == 1:
        caption.append(BARS)
    if over[0] == LENGTH and _windows(series, numbers_of(LENGTH, series)):
        caption.append(_DASHED)
    return Figure(f"By {' and '.join(over)}", " ".join(caption), tuple(pictures))


def _maps_by_cells(task: str, score: Score, series: Sequence[Series], x: str, y: str) -> Iterator[Picture]:
    across, down = numbers_of(x, series), numbers_of(y, series)
    parts = {(column, line): Part("", ({x: at, y: depth},))
             for column, at in enumerate(across) for line, depth in enumerate(down)}  # fmt: skip
    colors = colors_of(score, [score.of(one, part) for one in series for part in parts.values()])
    for number, one in enumerate(series, start=1):
        whole = score.of(one)
        mean = f"{score.title} {score.write(whole.mean)} over {whole.count} texts" if whole else "no text was done"
        drawn = HeatMap(
            name=f"{task}-{number}",
            title=one.label,
            subtitle=mean,
            alt=f"Heat map of {score.title} by {x} and {y} for {one.label}: {mean}",
            x_title=_AXES.get(x, x),
            x_labels=[_label(x, value) for value in across],
            y_title=_AXES.get(y, y),
            y_labels=[_label(y, value) for value in down],
            squares={place: square(score, one, part) for place, part in parts.items()},
            wall=_wall(one, across) if x == LENGTH else None,
        )
        yield heat_map(drawn, colors)
    yield scale(f"{task}-colors", colors)


def _wall(one: Series, lengths: Sequence[float]) -> tuple[int, str] | None:
    """Between the lengths that the model was trained on and the others, if there are others."""
    for window, what in _windows([one], lengths):
        return sum(length <= window for length in lengths), what
    return None


def _curves_by_cells(task: str, score: Score, series: Sequence[Series], x: str) -> Iterator[Picture]:
    across = numbers_of(x, series)
    groups = _few_lines(series)
    for number, group in enumerate(groups, start=1):
        parts = [(value, Part("", ({x: value},))) for value in across]
        lines = [Line(one.label, points((at, score.of(one, part)) for at, part in parts), color)
                 for one, color in _colored(group)]  # fmt: skip
        yield curves(
            Curves(
                name=f"{task}-{number}" if len(groups) > 1 else task,
                alt=f"{score.title} by {x}, a line for each of {len(group)} methods",
                lines=lines,
                score=score,
                x_title=_AXES.get(x, x),
                ticks=across,
                tick_label=lambda value: _label(x, value),
                is_log=min(across) > 0,
                walls=_windows(group, across) if x == LENGTH else (),
            )
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
    scores = {begin: replace(score, pooled=(f"{name}_{begin}", f"{weight}_{begin}")) for begin in begins}
    part = Part("", (cell,))
    pictures = []
    groups = _few_lines(series)
    for number, group in enumerate(groups, start=1):
        lines = [Line(one.label, points((begin, its.of(one, part)) for begin, its in scores.items()), color)
                 for one, color in _colored(group)]  # fmt: skip
        pictures.append(curves(Curves(
            name=f"{task}-positions-{number}" if len(groups) > 1 else f"{task}-positions",
            alt=f"{score.title} by position in the text, a line for each of {len(group)} methods",
            lines=lines,
            score=score,
            x_title="position in the text (tokens)",
            ticks=_round_positions(begins[-1]),
            tick_label=tokens,
            is_log=False,
            band=True,
            walls=_windows(group, begins),
        )))  # fmt: skip
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
