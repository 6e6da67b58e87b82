# SPDX-License-Identifier: Apache-2.0
"""The picture of what a position map does to a text: a curve of the positions it gives, and a small text's matrix."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ropewalk.explanation import Explanation, first_far_distance, number
from ropewalk.files import replacing
from ropewalk.maps import PositionMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_SUFFIXES = (".png", ".svg")

# Texts up to this many tokens are drawn as they are; longer ones by a small map of the same kind.
_LEGIBLE = 14
_MINIATURE_LENGTH = 10
# Points of the curve; more than a picture has pixels across.
_CURVE_POINTS = 2000

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_NEAR, _FAR, _BEYOND = "#2f6fab", "#d9730d", "#c0392b"


def miniature(position_map: PositionMap, length: int) -> tuple[PositionMap, int]:
    """A map and a length (tokens) whose matrix can be printed: the given ones, or small ones of the same kind."""
    if length <= _LEGIBLE:
        return position_map, length
    return replace(position_map, start=0, **type(position_map).miniature), _MINIATURE_LENGTH


def last_query_curve(position_map: PositionMap, length: int) -> tuple[Tensor, Tensor]:
    """Distances from the text's last query, and the relative positions they are given, -1 for keys that it does not
    see: 1-d, same shape."""
    firsts = {length - edge(length - 1) for band in position_map.bands for edge in (band.high, band.low)}
    edges = {edge for first in firsts for edge in (first - 1, first) if 0 <= edge < length}
    sampled = torch.linspace(0, length - 1, min(length, _CURVE_POINTS), dtype=torch.float64).round().long()
    distances = torch.tensor(sorted(edges.union(sampled.tolist())))
    query = torch.tensor(length - 1)
    return distances, position_map.relative_to(query, query - distances)


def draw(explanation: Explanation, path: Path) -> None:
    """Draws the curve of mapped against true distance, and the matrix of relative positions, to a PNG or SVG file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `path` ends in neither .png nor .svg.
        OSError: `path` cannot be written.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"a picture is one of {', '.join(PICTURE_SUFFIXES)}, got {path.name!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ropewalk[plot]'") from error

    style: dict[Any, Any] = {"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _MUTED}
    style |= {"xtick.color": _MUTED, "ytick.color": _MUTED, "svg.hashsalt": "ropewalk"}
    form = path.suffix.lower().removeprefix(".")
    with rc_context(style), replacing(path) as unfinished:
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03)
        figure = Figure(figsize=(12, 5.6), layout=layout, facecolor="white")
        curve, matrix = figure.subplots(1, 2, width_ratios=[1.5, 1])
        _draw_curve(curve, explanation)
        small, tokens = miniature(explanation.position_map, explanation.length)
        is_whole = small == explanation.position_map and tokens == explanation.length
        headline = "Relative positions of all pairs" if is_whole else f"The same kind of map on {tokens} tokens"
        _draw_matrix(matrix, headline, small, tokens)
        figure.legend(*curve.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        # Without a date, the same explanation is the same file.
        figure.savefig(unfinished, format=form, dpi=160, metadata={"Date": None} if form == "svg" else None)


def _draw_curve(axes: Axes, explanation: Explanation) -> None:
    window, length = explanation.trained_window, explanation.length
    distances, relative = last_query_curve(explanation.position_map, length)
    seen = torch.where(relative < 0, math.nan, relative.double())
    last, reached = max(length - 1, 1), relative.max().item()
    is_mapped = length > explanation.position_map.start
    far = first_far_distance(explanation.position_map, length - 1) if is_mapped else math.inf
    top = 1.18 * max(window, reached)

    axes.axhspan(window, top, color=_BEYOND, alpha=0.07, linewidth=0)
    axes.axhline(window, color=_BEYOND, linewidth=1)
    axes.axhline(window / 2, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
    leaves = f", outside its window from {number(window)} on" if last >= window else ""
    end = min(last, top)
    axes.plot([0, end], [0, end], color=_MUTED, linewidth=1.4, linestyle=(0, (5, 4)), label=f"unmodified model{leaves}")
    if last >= window:
        axes.plot(window, window, "o", color=_MUTED, markersize=6)
    near_part, far_part = distances < far, distances >= far - 1
    thick: dict[str, Any] = {"linewidth": 2.6, "solid_capstyle": "round", "zorder": 3}
    axes.plot(distances[near_part], seen[near_part], color=_NEAR, label="true distance kept", **thick)
    if far < length:
        axes.plot(distances[far_part], seen[far_part], color=_FAR, label="re-mapped", **thick)
        if relative[distances < far].min() >= 0:  # nothing is hidden before it
            _mark_far(axes, far, relative[distances == far].item(), last)
    color = _FAR if far < length else _NEAR
    farthest = distances[relative >= 0][-1].item()
    axes.plot(farthest, relative[relative >= 0][-1].item(), "o", color=color, markersize=6, clip_on=False, zorder=4)
    axes.annotate(
        number(reached),
        (farthest, reached),
        (-6, 8),
        textcoords="offset points",
        color=color,
        weight="bold",
        ha="right",
        bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1},  # lines may pass behind
    )
    levels: list[tuple[float, str, str]] = [(window, f"trained window\n{number(window)}", _BEYOND)]
    if window / 2 > 0.1 * top:  # else the two labels would lie on each other
        levels.append((window / 2, f"half of it (eq. 5)\n{number(window / 2)}", _MUTED))
    for level, text, color in levels:
        axes.annotate(text, (1, level), (8, 0), ("axes fraction", "data"), "offset points", color=color, va="center")

    axes.set(xlim=(0, last), ylim=(0, top))
    axes.set_xlabel("true distance from the last token")
    axes.set_ylabel("relative position it is given")
    _title(axes, f"{number(length)} tokens on a model trained on {number(window)}", explanation.position_map, 72)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_far(axes: Axes, far: float, relative: float, last: int) -> None:
    """Marks the distance from which on keys are re-mapped."""
    axes.plot([far, far], [0, relative], color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
    flip = far > 0.7 * last
    axes.annotate(
        f"true distances\nbelow {number(far)}",
        (far, 0),
        (-6 if flip else 6, 8),
        textcoords="offset points",
        color=_NEAR,
        ha="right" if flip else "left",
    )


def _title(axes: Axes, headline: str, position_map: PositionMap, width: int) -> None:
    lines = textwrap.wrap(str(position_map), width)
    axes.set_title("\n".join(lines), loc="left", fontsize=10, color=_MUTED, pad=6)
    axes.annotate(
        headline,
        (0, 1),
        (0, 8 + 13 * len(lines)),
        "axes fraction",
        "offset points",
        fontsize=12,
        weight="bold",
        va="bottom",
    )


def _draw_matrix(axes: Axes, headline: str, position_map: PositionMap, length: int) -> None:
    from matplotlib.patches import Rectangle

    relative = position_map.relative_positions(length)
    largest = max(1.0, relative.max().item())
    for m, n in _pairs(length):
        value = relative[m, n].item()
        if value < 0:  # a key that this query does not see
            continue
        is_far = m >= position_map.start and m - n >= first_far_distance(position_map, m)
        face = _shade(_FAR if is_far else _NEAR, 0.12 + 0.5 * value / largest)
        axes.add_patch(Rectangle((n - 0.5, m - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5))
        axes.text(n, m, f"{value:.3g}", ha="center", va="center", color=_INK)
    axes.set(xlim=(-0.5, length - 0.5), ylim=(length - 0.5, -0.5), aspect="equal", anchor="N")
    axes.set_xticks(range(length))
    axes.set_yticks(range(length))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    _title(axes, headline, position_map, 46)


def _pairs(length: int) -> Iterator[tuple[int, int]]:
    return ((m, n) for m in range(length) for n in range(m + 1))


def _shade(color: str, strength: float) -> tuple[float, float, float]:
    """The color mixed with white: 0 is white, 1 the color itself."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (1 - strength * (1 - channel) for channel in channels)
    return red, green, blue
