# SPDX-License-Identifier: Apache-2.0
"""The picture of a benchmark: ratio to the fastest plain attention against length, from stored rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What the project aims at, by kind of work: at least this of the fastest plain attention's speed.
TARGETS = {
    "prefill": ((0.92, "aim at 16k"), (0.96, "aim from 32k")),
    "decode": ((0.95, "aim"),),
    "rest": ((0.90, "aim, other maps"), (0.92, "aim, SelfExtend")),
}

_INK, _MUTED, _GRID, _TARGET = "#1f2933", "#7b8794", "#e4e7eb", "#0a7d55"
_COLORS = ("#2f6fab", "#d9730d", "#7a4fa3", "#b8336a", "#0e8a8a", "#8a6d1d", "#4b5563", "#c0392b")
_K = 1024
_WORKS = ("prefill", "chunk", "decode")
_REST = "Measured at one length"
_AXIS = "speed (fastest plain attention = 1)"


@dataclass(frozen=True)
class Series:
    """Rows that differ in length alone, shortest first, and what to call them."""

    label: str
    rows: tuple[Row, ...]

    @property
    def ours(self) -> bool:
        return self.rows[0].kind == "ropewalk"


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows to draw, those that differ in length alone together; ours first."""
    usable = [row for row in rows if row.work in _WORKS and row.kind != "plain" and row.ratio is not None]
    # Host costs are not the kernels': where a graph was replayed, that is the time that counts.
    replayed = {row.case for row in usable if row.timing == "graph"}
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in usable:
        if row.timing == "graph" or row.case not in replayed:
            chunk = row.queries if row.work == "chunk" else 0
            shape = (row.batch, row.heads, row.key_heads, row.head_dim, row.dtype)
            lines.setdefault((row.kind != "ropewalk", row.work, row.map, row.impl, chunk, shape), []).append(row)
    ordered = sorted(lines.items(), key=lambda item: item[0][0])
    return [sorted(line, key=lambda row: row.keys) for _, line in ordered]


def labelled(lines: Sequence[Sequence[Row]]) -> list[Series]:
    """Lines with labels that say in what they differ from each other."""
    rows = [line[0] for line in lines]
    varying = {name for name in ("work", "batch", "map", "dtype") if len({getattr(row, name) for row in rows}) > 1}
    if len({(row.heads, row.key_heads, row.head_dim) for row in rows}) > 1:
        varying.add("shape")
    if len({row.impl for row in rows if row.kind == "ropewalk"}) > 1:
        varying.add("impl")
    return [Series(_label(line, varying), tuple(line)) for line in lines]


def _label(line: Sequence[Row], varying: set[str]) -> str:
    row = line[0]
    parts = [short_map(row.map)] if "map" in varying else []
    if row.kind == "composition":
        return ", ".join([*parts, "two FlexAttention\npasses"])
    if "impl" in varying:
        parts.append(f"impl={row.impl}")
    if "shape" in varying:
        parts.append(f"{row.heads} / {row.key_heads} heads of {row.head_dim}")
    if row.work == "decode" and varying & {"batch", "work"}:
        parts.append(f"batch {row.batch}")
    if "dtype" in varying:
        parts.append(row.dtype)
    if row.work == "chunk":
        parts.append(f"{_tokens(row.queries)} queries on {_tokens(row.keys - row.queries)} keys")
    elif len(line) == 1:
        parts.append(f"{'decode, ' if row.work == 'decode' else ''}{_tokens(row.keys)} keys")
    return ", ".join(parts) or short_map(row.map)


def short_map(text: str) -> str:
    """A map's name; of SELF also the grouping, of which there are two."""
    name = text.split("(", 1)[0]
    if "grouping=" in text:
        return f"{name} {text.split('grouping=')[1].split(')')[0].split(',')[0].strip(chr(39))}"
    return name


def _tokens(number: int) -> str:
    return f"{number // _K}k" if number % _K == 0 else str(number)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places as near to the wanted ones as it goes, in the same order and at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Neighbors that are too near become a group, placed around the mean of what its members want.
    groups: list[list[float]] = []  # sum of (wanted - offset in the group), members
    for i in order:
        groups.append([wanted[i], 1])
        while len(groups) > 1:
            (total, count), (next_total, next_count) = groups[-2], groups[-1]
            if total / count + gap * count <= next_total / next_count:
                break
            groups[-2:] = [[total + next_total - gap * count * next_count, count + next_count]]
    places = [total / count + gap * at for total, count in groups for at in range(int(count))]
    placed = [0.0] * len(wanted)
    for i, place in zip(order, places, strict=True):
        placed[i] = place
    return placed


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the rows: lines for what was measured at several lengths, dots for the rest."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    everything = grouped(rows)
    if not everything:
        raise ValueError("no row has a ratio to plain attention: there is nothing to draw")
    panels = []
    for title, work in (("Prefill", "prefill"), ("Decode, one new token", "decode")):
        if lines := [line for line in everything if line[0].work == work and len(line) > 1]:
            maps = {short_map(line[0].map) for line in lines}
            panels.append((f"{title}: {maps.pop()}" if len(maps) == 1 else title, labelled(_told_apart(lines))))
    dots = labelled([line for line in everything if len(line) == 1 and line[0].kind == "ropewalk"])
    shown = [row for _, lines in panels for line in lines for row in line.rows]
    low = min(0.88, *(row.ratio_low or row.ratio or 1 for row in shown), 1) - 0.03
    high = max(1.0, *(row.ratio_high or row.ratio or 1 for row in shown), 1) + 0.04
    # Inches, from the top: heading, lines side by side, dots, footnote.
    upper, lower = (4.6 if panels else 0.0), (1.3 + 0.34 * len(dots) if dots else 0.0)
    width, height = 13.0, 1.0 + upper + lower + 0.35
    with rc_context({"font.size": 10, "text.color": _INK, "axes.edgecolor": _MUTED, "xtick.color": _MUTED}):
        figure = Figure(figsize=(width, height), dpi=130, facecolor="white")

        def axes_at(left: float, top: float, wide: float, high: float, title: str) -> Axes:
            axes = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
            axes.set_title(title, loc="left", weight="bold", fontsize=12, pad=20 if title == _REST else 8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
            return axes

        for column, (title, lines) in enumerate(panels):
            _lines(axes_at(0.8 + 6.4 * column, 1.35, 4.0, upper - 1.1, title), lines, low, high)
        if dots:
            _dots(axes_at(3.9, 1.6 + upper, 8.4, lower - 1.05, _REST), dots)
        start = 0.8 / width
        heading = "How fast is attention under a position map, beside plain attention?"
        figure.text(start, 1 - 0.45 / height, heading, fontsize=14, weight="bold")
        figure.text(start, 1 - 0.75 / height, _subtitle(rows), color=_MUTED)
        figure.text(start, 0.15 / height, _footnote(rows), color=_MUTED, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _told_apart(lines: Sequence[list[Row]]) -> list[list[Row]]:
    """Ours, and of the compositions, which lie close together and only show the scale, the one measured most."""
    others = [line for line in lines if line[0].kind != "ropewalk"]
    return [line for line in lines if line[0].kind == "ropewalk"] + sorted(others, key=len)[-1:]


def _subtitle(rows: Sequence[Row]) -> str:
    shapes = {(row.heads, row.key_heads, row.head_dim) for row in rows if row.kind == "ropewalk" and row.ratio}
    dtypes = ", ".join(sorted({row.dtype for row in rows}))
    shape = "".join(f", {q} query / {k} key heads of {d} dimensions" for q, k, d in shapes) if len(shapes) == 1 else ""
    maps = {short_map(row.map) for row in rows if row.kind == "ropewalk" and row.ratio}
    only = f"{maps.pop()}. " if len(maps) == 1 else ""
    device = ", ".join(sorted({row.facts.device for row in rows if row.facts}))
    heads = "" if shape else " Heads: query / key heads of so many dimensions."
    return f"{only}{device}, {dtypes}{shape}. 1.0 is the fastest plain attention of the same run.{heads}"


def _footnote(rows: Sequence[Row]) -> str:
    facts = [row.facts for row in rows if row.facts]
    plain = {row.fastest_plain for row in rows if row.fastest_plain}
    parts = [f"Fastest plain attention: {' or '.join(sorted(plain))}."] if plain else []
    parts.append("Whiskers: lowest and highest round.")
    if any(row.timing == "graph" for row in rows):
        parts.append("Decode by CUDA graph.")
    for name, label in (("torch", "torch"), ("commit", "commit"), ("date", "")):
        values = sorted({getattr(one, name).split("T")[0] for one in facts})
        if values:
            parts.append(f"{label} {', '.join(values)}".strip() + ("." if name == "date" else ","))
    return " ".join(parts)


def _lines(axes: Axes, lines: Sequence[Series], low: float, high: float) -> None:
    from matplotlib.transforms import blended_transform_factory

    lengths = sorted({row.keys for line in lines for row in line.rows})
    axes.set_ylim(low, high)
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 2.6, lengths[-1] * 1.1)  # room for the names of levels
    axes.set_xticks(lengths, [_tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("keys", color=_INK)
    axes.set_ylabel(_AXIS, color=_INK)
    axes.tick_params(axis="y", colors=_MUTED)
    axes.grid(axis="y", color=_GRID)
    left = axes.get_xlim()[0] * 1.02
    marks = _marks(lines[0].rows[0].work)
    names = spread([at for at, *_ in marks], 0.032 * (high - low))
    for (at, name, color, style), place in zip(marks, names, strict=True):
        axes.axhline(at, color=color, linewidth=1, linestyle=style)
        axes.text(left, place, name, va="bottom", fontsize=8, color=color)
    places = spread([line.rows[-1].ratio or 0.0 for line in lines], 0.045 * (high - low))
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    for line, color, place in zip(lines, _colors(lines), places, strict=True):
        x, y, spans = _points(line)
        axes.errorbar(
            x, y, yerr=spans, color=color, marker="o" if line.ours else "s", markersize=5 if line.ours else 4,
            linewidth=1.8 if line.ours else 1.1, elinewidth=1, linestyle="-" if line.ours else ":", zorder=3,
        )  # fmt: skip
        axes.annotate(
            f"{line.label}  {y[-1]:.2f}",
            xy=(x[-1], y[-1]), xytext=(1.03, place), textcoords=beside, color=color, fontsize=9, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _dots(axes: Axes, lines: Sequence[Series]) -> None:
    ends = [end for line in lines for row in line.rows for end in (row.ratio_low, row.ratio, row.ratio_high) if end]
    axes.set_xlim(min(0.88, *ends) - 0.01, max(1.0, *ends) + 0.02)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks(range(len(lines)), [line.label for line in lines], color=_INK, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(_AXIS, color=_INK)
    axes.grid(axis="y", color=_GRID)
    marks = _marks("rest")
    names = spread([at for at, *_ in marks], 0.12 * (axes.get_xlim()[1] - axes.get_xlim()[0]))
    for (at, name, color, style), place in zip(marks, names, strict=True):
        axes.axvline(at, color=color, linewidth=1, linestyle=style)
        axes.text(place, -0.68, name, fontsize=8, color=color, ha="center", va="bottom")
    for place, line in enumerate(lines):
        _, y, spans = _points(line)
        axes.errorbar(y, [place], xerr=spans, color=_COLORS[0], marker="o", markersize=6, elinewidth=1, zorder=3)
        axes.annotate(
            f"{y[0]:.2f}",
            (y[0] + spans[1][0], place),
            (6, 0),
            textcoords="offset points",
            color=_COLORS[0],
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


def _marks(work: str) -> list[tuple[float, str, str, object]]:
    """Levels to compare with: where, in words, color, line style."""
    aims = [(at, name, _TARGET, (0, (4, 3))) for at, name in TARGETS[work]]
    return [(1.0, "as fast as plain", _INK, "-"), *aims]


def _colors(lines: Sequence[Series]) -> list[str]:
    ours = iter(range(len(lines)))
    return [_COLORS[next(ours) % len(_COLORS)] if line.ours else _MUTED for line in lines]


def _points(line: Series) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, ratios, and how far the lowest and the highest round are from them."""
    y = [row.ratio or 0.0 for row in line.rows]
    below = [max(at - (row.ratio_low or at), 0.0) for at, row in zip(y, line.rows, strict=True)]
    above = [max((row.ratio_high or at) - at, 0.0) for at, row in zip(y, line.rows, strict=True)]
    return [row.keys for row in line.rows], y, [below, above]
