"""The figures of a report, drawn from rows alone. A task gets one by a function here and a line in `FIGURES`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.runs import Series
from ropewalk.eval.report.tables import (
    Value,
    estimate_of,
    is_proportion,
    metrics_of,
    title_of,
    tokens,
    values_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _EDGE = "#1f2933", "#7b8794", "#cbd2d9"
# From 0 to 1, one hue and ever darker: the same order in grey, and for every kind of color vision.
_SHADES = ("#f3f6fa", "#c9dbec", "#8fb5d9", "#4f87bd", "#2a5f97", "#143a63")
_DARK = 0.55
# Told apart by every kind of color vision, with a marker each for grey.
_LINES = ("#2f6fab", "#d9730d", "#7a4fa3", "#0e8a8a", "#b8336a", "#8a6d1d")
_MARKERS = "osD^vPX"
# Inches: of a square; of all squares, at least, for the names of the axes; of what is around them.
_WIDE, _HIGH = 0.68, 0.4
_LEAST_WIDE, _LEAST_HIGH = 2.3, 1.9
_LEFT, _RIGHT, _BOTTOM, _LINE = 0.85, 0.12, 0.62, 0.19


@dataclass(frozen=True)
class Picture:
    """An SVG picture, the name for its file, and what it shows, in words; a scale belongs to those before it."""

    name: str
    alt: str
    svg: bytes
    is_scale: bool = False


def pictures_of(task: str, series: Sequence[Series]) -> list[Picture]:
    """Those of a task; none if it has none, or no row with what they show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    draw = FIGURES.get(task)
    return draw(series) if draw else []


def _passkey(series: Sequence[Series]) -> list[Picture]:
    return heat_maps(
        "passkey",
        series,
        metric="exact_match",
        x="length",
        y="depth",
        x_title="length of the text (tokens)",
        y_title="where the key is hidden",
        y_label=lambda depth: {0: "start", 1: "end"}.get(depth, f"{depth:.0%}") if _is_number(depth) else str(depth),
    )


def _passkey_length(series: Sequence[Series]) -> list[Picture]:
    return curves("passkey-length", series, metric="exact_match", x="digits", x_title="digits of the key")


def _perplexity(series: Sequence[Series]) -> list[Picture]:
    return curves("perplexity", series, metric="perplexity", x="length", x_title="tokens read, at most")


FIGURES: dict[str, Callable[[Sequence[Series]], list[Picture]]] = {
    "passkey": _passkey,
    "passkey-length": _passkey_length,
    "perplexity": _perplexity,
}


def curves(task: str, series: Sequence[Series], *, metric: str, x: str, x_title: str) -> list[Picture]:
    """A score over one part of the cells: a line for each method, in one picture; none for a single value."""
    across = [value for value in values_of(x, series) if isinstance(value, int | float)]
    if len(across) < 2:
        return []
    known = metrics_of(task, series).get(metric)
    title, proportion = title_of(metric, known), is_proportion(metric, series)
    # A long name takes a line of the legend for itself.
    names = [textwrap.fill(one.label, 58) for one in series]
    width, plot, legend = 7.2, 3.1, 0.2 * sum(name.count("\n") + 1 for name in names) + 0.25
    height = 0.35 + plot + 0.6 + legend
    figure = _figure(width, height)
    from matplotlib.ticker import LogLocator, NullLocator

    axes = figure.add_axes((0.8 / width, (0.6 + legend) / height, (width - 1.0) / width, plot / height))
    for number, (one, name) in enumerate(zip(series, names, strict=True)):
        # Beside each other, so that no bar hides another.
        found = [(value, estimate_of(metric, known, one, {x: value})) for value in across]
        points = [(value, its) for value, its in found if its is not None]
        ends = [its.interval or (its.mean, its.mean) for _, its in points]
        means = [its.mean for _, its in points]
        spans = [[m - low for m, (low, _) in zip(means, ends, strict=True)],
                 [high - m for m, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
        is_plain = one.method == UNMODIFIED
        axes.errorbar(
            [value * 1.012 ** (2 * number - len(series) + 1) for value, _ in points], means, yerr=spans, label=name,
            linewidth=1.6, elinewidth=0.9, markersize=5,
            color=_MUTED if is_plain else _LINES[number % len(_LINES)], linestyle="--" if is_plain else "-",
            marker=_MARKERS[number % len(_MARKERS)],
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(across, [tokens(value) if x == "length" else f"{value:g}" for value in across])
    axes.minorticks_off()
    if proportion:
        axes.set_ylim(-0.04, 1.04)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x_title)
    axes.set_ylabel(title)
    axes.grid(axis="y", color=_EDGE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = figure.legend(loc="lower left", bbox_to_anchor=(0.09, 0.0), frameon=False, fontsize=9)
    for text in drawn.get_texts():
        text.set_parse_math(False)
    return [Picture(task, f"{title} by {x}, a line for each of {len(series)} methods", _svg(figure))]


def heat_maps(
    task: str,
    series: Sequence[Series],
    *,
    metric: str,
    x: str,
    y: str,
    x_title: str,
    y_title: str,
    x_label: Callable[[Any], str] = tokens,
    y_label: Callable[[Any], str] = str,
) -> list[Picture]:
    """A score from 0 to 1 over two parts of the cells: a picture for each method, and one of the colors' meaning."""
    across, down = values_of(x, series), values_of(y, series)
    if not across or not down:
        return []
    name = title_of(metric, metrics_of(task, series).get(metric))
    width = _LEFT + _RIGHT + max(_WIDE * len(across), _LEAST_WIDE)
    tall = max(_HIGH * len(down), _LEAST_HIGH)
    pictures = []
    for number, one in enumerate(series, start=1):
        label = textwrap.wrap(one.label, int((width - 0.15) / 0.092))
        head = 0.42 + _LINE * len(label)
        height = head + tall + _BOTTOM
        figure = _figure(width, height)
        axes = figure.add_axes((_LEFT / width, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / width, tall / height))
        _squares(axes, one, metric, [(x, value) for value in across], [(y, value) for value in down])
        axes.set_xticks(range(len(across)), [x_label(value) for value in across])
        axes.set_yticks(range(len(down)), [y_label(value) for value in down])
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        scores = one.scores(metric)
        mean = f"{name} {fmean(scores):.2f} over {len(scores)} texts" if scores else "no text was done"
        # As it is: a method's name may hold what matplotlib takes for a formula.
        plain: dict[str, Any] = {"parse_math": False, "va": "bottom"}
        left, top = 0.1 / width, 1 - head / height
        figure.text(left, top + 0.1 / height, mean, color=_MUTED, fontsize=9, **plain)
        figure.text(
            left, top + 0.29 / height, "\n".join(label), weight="bold", fontsize=10.5, linespacing=1.25, **plain
        )
        alt = f"Heat map of {name} by {x} and {y} for {one.label}: {mean}"
        pictures.append(Picture(f"{task}-{number}", alt, _svg(figure)))
    return [*pictures, _scale(task, name)]


def _squares(
    axes: Axes, one: Series, metric: str, across: Sequence[tuple[str, Value]], down: Sequence[tuple[str, Value]]
) -> None:
    from matplotlib.patches import Rectangle

    for column, (x, at) in enumerate(across):
        for line, (y, depth) in enumerate(down):
            scores = one.scores(metric, {x: at, y: depth})
            failed = sum(row.cell.get(x) == at and row.cell.get(y) == depth for row in one.failed)
            corner = (column - 0.5, line - 0.5)
            if scores:
                mean = fmean(scores)
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=shade(mean), edgecolor="white", linewidth=1.5))
                ink = "white" if mean > _DARK else _INK
                centered: dict[str, Any] = {"ha": "center", "color": ink}
                axes.text(column, line + 0.06, f"{mean:.2f}", va="bottom", fontsize=9.5, **centered)
                axes.text(column, line + 0.13, f"n={len(scores)}", va="top", fontsize=6.5, alpha=0.85, **centered)
            elif failed:
                axes.text(column, line, f"{failed} failed", ha="center", va="center", fontsize=7, color=_MUTED)
    axes.set(xlim=(-0.5, len(across) - 0.5), ylim=(len(down) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_color(_EDGE)


def _scale(task: str, name: str) -> Picture:
    from matplotlib.patches import Rectangle

    width, height, steps = 3.2, 0.62, 60
    figure = _figure(width, height)
    axes = figure.add_axes((0.15 / width, 0.26 / height, 2.9 / width, 0.16 / height))
    for step in range(steps):
        # To the end, under the next: without seams.
        start, color = step / steps, shade(step / (steps - 1))
        axes.add_patch(Rectangle((start, 0), 1 - start, 1, facecolor=color, linewidth=0))
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[])
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_color(_EDGE)
    axes.set_title(name, fontsize=9, color=_INK, pad=3, parse_math=False)
    return Picture(f"{task}-colors", f"Colors of {name}, from pale at 0 to dark at 1", _svg(figure), is_scale=True)


def shade(value: float) -> tuple[float, float, float]:
    """The color of a score from 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(_SHADES) - 1)
    low = min(int(place), len(_SHADES) - 2)
    pairs = ((int(_SHADES[low][i : i + 2], 16) / 255, int(_SHADES[low + 1][i : i + 2], 16) / 255) for i in (1, 3, 5))
    red, green, blue = (start + (place - low) * (end - start) for start, end in pairs)
    return red, green, blue


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ropewalk[plot]'") from error
    return Figure(figsize=(width, height), facecolor="white")


def _svg(figure: Figure) -> bytes:
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context({"svg.hashsalt": "ropewalk"}):
        # Without a date, the same rows are the same file.
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
