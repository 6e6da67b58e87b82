# SPDX-License-Identifier: Apache-2.0
"""Sweeps: methods of a run that differ only in the parameters of one map, or of another change to the model; and the
figure of each: how a score depends on the parameters (SelfExtend, figures 5, 8 and 10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ropewalk.eval.report.curves import BARS, MOST_LINES, Line, curves
from ropewalk.eval.report.drawing import Figure, Picture
from ropewalk.eval.report.heat_maps import HeatMap, heat_maps
from ropewalk.eval.report.scores import (
    LENGTH,
    TASK,
    Part,
    Score,
    Seen,
    Verdict,
    average_of,
    numbers_of,
    tokens,
    values_of,
)
from ropewalk.eval.report.series import Series, baseline
from ropewalk.maps import PositionMap
from ropewalk.maps.numbers import UNBOUNDED

# Of more tasks than this the average alone is shown.
_MOST_TASKS = 6


@dataclass(frozen=True)
class Sweep:
    """The methods of one kind of change in one run."""

    kind: str
    settings: Sequence[Series]

    @cached_property
    def varying(self) -> list[str]:
        """Parameters that have more than one value, as the change has them."""
        names = [field.name for field in fields(self.settings[0].change)]  # type: ignore[arg-type]
        return [name for name in names if len({value(one, name) for one in self.settings}) > 1]

    @cached_property
    def numeric(self) -> list[str]:
        """Those of them that are numbers."""
        return [name for name in self.varying
                if all(isinstance(value(one, name), int | float) for one in self.settings)]  # fmt: skip

    def values(self, parameter: str) -> list[Any]:
        return sorted({value(one, parameter) for one in self.settings})

    def apart_from(self, *parameters: str) -> dict[str, list[Series]]:
        """The settings that differ in nothing but these parameters, by the others that vary, in words."""
        rest = [name for name in self.varying if name not in parameters]
        found: dict[str, list[Series]] = {}
        for one in self.settings:
            found.setdefault(", ".join(f"{name}={value(one, name)!r}" for name in rest), []).append(one)
        return found


def sweeps_of(series: Sequence[Series]) -> list[Sweep]:
    """Those of each run that differ in a number, in the order in which they were asked for."""
    together: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        if one.change is not None:
            together.setdefault((one.run.folder, one.change.name), []).append(one)
    sweeps = [Sweep(kind, settings) for (_, kind), settings in together.items()]
    return [sweep for sweep in sweeps if sweep.numeric]


def value(one: Series, parameter: str) -> Any:
    """Of a parameter of a method's change."""
    return getattr(one.change, parameter)


def verdict(one: Series, length: int | None) -> Verdict:
    """What the paper's rules say of a text so long, where all is known that they ask for."""
    window = one.run.config.trained_window
    known = length is not None and 0 <= length <= UNBOUNDED
    if length is None or not known or not window or not isinstance(one.change, PositionMap):
        return "unknown"
    if one.change.meets_rule(length, window):
        return "recommended"
    return "beyond" if one.change.max_length(window) < length else "within"


@dataclass(frozen=True)
class _Facet:
    """Rows that are shown apart from others, and the tokens of their longest text; None if not known."""

    part: Part
    length: int | None

    def seen(self, score: Score, one: Series) -> Seen:
        return score.seen(one, self.part, verdict(one, self.length))


def sweep_figure(name: str, score: Score, sweep: Sweep, series: Sequence[Series]) -> Figure | None:
    """Heat maps over two parameters and curves over one, with every other one fixed; None if no two settings are so.

    Args:
        name: of the pictures' files.
        series: all of the task, for the unmodified model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    facets = _facets(score, sweep.settings)
    maps = list(_maps(name, score, sweep, facets))
    lines = list(_curves(name, score, sweep, facets, baseline(sweep.settings[0], series)))
    if not maps and not lines:
        return None
    title = f"Parameters of {sweep.kind}{sweep.settings[0].apart}"
    has_rules = any(verdict(one, 1) != "unknown" for one in sweep.settings)
    return Figure(title, _caption(sweep.kind, bool(maps), bool(lines), has_rules), (*maps, *lines))


def _facets(score: Score, series: Sequence[Series]) -> list[_Facet]:
    """Each length; or the average of several tasks and, where they are few, each of them; or all."""
    if lengths := numbers_of(LENGTH, series):
        parts = [Part(f"{tokens(length)} tokens", ({LENGTH: length},)) for length in lengths]
        return [
            _Facet(part, _longest(part, series) or int(length)) for part, length in zip(parts, lengths, strict=True)
        ]
    parts = [Part(str(task), ({TASK: task},)) for task in values_of(TASK, series)]
    parts = [part for part in parts if any(score.of(one, part) for one in series)]
    if len(parts) > 1:
        average = average_of(cell for part in parts for cell in part.cells)
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
    x, y = sweep.numeric[:2]
    maps = []
    for facet in facets:
        for fixed, settings in sweep.apart_from(x, y).items():
            # Two settings share a line, and two a column.
            if all(len({value(one, axis) for one in settings}) < len(settings) for axis in (x, y)):
                title = ", ".join(filter(None, (facet.part.head, fixed)))
                alt = f"Heat map of {score.title} by {x} and {y} of {sweep.kind}: {title}"
                squares = {(value(one, x), value(one, y)): facet.seen(score, one) for one in settings}
                maps.append(HeatMap(sweep.kind, title, alt, squares))
    yield from heat_maps(name, maps, score, x, y, "-map")


def _curves(name: str, score: Score, sweep: Sweep, facets: Sequence[_Facet], other: Series | None) -> Iterator[Picture]:
    """Over the parameter with the most values: a picture for each facet, with a line for each combination of the other
    parameters; or, where there are none, one picture with a line for each facet."""
    x = max(sweep.numeric, key=lambda name: len(sweep.values(name)))
    groups = sweep.apart_from(x)
    number = 0
    for together in [facets] if len(groups) == 1 else [[facet] for facet in facets]:
        found = [(fixed or facet.part.head, {value(one, x): facet.seen(score, one) for one in settings})
                 for facet in together for fixed, settings in groups.items()]  # fmt: skip
        lines = [line for color, its in enumerate(found) if (line := Line(*its, color)).shown]
        if not any(len(line.shown) > 1 for line in lines):
            continue
        for start in range(0, len(lines), MOST_LINES):
            chosen = lines[start : start + MOST_LINES]
            level = _unmodified(score, together, other, [at for line in chosen for at in line.shown])
            number += 1
            title = "" if len(together) > 1 else together[0].part.head
            yield curves(
                name=f"{name}-curve-{number}",
                alt=f"{score.title} by {x} of {sweep.kind}{f', {title}' if title else ''}: {len(chosen)} lines",
                lines=[*chosen, *level],
                score=score,
                x=x,
                x_title=f"{x} of {sweep.kind}",
                ticks=sweep.values(x),
                title=title,
                width=5.2,
            )


def _unmodified(score: Score, facets: Sequence[_Facet], other: Series | None, x: Sequence[float]) -> list[Line]:
    """Level, as it has no parameters; of several facets in the color of each."""
    several = len(facets) > 1
    lines = [
        Line(
            f"unmodified, {facet.part.head}" if several else "unmodified",
            dict.fromkeys((min(x), max(x)), score.seen(other, facet.part)),
            color if several else None,
            dashed=True,
        )
        for color, facet in enumerate(facets)
        if other is not None
    ]
    return [line for line in lines if line.shown]


def _caption(kind: str, has_maps: bool, has_curves: bool, has_rules: bool) -> str:
    words = []
    if has_maps:
        words.append(f"Each square is a setting of {kind}; the darker, the better.")
    if has_curves:
        words.append(f"A curve is the score over one parameter, the others fixed; dashes: the unmodified model. {BARS}")
    if has_rules:
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
