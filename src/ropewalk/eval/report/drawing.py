"""What all pictures of a report share: size, colors, and being SVG."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

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


def canvas(width: float, height: float) -> Canvas:
    """Of so many inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ropewalk[plot]'") from error
    return Canvas(figsize=(width, height), facecolor="white")


def svg(drawn: Canvas) -> bytes:
    """The same bytes for the same picture."""
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context({"svg.hashsalt": "ropewalk"}):
        drawn.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def shade(value: float) -> tuple[float, float, float]:
    """The color of what is as good as 0 (bad) to 1 (good)."""
    place = min(max(value, 0.0), 1.0) * (len(_SHADES) - 1)
    low = min(int(place), len(_SHADES) - 2)
    pairs = ((int(_SHADES[low][i : i + 2], 16) / 255, int(_SHADES[low + 1][i : i + 2], 16) / 255) for i in (1, 3, 5))
    red, green, blue = (start + (place - low) * (end - start) for start, end in pairs)
    return red, green, blue
