# SPDX-License-Identifier: Apache-2.0
"""What all pictures of a report share: the names of axes, colors, and being SVG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING
from warnings import catch_warnings, filterwarnings

from ropewalk.eval.report.scores import LENGTH, Value, tokens
from ropewalk.eval.report.series import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

DEPTH, POSITION = "depth", "position"
_TITLES = {
    LENGTH: "length of the text (tokens)",
    DEPTH: "where it is hidden",
    "digits": "digits of the key",
    POSITION: "position in the text (tokens)",
}

INK, MUTED, EDGE = "#1f2933", "#7b8794", "#cbd2d9"
# Of what is marked in a picture, such as the trained window; and of the setting that a rule recommends.
MARK = "#d9730d"
# From bad to good, one hue and ever darker: the same order in grey, and for every kind of color vision.
_SHADES = ("#f3f6fa", "#c9dbec", "#8fb5d9", "#4f87bd", "#2a5f97", "#143a63")


@dataclass(frozen=True)
class Picture:
    """An SVG picture, the name for its file, and what it shows, in words; a scale belongs to those before it."""

    name: str
    alt: str
    svg: bytes
    is_scale: bool = False


@dataclass(frozen=True)
class Figure:
    """Pictures that belong together, and what to look at."""

    title: str
    caption: str
    pictures: tuple[Picture, ...]


def picture(
    name: str, alt: str, width: float, height: float, paint: Callable[[Canvas], None], is_scale: bool = False
) -> Picture:
    """What `paint` puts on an empty picture of so many inches: the same bytes for the same picture.

    Words are drawn as they are: a method's name may hold what matplotlib, or TeX, takes for a formula.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ropewalk[plot]'") from error
    file = BytesIO()
    with rc_context({"svg.hashsalt": "ropewalk", "text.parse_math": False, "text.usetex": False}), catch_warnings():
        # Shown as a box, and no reason to fill a terminal.
        filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        canvas = Canvas(figsize=(width, height), facecolor="white")
        paint(canvas)
        canvas.savefig(file, format="svg", metadata={"Date": None})
    return Picture(name, alt, file.getvalue(), is_scale)


def shade(value: float) -> tuple[float, float, float]:
    """The color of what is as good as 0 (bad) to 1 (good)."""
    place = min(max(value, 0.0), 1.0) * (len(_SHADES) - 1)
    low = min(int(place), len(_SHADES) - 2)
    pairs = ((int(_SHADES[low][i : i + 2], 16) / 255, int(_SHADES[low + 1][i : i + 2], 16) / 255) for i in (1, 3, 5))
    red, green, blue = (start + (place - low) * (end - start) for start, end in pairs)
    return red, green, blue


def axis_title(key: str) -> str:
    """Of a part of the cells, or of a parameter, which has no other name."""
    return _TITLES.get(key, key)


def tick(key: str, value: Value) -> str:
    """One of its values."""
    if key in (LENGTH, POSITION):
        return tokens(value)
    if key == DEPTH and isinstance(value, int | float):
        return "start" if value == 0 else "end" if value == 1 else f"{value:.0%}"
    return plain(value)
