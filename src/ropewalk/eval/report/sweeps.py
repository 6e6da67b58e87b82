"""Sweeps: methods of a run that differ only in the parameters of one map, or of another change to the model; and the
figure of each: how a score depends on the parameters (SelfExtend, figures 5, 8 and 10)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ropewalk.eval.methods import Change, parse
from ropewalk.eval.report.curves import BARS, MOST_LINES, Line, Mark, Point, curves, points
from ropewalk.eval.report.drawing import Figure, Picture
from ropewalk.eval.report.heat_maps import Colors, colors_of, heat_map, scale, square
from ropewalk.eval.report.runs import Series, baseline, plain
from ropewalk.eval.report.scores import LENGTH, TASK, Part, Score, average_of, numbers_of, tokens, values_of
from ropewalk.maps import PositionMap

# Of more tasks than this the average alone is shown.
_MOST_TASKS = 6


@dataclass(frozen=True)
class Setting:
    """One method of a sweep: its parameters, and its rows."""

    change: Change
    series: Series

    def value(self, parameter: str) -> Any:
        return getattr(self.change, parameter)

    @property
    def rules(self) -> tuple[PositionMap, int] | None:
        """The map and the trained window, which say what lengths eq. 4 and 5 allow; None where they do not."""
        window = self.series.run.config.trained_window
        return (self.change, window) if isinstance(self.change, PositionMap) and window else None

    def is_recommended(self, length: int | None) -> bool:
        """Whether it is known that a text so long keeps the rule of eq. 5."""
        return self.rules is not None and length is not None and self.rules[0].meets_rule(length, self.rules[1])

    def is_beyond(self, length: int | None) -> bool:
        """Whether it is known that a text so long leaves the trained window (eq. 4)."""
        return self.rules is not None and length is not None and self.rules[0].max_length(self.rules[1]) < length

    def mark(self, length: int | None) -> Mark:
        """Of the point of a text so long."""
        if length is None or self.rules is None or self.is_recommended(length):
            return "full"
        return "cross" if self.is_beyond(length) else "hollow"


@dataclass(frozen=True)
class Sweep:
    """The settings of one kind of change in one run.

    Attributes:
        varying: parameters that have more than one value, as the change has them.
        numeric: those of them that are numbers; one at least.
    """

    kind: str
    settings: tuple[Setting, ...]
    varying: tuple[str, ...]
    numeric: tuple[str, ...]

    def values(self, parameter: str) -> list[Any]:
        return sorted({one.value(parameter) for one in self.settings})

    def apart_from(self, *parameters: str) -> dict[str, list[Setting]]:
        """The settings that differ in nothing but these parameters, by the others that vary, in words."""
        rest = [name for name in self.varying if name not in parameters]
        found: dict[str, list[Setting]] = {}
        for one in self.settings:
            found.setdefault(", ".join(f"{name}={one.value(name)!r}" for name in rest), []).append(one)
        return found


def sweeps_of(series: Sequence[Series]) -> list[Sweep]:
    """Those of each run, in the order in which they were asked for."""
    together: dict[tuple[str, str], list[Setting]] = {}
    for one in series:
        change = _change_of(one.method)
        if change is not None:
            together.setdefault((one.run.folder, change.name), []).append(Setting(change, one))
    return [sweep for (_, kind), its in together.items() if (sweep := _sweep(kind, its)) is not None]


def _sweep(kind: str, settings: Sequence[Setting]) -> Sweep | None:
    names = [field.name for field in fields(settings[0].change)]
    varying = [name for name in names if len({one.value(name) for one in settings}) > 1]
    numeric = [name for name in varying if all(isinstance(one.value(name), int | float) for one in settings)]
    return Sweep(kind, tuple(settings), tuple(varying), tuple(numeric)) if numeric else None


def _change_of(method: str) -> Change | None:
    """None for the unmodified model, and for what this version does not know."""
    try:
        return parse(method, 1, 1).change
    except ValueError:
        return None


@dataclass(frozen=True)
class _Facet:
    """Rows that are shown apart from others, and the tokens of their longest text; None if not known."""

    part: Part
    length: int | None


def sweep_figure(name: str, score: Score, sweep: Sweep, series: Sequence[Series]) -> Figure | None:
    """Heat maps over two parameters and curves over one, with every other one fixed; None if no two settings are so.

    Args:
        name: of the pictures' files.
        series: all of the task, for the unmodified model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    facets = _facets(score, [one.series for one in sweep.settings])
    maps = list(_maps(name, score, sweep, facets))
    lines = list(_curves(name, score, sweep, facets, baseline(sweep.settings[0].series, series)))
    if not maps and not lines:
        return None
    return Figure(
        f"Parameters of {sweep.kind}{sweep.settings[0].series.apart}",
        _caption(sweep, bool(maps), bool(lines)),
        (*maps, *lines),
    )


def _facets(score: Score, series: Sequence[Series]) -> list[_Facet]:
    """Each length; or the average of several tasks and, where they are few, each of them; or all."""
    if lengths := numbers_of(LENGTH, series):
        parts = [Part(f"{tokens(length)} tokens", ({LENGTH: length},)) for length in lengths]
        return [
            _Facet(part, _longest(part, series) or int(length)) for part, length in zip(parts, lengths, strict=True)
        ]
    parts = [Part(str(value), ({TASK: value},)) for value in values_of(TASK, series)]
    parts = [part for part in parts if any(score.of(one, part) for one in series)]
    if len(parts) > 1:
        average = average_of([cell for part in parts for cell in part.cells])
        parts = [average, *(parts if len(parts) <= _MOST_TASKS else ())]
    else:
        parts = [Part("all examples")]
    return [_Facet(part, _longest(part, series)) for part in parts]


def _longest(part: Part, series: Sequence[Series]) -> int | None:
    """Tokens of the longest prompt, which may be a little shorter than the length that was asked for."""
    found = [row.prompt_tokens for one in series for cell in part.cells for row in one.done_in(cell)]
    return max((count for count in found if count is not None), default=None)


def _maps(name: str, score: Score, sweep: Sweep, facets: Sequence[_Facet]) -> Iterator[Picture]:
    """For each facet, and each combination of the parameters that are neither of the first two numbers."""
    if len(sweep.numeric) < 2:
        return
    colors = colors_of(score, [score.of(one.series, facet.part) for one in sweep.settings for facet in facets])
    number = 0
    for facet in facets:
        for fixed, settings in sweep.apart_from(*sweep.numeric[:2]).items():
            if _is_grid(sweep, settings):
                number += 1
                yield _map(f"{name}-map-{number}", score, sweep, settings, facet, fixed, colors)
    if number:
        yield scale(f"{name}-colors", colors)


def _is_grid(sweep: Sweep, settings: Sequence[Setting]) -> bool:
    """Whether two settings share a line, and two a column."""
    return all(len({one.value(name) for one in settings}) < len(settings) for name in sweep.numeric[:2])


def _map(
    name: str, score: Score, sweep: Sweep, settings: Sequence[Setting], facet: _Facet, fixed: str, colors: Colors
) -> Picture:
    x, y = sweep.numeric[:2]
    across, down = (sorted({one.value(parameter) for one in settings}) for parameter in (x, y))
    title = ", ".join(filter(None, (facet.part.head, fixed)))
    alt = f"Heat map of {score.title} by {x} and {y} of {sweep.kind}: {title}"
    squares = {
        (across.index(one.value(x)), down.index(one.value(y))): square(
            score, one.series, facet.part, one.is_recommended(facet.length), one.is_beyond(facet.length)
        )
        for one in settings
    }
    axes = (x, list(map(plain, across))), (y, list(map(plain, down)))
    return heat_map(name, sweep.kind, title, alt, axes, squares, colors)


def _curves(name: str, score: Score, sweep: Sweep, facets: Sequence[_Facet], other: Series | None) -> Iterator[Picture]:
    """Over the parameter with the most values: a picture for each facet, with a line for each combination of the other
    parameters; or, where there are none, one picture with a line for each facet."""
    x = max(sweep.numeric, key=lambda name: len(sweep.values(name)))
    groups = sweep.apart_from(x)
    number = 0
    for together in [facets] if len(groups) == 1 else [[facet] for facet in facets]:
        found = [(fixed or facet.part.head, _points(score, settings, x, facet))
                 for facet in together for fixed, settings in groups.items()]  # fmt: skip
        lines = [Line(label, its, color) for color, (label, its) in enumerate(found) if its]
        if not any(len(line.points) > 1 for line in lines):
            continue
        for start in range(0, len(lines), MOST_LINES):
            chosen = lines[start : start + MOST_LINES]
            plain_lines = _unmodified(score, together, other, [point.x for line in chosen for point in line.points])
            number += 1
            title = "" if len(together) > 1 else together[0].part.head
            yield curves(
                name=f"{name}-curve-{number}",
                alt=f"{score.title} by {x} of {sweep.kind}{f', {title}' if title else ''}: {len(chosen)} lines",
                lines=[*chosen, *plain_lines],
                score=score,
                x_title=f"{x} of {sweep.kind}",
                ticks=sweep.values(x),
                tick_label=plain,
                is_log=min(sweep.values(x)) > 0,
                title=title,
                width=5.2,
            )


def _points(score: Score, settings: Sequence[Setting], x: str, facet: _Facet) -> list[Point]:
    found = [replace(point, mark=one.mark(facet.length)) for one in settings
             for point in points([(one.value(x), score.of(one.series, facet.part))])]  # fmt: skip
    return sorted(found, key=lambda point: point.x)


def _unmodified(score: Score, facets: Sequence[_Facet], other: Series | None, x: Sequence[float]) -> list[Line]:
    """Level, as it has no parameters; of several facets in the color of each."""
    lines = []
    for color, facet in enumerate(facets):
        its = score.of(other, facet.part) if other is not None else None
        if its is not None and math.isfinite(its.mean):
            several = len(facets) > 1
            label = f"unmodified, {facet.part.head}" if several else "unmodified"
            level = [Point(min(x), its), Point(max(x), its)]
            lines.append(Line(label, level, color if several else None, dashed=True))
    return lines


def _caption(sweep: Sweep, has_maps: bool, has_curves: bool) -> str:
    words = []
    if has_maps:
        words.append(f"Each square is a setting of {sweep.kind}; the darker, the better.")
    if has_curves:
        words.append(f"A curve is the score over one parameter, the others fixed; dashes: the unmodified model. {BARS}")
    if any(one.rules for one in sweep.settings):
        inside, beyond = [], []
        if has_maps:
            inside, beyond = ["inside the outline"], ["hatched"]
        if has_curves:
            inside, beyond = [*inside, "full points"], [*beyond, "crosses"]
        words.append(
            "For a text of this length the SelfExtend paper recommends settings under which no position is above half "
            f"the trained window (eq. 5: {', '.join(inside)}); those under which positions leave the trained window "
            f"(eq. 4: {', '.join(beyond)}) do not reach so far. Look whether the best are the recommended."
        )
    return " ".join(words)
