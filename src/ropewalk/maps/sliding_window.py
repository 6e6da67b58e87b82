from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, _require


@dataclass(frozen=True)
class SlidingWindow(PositionMap):
    """Only the nearest `window` keys are seen, at their true distance: a sliding-window layer's own attention.

    Not among `MAPS`: it extends nothing. It describes layers that are left as they are, and is a baseline in `eval`.

    Args:
        window: keys seen, the query's own included.
    """

    name: ClassVar[str] = "sliding-window"
    keeps_to_half: ClassVar[bool] = False
    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.window >= 1, f"window must be 1 or more, got {self.window}")

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        return (Band.at_distances(0, self.window),)

    @classmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """The trained window, whatever the length."""
        return cls(trained_window)
