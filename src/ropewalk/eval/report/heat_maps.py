# SPDX-License-Identifier: Apache-2.0
"""Heat maps: squares whose color says how good a score is, with the number in them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropewalk.eval.report.drawing import EDGE, INK, MARK, MUTED, Picture, axis_title, picture, shade, tick
from ropewalk.eval.report.estimates import Estimate
from ropewalk.eval.report.scores import Score, Seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# From here on text on a square is white.
_DARK = 0.55
# Inches: of a square; of all squares, at least, for the names of the axes; of what is around them.
_WIDE, _HIGH = 0.68, 0.4
_LEAST_WIDE, _LEAST_HIGH = 2.3, 1.9
_LEFT, _RIGHT, _BOTTOM, _LINE = 0.85, 0.12, 0.62, 0.19
_LARGE = 1e4


@dataclass(frozen=True)
class Colors:
    """Which color a score has: from pale at the worst to dark at the best, by its logarithm if it is no share."""

    score: Score
    worst: float
    best: float

    def goodness(self, value: float) -> float:
        """From 0 to 1."""
        ends = [self.worst, self.best, value]
        if not self.score.is_share and min(ends) > 0:
            ends = [math.log(end) for end in ends]
        worst, best, its = ends
        if math.isinf(its) or worst == best:
            return 0.0 if math.isinf(its) else 1.0
        return (its - worst) / (best - worst)


def colors_of(score: Score, estimates: Iterable[Estimate | None]) -> Colors:
    """From 0 to 1 for shares, else from the worst to the best that there is."""
    means = [0.0, 1.0]
    if not score.is_share:
        means = [one.mean for one in estimates if one is not None and math.isfinite(one.mean)] or [0.0]
    ends = min(means), max(means)
    return Colors(score, *(ends[::-1] if score.higher_is_better is False else ends))


@dataclass(frozen=True)
class HeatMap:
    """One of several heat maps over the same two numbers.

    Attributes:
        squares: what is known, by the numbers across and down.
        wall: a line right of so many columns, None for none; and what it is.
    """

    title: str
    subtitle: str
    alt: str
    squares: dict[tuple[float, float], Seen]
    wall: tuple[int, str] | None = None


def heat_maps(name: str, maps: Sequence[HeatMap], score: Score, x: str, y: str, number: str = "") -> Iterator[Picture]:
    """Heat maps in the same colors, and what those mean.

    Args:
        x, y: what the numbers across and down are.
        number: what the pictures' numbers follow in their names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if maps:
        colors = colors_of(score, [square.its for one in maps for square in one.squares.values()])
        for i, one in enumerate(maps, start=1):
            yield _heat_map(f"{name}{number}-{i}", one, x, y, colors)
        yield _scale(f"{name}-colors", colors)


def _heat_map(name: str, one: HeatMap, x: str, y: str, colors: Colors) -> Picture:
    across, down = (sorted({place[i] for place in one.squares}) for i in (0, 1))
    squares = {(across.index(column), down.index(line)): square for (column, line), square in one.squares.items()}
    width = _LEFT + _RIGHT + max(_WIDE * len(across), _LEAST_WIDE)
    tall = max(_HIGH * len(down), _LEAST_HIGH)
    titles = textwrap.wrap(one.title, int((width - 0.15) / 0.092))
    subtitle = one.subtitle + (f"\ndashed: {one.wall[1]}" if one.wall else "")
    low = 0.1 + _LINE * (subtitle.count("\n") + 1)
    head = low + 0.13 + _LINE * len(titles)
    height = head + tall + _BOTTOM

    def paint(canvas: Canvas) -> None:
        axes = canvas.add_axes((_LEFT / width, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / width, tall / height))
        for place, square in squares.items():
            _square(axes, *place, square, colors)
        _outline(axes, {place for place, square in squares.items() if square.verdict == "recommended"})
        if one.wall:
            axes.axvline(one.wall[0] - 0.5, color=MARK, linewidth=1.8, linestyle=(0, (4, 2)), clip_on=False)
        axes.set(
            xlim=(-0.5, len(across) - 0.5), ylim=(len(down) - 0.5, -0.5), xlabel=axis_title(x), ylabel=axis_title(y)
        )
        axes.set_xticks(range(len(across)), [tick(x, value) for value in across])
        axes.set_yticks(range(len(down)), [tick(y, value) for value in down])
        axes.tick_params(length=0)
        axes.spines[:].set_color(EDGE)
        left, top = 0.1 / width, 1 - head / height
        above: dict[str, Any] = {"va": "bottom", "linespacing": 1.25}
        canvas.text(left, top + 0.1 / height, subtitle, color=MUTED, fontsize=9, **above)
        canvas.text(left, top + low / height, "\n".join(titles), weight="bold", fontsize=10.5, **above)

    return picture(name, one.alt, width, height, paint)


def _square(axes: Axes, column: int, line: int, square: Seen, colors: Colors) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.5, line - 0.5)
    if square.its is not None:
        good = colors.goodness(square.its.mean)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=shade(good), edgecolor="white", linewidth=1.5))
        centered: dict[str, Any] = {"ha": "center", "color": "white" if good > _DARK else INK}
        axes.text(column, line + 0.06, _short(colors.score, square.its.mean), va="bottom", fontsize=9.5, **centered)
        axes.text(column, line + 0.13, f"n={square.its.count}", va="top", fontsize=6.5, alpha=0.85, **centered)
    elif square.failed:
        axes.text(column, line, f"{square.failed} failed", ha="center", va="center", fontsize=7, color=MUTED, zorder=3)
    if square.verdict == "beyond":
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor=EDGE, linewidth=0, zorder=1.5))


def _short(score: Score, value: float) -> str:
    return f"{value:.1e}" if value >= _LARGE else score.write(value)


def _outline(axes: Axes, inside: set[tuple[int, int]]) -> None:
    """Around squares that touch: each edge between one inside and one outside."""
    for column, line in inside:
        left, right, top, bottom = column - 0.46, column + 0.46, line - 0.44, line + 0.44
        # An edge runs on to the neighbor's where that is inside too.
        ends_x = [column - 0.5 if (column - 1, line) in inside else left,
                  column + 0.5 if (column + 1, line) in inside else right]  # fmt: skip
        ends_y = [line - 0.5 if (column, line - 1) in inside else top,
                  line + 0.5 if (column, line + 1) in inside else bottom]  # fmt: skip
        edges = {(-1, 0): ([left, left], ends_y), (1, 0): ([right, right], ends_y),
                 (0, -1): (ends_x, [top, top]), (0, 1): (ends_x, [bottom, bottom])}  # fmt: skip
        for (aside, below), (x, y) in edges.items():
            if (column + aside, line + below) not in inside:
                axes.plot(x, y, color=MARK, linewidth=2, solid_capstyle="projecting")


def _scale(name: str, colors: Colors) -> Picture:
    """What the colors mean."""
    width, height, steps = 3.2, 0.62, 60
    ends = [_short(colors.score, end) for end in (colors.worst, colors.best)]

    def paint(canvas: Canvas) -> None:
        from matplotlib.patches import Rectangle

        axes = canvas.add_axes((0.15 / width, 0.26 / height, 2.9 / width, 0.16 / height))
        for step in range(steps):
            # To the end, under the next: without seams.
            start, color = step / steps, shade(step / (steps - 1))
            axes.add_patch(Rectangle((start, 0), 1 - start, 1, facecolor=color, linewidth=0))
        axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[])
        axes.set_xticks([0, 1], ends, fontsize=8)
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.get_xticklabels()[1].set_horizontalalignment("right")
        axes.tick_params(length=0)
        axes.spines[:].set_color(EDGE)
        axes.set_title(colors.score.title, fontsize=9, color=INK, pad=3)

    alt = f"Colors of {colors.score.title}, from pale at {ends[0]} to dark at {ends[1]}"
    return picture(name, alt, width, height, paint, is_scale=True)
