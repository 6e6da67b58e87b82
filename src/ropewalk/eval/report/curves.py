# SPDX-License-Identifier: Apache-2.0
"""Curves: scores against a number, a line for each method or setting."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropewalk.eval.report.drawing import EDGE, INK, MARK, MUTED, Picture, axis_title, picture, tick
from ropewalk.eval.report.estimates import Estimate
from ropewalk.eval.report.scores import Score, Seen, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Told apart by every kind of color vision, with a marker each for grey.
_COLORS = ("#2f6fab", "#d9730d", "#7a4fa3", "#0e8a8a", "#b8336a", "#8a6d1d")
_MARKERS = "osD^vPX"
# As many lines as can be told apart in one picture.
MOST_LINES = len(_COLORS)

# From such a factor on scores are shown by their logarithm.
_FAR = 3

# Values so many times above the middle one would leave no room to tell the others apart: a picture then ends above
# those that are not this far from it.
_FAR_ABOVE, _ROOM = 10, 3

BARS = "Bars show how far a value may be off by chance, with 95% confidence."


@dataclass(frozen=True)
class Line:
    """A line.

    Attributes:
        points: what is known, by the number across.
        color: number of its color and marker; None for grey and dashes, what the others are compared with.
        dashed: without marks, and with dashes.
    """

    label: str
    points: dict[float, Seen]
    color: int | None
    dashed: bool = False

    @property
    def shown(self) -> dict[float, tuple[Estimate, Verdict]]:
        """The points that there are, from the left."""
        return {
            x: (seen.its, seen.verdict)
            for x, seen in sorted(self.points.items())
            if seen.its is not None and math.isfinite(seen.its.mean)
        }


def shown_range(score: Score, lines: Sequence[Line]) -> tuple[float, float] | None:
    """Where a picture begins and ends that does not show the highest values; None where it shows all."""
    found = sorted((its for line in lines for its, _ in line.shown.values()), key=lambda its: its.mean)
    if score.is_share or not found or found[0].mean <= 0:
        return None
    middle = found[len(found) // 2].mean
    if found[-1].mean <= _FAR_ABOVE * middle:
        return None
    near = [its for its in found if its.mean <= _ROOM * middle]
    ends = [end for its in near for end in (its.mean, *(its.interval or ())) if 0 < end < math.inf]
    return 0.95 * min(ends), 1.05 * max(ends)


def curves(
    name: str,
    alt: str,
    lines: Sequence[Line],
    score: Score,
    x: str,
    ticks: Sequence[float],
    x_title: str = "",
    title: str = "",
    band: bool = False,
    width: float = 7.2,
    walls: Sequence[tuple[float, str]] = (),
) -> Picture:
    """Lines against one number; where all are above 0, equal factors are equally far apart.

    Args:
        x: what the number is.
        ticks: where the numbers stand.
        x_title: if it is not that of all axes of such numbers.
        band: show intervals as bands, not as bars.
        width: in inches.
        walls: where vertical lines are, and what they are.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # A long name takes a line of the legend for itself.
    shown, is_log = shown_range(score, lines), min(ticks) > 0
    labels = [textwrap.fill(_label(line, shown), int(8 * width)) for line in lines]
    head = 0.5 if title else 0.3
    plot, legend = 0.43 * width, 0.2 * sum(label.count("\n") + 1 for label in labels) + 0.25
    height = head + plot + 0.6 + legend

    def paint(canvas: Canvas) -> None:
        axes = canvas.add_axes((0.8 / width, (0.6 + legend) / height, (width - 1.0) / width, plot / height))
        for number, (line, label) in enumerate(zip(lines, labels, strict=True)):
            # Beside each other, so that no bar hides another.
            aside = (max(ticks) / min(ticks)) ** (0.006 * (2 * number - len(labels) + 1)) if is_log else 1.0
            _line(axes, line, label, aside, band)
        if is_log:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [tick(x, value) for value in ticks])
        axes.minorticks_off()
        _heights(axes, score, [its.mean for line in lines for its, _ in line.shown.values()], shown)
        for at, what in walls:
            axes.axvline(at, color=MARK, linewidth=1.4, linestyle=(0, (4, 2)), zorder=1)
            axes.annotate(what, (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
                          fontsize=8, color=MARK, va="top")  # fmt: skip
        axes.set(xlabel=x_title or axis_title(x), ylabel=score.title)
        axes.grid(axis="y", color=EDGE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        if title:
            axes.set_title(title, loc="left", fontsize=10.5, weight="bold")
        entries = axes.get_legend_handles_labels()
        canvas.legend(*entries, loc="lower left", bbox_to_anchor=(0.09, 0.0), frameon=False, fontsize=9)

    return picture(name, alt, width, height, paint)


def _label(line: Line, shown: tuple[float, float] | None) -> str:
    """For the legend, which also says of which lines nothing is to be seen."""
    is_hidden = shown is not None and all(its.mean > shown[1] for its, _ in line.shown.values())
    return f"{line.label} (beyond the top)" if is_hidden else line.label


def _line(axes: Axes, line: Line, label: str, aside: float, band: bool) -> None:
    number = line.color or 0
    color = MUTED if line.color is None else _COLORS[number % len(_COLORS)]
    marker = None if line.dashed or band else _MARKERS[number % len(_MARKERS)]
    style: dict[str, Any] = {"color": color, "linewidth": 1.6}
    style["linestyle"] = "--" if line.dashed or line.color is None else "-"
    found = [(x * aside, its, verdict) for x, (its, verdict) in line.shown.items()]
    axes.plot([x for x, _, _ in found], [its.mean for _, its, _ in found], **style)
    axes.plot([], [], **style, marker=marker, label=label)
    known = [(x, *its.interval) for x, its, _ in found if its.interval and all(map(math.isfinite, its.interval))]
    if known and not line.dashed:
        places, low, high = map(list, zip(*known, strict=True))
        if band:
            axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
        else:
            axes.vlines(places, low, high, color=color, linewidth=0.9)
    for x, its, verdict in found if marker else ():
        shape, face = ("x" if verdict == "beyond" else marker), ("white" if verdict == "within" else color)
        axes.plot(x, its.mean, marker=shape, markersize=5.5, color=color, markerfacecolor=face, zorder=3)


def _heights(axes: Axes, score: Score, found: Sequence[float], shown: tuple[float, float] | None) -> None:
    """The axis of the scores."""
    from matplotlib.ticker import LogLocator, NullLocator

    means = [mean for mean in found if shown is None or mean <= shown[1]]
    if score.is_share:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value if score.percent else value:g}")
    elif min(means) > 0 and max(means) > _FAR * min(means):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if shown is not None:
        axes.set_ylim(shown)
        axes.annotate(f"what goes beyond the top reaches {max(found):,.0f}", (1, 1), xycoords="axes fraction",
                      xytext=(0, 4), textcoords="offset points", fontsize=8, color=MUTED, ha="right")  # fmt: skip
